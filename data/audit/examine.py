"""Sources -> encoded examples and the account of every row: what is trained, what was left out, and why.

The one pass over the data that training and `graft check` share. Rows are read, compared, encoded and written one at a
time; what grows with the data are hashes and counts.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from data.audit.leaks import Comparison
from data.audit.report import DataReport
from data.audit.row_counts import (
    HELD_OUT,
    NOT_DRAWN,
    SHOWN,
    Lengths,
    Sample,
    SourceAccount,
    SourceReport,
    decoded,
    totals,
)
from data.audit.split import chosen_contexts, context_key, count_contexts, held_out_by_share
from data.audit.triggers import Triggers
from data.conversation import Conversation, DataError, Ledger
from data.encode.chat import AUDITS, Example, TooLong, encode_turns, markers_in
from data.encode.example_store import Examples, Writer
from data.encode.template import OVER_LIMITS
from data.progress import track
from data.readers.source import SourceLike, read_rows


class WeightedSource(SourceLike, Protocol):
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Rules:
    """What a recipe says of which rows are trained on; the names are the recipe's."""

    task: str
    max_length: int
    audit: Mapping[str, int]  # key of AUDITS -> how many such rows are allowed
    max_leaks: int | None = None  # None: leaks are reported and stop nothing
    on_error: str = "stop"
    too_long: str = "stop"
    duplicates: str = "keep"
    near_duplicates: str = "keep"
    leaks: str = "keep"
    max_contexts: int | None = None
    unanswerable_share: float | None = None
    held_out_share: float | None = None
    held_out_seed: int = 0
    seed: int = 0


def examine(
    sources: Sequence[WeightedSource],
    held_out: SourceLike | None,
    tokenizer: PreTrainedTokenizerBase,
    rules: Rules,
    folder: Path,
) -> DataReport:
    """Write the examples into `folder` and return the report. Its "stops" are the reasons not to train, a line each;
    the examples are then those of the other rows."""
    examination = _Examination(tokenizer, rules, Writer(folder))
    other = SourceAccount(Ledger(held_out.path)) if held_out else None
    if held_out and other:
        for conversation in track(read_rows(held_out, rules.task, other.ledger), "read held-out data"):
            examination.hold_out(conversation, other.ledger)
    elif rules.held_out_share:
        for conversation in read_held_out(sources, rules):
            examination.comparison.hold_out(conversation)
    if rules.max_contexts is not None:
        counts = count_contexts(c for c in _conversations(sources, rules) if not _is_held_out(c, rules))
        examination.drawn = chosen_contexts(counts, rules.max_contexts, rules.seed, rules.unanswerable_share)
    accounts = []
    for source in sources:
        account = SourceAccount(Ledger(source.path), source.weight)
        accounts.append(account)
        for conversation in track(read_rows(source, rules.task, account.ledger), f"encode {Path(source.path).name}"):
            examination.take(conversation, account)
    examination.writer.close()
    examination.triggers.note()
    stops = _stops([*accounts, *([other] if other else [])], examination, rules)
    return examination.report(accounts, other, stops, folder)


def read_held_out(sources: Sequence[WeightedSource], rules: Rules) -> Iterator[Conversation]:
    """The clusters of the training data that `held_out_share` keeps apart."""
    return (c for c in _conversations(sources, rules) if _is_held_out(c, rules))


