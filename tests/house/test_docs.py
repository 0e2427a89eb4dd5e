"""Command lines, recipes, keys, files and links of the user's pages, held against the code; nothing of them is run."""

import argparse
import ast
import contextlib
import dataclasses
import importlib.util
import io
import re
import shlex
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import pytest
import typer
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pydantic import BaseModel, ValidationError
from torch.distributed.run import get_args_parser as torchrun_parser

from data.errors import ExitCode, UserError
from sft import train
from sft.cli import app
from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.load import _set, check_baseline, check_recipe, peft_types
from sft.recipe.schema import Recipe
from sft.recipe.strict_yaml import YamlError, parse
from tests.helpers.places import ROOT
from tests.helpers.recipes import MINIMAL

PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
KINDS = (Recipe, BaselineRecipe)
SECTIONS = {name for kind in KINDS for name in kind.model_fields}
KEY = re.compile(r"((?:model|tune|data|pretraining|train|eval|export)(?:\.[a-z]\w*)+)(?:(?:: |=)(.+))?")
FILES = (".py", ".json", ".jsonl", ".md", ".yaml", ".html", ".gz")  # `train.py` is no key of a recipe
OURS = re.compile(r"(?:sft|data|eval|tests|recipes|docs|\.ci)/[\w./-]+")
COMMAND = re.compile(
    r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?((?:graft|accelerate launch|torchrun|make|python (?:-m )?tests)\b.*)"
)
PLACEHOLDER = re.compile(r"(--[a-z-]+=)?[A-Z][A-Z0-9_]*")  # RUN, N, --limit=N
OTHER_PROGRAMS = {"--jinja", "--default-chat-template-kwargs", "--enable-auto-tool-choice", "--tool-call-parser", "--signal", "--help", "--include_path", "--apply_chat_template", "--max-restarts", "--dtype"}  # fmt: skip
MARKDOWN = MarkdownIt("commonmark").enable("table")
GRAFT: Any = typer.main.get_command(app)
TRAIN = typer.Typer()
TRAIN.command()(train.main)


def problems(text: str, page: Path) -> Iterator[str]:
    """What a page says that the code does not know, a line each."""
    for token in MARKDOWN.parse(text):
        where = f"{page.name}:{token.map[0] + 1 if token.map else 0}"
        if token.type in ("fence", "code_block"):
            found = yaml_problems(token.content) if token.info == "yaml" else block_problems(token.content)
        else:
            found = (problem for child in token.children or () for problem in inline_problems(child, text, page))
        yield from (f"{where}: {problem}" for problem in found)


