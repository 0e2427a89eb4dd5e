"""Print so that no text of a server, a model or data acts on the terminal, or on the shell that a line is copied to.

`print` and `Console` here take the place of Python's and rich's in all modules; a test holds it.
"""

import builtins
import re
import shlex
from typing import Any, TextIO

from rich import console
from rich.segment import Segment

# Control characters, lone surrogates and marks that reorder text. A terminal acts on some of them, a browser hides the
# rest, and UTF-8 has no surrogates; so their names are shown.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with invisible and dangerous characters written as ␛ or ⟨U+202E⟩; tabs and line breaks stay."""
    return INVISIBLE.sub(lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else f"⟨U+{ord(m[0]):04X}⟩", text)


def quoted(name: object) -> str:
    """A name as one word of a command to copy."""
    return shlex.quote(str(name))


def print(*values: object, sep: str = " ", end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """Python's print, of printable text."""
    builtins.print(printable(sep.join(map(str, values))), end=end, file=file, flush=flush)


class Console(console.Console):
    """rich's console, of printable text; what looks like rich's markup is text too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, *args: Any, **options: Any) -> Any:
        for segment in super().render(*args, **options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
