"""What is printed neither acts on the terminal nor, when copied, on the shell."""

import ast
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from data import terminal
from data.terminal import Console, printable, quoted
from sft.cli import main
from sft.errors import RecipeError
from sft.train import _print_next
from sft.untrusted import check_run_folder
from tests.helpers.places import ROOT

MODULES = sorted(path for room in ("data", "eval", "sft") for path in (ROOT / room).rglob("*.py"))
HOSTILE = ["\x1b]0;title\x07", "\x1b[2J", "\x9b2J", "\r", "a\u202eb", "a\u2028b", "\ud800", "\x7f", "\x00"]


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_are_shown_by_name(text, capsys):
    out = io.StringIO()
    table = Table("heading", title=text)
    table.add_row(text)
    Console(file=out, force_terminal=True, color_system=None).print(text, table)
    terminal.print(text, file=sys.stderr)
    terminal.print("a", text, sep=text, end="")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (printable(f"a{text}{text}"), printable(text) + "\n")
    odd = {character for character in text if not character.isprintable()}
    assert not odd & set("".join((out.getvalue(), *printed)))


def test_text_stays_as_it_is_with_tabs_lines_and_what_looks_like_markup():
    text = "if x:\n\treturn [bold]y[/link] :smile: Ärger 北京 👍🏽"
    assert printable(text) == text
    out = io.StringIO()
    Console(file=out, width=90).print(text.replace("\t", ""))
    assert out.getvalue() == text.replace("\t", "") + "\n"


def test_all_modules_print_by_the_functions_that_make_text_printable():
    wrong = []
    for path in MODULES:
        if path.name == "terminal.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        imports = {a.name: n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        names = ("print", "Console")
        wrong += [f"{path}: {name}" for name in names if name in used and imports.get(name) != "data.terminal"]
    assert not wrong, "import it from data.terminal"


def test_names_in_commands_to_copy_are_quoted():
    """Of every command of Graft's that a message holds: what is filled in is one word."""
    wrong = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            before = ""
            for part in node.values:
                if isinstance(part, ast.Constant):
                    before += part.value
                elif re.search(r"\b(graft \w+|llama-server) [^`;,]*$", before):
                    value = ast.unparse(part.value)
                    wrong += [f"{path}:{node.lineno}: {value}"] * (not value.startswith(("quoted(", "step.format(")))
                    before += "NAME"
    assert not wrong, "write {quoted(name)}"


@pytest.mark.parametrize("name", ["a b", "a;touch x", "$(x)", "{a,b}", "a'b", "*", "x --allow-changed data"])
def test_name_is_one_word_of_a_shell(name, capsys):
    assert shlex.split(f"graft eval {quoted(name)} --base") == ["graft", "eval", name, "--base"]
    _print_next(Path(name), "graft eval {run}")
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-1] == name


@pytest.mark.parametrize(
    "name", ["x --allow-changed recipe", "x(+reboot)", "{a,b}", "[ab]", "a\u202eb", "a\u2028b", "a\u00a0b", "x -y"]
)
def test_name_of_a_run_holds_nothing_that_a_shell_or_an_option_parser_acts_on(name):
    with pytest.raises(RecipeError, match="train.output_dir: .*(holds|begins with -)"):
        check_run_folder(Path("runs") / name, "train.output_dir")
    check_run_folder(Path("runs/my run 2026-11"), "train.output_dir")


TOKEN = "hf_" + "aB3" * 10


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "a.yaml", TOKEN],
        [TOKEN],
        ["bench", TOKEN],
        ["eval", "x", "--limit", TOKEN],
        [f"--{TOKEN}"],
        ["-x", TOKEN],
    ],
)
def test_token_at_a_wrong_place_of_the_command_line_is_not_shown(arguments, monkeypatch, capsys):
    """The parser's error would come before the command's check, and shows what it can't parse."""
    monkeypatch.setattr(sys, "argv", ["graft", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = "".join(capsys.readouterr())
    assert (ended.value.code, TOKEN in shown, "holds a token" in shown) == (2, False, True)


@pytest.mark.parametrize("arguments", [["train", "a", "password=hunter2hunter2"], ["bench", "api_key=hunter2hunter2"]])
def test_error_of_the_parser_hides_what_is_named_a_password_and_control_characters(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["graft", *arguments, "\x1b[2J"])
    monkeypatch.setenv("GLIBC_TUNABLES", "set")  # else `graft train` restarts this process
    with pytest.raises(SystemExit) as ended:
        main()
    shown = "".join(capsys.readouterr())
    assert ended.value.code == 2
    assert "hunter2" not in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize("arguments", [["a", "password=hunter2hunter2"], ["--password=hunter2hunter2"]])
def test_train_started_as_a_file_hides_them_too(arguments):
    command = [sys.executable, ROOT / "sft" / "train.py", *arguments, "\x1b[2J"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Usage: train.py" in done.stderr
    assert not any(hidden in done.stdout + done.stderr for hidden in ("hunter2", "\x1b[2J"))
