"""Mistakes and failures that end a command with one line on stderr.

Their base class and the exit codes are in data/errors.py.
"""

from data.errors import ExitCode, UserError


class RecipeError(UserError):
    """A recipe or an option that can't run; the text names key, value, allowed values and the nearest valid key."""


class RunError(UserError):
    """A folder that is not the run, adapter or export that a command needs."""


class RunLocked(RunError):
    """Another process writes to the folder."""

    exit_code = ExitCode.LOCKED


class TrainingDiverged(UserError):
    """A loss, gradient or weight is not finite, and the adapter would be broken."""

    exit_code = ExitCode.DIVERGED


class ParityError(UserError):
    """A merged model does not answer like the adapter, or has other weights than the run's."""
