"""Mistakes that a user can correct, and the exit codes of all commands."""

import errno
import re
from enum import IntEnum

# characters that a terminal acts on, or that reverse the order of text; a line break is allowed
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class ExitCode(IntEnum):
    """The exit codes of all commands; a test compares the table in docs/run-safely.md with them."""

    DONE = 0
    FAILED = 1  # a bug, with a traceback; or a check that did not pass (check, ladder)
    MISTAKE = 2
    DIVERGED = 3
    DISK_FULL = 4
    LOCKED = 5
    OUT_OF_MEMORY = 6
    INTERRUPTED = 130  # 128 + SIGINT
    USER_SIGNAL = 138  # 128 + SIGUSR1
    TERMINATED = 143  # 128 + SIGTERM


class UserError(Exception):
    """A mistake of the user. Its text names the value, the limit and the remedy; no traceback is printed."""

    exit_code = ExitCode.MISTAKE

    def __str__(self) -> str:
        """The text with control characters escaped: names and values from recipes and data may hold them."""
        return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), super().__str__())


class DiskFull(UserError):
    """No space left. Files written before are whole; the file that did not fit does not exist."""

    exit_code = ExitCode.DISK_FULL


def is_disk_full(error: BaseException) -> bool:
    """No space, no quota, or a file above the process's limit; safetensors names the errno only in its text."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)
