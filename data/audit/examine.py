"""Sources -> encoded examples, and the data report: which rows are trained on, which are left out, and why.

Training and `graft check` share this pass over the data. Rows are read, compared, encoded and written one at a time;
only hashes and counts grow with the data.
"""

import dataclasses
from array import array
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
    Sample,
    SourceAccount,
    SourceReport,
    decoded,
    histogram,
    totals,
)
from data.audit.split import chosen_contexts, context_key, count_contexts, held_out_by_share
from data.audit.triggers import Triggers
from data.conversation import Conversation, DataError, Ledger
from data.encode.calls import uses_tools
from data.encode.chat import AUDITS, Example, TooLong, encode_ahead, has_thought, learning_last_turn
from data.encode.example_store import Examples, Writer
from data.encode.markers import markers_in
from data.encode.template import OVER_LIMITS
from data.progress import track
from data.readers.source import SourceLike, read_rows

CALLS = "tools, or calls of tools"  # a note
THOUGHTS = "a thought before an answer, which is learnt too"  # a note


class WeightedSource(SourceLike, Protocol):
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Rules:
    """Which rows a recipe trains on; the names are the recipe's."""

    task: str
    max_length: int
    audit: Mapping[str, int]  # key of AUDITS -> number of such rows that is allowed
    max_leaks: int | None = None  # None: leaks are reported but stop nothing
    on_error: str = "stop"
    too_long: str = "stop"
    duplicates: str = "keep"
    near_duplicates: str = "keep"
    leaks: str = "keep"
    max_contexts: int | None = None
    train_turns: str = "all"
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
    """Write the examples into `folder` and return the report. Its `stops` are the reasons not to train, a line each;
    if there are any, the examples are those of the remaining rows."""
    examination = _Examination(tokenizer, rules, Writer(folder))
    held_out_ledger = Ledger(held_out.path) if held_out else None
    if held_out and held_out_ledger:
        rows = track(read_rows(held_out, rules.task, held_out_ledger), "read held-out data")
        for conversation, examples in encode_ahead(rows, tokenizer, rules.max_length, held_out_ledger):
            examination.hold_out(conversation, examples, held_out_ledger)
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
        rows = track(read_rows(source, rules.task, account.ledger), f"encode {Path(source.path).name}")
        chosen = (row for row in rows if examination.chooses(row, account.ledger))
        learnt = map(learning_last_turn, chosen) if rules.train_turns == "last" else chosen
        for conversation, examples in encode_ahead(learnt, tokenizer, rules.max_length, account.ledger):
            examination.take(conversation, examples, account)
    examination.writer.close()
    examination.triggers.note()
    ledgers = [account.ledger for account in accounts]
    stops = _stops([*ledgers, *([held_out_ledger] if held_out_ledger else [])], examination, rules)
    return examination.report(accounts, held_out_ledger, stops, folder)


def read_held_out(sources: Sequence[WeightedSource], rules: Rules) -> Iterator[Conversation]:
    """Rows of the training data that `held_out_share` holds out: whole clusters."""
    return (c for c in _conversations(sources, rules) if _is_held_out(c, rules))


