"""Counts of what becomes of every row: the numbers of data_report.json."""

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.conversation import Ledger
from data.encode.chat import Example, special_ids

HELD_OUT, NOT_DRAWN = "held out by eval.share", "not drawn by data.max_contexts"
NOT_CHOSEN = (HELD_OUT, NOT_DRAWN)  # nothing is wrong with such rows
SHOWN = 10  # examples in the report
BINS = 40


@dataclass
class SourceAccount:
    """One source: what its ledger says, and what was encoded of it."""

    ledger: Ledger
    weight: float = 1.0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def count(self, example: Example) -> None:
        self.examples += 1
        self.tokens += len(example.ids)
        self.trained_tokens += sum(example.loss_mask)

    def report(self, sha256: Mapping[str, str]) -> dict[str, Any]:
        ledger = self.ledger
        return {
            "name": ledger.source, "format": ", ".join(ledger.formats), "weight": self.weight, "rows_read": ledger.rows,
            "defects": dict(ledger.defects), "notes": dict(ledger.notes), "left_out": dict(ledger.left_out),
            "named": ledger.named, "examples": self.examples, "tokens": self.tokens,
            "trained_tokens": self.trained_tokens, "sha256": dict(sha256),
        }  # fmt: skip


class Lengths:
    """Token counts, 4 bytes each."""

    def __init__(self) -> None:
        self.values = array("I")

    def histogram(self, max_length: int) -> dict[str, Any]:
        """Bins of equal width up to twice max_length, the last one open; empty for no values."""
        if not self.values:
            return {}
        values = np.frombuffer(self.values, dtype=np.uint32)
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
    """A few examples drawn evenly from a stream of unknown length (reservoir sampling, Vitter 1985, algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.rng, self.seen = size, random.Random(seed), 0
        self.kept: list[Example] = []

    def add(self, example: Example) -> None:
        self.seen += 1
        if len(self.kept) < self.size:
            self.kept.append(example)
        elif (place := self.rng.randrange(self.seen)) < self.size:
            self.kept[place] = example


def decoded(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The example as text: runs of tokens that are alike in being trained and in being control tokens."""
    special = special_ids(tokenizer)
    runs: list[tuple[list[int], int, int]] = []
    for token, trained in zip(example.ids, example.loss_mask, strict=True):
        kind = (trained, int(token in special))
        if runs and runs[-1][1:] == kind:
            runs[-1][0].append(token)
        else:
            runs.append(([token], *kind))
    return {
        "where": example.where,
        "tokens": [[tokenizer.decode(ids), trained, control] for ids, trained, control in runs],
        "length": len(example.ids),
        "trained": sum(example.loss_mask),
    }


def totals(sources: Sequence[SourceAccount], contexts: int, longest: int) -> dict[str, Any]:
    not_chosen = sum(s.ledger.left_out[reason] for s in sources for reason in NOT_CHOSEN)
    return {
        "rows_read": sum(s.ledger.rows for s in sources),
        "defects": _sum(s.ledger.defects for s in sources),
        "left_out": _sum(s.ledger.left_out for s in sources) - not_chosen,
        "not_chosen": not_chosen,
        "examples": sum(s.examples for s in sources),
        "contexts": contexts,
        "tokens": sum(s.tokens for s in sources),
        "trained_tokens": sum(s.trained_tokens for s in sources),
        "longest_example_tokens": longest,
    }


def _sum(counters: Iterable[Counter[str]]) -> int:
    return sum(sum(counter.values()) for counter in counters)
