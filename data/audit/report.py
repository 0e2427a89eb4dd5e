"""The data report: its record, a self-contained HTML page, and tables for the terminal."""

import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich import box
from rich.table import Table
from rich.text import Text

from data.atomic import write_text
from data.audit.leaks import DuplicateReport, LeakReport
from data.audit.row_counts import SourceReport, Totals
from data.conversation import NAMED
from data.page import number, render, share, visible
from data.terminal import Console

Rows = list[tuple[str, ...]]  # of a table on the screen, headings first

PAGE = Path(__file__).with_name("report.html")
PLAIN_WIDTH = 160  # columns of a table in a log file, which has no window to fit
SEVERITIES = {"defects": "defect", "left_out": "left out", "notes": "note"}  # field of SourceReport -> heading


@dataclass
class DataReport:
    """Content of data_report.json. `stops`: each line names a reason that stops the run, and the remedy.

    lengths: bin i of a histogram lies between edges[i] and edges[i + 1]; `clipped` rows beyond the last edge are in the
    last bin. examples: see decoded(). A missing value is shown as unknown, never as zero.
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
    duplicates: DuplicateReport | None = None  # None: not searched for
    leaks: LeakReport = field(default_factory=LeakReport)
    examples: list[dict[str, Any]] = field(default_factory=list)
    tokenizer: dict[str, str] = field(default_factory=dict)
    examples_sha256: str | None = None  # of what is trained, see data/encode/example_store.py; None: a date is in it

    @property
    def all_sources(self) -> list[SourceReport]:
        return [*self.sources, *([self.held_out] if self.held_out else [])]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "DataReport":
        """The record of a data_report.json; keys that the file lacks are unknown."""
        return TypeAdapter(cls).validate_python(value)


@dataclass
class Finding:
    """One kind of defect, reason to leave rows out, or note: number of rows, and their first places."""

    severity: str
    kind: str
    count: int
    places: list[str]
    by_source: list[tuple[str, int]]


def write_html(report: DataReport, path: Path) -> None:
    page = render(PAGE, findings=find_all(report), all_sources=report.all_sources, **vars(report))
    write_text(path, page)


def print_report(report: DataReport, console: Console) -> None:
    """Print sources, findings, totals and the verdict, without lines and colour if the console is no terminal."""
    report = DataReport.from_json(visible(report.to_json()))
    screen = console.is_terminal
    if not screen:
        console.width = PLAIN_WIDTH
    for rows in (_source_rows(report), _finding_rows(report), _total_rows(report)):
        table = Table(*rows[0], box=box.SIMPLE_HEAD if screen else None, pad_edge=screen)
        for column, text in zip(table.columns, rows[-1], strict=True):
            column.overflow, column.justify = "fold", "right" if re.fullmatch(r"[\d,]+|–", text) else "left"
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        console.print(table, *[""] * (not screen))
    verdict = ("Not ready to train:", "bold red") if report.stops else ("Ready to train.", "bold green")
    console.print(Text.assemble(verdict, *(f"\n- {stop}" for stop in report.stops)), soft_wrap=True)


def print_example(example: dict[str, Any], console: Console) -> None:
    """Print an example's tokens as text: trained ones in bold green, or between ⟦ ⟧ if there is no colour."""
    example = visible(example)
    colour = console.color_system is not None and not console.no_color
    length, trained = example["length"], example["trained"]
    head = f"{length:,} tokens, {trained:,} trained ({share(trained, length)})"
    legend = [("trained", "bold green"), "  ", ("special", "cyan")] if colour else ["⟦trained⟧"]
    text = Text.assemble((example["where"], "bold"), f"  {head}  ", *legend, "\n")
    for piece, is_trained, is_special in example["tokens"]:
        style = "bold green" if is_trained else "cyan" if is_special else ""
        text.append(piece if colour or not is_trained else f"⟦{piece}⟧", style=style)
    console.print(text, soft_wrap=True)


def find_all(report: DataReport) -> list[Finding]:
    """Defects, then rows left out, then notes; each kind once for all sources, the most frequent first."""
    findings = []
    for name, severity in SEVERITIES.items():
        counts = sum((Counter(getattr(source, name)) for source in report.all_sources), Counter[str]())
        for kind, count in counts.most_common():
            sources = [source for source in report.all_sources if kind in getattr(source, name)]
            places = [place for source in sources for place in source.named.get(kind, ())]
            by_source = [(source.name, getattr(source, name)[kind]) for source in sources]
            findings.append(Finding(severity, kind, count, places[:NAMED], by_source))
    return findings


def _source_rows(report: DataReport) -> Rows:
    rows: Rows = [("source", "rows read", "defects", "left out", "examples", "tokens", "trained tokens")]
    for source in report.all_sources:
        name = source.name + (" (held out)" if source is report.held_out else "")
        read = source.rows_read, sum(source.defects.values()), sum(source.left_out.values())
        rows.append((name, *map(number, (*read, source.examples, source.tokens, source.trained_tokens))))
    return rows


def _finding_rows(report: DataReport) -> Rows:
    rows: Rows = [("type", "rows", "finding, and its first place")]
    rows += [(f.severity, number(f.count), "\n".join([f.kind, *f.places[:1]])) for f in find_all(report)]
    return rows if rows[1:] else [*rows, ("nothing", "", "no defects, no rows left out, no notes")]


def _total_rows(report: DataReport) -> Rows:
    n = {name: number(value) for name, value in vars(report.totals).items()}
    not_chosen = f", {n['not_chosen']} not chosen" if report.totals.not_chosen else ""
    trained = share(report.totals.trained_tokens, report.totals.tokens)
    duplicates, leaks, repeated, leaked = report.duplicates, report.leaks, "not searched for", "not searched for"
    if duplicates:
        repeated = f"{duplicates.exact_rows:,} exact, {duplicates.near_rows:,} near{_sampled(duplicates)}"
    if leaks.checked:
        leaked = f"{leaks.rows:,} also in the held-out data{_sampled(leaks)}"
    return [
        ("total", ""),
        ("rows", f"{n['rows_read']} read, {n['defects']} with defects, {n['left_out']} left out{not_chosen}"),
        ("examples", f"{n['examples']} on {n['contexts']} contexts"),
        ("tokens", f"{n['tokens']}, {n['trained_tokens']} of them trained ({trained})"),
        ("longest example", f"{n['longest_example_tokens']} tokens, max_length {number(report.max_length)}"),
        ("prefix sharing", f"{n['executed_tokens']} executed tokens, {n['flat_tokens_per_executed_token']} to 1"),
        ("duplicates", repeated),
        ("leaks", leaked),
    ]


def _sampled(report: DuplicateReport | LeakReport) -> str:
    """The share of the texts that was searched for near ones, if not all were."""
    return "" if report.near_share == 1 else f" (near ones in {share(report.near_share, 1)} of the texts)"
