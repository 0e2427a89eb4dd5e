"""Regular expressions of a recipe or an adapter, tried on a model's names within a time before PEFT matches them.

Python's `re` tries every way of matching, so one short expression can take longer than any run.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from sft.errors import RecipeError

SECONDS = 10  # for all expressions on all names; a usual one takes milliseconds
# how PEFT and `freeze` match an expression
FORMS = ("{}", "(.*\\.)?({})$", "(?:^|.*?\\.){}\\.(\\d+)\\.")
TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try: expression = re.compile(pattern)
    except (re.error, RecursionError, OverflowError): continue  # the recipe or adapter that has it is refused elsewhere
    for name in names: expression.search(name), expression.fullmatch(name)
"""


def check_adapter_patterns(model: nn.Module, adapter: Path) -> None:
    """check_patterns for the settings of an adapter folder."""
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    check_patterns(model, settings, f"{adapter}: adapter_config.json")


def check_patterns(model: nn.Module, settings: Any, name: str) -> None:
    """Raise RecipeError if the regular expressions among the settings' texts take too long on the model's names."""
    texts = sorted({text for text in _texts(settings) if set(text) & set("*+?{|(")})
    if not texts:
        return
    names = sorted({*(n for n, _ in model.named_modules()), *(n for n, _ in model.named_parameters())})
    patterns = [form.replace("{}", text) for text in texts for form in FORMS]
    try:  # in a process of its own: no thread can interrupt a match
        subprocess.run(
            [sys.executable, "-P", "-c", TRY],
            input=json.dumps([patterns, names]).encode(),
            timeout=SECONDS,
            check=True,
            capture_output=True,
        )
    except subprocess.TimeoutExpired as error:
        shown = ", ".join(repr(text[:60]) for text in texts[:3])
        raise RecipeError(
            f"{name}: the regular expressions {shown} take more than {SECONDS} s on the names of this model; "
            "name the modules in a list"
        ) from error


def _texts(settings: Any) -> Iterator[str]:
    waiting = [settings]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
