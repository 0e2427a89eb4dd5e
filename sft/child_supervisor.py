"""Run a command and stop its whole process group once this process's stdin ends.

python sft/child_supervisor.py COMMAND...

The parent holds the other end of stdin, a pipe. The kernel closes it at any end of the parent, kill -9 too, so no
server outlives the parent; nor, on Linux, this process. Standard library only: it runs as long as the server and should
cost nothing.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

PATIENCE_S = 15  # between asking the group to end and killing it
PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent() -> Callable[[], None]:
    """Popen's preexec_fn: on Linux the child gets SIGTERM at any end of this process, kill -9 too."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda *_: None  # looked up before the fork
    parent = os.getpid()

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os.kill(os.getpid(), signal.SIGTERM)

    return ask_kernel


def main(command: list[str]) -> int:
    """The command's exit code; 128 plus the signal's number if a signal ended it, as in a shell."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=end_with_parent())
    signal.signal(signal.SIGTERM, lambda *_: _send(child.pid, signal.SIGTERM))
    threading.Thread(target=_stop_after_parent, args=(child,), daemon=True).start()
    code = child.wait()
    _send(child.pid, signal.SIGKILL)  # to processes that the command left running
    return code if code >= 0 else 128 - code


def _stop_after_parent(child: "subprocess.Popen[bytes]") -> None:
    while os.read(0, 1):  # sys.stdin's lock, held here, would abort this process at its own end
        pass
    _send(child.pid, signal.SIGTERM)  # not SIGINT, which a shell's background jobs ignore
    deadline = time.monotonic() + PATIENCE_S
    while child.returncode is None and time.monotonic() < deadline:
        time.sleep(0.1)
    _send(child.pid, signal.SIGKILL)


def _send(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
