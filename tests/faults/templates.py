"""Damaged chat templates of real models: each renders or is refused, within its time and 2 GiB.

python -m tests.faults.templates --count 2000 --seed 0

The templates are those that TRL ships. A damage puts in costly expressions, other filters, loops and huge numbers, cuts,
doubles, or joins two templates. Failing templates stay in the folder that is printed.
"""

import argparse
import copy
import random
import re
import resource
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import psutil
import trl
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.conversation import DataError
from data.encode import template
from data.encode.template import OVER_LIMITS, SECONDS
from data.progress import Bar
from tests.helpers.families import build
from tests.helpers.render import render

GRACE_S, MEMORY = 3, 2 * 2**30  # CPU time above the limit of a render; bytes of the process that renders
REAL = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TURNS = [
    {"role": "user", "content": "What is red? <b> é 日"},
    {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nThe sky."},
    {"role": "user", "content": "And blue?"},
]
FILTERS = sorted(ImmutableSandboxedEnvironment().filters)
METHODS = [
    "center",
    "count",
    "encode",
    "expandtabs",
    "find",
    "format",
    "index",
    "join",
    "ljust",
    "replace",
    "rfind",
    "rsplit",
    "split",
    "splitlines",
    "startswith",
    "translate",
    "zfill",
    "to_bytes",
    "items",
]
NUMBERS = ["0", "-1", "2**61", "99999", "10**9", "99999999999", "1e308", "10**4000"]
VALUES = [
    "messages", "messages[0].content", "'a' * 1000000", "range(100000)", "range(100000) | list", "'日' * 3000000", "1", "0.5", "none",
    "[[1]] * 100000", "messages | tojson", "'a b,' * 200000", "namespace(x=messages)", "{'a': messages}", "'www.x.y ' * 100000",
    "range(0, 99999 * (2**61 - 1), 2**61 - 1)", "('a' * 500000).encode('utf-32')", "loop", "self", "cycler('a', 'b')", "caller",
]  # fmt: skip
COSTLY = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set q = namespace(x=[1]) %}{% for i in range(60) %}{% set q.x = [q.x, q.x] %}{% endfor %}{{ q.x }}",
    "{% set q = namespace(x='aa') %}{% for i in range(60) %}{% set q.x = q.x ~ q.x %}{% endfor %}{{ q.x }}",
    "{% set q = namespace(x=7) %}{% for i in range(60) %}{% set q.x = q.x * q.x %}{% endfor %}",
    "{% macro z(n) %}{{ z(n + 1) }}{{ z(n + 1) }}{% endmacro %}{{ z(0) }}",
    "{% for i in [1] %}" * 30,
    "{{ " + "(" * 3000,
    "{% filter upper %}" * 40,
    "{% raw %}", "{#", "{{", "%}", "{% endfor %}", "{% generation %}", "{% if false %}", "{% block b %}", "{% include 'x' %}",
]  # fmt: skip


def expression(draw: random.Random) -> str:
    """A value with some filters, methods, operators and slices on it."""
    text = f"({draw.choice(VALUES)})"
    for _ in range(draw.randint(0, 3)):
        arguments = ", ".join(draw.choice([*VALUES, *NUMBERS]) for _ in range(draw.randint(0, 2)))
        text = draw.choice(
            [
                f"{text} | {draw.choice(FILTERS)}({arguments})",
                f"{text} | {draw.choice(FILTERS)}",
                f"{text} | map('{draw.choice(FILTERS)}') | list",
                f"({text}).{draw.choice(METHODS)}({arguments})",
                f"({text})[{draw.choice(NUMBERS)}:]",
                f"({text}) {draw.choice(['*', '+', '**', '%', '~', '//', 'in', '==', '<'])} ({draw.choice([*VALUES, *NUMBERS])})",
            ]
        )
    return text


