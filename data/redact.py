"""Remove secrets from what is printed and written, and find them in recipes and command lines.

A secret is recognised by its environment variable (HF_TOKEN), by its form (hf_...), or by the name before it.
"""

import os
import re
import sys
import traceback
from types import TracebackType
from typing import Any

from data.terminal import printable

VARIABLE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
SHORTEST = 8  # characters of a variable's value; shorter values occur in ordinary text too
# tokens of Hugging Face, OpenAI and similar, GitHub, Slack, AWS, JSON web tokens; also after \n as repr() writes it
FORM = re.compile(
    r"(?:(?<![\w-])|(?<=\\[nrt]))(?:hf_[A-Za-z0-9]{20,}|sk-(?:proj-|ant-|or-)?[\w-]{20,}|gh[opsu]_[A-Za-z0-9]{30,}"
    r"|github_pat_\w{30,}|xox[abpr]-[\w-]{20,}|AKIA[A-Z0-9]{16}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+)"
)
USER = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # user and password in a URL
# a value after its name; `use_cls_token=true` and `eos_token: </s>` are no secrets
NAMED = re.compile(
    r"(?i)(--[\w-]*(?:key|token|secret|password)[= ]|\bbearer\s+"
    r"|\b(?:(?:api|access|auth|hf|hub|private|secret|wandb)[_-]?(?:api[_-]?)?(?:key|token)|password|passwd)[\"']?\s*[=:]\s*)"
    r"([\"']?)(?!\$)[^\s\"',;}]{8,}"
)
HIDDEN = "[secret]"


def scrub(text: str) -> str:
    """The text without secrets."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    text = USER.sub(HIDDEN, FORM.sub(HIDDEN, text))
    return NAMED.sub(rf"\1\2{HIDDEN}", text)


def scrub_values(value: Any) -> Any:
    """The JSON value without secrets in its texts; a text is also checked together with its key."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {scrub(str(key)): _scrub_entry(str(key), inner) for key, inner in value.items()}
    return [scrub_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def _scrub_entry(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return scrub_values(value)
    return HIDDEN if NAMED.fullmatch(f"{key}={value}") else scrub(value)


def secret_line(text: str) -> int | None:
    """The number, from 1, of the first line with a sure secret: a variable's value, a known form, or in a URL."""
    for number, line in enumerate(text.split("\n"), start=1):
        if FORM.search(line) or USER.search(line) or any(value in line for value in _environment_secrets()):
            return number
    return None


def print_scrubbed(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A sys.excepthook: the traceback of an unexpected error, without secrets."""
    sys.stderr.write(printable(scrub("".join(traceback.format_exception(kind, error, trace)))))


def _environment_secrets() -> list[str]:
    """Values of secret variables, the longest first: one may contain another."""
    secrets = {value for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= SHORTEST}
    return sorted(secrets, key=len, reverse=True)
