"""The data report: its record, one self-contained page for people, and tables for the terminal."""

import re
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.audit.leaks import DuplicateReport, LeakReport
from data.audit.row_counts import SourceReport, Totals
from data.conversation import NAMED

Report = dict[str, Any]

PLAIN_WIDTH = 160  # columns of a table in a log file, where there is no window to fit
SEVERITIES = {"defects": "defect", "left_out": "left out", "notes": "note"}  # by their key in a source

# Controls, lone surrogates and marks that reorder the text around them. A terminal obeys some of them, a browser hides
# the rest, and a file can't hold a surrogate: the reader of a report is better served by their names.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


@dataclass
class DataReport:
    """What data_report.json holds. `stops`: each line names what stops the run and the remedy.

    lengths: bin i of a histogram lies between edges[i] and edges[i + 1]; `clipped` rows beyond the last edge are in the
    last bin. examples: see decoded(). What is absent is shown as unknown, never as zero.
    """

    stops: list[str]
    recipe: str = ""
    task: str = ""
    max_length: int | None = None
    created_by: str = ""
    totals: Totals = field(default_factory=Totals)
    sources: list[SourceReport] = field(default_factory=list)
    held_out: SourceReport | None = None
    lengths: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    duplicates: DuplicateReport | None = None  # None: not looked for
    leaks: LeakReport = field(default_factory=LeakReport)
    examples: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: dict[str, str] = field(default_factory=dict)

    @property
    def all_sources(self) -> list[SourceReport]:
        return [*self.sources, *([self.held_out] if self.held_out else [])]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DataReport":
        """The record of a data_report.json; what the file leaves out is unknown."""
        kinds = {"totals": Totals, "held_out": SourceReport, "duplicates": DuplicateReport, "leaks": LeakReport}
        parts = {name: kind(**value[name]) for name, kind in kinds.items() if value.get(name)}
        sources = [SourceReport(**source) for source in value.get("sources", ())]
        rest = {name: part for name, part in value.items() if name not in kinds}
        return cls(**{**rest, **parts, "sources": sources})


def write_html(report: DataReport, path: Path) -> None:
    """One page without scripts or anything to fetch; text from data can't become markup."""
    shown = _visible(report.to_json())
    loader = FileSystemLoader(Path(__file__).parent)
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters |= {"n": number, "share": share, "spans": spans, "ticks": ticks, "place_on": place_on}
    path.write_text(jinja.get_template("report.html").render(shown, findings=find_all(shown)), encoding="utf-8")


def print_report(data: DataReport, console: Console) -> None:
    """Sources, findings, totals and the verdict; without lines and colour where the console is no terminal."""
    report = _visible(data.to_json())
    for table in (_source_table(report), _finding_table(report), _totals_table(report)):
        console.print(table if console.is_terminal else Text(_plain(table)), soft_wrap=not console.is_terminal)
    verdict = ("Not ready to train:", "bold red") if report["stops"] else ("Ready to train.", "bold green")
    console.print(Text.assemble(verdict, *(f"\n- {stop}" for stop in report["stops"])), soft_wrap=True)


def print_example(example: Report, console: Console) -> None:
    """The tokens of an example as text: trained ones in bold green, or between ⟦ ⟧ where there is no colour."""
    example = _visible(example)
    colour = console.color_system is not None and not console.no_color
    length, trained = example["length"], example["trained"]
    head = f"{length:,} tokens, {trained:,} trained ({share(trained, length)})"
    legend = [("trained", "bold green"), "  ", ("special", "cyan")] if colour else ["⟦trained⟧"]
    text = Text.assemble((example["where"], "bold"), f"  {head}  ", *legend, "\n")
    for piece, is_trained, is_special in spans(example["tokens"]):
        style = "bold green" if is_trained else "cyan" if is_special else ""
        text.append(piece if colour or not is_trained else f"⟦{piece}⟧", style=style)
    console.print(text, soft_wrap=True)


def find_all(report: Report) -> list[Report]:
    """Defects, then rows left out, then notes, each kind once for all sources, the most frequent first."""
    sources, findings = _sources(report), []
    for key, severity in SEVERITIES.items():
        counts = sum((Counter(source[key]) for source in sources), Counter[str]())
        for kind, count in counts.most_common():
            holders = [source for source in sources if kind in source[key]]
            places = [place for source in holders for place in source["named"].get(kind, [])][:NAMED]
            found: Report = {"severity": severity, "kind": kind, "count": count, "places": places}
            findings.append(found | {"by_source": [(source["name"], source[key][kind]) for source in holders]})
    return findings


