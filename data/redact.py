"""Secrets stay out of what is printed and written, and out of recipes and command lines.

One is known by where it is kept (an environment variable whose name says so), by its form, or by what precedes it.
"""

import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 8  # characters of a variable's value: what is shorter occurs in ordinary text too
# Hugging Face, OpenAI and alike, GitHub, Slack, AWS, JSON web tokens; also behind a line break as repr() writes it
FORM = re.compile(
    r"(?:(?<![\w-])|(?<=\\[nrt]))(?:hf_[A-Za-z0-9]{20,}|sk-(?:proj-|ant-|or-)?[\w-]{20,}|gh[opsu]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|xox[abpr]-[\w-]{20,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # of a URL
# a value behind its name; `use_cls_token=true` and `eos_token: </s>` are none
NAMED = re.compile(
    r"(?i)(--[\w-]*(?:key|token|secret|password)[= ]|\bbearer\s+"
    r"|\b(?:(?:api|access|auth|hf|hub|private|secret|wandb)[_-]?(?:api[_-]?)?(?:key|token)|password|passwd)[\"']?\s*[=:]\s*)"
    r"([\"']?)(?!\$)[^\s\"',;}]{8,}"
)
HIDDEN = "[secret]"


def scrub(text: str) -> str:
    """The text without secrets."""
    for value in _kept():
        text = text.replace(value, HIDDEN)
    text = USER.sub(HIDDEN, FORM.sub(HIDDEN, text))
    return NAMED.sub(rf"\1\2{HIDDEN}", text)


def scrub_values(value: Any) -> Any:
    """What JSON can hold, without secrets in its texts; a text is also looked at together with its key."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {scrub(str(key)): _behind(str(key), inner) for key, inner in value.items()}
    return [scrub_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def _behind(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return scrub_values(value)
    return HIDDEN if NAMED.fullmatch(f"{key}={value}") else scrub(value)


def secret_line(text: str) -> int | None:
    """The first line, from 1, with a secret that is certainly one: kept in a variable, of a known form, or in a URL."""
    for number, line in enumerate(text.split("\n"), start=1):
        if FORM.search(line) or USER.search(line) or any(value in line for value in _kept()):
            return number
    return None


def print_scrubbed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """sys.excepthook: what nobody has foreseen."""
    sys.stderr.write(scrub("".join(traceback.format_exception(kind, error, trace))))


def _kept() -> list[str]:
    """The longest first: one may hold another."""
    found = {value for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)
