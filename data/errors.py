"""Mistakes that a user can mend."""


class UserError(Exception):
    """The text is all that the user sees: it names the value, the limit and the remedy. The exit code is 2."""
