"""The fault harness itself, with few kills; by hand it is run with hundreds."""

import os
import subprocess
import sys

import pytest

from tests.helpers.places import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_trainings_end_like_the_undisturbed_one(processes):
    """R3, R4: at random moments."""
    command = [sys.executable, "-m", "tests.faults.kills", "--count", "6", "--seed", "1"]
    command += ["--processes", processes]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "runs equal" in done.stdout
    assert "6 kills" in done.stdout