class _Examination:
    """What is known so far of the training rows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: Rules, writer: Writer) -> None:
        self.tokenizer, self.rules, self.writer = tokenizer, rules, writer
        self.comparison = Comparison(rules.leaks, rules.duplicates, rules.near_duplicates)
        self.drawn: set[str] | None = None
        self.lengths, self.answers = Lengths(), Lengths()
        self.labels: Counter[str] = Counter()
        self.sample = Sample(SHOWN, rules.seed)
        self.triggers = Triggers()

    def take(self, conversation: Conversation, account: SourceAccount) -> None:
        """Encode one row, or count why not."""
        rules, ledger = self.rules, account.ledger
        context = context_key(conversation)
        if _is_held_out(conversation, rules):
            return ledger.leave_out(HELD_OUT)
        if self.drawn is not None and context not in self.drawn:
            return ledger.leave_out(NOT_DRAWN)
        try:
            examples = encode_turns(conversation, self.tokenizer, rules.max_length)
        except TooLong as error:
            self.lengths.values.append(error.tokens)
            return ledger.leave_out(error.kind, error)
        except DataError as error:
            if error.kind in AUDITS.values():
                return ledger.leave_out(error.kind, error)
            if error.kind == OVER_LIMITS:  # the same for every row, after seconds of each
                raise
            return ledger.defect(error)
        if self.comparison.leaves_out(conversation, ledger):
            return None
        if markers := markers_in(conversation, self.tokenizer):
            ledger.note(conversation.where, "control markers in the text, encoded as plain text", ", ".join(markers))
        self.triggers.add(conversation, ledger)
        for example in examples:
            self._keep(dataclasses.replace(example, context=context), account)
        if conversation.label:
            self.labels[conversation.label] += 1
        return None

    def hold_out(self, conversation: Conversation, ledger: Ledger) -> None:
        """Remember a held-out row, and tell where it can't be encoded: prompts are scored all the same."""
        self.comparison.hold_out(conversation)
        try:
            encode_turns(conversation, self.tokenizer, self.rules.max_length)
        except TooLong as error:
            ledger.note(error.where, "longer than max_length, so not in held-out loss and parity check", error.problem)
        except DataError as error:
            if error.kind == OVER_LIMITS:
                raise
            ledger.defect(error)

    def _keep(self, example: Example, account: SourceAccount) -> None:
        self.writer.add(example, account.weight)
        account.count(example)
        self.lengths.values.append(len(example.ids))
        self.answers.values.append(sum(example.loss_mask))
        self.sample.add(example)

    def report(
        self, accounts: Sequence[SourceAccount], other: SourceAccount | None, stops: list[str], folder: Path
    ) -> DataReport:
        rules, removed = self.rules, Counter[str]()
        for account in accounts:
            removed.update(account.ledger.left_out)
        longest = max(self.lengths.values, default=0)
        duplicates, leaks = self.comparison.report(removed)
        return DataReport(
            created_by=f"graft {version('graft')}",
            task=rules.task,
            max_length=rules.max_length,
            stops=stops,
            totals=totals(accounts, len(set(Examples(folder).contexts)), longest),
            sources=[account.report() for account in accounts],
            held_out=SourceReport.of(other.ledger) if other else None,
            lengths={
                "example": self.lengths.histogram(rules.max_length),
                "answer": self.answers.histogram(rules.max_length),
            },
            labels=dict(self.labels.most_common()),
            duplicates=duplicates,
            leaks=leaks,
            examples=[decoded(example, self.tokenizer) for example in self.sample.kept],
        )


def nothing_held_out(share: float | None) -> str:
    return f"eval.share {share} holds out nothing; raise it, or name eval.data" if share else "eval.data holds no row"


def _stops(accounts: Sequence[SourceAccount], examination: _Examination, rules: Rules) -> list[str]:
    lines = []
    for account in accounts:
        lines += account.ledger.unread
        for kind, count in account.ledger.defects.most_common() if rules.on_error == "stop" else ():
            lines.append(f"{account.ledger.line(kind, count)}; correct it, or set data.on_error: skip")
    for key, kind in AUDITS.items():
        found = {a: count for a in range(len(accounts)) if (count := accounts[a].ledger.left_out[kind])}
        allowed = rules.audit[key]
        if sum(found.values()) > allowed and not (key == "truncated" and rules.too_long == "skip"):
            limit = f"; data.audit.{key} allows {allowed}" if allowed else ""
            lines += [accounts[a].ledger.line(kind, count) + limit for a, count in found.items()]
    if rules.held_out_share and not examination.comparison.held_out:
        lines.append(nothing_held_out(rules.held_out_share))
    leaks = examination.comparison.leaks
    if rules.max_leaks is not None and rules.leaks == "keep" and leaks.counts.total() > rules.max_leaks:
        first = leaks.first[0]
        lines.append(
            f"{first['where']}: {first['kind']} as the held-out {first['held_out']} ({leaks.counts.total()} such rows, "
            f"data.audit.leaks allows {rules.max_leaks}); remove them or set data.leaks: remove"
        )
    if not lines and not examination.sample.seen:
        read = sum(account.ledger.rows for account in accounts)
        reasons = Counter[str]()
        for account in accounts:
            reasons.update(account.ledger.left_out + account.ledger.defects)
        lines.append(f"no row of {read} is left to train on: {', '.join(f'{n} {r}' for r, n in reasons.items())}")
    return lines


def _conversations(sources: Sequence[WeightedSource], rules: Rules) -> Iterator[Conversation]:
    """A pass whose findings are not kept: the main one names them."""
    for source in sources:
        yield from track(read_rows(source, rules.task, Ledger(source.path)), f"read {Path(source.path).name}")


def _is_held_out(conversation: Conversation, rules: Rules) -> bool:
    share = rules.held_out_share
    return share is not None and held_out_by_share(conversation.cluster, share, rules.held_out_seed)
