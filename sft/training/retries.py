"""Resume after a crash: `graft train RECIPE --retries 3` supervises the training in a process of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.errors import ExitCode
from data.terminal import print, quoted
from sft.child_supervisor import end_with_parent
from sft.errors import RecipeError
from sft.runs.interrupt import handle_signals
from sft.session import child_environment, graft_command


def supervise(first: Sequence[str], run: Path, again: Sequence[str], retries: int) -> int:
    """The exit code of the last of at most 1 + `retries` processes.

    first: arguments of `graft train` that begin the run in the folder `run`; again: those that resume it. Another
    process follows one that was killed or failed with an error of Graft's own, not one that ended with another exit
    code (a mistake, a full disk, ...). Signals are passed on. At any end of this process, kill -9 too, the training
    gets SIGTERM, so that it saves and ends.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError("--retries supervises one process; with several, use torchrun --max-restarts")
    for attempt in range(retries + 1):
        code = _run(again if (run / "recipe.yaml").is_file() else first)
        if code != ExitCode.FAILED and code >= 0:
            return code
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "failed"
        if attempt < retries:
            print(f"the training {how}; trying again, {attempt + 1} of {retries}", file=sys.stderr, flush=True)
    print(f"the training {how}, {retries + 1} times; resume with: graft train --resume {quoted(run)}", file=sys.stderr)
    return ExitCode.FAILED


def _run(arguments: Sequence[str]) -> int:
    command = graft_command("train", *arguments)
    # in its own group, so that a terminal's Ctrl-C arrives once, through us
    process = subprocess.Popen(command, process_group=0, env=child_environment(), preexec_fn=end_with_parent())
    received: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        received.append(number)
        process.send_signal(number)

    with handle_signals(pass_on):
        code = process.wait()
    # a stop was requested, even if the process ended before it could save
    return 128 + received[-1] if received and (code < 0 or code == ExitCode.FAILED) else code
