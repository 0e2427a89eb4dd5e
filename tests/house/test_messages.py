"""The sentences of messages, help and schema in one file: a change of wording is seen, and accepted, there alone.

To accept new ones: GRAFT_GOLDEN=write python -m pytest tests/house/test_messages.py
"""

import ast
import os
import re
from pathlib import Path

from tests.helpers.places import ROOT

GOLDEN = ROOT / "tests" / "golden" / "messages.txt"
# what a reader stumbles over; docs/contributing.md says how to write instead
ODD = (
    "anew", "but for", "stands in", "is told", "are told", "so often", "so many", "hangs? on", "made to the measure",
    "go on", "goes on", "aside", "whoever",
)  # fmt: skip
SHOWN = ("sft/cli.py", "sft/train.py", "sft/recipe/schema.py", "sft/recipe/baseline_schema.py")  # docstrings are help


def text_of(node: ast.AST) -> str:
    """A literal's text; an f-string with its expressions in braces, joined pieces as one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
        return node.value.decode(errors="replace")
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    return f"{{{ast.unparse(node.value)}}}" if isinstance(node, ast.FormattedValue) else ""


def sentences(path: Path) -> list[str]:
    """Texts of three words or more in order; docstrings only if the command line or the schema shows them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    shown = path.relative_to(ROOT).as_posix() in SHOWN
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and not shown}
    literals = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in inside | docstrings
    ]
    literals.sort(key=lambda node: (node.lineno, node.col_offset))
    texts = (" ".join(text_of(node).split()) for node in literals)
    return [text for text in texts if len(re.findall(r"[A-Za-z]{2,}", text)) > 2 and text.count(" ") > 1]


def collected() -> str:
    parts = []
    for package in ("data", "eval", "sft"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if lines := sentences(path):
                parts.append("\n  ".join([path.relative_to(ROOT).as_posix(), *lines]))
    return "\n".join(parts) + "\n"


def test_messages_are_the_golden_ones():
    now = collected()
    if os.environ.get("GRAFT_GOLDEN") == "write":
        GOLDEN.write_text(now, encoding="utf-8")
    assert now.splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines()


def test_messages_are_plain_english():
    odd = [line for line in collected().splitlines() if any(re.search(rf"\b{word}\b", line) for word in ODD)]
    assert odd == []
