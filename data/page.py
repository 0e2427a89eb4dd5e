"""Pages and tables for people to read. Text from data stays text: it becomes neither markup nor a control sequence.

A page extends page.html (layout, style) and imports charts.html (SVG). It is one file without scripts that fetches
nothing, so it opens from a mail, offline and years later.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# Controls, lone surrogates and marks that reorder the text around them. A terminal obeys some of them, a browser hides
# the rest, and a file can't hold a surrogate: the reader of a report is better served by their names.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def render(template: Path, **values: Any) -> str:
    """The page that the template makes of the values; a value that is missing is an error."""
    jinja = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {"number": number, "share": share, "ticks": ticks, "place_on": place_on}
    return jinja.get_template(template.name).render(values)


def visible(value: Any) -> Any:
    """The same JSON value, its invisible and dangerous characters written as ␛ or ⟨U+202E⟩."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return INVISIBLE.sub(lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else f"⟨U+{ord(m[0]):04X}⟩", value)
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    return [visible(item) for item in value] if isinstance(value, list | tuple) else value


def number(value: float | None) -> str:
    """1234 -> "1,234"; 1.5 -> "1.50"; what is not known is a dash."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def share(part: float | None, whole: int | None) -> str:
    if part is None or not whole:
        return "–"
    return "< 0.1 %" if 0 < part < whole / 2000 else f"{100 * part / whole:.1f} %"


def ticks(most: int) -> list[int]:
    """Round numbers from 0 to at least `most`, five or fewer steps of 1, 2 or 5 times a power of ten."""
    most = max(most, 1)
    step = next(s * 10**k for k in range(20) for s in (1, 2, 5) if 5 * s * 10**k >= most)
    return list(range(0, most + step, step))


def place_on(value: int | None, edges: Sequence[int]) -> float | None:
    """Where a value lies, in bins from the left; None outside the edges."""
    if value is None or not edges[0] <= value <= edges[-1]:
        return None
    return float(np.interp(value, edges, range(len(edges))))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of numbers are aligned right."""
    columns = zip(head, *rows, strict=True)
    rule = ["--:" if all(re.match(r"-?\d|–", text) for text in column[1:]) else "---" for column in columns]
    lines = [head, rule, *([plain_markdown(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_markdown(text: str) -> str:
    """Markdown that shows just this text, on one line, and is no formula if a cell is pasted into a spreadsheet."""
    inside_word = r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])"  # means nothing in Markdown
    escaped = re.sub(rf"(?!{inside_word})([\\`*_\[\]<>|&#])", r"\\\1", " ".join(visible(text).split()))
    return re.sub(r"^(?=[=+@]|-(?![\d.]+( |$)))", r"\\", escaped)
