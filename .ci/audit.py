"""Installed packages at their safe floors: .ci/floors.txt, then pip-audit where it is installed (extra `audit`).

python .ci/audit.py        exit code 1 where one is below
"""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

FLOORS = Path(__file__).with_name("floors.txt")


def floors(text: str) -> list[tuple[Requirement, str]]:
    """Requirement and advisories of each line."""
    lines = [line.partition("#") for line in text.splitlines()]
    return [(Requirement(named.strip()), why.strip()) for named, _, why in lines if named.strip()]


def below(text: str, installed: Callable[[str], str] = version) -> list[str]:
    """A line for each package that is installed and below its floor."""
    found = []
    for floor, why in floors(text):
        try:
            have = installed(floor.name)
        except PackageNotFoundError:
            continue
        if not floor.specifier.contains(have, prereleases=True):
            found.append(f"{floor.name} {have} is below its safe floor {floor.specifier} ({why}); upgrade it")
    return found


def main() -> int:
    text = FLOORS.read_text(encoding="utf-8")
    wrong = below(text)
    print("\n".join(wrong) or f"{len(floors(text))} floors of {FLOORS.name} hold for what is installed")
    if find_spec("pip_audit") is None:
        print("pip-audit is not installed (pip install -e '.[audit]'): only the kept list was checked")
        return int(bool(wrong))
    done = subprocess.run([sys.executable, "-m", "pip_audit", "--local", "--skip-editable"], check=False)
    return int(bool(wrong)) or done.returncode


if __name__ == "__main__":
    sys.exit(main())