def damaged(text: str, draw: random.Random) -> str:
    """The template with one to three damages."""
    for _ in range(draw.randint(1, 3)):
        a = draw.randrange(len(text) + 1)
        b = min(len(text), a + draw.randint(0, 200))
        spots = [match.span(1) for match in re.finditer(r"\{\{-?(.*?)-?\}\}", text, re.DOTALL)]
        action = draw.choice(
            ["expression", "expression", "expression", "print", "costly", "number", "cut", "double", "join"]
        )
        if action == "expression" and spots:
            a, b = draw.choice(spots)
            text = text[:a] + " " + expression(draw) + " " + text[b:]
        elif action == "print":
            a = draw.choice([0, len(text), a])
            text = text[:a] + "{{ " + expression(draw) + " }}" + text[a:]
        elif action == "costly":
            a = draw.choice([0, len(text), a])
            text = text[:a] + draw.choice(COSTLY) + text[a:]
        elif action == "number":
            text = re.sub(r"(?<=[ (\[])\d+", lambda _: draw.choice(NUMBERS), text, count=draw.randint(1, 3))
        elif action == "double":
            text = text[:b] + text[a:b] * draw.choice([1, 2, 50]) + text[b:]
        elif action == "join":
            text = text[:a] + draw.choice(REAL).read_text(encoding="utf-8")[draw.randrange(2000) :]
        else:
            text = text[:a] + text[b:]
    return text


def spent() -> float:
    """CPU time of this process and of those that rendered."""
    total = time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    process = template._worker.process
    return total + (sum(psutil.Process(process.pid).cpu_times()[:2]) if process else 0)


def peak() -> int:
    """The most memory that a process that rendered has had, in bytes."""
    process = template._worker.process
    status = Path(f"/proc/{process.pid}/status").read_text() if process else ""
    running = re.search(r"VmHWM:\s+(\d+) kB", status)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return 1024 * max(ended, int(running[1]) if running else 0)


def fuzz(count: int, number: int, folder: Path, seconds: float = SECONDS) -> tuple[Counter[str], list[str], float]:
    """Outcomes of `count` damaged templates, details of those that are wrong, and the most CPU time of one."""
    draw = random.Random(number)
    tokenizer = copy.deepcopy(build("llama3"))
    counts: Counter[str] = Counter()
    failures: list[str] = []
    most, bar = 0.0, Bar("templates", count)
    for i in range(count):
        text = damaged(draw.choice(REAL).read_text(encoding="utf-8"), draw)
        tokenizer.chat_template = text
        start, detail = spent(), ""
        try:
            render(TURNS, tokenizer, True, seconds=seconds)
            outcome = "rendered"
        except DataError as error:
            outcome = "over the limits" if error.kind == OVER_LIMITS else "refused"
        except Exception:
            outcome, detail = "traceback", traceback.format_exc()
        took = spent() - start
        most = max(most, took)
        if took > seconds + GRACE_S:
            outcome, detail = "too long", f"{took:.1f} s of CPU time"
        elif peak() > MEMORY:
            outcome, detail = "too large", f"{peak() / 2**30:.1f} GiB"
        counts[outcome] += 1
        bar.update(i + 1, f"{len(failures)} failures")
        if outcome not in ("rendered", "refused", "over the limits"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"failure-{i}.jinja").write_text(text, encoding="utf-8")
            failures.append(f"{folder / f'failure-{i}.jinja'}: {outcome}: {detail}")
    bar.close()
    return counts, failures, most


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a render (default: %(default)s)")
    asked = parser.parse_args()
    start = time.monotonic()
    counts, failures, most = fuzz(
        asked.count, asked.seed, Path(tempfile.mkdtemp(prefix="graft-templates-")), asked.seconds
    )
    for name, n in sorted(counts.items()):
        print(f"{n:7,}  {name}")
    print(
        f"{counts.total():7,}  in {time.monotonic() - start:.0f} s, seed {asked.seed}; most of one: {most:.1f} s of CPU time, "
        f"{peak() / 2**30:.2f} GiB"
    )
    print("\n".join(failures[:20]))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
