"""Mistakes that a user can mend, and the exit code of everything that ends a command."""

import errno
from enum import IntEnum


class ExitCode(IntEnum):
    """What a command's exit code says; the README's table of them is checked against this one."""

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


class DiskFull(UserError):
    """What was written before is whole; what could not be written is not there."""

    exit_code = ExitCode.DISK_FULL


def is_disk_full(error: BaseException) -> bool:
    """No space, no quota, or a file larger than the process may write; safetensors has it only in its text."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)
