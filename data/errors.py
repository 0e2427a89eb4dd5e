"""Mistakes that a user can mend, and the exit code of everything that ends a command."""

import errno
import re
from enum import IntEnum

# a terminal acts on them, or shows what follows in another order; a line break is meant
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class ExitCode(IntEnum):
    """What a command's exit code says; the table in docs/run-safely.md is checked against this one."""

    DONE = 0
    FAILED = 1  # an error of our own, with a traceback; or what was checked is not in order (check, ladder)
    MISTAKE = 2
    DIVERGED = 3
    DISK_FULL = 4
    LOCKED = 5
    OUT_OF_MEMORY = 6
    INTERRUPTED = 130  # 128 + SIGINT
    USER_SIGNAL = 138  # 128 + SIGUSR1
    TERMINATED = 143  # 128 + SIGTERM


class UserError(Exception):
    """The text is all that the user sees: it names the value, the limit and the remedy."""

    exit_code = ExitCode.MISTAKE

    def __str__(self) -> str:
        """With control characters, which names and values of recipes and data may hold, written out."""
        return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), super().__str__())


class DiskFull(UserError):
    """What was written before is whole; what could not be written is not there."""

    exit_code = ExitCode.DISK_FULL


def is_disk_full(error: BaseException) -> bool:
    """No space, no quota, or a file larger than the process may write; safetensors has it only in its text."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)