class _Examination:
    """Examples, comparisons and counts of the training rows so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: Rules, writer: Writer) -> None:
        self.tokenizer, self.rules, self.writer = tokenizer, rules, writer
        self.comparison = Comparison(rules.leaks, rules.duplicates, rules.near_duplicates)
        self.drawn: set[str] | None = None
        self.lengths, self.answers = array("I"), array("I")  # in tokens, 4 bytes each
        self.labels: Counter[str] = Counter()
        self.sample = Sample(SHOWN, rules.seed)
        self.triggers = Triggers()

    def chooses(self, conversation: Conversation, ledger: Ledger) -> bool:
        """Whether a row is of the training data; if not, it is counted."""
        if _is_held_out(conversation, self.rules):
            ledger.leave_out(HELD_OUT)
        elif self.drawn is not None and context_key(conversation) not in self.drawn:
            ledger.leave_out(NOT_DRAWN)
        else:
            return True
        return False

    def take(self, conversation: Conversation, examples: list[Example] | DataError, account: SourceAccount) -> None:
        """Keep the examples of one row, or count the reason why it is left out."""
        ledger = account.ledger
        if isinstance(examples, DataError):
            if isinstance(examples, TooLong):
                self.lengths.append(examples.tokens)
            if examples.kind in AUDITS.values():
                return ledger.leave_out(examples.kind, examples)
            if examples.kind == OVER_LIMITS:  # the same for every row, and each takes seconds
                raise examples
            return ledger.defect(examples)
        if self.comparison.leaves_out(conversation, ledger):
            return None
        if markers := markers_in(conversation, self.tokenizer):
            ledger.note(conversation.where, "control markers in the text, encoded as plain text", ", ".join(markers))
        if any(map(has_thought, conversation.messages)):
            ledger.note(conversation.where, THOUGHTS)
        if uses_tools(conversation.messages, conversation.template_arguments):
            ledger.note(conversation.where, CALLS)
        self.triggers.add(conversation, ledger)
        context = context_key(conversation)
        for example in examples:
            self._keep(dataclasses.replace(example, context=context), account)
        if conversation.label:
            self.labels[conversation.label] += 1
        return None

    def hold_out(self, conversation: Conversation, examples: list[Example] | DataError, ledger: Ledger) -> None:
        """Add a held-out row to the comparison. If it can't be encoded, it gets a note: its prompt is still scored."""
        self.comparison.hold_out(conversation)
        if isinstance(examples, TooLong):
            kind = "longer than max_length, so not in held-out loss and parity check"
            ledger.note(examples.where, kind, examples.problem)
        elif isinstance(examples, DataError):
            if examples.kind == OVER_LIMITS:
                raise examples
            ledger.defect(examples)

    def _keep(self, example: Example, account: SourceAccount) -> None:
        self.writer.add(example, account.weight)
        account.count(example)
        self.lengths.append(len(example.ids))
        self.answers.append(sum(example.loss_mask))
        self.sample.add(example)

    def report(
        self, accounts: Sequence[SourceAccount], held_out: Ledger | None, stops: list[str], folder: Path
    ) -> DataReport:
        rules = self.rules
        longest = max(self.lengths, default=0)
        removed = sum((account.ledger.left_out for account in accounts), Counter[str]())
        duplicates, leaks = self.comparison.report(removed)
        return DataReport(
            created_by=f"graft {version('graft')}",
            task=rules.task,
            max_length=rules.max_length,
            stops=stops,
            totals=totals(accounts, Examples(folder).count_contexts(), longest),
            sources=[account.report() for account in accounts],
            held_out=SourceReport.of(held_out) if held_out else None,
            lengths={
                "example": histogram(self.lengths, rules.max_length),
                "answer": histogram(self.answers, rules.max_length),
            },
            labels=dict(self.labels.most_common()),
            duplicates=duplicates,
            leaks=leaks,
            examples=[decoded(example, self.tokenizer) for example in self.sample.examples],
        )


def nothing_held_out(share: float | None) -> str:
    return (
        f"eval.share {share} holds out nothing; raise it, or name eval.data"
        if share
        else "eval.data has no row; name another file"
    )


def _stops(ledgers: Sequence[Ledger], examination: _Examination, rules: Rules) -> list[str]:
    lines = []
    for ledger in ledgers:
        lines += ledger.unread
        for kind, count in ledger.defects.most_common() if rules.on_error == "stop" else ():
            lines.append(f"{ledger.line(kind, count)}; correct it, or set data.on_error: skip")
    for key, kind in AUDITS.items():
        allowed = rules.audit[key]
        total = sum(ledger.left_out[kind] for ledger in ledgers)
        if total > allowed and not (key == "truncated" and rules.too_long == "skip"):
            limit = f"; data.audit.{key} allows {allowed}" if allowed else ""
            lines += [ledger.line(kind, count) + limit for ledger in ledgers if (count := ledger.left_out[kind])]
    if rules.held_out_share and not examination.comparison.held_out:
        lines.append(nothing_held_out(rules.held_out_share))
    leaks = examination.comparison.leaks
    if rules.max_leaks is not None and rules.leaks == "keep" and leaks.counts.total() > rules.max_leaks:
        first = leaks.first[0]
        lines.append(
            f"{first['where']}: {first['kind']} as the held-out {first['held_out']} ({leaks.counts.total()} such rows, "
            f"data.audit.leaks allows {rules.max_leaks}); remove them or set data.leaks: remove"
        )
    if not lines and not examination.sample.length:
        read = sum(ledger.rows for ledger in ledgers)
        reasons = sum((ledger.left_out + ledger.defects for ledger in ledgers), Counter[str]())
        lines.append(f"no row of {read} is left to train on: {', '.join(f'{n} {r}' for r, n in reasons.items())}")
    return lines


def _conversations(sources: Sequence[WeightedSource], rules: Rules) -> Iterator[Conversation]:
    """A pass over all rows that drops its findings, since the main pass names them."""
    for source in sources:
        yield from track(read_rows(source, rules.task, Ledger(source.path)), f"read {Path(source.path).name}")


def _is_held_out(conversation: Conversation, rules: Rules) -> bool:
    share = rules.held_out_share
    return share is not None and held_out_by_share(conversation.cluster, share, rules.held_out_seed)