def spans(tokens: list[list[Any]]) -> list[tuple[str, bool, bool]]:
    """(text, trained, special), neighbours of equal kind as one."""
    runs = groupby(tokens, key=lambda token: (bool(token[1]), bool(token[2])))
    return [("".join(token[0] for token in run), *kind) for kind, run in runs]


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


def place_on(value: int | None, edges: list[int]) -> float | None:
    """Where a value lies, in bins from the left; None outside the edges."""
    if value is None or not edges[0] <= value <= edges[-1]:
        return None
    i = min(bisect_right(edges, value), len(edges) - 1) - 1
    return i + (value - edges[i]) / (edges[i + 1] - edges[i])


def _sources(report: Report) -> list[Report]:
    return report["sources"] + ([report["held_out"]] if report["held_out"] else [])


def _plain(table: Table) -> str:
    table.box, table.pad_edge = None, False
    page = Console(width=PLAIN_WIDTH, color_system=None)
    with page.capture() as captured:
        page.print(table)
    return re.sub(" +$", "", captured.get(), flags=re.MULTILINE)


def _source_table(report: Report) -> Table:
    table = Table("source", box=box.SIMPLE_HEAD)
    for name in ("rows read", "defects", "left out", "examples", "tokens", "trained tokens"):
        table.add_column(name, justify="right")
    for source in _sources(report):
        name = source["name"] + (" (held out)" if source is report["held_out"] else "")
        found = sum(source["defects"].values()), sum(source["left_out"].values())
        counts = source["rows_read"], *found, source["examples"], source["tokens"], source["trained_tokens"]
        table.add_row(Text(name, overflow="fold"), *map(number, counts))
    return table


def _finding_table(report: Report) -> Table:
    table = Table("found", "rows", "what, and where first", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for found in find_all(report):
        what = Text("\n".join([found["kind"], *found["places"][:1]]), overflow="fold")
        table.add_row(found["severity"], number(found["count"]), what)
    if not table.rows:
        table.add_row("nothing", "", "no defects, no rows left out, no notes")
    return table


def _totals_table(report: Report) -> Table:
    totals, duplicates, leaks = report["totals"], report["duplicates"], report["leaks"]
    n = {key: number(value) for key, value in totals.items()}
    n["trained_share"] = share(totals["trained_tokens"], totals["tokens"])
    table = Table("total", "", box=box.SIMPLE_HEAD)
    for name, value in (
        ("rows", f"{n['rows_read']} read, {n['defects']} with defects, {n['left_out']} left out"),
        ("examples", f"{n['examples']} on {n['contexts']} contexts"),
        ("tokens", f"{n['tokens']}, {n['trained_tokens']} of them trained ({n['trained_share']})"),
        ("longest example", f"{n['longest_example_tokens']} tokens, max_length {number(report['max_length'])}"),
        ("prefix sharing", f"{n['executed_tokens']} executed tokens, {n['flat_tokens_per_executed_token']} to 1"),
        ("duplicates", _duplicates(duplicates) if duplicates else "not sought"),
        (
            "leaks",
            f"{leaks['rows']:,} also in the held-out data{_sampled(leaks)}" if leaks.get("checked") else "not sought",
        ),
    ):
        table.add_row(name, value)
    return table


def _duplicates(found: Report) -> str:
    return f"{found['exact_rows']:,} exact, {found['near_rows']:,} near{_sampled(found)}"


def _sampled(found: Report) -> str:
    """Near ones are looked for in a sample where there are too many texts for all."""
    return "" if found["near_share"] == 1 else f" (near ones in {share(found['near_share'], 1)} of the texts)"


def _visible(value: Any) -> Any:
    """The same JSON value, its invisible and dangerous characters written as ␛ or ⟨U+202E⟩."""
    if isinstance(value, str):
        return INVISIBLE.sub(lambda m: chr(0x2400 + ord(m[0])) if m[0] < " " else f"⟨U+{ord(m[0]):04X}⟩", value)
    if isinstance(value, dict):
        return {_visible(key): _visible(item) for key, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, list | tuple) else value
