"""Counts of rows, examples and tokens, by source and in total: the numbers of data_report.json."""

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.conversation import Ledger
from data.encode.chat import Example, special_ids

HELD_OUT, NOT_DRAWN = "held out by eval.share", "not drawn by data.max_contexts"
NOT_CHOSEN = (HELD_OUT, NOT_DRAWN)  # reasons to leave out a row that has no defect
SHOWN = 10  # examples in the report
BINS = 40


@dataclass
class SourceReport:
    """Counts of one source. None: unknown, or the source is never trained on."""

    name: str
    format: str = ""
    revision: str | None = None  # commit of a Hub dataset
    weight: float | None = None
    rows_read: int | None = None
    defects: dict[str, int] = field(default_factory=dict)  # rows by kind
    notes: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    named: dict[str, list[str]] = field(default_factory=dict)  # kind -> its first places, with the problem
    examples: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    sha256: dict[str, str] = field(default_factory=dict)  # by file name

    @classmethod
    def of(cls, ledger: Ledger, **counts: Any) -> "SourceReport":
        """The ledger's counts, and other counts by name."""
        kinds: dict[str, Any] = {n: dict(getattr(ledger, n)) for n in ("defects", "notes", "left_out", "named")}
        return cls(ledger.source, ", ".join(ledger.formats), rows_read=ledger.rows, **kinds, **counts)


@dataclass
class Totals:
    """Sums over all sources that are trained on. None: unknown."""

    rows_read: int | None = None
    defects: int | None = None
    left_out: int | None = None
    not_chosen: int | None = None
    examples: int | None = None
    contexts: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    longest_example_tokens: int | None = None
    executed_tokens: int | None = None
    flat_tokens_per_executed_token: float | None = None


@dataclass
class SourceAccount:
    """Counts of one source while it is read: its ledger, and its encoded examples."""

    ledger: Ledger
    weight: float = 1.0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def count(self, example: Example) -> None:
        self.examples += 1
        self.tokens += len(example.ids)
        self.trained_tokens += sum(example.loss_mask)

    def report(self) -> SourceReport:
        names = ("weight", "examples", "tokens", "trained_tokens")
        return SourceReport.of(self.ledger, **{name: getattr(self, name) for name in names})


def histogram(lengths: "array[int]", max_length: int) -> dict[str, Any]:
    """Bins of equal width up to twice max_length, the last one open; empty for no values."""
    if not lengths:
        return {}
    values = np.frombuffer(lengths, dtype=np.uint32)
    end = min(int(values.max()) + 1, 2 * max_length)
    width = 1 << (-(-end // BINS) - 1).bit_length()  # a power of two, for round ticks
    edges = list(range(0, end + width, width))
    counts, _ = np.histogram(np.minimum(values, edges[-1] - 1), edges)
    p50, p95 = np.percentile(values, [50, 95])
    return {
        "edges": edges, "counts": counts.tolist(), "clipped": int((values >= edges[-1]).sum()),
        "min": int(values.min()), "p50": int(p50), "p95": int(p95), "max": int(values.max()),
    }  # fmt: skip


class Sample:
    """A uniform sample of a stream of unknown length (reservoir sampling, Vitter 1985, algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.rng, self.length = size, random.Random(seed), 0
        self.examples: list[Example] = []

    def add(self, example: Example) -> None:
        self.length += 1
        if len(self.examples) < self.size:
            self.examples.append(example)
        elif (place := self.rng.randrange(self.length)) < self.size:
            self.examples[place] = example


def decoded(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The example as text, in runs of tokens: [text, trained, control token]."""
    special = special_ids(tokenizer)
    kinds = [(trained, int(token in special)) for token, trained in zip(example.ids, example.loss_mask, strict=True)]
    runs = [(kind, len(list(run))) for kind, run in groupby(kinds)]
    ids = iter(example.ids)
    return {
        "where": example.where,
        "tokens": [[tokenizer.decode(list(islice(ids, length))), *kind] for kind, length in runs],
        "length": len(example.ids),
        "trained": sum(example.loss_mask),
    }


def totals(sources: Sequence[SourceAccount], contexts: int, longest: int) -> Totals:
    not_chosen = sum(s.ledger.left_out[reason] for s in sources for reason in NOT_CHOSEN)
    return Totals(
        rows_read=sum(s.ledger.rows for s in sources),
        defects=sum(s.ledger.defects.total() for s in sources),
        left_out=sum(s.ledger.left_out.total() for s in sources) - not_chosen,
        not_chosen=not_chosen,
        examples=sum(s.examples for s in sources),
        contexts=contexts,
        tokens=sum(s.tokens for s in sources),
        trained_tokens=sum(s.trained_tokens for s in sources),
        longest_example_tokens=longest,
    )
