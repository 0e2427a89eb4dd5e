"""Run programs that end with this process: vLLM, and the tools that make an export smaller."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from data.atomic import open_new
from data.progress import LINE_EVERY_S
from data.terminal import print
from sft import child_supervisor as supervisor
from sft.errors import RunError

KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)  # of the supervisor itself, or as it reports the command's end


@contextlib.contextmanager
def supervised(
    command: Sequence[str], log: Path, environment: Mapping[str, str]
) -> "Iterator[subprocess.Popen[bytes]]":
    """The running command, its output in the log. Its whole process tree stops at the end of the block, and if this
    process is killed."""
    with open_new(log) as file:
        process = subprocess.Popen(
            [sys.executable, supervisor.__file__, *command],
            stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        _stop(process)


def run_tool(name: str, command: Sequence[str | Path], log: Path) -> None:
    """Run a program, with a progress line every LINE_EVERY_S. Raises RunError with its last line if it fails, and then
    leaves the log."""
    start = time.monotonic()
    with supervised([str(part) for part in command], log, os.environ | {"HF_HUB_OFFLINE": "1"}) as process:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LINE_EVERY_S)
                break
            print(f"{name}, {time.monotonic() - start:.0f} s; log: {log}", file=sys.stderr, flush=True)
    if process.returncode in KILLED:
        remedy = "most likely out of memory; end other programs or take a larger machine"
        raise RunError(f"{name} was killed, {remedy}; see {log}")
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = ["no output", *(line.strip() for line in lines if line.strip())][-1]
        raise RunError(f"{name} failed ({process.returncode}): {last}; see {log}")
    log.unlink()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Close the supervisor's stdin: it then ends the command's process group, by SIGTERM first."""
    if process.stdin:
        process.stdin.close()
    if process.wait(supervisor.PATIENCE_S + 10) == -signal.SIGKILL:  # the supervisor was killed, its group still runs
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == process.pid:
                    os.kill(pid, signal.SIGKILL)
