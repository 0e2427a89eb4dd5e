"""Go on after a crash: `graft train RECIPE --retries 3` starts the training as a process and looks after it."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import ExitCode
from sft.errors import RecipeError
from sft.session import child_environment, graft_command


def supervise(first: Sequence[str], run: Path, going_on: Sequence[str], retries: int) -> int:
    """The exit code of the last of at most 1 + `retries` processes.

    first: arguments of `graft train` that begin the run in the folder `run`; going_on: those that resume it. A process
    that was killed or failed by an error of our own is followed by another one; mistakes, a full disk and the other
    ends that have a code of their own are not. Signals are passed on.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError("--retries: is for one process; a launcher has its own way, such as torchrun --max-restarts")
    for attempt in range(retries + 1):
        code = _run(going_on if (run / "recipe.yaml").is_file() else first)
        if code != ExitCode.FAILED and code >= 0:
            return code
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
        if attempt < retries:
            print(f"the training {how}; trying again, {attempt + 1} of {retries}", file=sys.stderr, flush=True)
    print(
        f"the training {how}, {retries + 1} times; go on with: graft train --resume {run}", file=sys.stderr, flush=True
    )
    return ExitCode.FAILED


def _run(arguments: Sequence[str]) -> int:
    command = graft_command("train", *arguments)
    # in a group of its own: a terminal's Ctrl-C then comes once, through us
    process = subprocess.Popen(command, process_group=0, env=child_environment())

    asked: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        asked.append(number)
        process.send_signal(number)

    previous = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = process.wait()
        # before it could save, or while it tried: asked to stop all the same
        return 128 + asked[-1] if asked and (code < 0 or code == ExitCode.FAILED) else code
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
