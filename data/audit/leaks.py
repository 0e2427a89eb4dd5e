"""Duplicates and leaks: training rows that equal earlier rows, or rows of the held-out data."""

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data.audit.duplicates import Match, TextIndex, normalize, text_key
from data.conversation import TOOLS, Conversation, DataError, Ledger
from data.tool_calls import spoken_text

PAIRS = 100  # named in a report; all are counted
SAME_ROW, SAME_TEXT, NEAR_TEXT = "same row", "same text", "nearly the same text"
LEAKED, DUPLICATE, NEAR_DUPLICATE = "is in the held-out data", "duplicate row", "near duplicate"


@dataclass
class Pairs:
    """Pairs of equal rows: counts by kind, and the first PAIRS pairs with both places."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kind: str, match: Match, **places: str) -> None:
        self.counts[kind] += 1
        if len(self.first) < PAIRS:
            self.first.append({**places, "kind": kind, "similarity": round(match.similarity, 3)})


@dataclass
class DuplicateReport:
    """Rows that equal an earlier row. near_share: share of the texts that are searched for near duplicates."""

    exact_rows: int = 0
    near_rows: int = 0
    removed: int = 0
    texts: int = 0
    near_share: float = 1.0
    pairs: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class LeakReport:
    """Training rows that are in the held-out data: whole rows (`exact`), their `context`, or nearly their context
    (`near`)."""

    checked: bool = False
    held_out_rows: int = 0
    rows: int = 0
    exact: int = 0
    context: int = 0
    near: int = 0
    removed: int = 0
    near_share: float = 1.0
    pairs: list[dict[str, Any]] = field(default_factory=list)


class Comparison:
    """Index of training and held-out rows. Rows are compared by all turns, texts by context: a passage, post, prompt.

    A blank text (a post that only quotes) equals no other.
    """

    def __init__(self, leaks: str, duplicates: str, near_duplicates: str) -> None:
        """Each argument is "keep" or "remove": whether such rows stay in training."""
        self.policy = {LEAKED: leaks, DUPLICATE: duplicates, NEAR_DUPLICATE: near_duplicates}
        self.held_out = 0  # rows
        self.held_out_rows, self.held_out_texts = TextIndex(near=False), TextIndex()
        self.rows, self.texts = TextIndex(near=False), TextIndex()
        self.near: dict[int, Match] = {}  # key of a training text -> the earlier text that it nearly equals
        self.leaked: dict[int, Match] = {}  # key of a training text -> the held-out text that it equals, or nearly
        self.duplicates, self.leaks = Pairs(), Pairs()

    def hold_out(self, conversation: Conversation) -> None:
        self.held_out += 1
        if text := normalize(conversation.context):
            self.held_out_rows.add(_row_text(conversation), conversation.where)
            self.held_out_texts.add(text, conversation.where)

    def leaves_out(self, conversation: Conversation, ledger: Ledger) -> bool:
        """Count the row if it or its text occurs elsewhere; return whether it is not trained on for that reason. Only
        rows that are trained on enter the index, so one of two copies stays."""
        where, row, text = conversation.where, _row_text(conversation), normalize(conversation.context)
        if not text:
            return False
        key = text_key(text)
        earlier = self.texts.find(text)
        if not (earlier and earlier.exact):  # an equal earlier text has been compared already
            if earlier:
                self.near[key] = earlier
            if leaked := self.held_out_texts.find(text):
                self.leaked[key] = leaked
        if leak := self._leak(row, key):
            kind, match = leak
            self.leaks.add(kind, match, where=where, held_out=match.where)
            if self._remove(LEAKED, ledger, where, f"{kind} as {match.where}"):
                return True
        if twin := self.rows.find(row):
            self.duplicates.add(SAME_ROW, twin, where=where, same_as=twin.where)
            return self._remove(DUPLICATE, ledger, where, f"same as {twin.where}")
        if near := self.near.get(key):
            self.duplicates.add(NEAR_TEXT, near, where=where, same_as=near.where)
            if self._remove(NEAR_DUPLICATE, ledger, where, f"nearly the text of {near.where}"):
                return True
        self.rows.add(row, where)
        self.texts.add(text, where)
        return False

    def report(self, removed: Counter[str]) -> tuple[DuplicateReport, LeakReport]:
        """Counts and first pairs. removed: number of rows left out, by reason."""
        duplicates, leaks = self.duplicates.counts, self.leaks.counts
        return DuplicateReport(
            exact_rows=duplicates[SAME_ROW],
            near_rows=duplicates[NEAR_TEXT],
            removed=removed[DUPLICATE] + removed[NEAR_DUPLICATE],
            texts=len(self.texts),
            near_share=round(self.texts.near_share, 4),
            pairs=self.duplicates.first,
        ), LeakReport(
            checked=self.held_out > 0,
            held_out_rows=self.held_out,
            rows=leaks.total(),
            exact=leaks[SAME_ROW],
            context=leaks[SAME_TEXT],
            near=leaks[NEAR_TEXT],
            removed=removed[LEAKED],
            near_share=round(self.held_out_texts.near_share, 4),
            pairs=self.leaks.first,
        )

    def _leak(self, row: str, key: int) -> tuple[str, Match] | None:
        if same := self.held_out_rows.find(row):
            return SAME_ROW, same
        if match := self.leaked.get(key):
            return (SAME_TEXT if match.exact else NEAR_TEXT), match
        return None

    def _remove(self, reason: str, ledger: Ledger, where: str, problem: str) -> bool:
        if self.policy[reason] == "remove":
            ledger.leave_out(reason, DataError(where, problem))
        return self.policy[reason] == "remove"


def _row_text(conversation: Conversation) -> str:
    tools = conversation.template_arguments.get(TOOLS)
    said = (f"{m['role']}: {spoken_text(m)}" for m in conversation.messages)
    return "\n".join([json.dumps(tools), *said] if tools else said)
