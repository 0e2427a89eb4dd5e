"""What is installed, and what pyproject.toml allows, stands at its safe floor."""

import importlib.util
import tomllib
from importlib.metadata import PackageNotFoundError

from packaging.requirements import Requirement

from tests.helpers.places import ROOT

spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
audit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(audit)
FLOORS = audit.FLOORS.read_text()


def test_installed_packages_are_at_their_floors():
    assert audit.below(FLOORS) == []


def test_package_below_its_floor_is_named_with_reason():
    old = {"transformers": "5.16.1", "accelerate": "1.15.0"}

    def installed(name: str) -> str:
        if name not in old:
            raise PackageNotFoundError(name)
        return old[name]

    (line,) = audit.below(FLOORS, installed)
    assert line.startswith("transformers 5.16.1 ")
    assert " >5.16.1 (CVE-" in line


def test_every_floor_has_a_source():
    assert all("CVE-" in why or why == "the same" for _, why in audit.floors(FLOORS))


def test_project_asks_for_no_less():
    """What pyproject.toml names is pinned, or bounded from below by the floor or more."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]
    lowest = {
        (r := Requirement(line)).name: next(iter(r.specifier)).version for line in asked if Requirement(line).specifier
    }
    shared = [floor for floor, _ in audit.floors(FLOORS) if floor.name in lowest]
    assert len(shared) >= 6
    for floor in shared:
        assert floor.specifier.contains(lowest[floor.name]), (floor, lowest[floor.name])