def block_problems(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        if named := COMMAND.fullmatch(line.strip()):
            yield from (f"{line.strip()}: {problem}" for problem in line_problems(named[1], complete=True))


def inline_problems(token: Token, text: str, page: Path) -> Iterator[str]:
    if token.type in ("link_open", "image"):
        yield from link_problems(str(token.attrs.get("href") or token.attrs.get("src")), text, page)
    elif token.type == "code_inline":
        yield from (f"`{token.content}`: {problem}" for problem in code_problems(token.content))


def code_problems(code: str) -> Iterator[str]:
    if OURS.fullmatch(code):
        if not (ROOT / code).exists():
            yield "no such file"
    elif code.endswith(FILES):
        return
    elif named := KEY.fullmatch(code):
        yield from key_problems(named[1], named[2])
    elif named := COMMAND.fullmatch(code):
        yield from line_problems(named[1], complete=False)
    elif code.startswith("--set "):
        yield from line_problems(f"graft train RECIPE {code}", complete=False)
    elif (named := re.match(r"--[a-z][\w-]*", code)) and named[0] not in options():
        yield "no command has this option"


def line_problems(line: str, complete: bool) -> Iterator[str]:
    """Of a shell line; `complete`: whether its arguments must all be there."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&<>")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set(";|&<>"):
            words.append(word)
            continue
        if words:
            yield from command_problems(words, complete)
        words = []


def command_problems(words: list[str], complete: bool) -> Iterator[str]:
    program, rest = words[0], [_filled(word) for word in words[1:]]
    if program != "python":
        yield from (f"{word}: no such file" for word in words if OURS.fullmatch(word) and not (ROOT / word).exists())
    if program == "graft":
        yield from graft_problems(GRAFT, rest, complete)
    elif program in ("accelerate", "torchrun"):
        parser = torchrun_parser() if program == "torchrun" else launch_command_parser()
        given = argparse_result(parser, rest if program == "torchrun" else rest[1:])
        if isinstance(given, str):
            yield from [given] if complete or "required" not in given else []
        elif given.training_script == "sft/train.py":
            yield from graft_problems(typer.main.get_command(TRAIN), given.training_script_args, complete)
    elif program == "make":
        yield from (f"make has no target {word}" for word in rest if word not in make_targets())
    elif program == "python":
        script = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        if not (ROOT / script).is_file():
            yield f"{script}: no such file"
        elif isinstance(given := argparse_result(script_parser(ROOT / script), rest[1 + (rest[0] == "-m") :]), str):
            yield from [given] if complete or "required" not in given else []


def _filled(word: str) -> str:
    """A word with 1 in a placeholder's place, which is a number, a text and a path."""
    named = PLACEHOLDER.fullmatch(word)
    return f"{named[1] or ''}1" if named else word


def graft_problems(command: Any, words: list[str], complete: bool) -> Iterator[str]:
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            known = {name for parameter in command.params for name in parameter.opts} | {"--help"}
            yield from (f"graft has no option {word}" for word in words if word not in known)
            return
        name, words = words[0], words[1:]
        if name not in command.commands:
            yield from [] if name == "1" and not complete else [f"there is no command {name}"]
            return
        command = command.commands[name]
    try:
        given = command.make_context(command.name, list(words)).params
    except typer.Exit:  # --help
        return
    except Exception as refused:
        # of what is only named an argument, or an option's value, may be left out
        if complete or type(refused).__name__ not in ("MissingParameter", "BadOptionUsage"):
            yield str(refused)
        return
    yield from override_problems(given.get("recipe"), given.get("overrides") or ())


def override_problems(recipe: Path | None, overrides: Sequence[str]) -> Iterator[str]:
    """Of --set, with the values if the recipe is one of ours."""
    if not recipe or not (ROOT / recipe).is_file():
        keys = [key for override in overrides if not PLACEHOLDER.fullmatch(key := override.partition("=")[0])]
        yield from (problem for key in keys for problem in key_problems(key, None))
    else:
        tree = parse((ROOT / recipe).read_text(encoding="utf-8"), str(recipe))
        try:
            for override in overrides:
                _set(tree, override)
        except (UserError, YamlError) as error:
            yield str(error)
        yield from tree_problems(tree)


def key_problems(key: str, value: str | None) -> Iterator[str]:
    """Of `train.learning_rate`, and of its value if one is named; keys below `tune` may be PEFT's."""
    names = key.split(".")
    if not any(_has(kind, names) for kind in KINDS) and not (names[0] == "tune" and names[1] in peft_keys()):
        yield f"{key}: no recipe has this key"
    elif value is not None:
        yield from yaml_problems(
            "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(names))[:-1] + f" {value}"
        )


def _has(kind: Any, names: Sequence[str]) -> bool:
    if not names:
        return True
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return names[0] in kind.model_fields and _has(kind.model_fields[names[0]].annotation, names[1:])
    return any(_has(inner, names) for inner in get_args(kind))


def yaml_problems(text: str) -> Iterator[str]:
    """Of a block that holds a recipe or sections of one; other programs' files hold no section."""
    try:
        tree = parse(text, "yaml")
    except YamlError as error:
        yield str(error)
        return
    if isinstance(tree, dict) and tree.keys() & SECTIONS - {"task"}:
        yield from tree_problems(tree)


def tree_problems(tree: dict[str, Any]) -> Iterator[str]:
    """The fewest complaints of the two kinds of recipe; what a fragment leaves out is none."""
    found: list[list[str]] = []
    for kind in [BaselineRecipe] if "objective" in tree else KINDS:
        errors: list[Any] = []
        try:
            kind.model_validate(tree)
        except ValidationError as refused:
            errors = refused.errors()
        wrong = [error for error in errors if error["type"] != "missing"]
        found.append([f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in wrong])
    yield from (fewest := min(found, key=len))
    if not fewest and "tune" in tree:  # PEFT's keys, of a fragment too
        whole = tree if "objective" in tree else MINIMAL | {"tune": tree["tune"]}
        try:
            (check_baseline if "objective" in tree else check_recipe)(whole, check_files=False)
        except UserError as refused:
            yield str(refused)


def link_problems(target: str, text: str, page: Path) -> Iterator[str]:
    """Of a link on a page that holds `text`."""
    if re.match("https?:|mailto:", target):
        return
    name, _, anchor = unquote(target).partition("#")  # the parser quotes what is not ASCII
    file = page.parent / name
    if not file.exists():
        yield f"{target}: leads nowhere"
    elif anchor and anchor not in anchors(file.read_text(encoding="utf-8") if name else text):
        yield f"{target}: {name or 'the page'} has no such heading"


def anchors(text: str) -> set[str]:
    """Ids of headings, as pymdownx.slugs makes them for mkdocs and as GitHub does."""
    found: dict[str, int] = {}
    tokens = MARKDOWN.parse(text)
    for token, inline in zip(tokens, tokens[1:], strict=False):
        if token.type == "heading_open":
            shown = "".join(child.content for child in inline.children or ())
            kept = re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", shown).strip().lower())
            found[kept.replace(" ", "-")] = found.get(kept.replace(" ", "-"), 0) + 1
    return {
        slug + again for slug, n in found.items() for i in range(n) for again in ({f"_{i}", f"-{i}"} if i else {""})
    }


def argparse_result(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace | str:
    """The arguments, or what the parser says against them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args(words)
    except SystemExit:
        return said.getvalue().strip().rpartition("error: ")[2]


@cache
def script_parser(script: Path) -> argparse.ArgumentParser:
    """The parser that a script of tests/ builds, from its source: importing it takes seconds."""
    parser = argparse.ArgumentParser()
    for call in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
            keywords = {k.arg: k.value for k in call.keywords if k.arg in ("action", "nargs", "choices", "type")}
            known = {name: v.value for name, v in keywords.items() if isinstance(v, ast.Constant)}
            if isinstance(number := keywords.get("type"), ast.Name) and number.id in ("int", "float"):
                known["type"] = int if number.id == "int" else float
            if isinstance(keywords.get("choices"), ast.List):
                known["choices"] = ast.literal_eval(keywords["choices"])
            parser.add_argument(*(ast.literal_eval(name) for name in call.args), **known)
    return parser


@cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@cache
def peft_keys() -> set[str]:
    return {field.name for config in peft_types().values() for field in dataclasses.fields(config)}


@cache
def options() -> set[str]:
    """Of every command and script that the pages may name."""
    commands, found = [GRAFT], set(OTHER_PROGRAMS)
    while commands:
        command = commands.pop()
        commands += getattr(command, "commands", {}).values()
        found |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    scripts = [path for folder in ("benchmarks", "faults") for path in (ROOT / "tests" / folder).glob("*.py")]
    parsers = [*map(script_parser, scripts), launch_command_parser(), torchrun_parser()]
    return found | {name for parser in parsers for name in parser._option_string_actions}


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "tests").rglob("README.md"))], ids=lambda page: str(page.relative_to(ROOT))
)
def test_page_names_what_there_is(page):
    assert list(problems(page.read_text(encoding="utf-8"), page)) == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_recipe_opens_with_the_command_that_trains_it(recipe):
    comments = [line[1:].strip() for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert f"accelerate launch sft/train.py recipes/{recipe.name}" in comments[0]
    assert list(block_problems("\n".join(comments))) == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("```sh\ngraft trian RECIPE\n```", "no command trian"),
        ("```sh\ngraft bench clients URL\n```", "no command clients"),
        ("```sh\ngraft export RUN --check\n```", "--check"),
        ("```sh\n$ graft eval\n```", "target"),
        ("```sh\ngraft eval RUN \\\n    --limit many\n```", "integer"),
        ("    graft serve RUN --port 99999", "65535"),
        ("```sh\ngraft eval RUN && graft compare\n```", "runs"),
        ("```sh\ngraft train recipes/smollm_qlora.yaml --set train.lr=1e-4\n```", "train.lr"),
        ("```sh\ngraft train recipes/smollm_qlora.yaml --set train.optim=adamw\n```", "train.optim"),
        ("```sh\ngraft train recipes/smollm.yaml\n```", "no such file"),
        ("```sh\ngraft --verbose\n```", "--verbose"),
        ("```sh\naccelerate launch sft/bert.py RECIPE\n```", "sft/bert.py"),
        ("```sh\naccelerate launch --config sft/train.py RECIPE\n```", "--config"),
        ("```sh\ntorchrun --nproc_per_node 2 sft/train.py RECIPE --resum RUN\n```", "--resum"),
        ("```sh\nmake quickstart tests\n```", "tests"),
        ("```sh\npython tests/benchmarks/speed.py\n```", "no such file"),
        ("```sh\npython tests/benchmarks/throughput.py FILE --system graft,trl\n```\n\n`--systems`", None),
        ("```sh\npython tests/benchmarks/throughput.py FILE --batches 8\n```", "--batches"),
        ("```sh\npython -m tests.faults.kills --count many\n```", "--count"),
        ("```yaml\ntrain: {learning_rat: 1}\n```", "train.learning_rat"),
        ("```yaml\ntask: squad_v2\nmodel: {base: x/y}\ndata: {train: a.json, on_error: go}\n```", "data.on_error"),
        ("```yaml\ntask: squad_v2\nmodle: {base: x/y}\ndata: {train: a.json}\n```", "modle"),
        ("```yaml\nobjective: mlm\ndata: {train: a.json, max_length: 5}\n```", "data.max_length"),
        ("```yaml\ntask: mine\ndataset_path: json\n```", None),
        ("```yaml\ntune: {method: lora, rank: 16}\n```", "tune.rank"),
        ("```yaml\nobjective: mlm\ntask: text\nmodel: {base: x/y}\ndata: {train: a.txt}\ntune: {method: lora}\n```", "objective mlm"),
        ("`train.learning_rates`", "no recipe has"),
        ("`tune.rang`", "no recipe has"),
        ("`data.share_prefixes: sometimes`", "data.share_prefixes"),
        ("`data.train.weight`, `tune.r`, `export.base: auto`, `train.py`, `data.max_seq_length=256`", None),
        ("`graft export --with RUN2`", "--with"),
        ("`--combine ties`", "no command has"),
        ("`graft verify`, `graft eval --data`, `make docs`, `--allow-mismatch`, `graft --install-completion`", None),
        ("`sft/fused_lora.py`", "no such file"),
        ("[a](nowhere.md)", "leads nowhere"),
        ("[a](#there)\n\n# Here", "no such heading"),
        ("[a](#the-end-of-it-1)\n\n# The `end` of it!\n\n## The end of it", None),
        ("[a](#五分钟用-graft-训练)\n\n# 五分钟：用 `graft` 训练", None),
    ],
)  # fmt: skip
def test_a_planted_mistake_is_named(text, named):
    found = list(problems(text, ROOT / "docs" / "planted.md"))
    assert (found == []) if named is None else (len(found) == 1 and named in found[0]), found


def test_exit_codes_are_those_of_the_page():
    table = (ROOT / "docs" / "run-safely.md").read_text(encoding="utf-8").split("| exit code |")[1].split("\n\n")[0]
    listed = [int(line.split("|")[1]) for line in table.splitlines()[2:]]
    assert listed == [code.value for code in ExitCode]


def test_page_of_recipe_keys_is_that_of_the_schema():
    """`python docs/recipe_keys.py` writes it again."""
    spec = importlib.util.spec_from_file_location("recipe_keys", ROOT / "docs" / "recipe_keys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "recipe-keys.md").read_text(encoding="utf-8") == module.page()


def test_every_command_is_shown_on_a_page():
    shown = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in GRAFT.commands if not re.search(rf"\bgraft {name}\b", shown)] == []
