"""HTML pages and Markdown tables. Text from data becomes neither markup nor a control sequence.

A page extends page.html (layout, style) and imports charts.html (SVG). It is one file without scripts and without
downloads, so it opens offline.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.terminal import printable


def render(template: Path, **values: Any) -> str:
    """The template filled with the values; a missing value is an error."""
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
    """The same JSON value with invisible and dangerous characters written as ␛ or ⟨U+202E⟩."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value)
    if isinstance(value, dict):
        return {visible(key): visible(item) for key, item in value.items()}
    return [visible(item) for item in value] if isinstance(value, list | tuple) else value


def number(value: float | None) -> str:
    """1234 -> "1,234"; 1.5 -> "1.50"; None -> a dash."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def share(part: float | None, whole: int | None) -> str:
    """1, 8 -> "12.5 %"; an unknown or empty share -> a dash."""
    if part is None or not whole:
        return "–"
    return "< 0.1 %" if 0 < part < whole / 2000 else f"{100 * part / whole:.1f} %"


def ticks(most: int) -> list[int]:
    """Round numbers from 0 to at least `most`, in at most five steps of 1, 2 or 5 times a power of ten."""
    most = max(most, 1)
    step = next(s * 10**k for k in range(20) for s in (1, 2, 5) if 5 * s * 10**k >= most)
    return list(range(0, most + step, step))


def place_on(value: int | None, edges: Sequence[int]) -> float | None:
    """The position of a value, counted in bins from the left; None outside the edges."""
    if value is None or not edges[0] <= value <= edges[-1]:
        return None
    return float(np.interp(value, edges, range(len(edges))))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned right."""
    columns = zip(head, *rows, strict=True)
    rule = ["--:" if all(re.match(r"-?\d|–", text) for text in column[1:]) else "---" for column in columns]
    lines = [head, rule, *([plain_markdown(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain_markdown(text: str) -> str:
    """Markdown that shows exactly this text, on one line; pasted into a spreadsheet it is no formula."""
    inside_word = r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])"  # no emphasis in Markdown
    escaped = re.sub(rf"(?!{inside_word})([\\`*_\[\]<>|&#])", r"\\\1", " ".join(visible(text).split()))
    return re.sub(r"^(?=[=+@]|-(?![\d.]+( |$)))", r"\\", escaped)
