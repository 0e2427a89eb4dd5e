"""The shape of the house: imports run one way, rooms stay small, and every module has one place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.places import ROOT

# each room may import what is in an earlier line; rooms of one line know nothing of each other
ORDER = (
    ("data.terminal",),
    ("data.errors", "data.progress", "data.redact", "data.page"),
    ("data.conversation", "data.atomic", "data.inside"),
    ("data.cache", "data.tool_calls"),
    ("data.readers", "data.encode"),
    ("data.audit",),
    ("eval",),
    ("sft.errors",),
    ("sft.session", "sft.untrusted", "sft.child_supervisor", "sft.child_process"),
    ("sft.recipe",),
    ("sft.models", "sft.kernels"),
    ("sft.runs",),
    ("sft.training",),
    ("sft.baselines", "sft.export"),
    ("sft.scoring",),
    ("sft.serving",),
    ("sft.train", "sft.quickstart"),
    ("sft.cli",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
BESIDE = {("sft.child_process", "sft.child_supervisor")}  # a program that another one starts
PACKAGES = ("data", "eval", "sft")
MOST_MODULES, MOST_LINES, MOST_MEDIAN = 17, 400, 150


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Dotted name -> file of every module but the packages' own, which only describe their rooms."""
    files = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path for path in files if path.name != "__init__.py"
    }


def imports(path: Path) -> Iterator[str]:
    """Dotted names of our own modules that a file imports anywhere, inside functions and for type checks too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def hidden_imports(root: Path) -> list[str]:
    """Imports that `imports` can't follow: relative ones, by a name in a string, and any in a package's own file."""
    hidden = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                relative = isinstance(node, ast.ImportFrom) and node.level > 0
                named = isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__"))
                packaged = path.name == "__init__.py" and isinstance(node, ast.Import | ast.ImportFrom)
                if relative or named or packaged:
                    hidden.append(f"{path.relative_to(root)}:{node.lineno}")
    return hidden


def room_of(module: str) -> str:
    """The longest entry of ORDER that the module is in."""
    parts = module.split(".")
    rooms = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    assert any(room in LEVEL for room in rooms), f"{module} has no place in ORDER"
    return next(room for room in rooms if room in LEVEL)


def wrong_imports(root: Path) -> list[str]:
    known = modules(root)
    wrong = []
    for name, path in known.items():
        for imported in sorted(set(imports(path)) & known.keys()):
            importer, room = room_of(name), room_of(imported)
            if importer != room and (importer, room) not in BESIDE and LEVEL[room] >= LEVEL[importer]:
                wrong.append(f"{path.relative_to(root)} imports {known[imported].relative_to(root)}")
    return wrong


def cycles(root: Path) -> list[list[str]]:
    known = modules(root)
    graph = {name: sorted(set(imports(path)) & known.keys()) for name, path in known.items()}
    found: list[list[str]] = []
    state: dict[str, int] = {}

    def visit(name: str, trail: list[str]) -> None:
        state[name] = 1
        for other in graph[name]:
            if state.get(other) == 1:
                found.append([*trail[trail.index(other) :], other])
            elif other not in state:
                visit(other, [*trail, other])
        state[name] = 2

    for name in graph:
        if name not in state:
            visit(name, [name])
    return found


def test_imports_run_one_way():
    assert wrong_imports(ROOT) == []
    assert hidden_imports(ROOT) == []


def test_no_import_runs_in_a_circle():
    assert cycles(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("data/atomic.py", "from sft.errors import RunError\n", "data/atomic.py imports sft/errors.py"),
        (
            "sft/models/load.py",
            "def late():\n    from sft.export.merge import read_merge\n",
            "sft/models/load.py imports sft/export/merge.py",
        ),
        ("eval/stats.py", "import sft.runs.folder\n", "eval/stats.py imports sft/runs/folder.py"),
        ("data/readers/csv_again.py", "from data.audit import leaks\n", "data/readers/csv_again.py imports data/audit/leaks.py"),
    ],
)  # fmt: skip
def test_a_planted_import_is_named_with_both_files(file, line, told, tmp_path):
    plant(tmp_path, file, line)
    assert wrong_imports(tmp_path) == [told]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("eval/__init__.py", "from sft.runs.folder import start_run\n"),
        ("sft/models/load.py", "from ..export.merge import read_merge\n"),
        ("eval/stats.py", "import importlib\nimportlib.import_module('sft.runs.folder')\n"),
    ],
)
def test_an_import_that_hides_its_module_is_found(file, line, tmp_path):
    plant(tmp_path, file, line)
    (where,) = hidden_imports(tmp_path)
    assert where.startswith(f"{file}:")


def plant(tmp_path: Path, file: str, line: str) -> None:
    """A copy of the house with one more import."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            copy = tmp_path / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    with (tmp_path / file).open("a", encoding="utf-8") as planted:
        planted.write(f"\n{line}")


def test_rooms_and_files_stay_small():
    known = modules()
    by_folder: dict[Path, int] = {}
    for path in known.values():
        by_folder[path.parent] = by_folder.get(path.parent, 0) + 1
    assert {folder: n for folder, n in by_folder.items() if n > MOST_MODULES} == {}
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in known.items()}
    assert {name: n for name, n in lengths.items() if n > MOST_LINES} == {}
    assert sorted(lengths.values())[len(lengths) // 2] <= MOST_MEDIAN


def test_each_package_describes_its_files():
    wrong = []
    for package in PACKAGES:
        for page in sorted((ROOT / package).rglob("__init__.py")):
            described = re.findall(r"^(\w+\.py) ", ast.get_docstring(ast.parse(page.read_text())) or "", re.MULTILINE)
            files = [path.name for path in page.parent.glob("*.py") if path != page]
            wrong += [f"{page.relative_to(ROOT)}: {name}" for name in {*files} ^ {*described}]
    assert wrong == []


def test_no_module_is_named_after_what_it_is_not():
    assert [n for n in modules() if n.rpartition(".")[2] in ("utils", "util", "common", "helpers", "misc")] == []


def test_no_test_module_imports_another():
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            if ".test_" in f".{name}" or name.endswith("conftest"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []
