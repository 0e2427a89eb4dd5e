"""Conversation, which every reader yields and every later step takes, and the ledger of defects."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data.errors import UserError

# role and content; of an assistant's turn the thought before it, as THOUGHT, and CALLS in OpenAI's layout, their
# arguments as objects; of a tool's turn perhaps `name` and `tool_call_id`
Message = dict[str, Any]

ARGUMENTS = "chat_template_kwargs"  # in a row, in a tokenizer's config and in a request to vLLM
DATE = "template_date"  # YYYY-MM-DD: in a tokenizer's config, what its template writes as today's date
THOUGHT = "reasoning_content"  # in a message
CALLS = "tool_calls"  # in a message
TOOLS = "tools"  # in a row, in what a chat template is given and in a request

Finding = tuple[Counter[str], str, str, str]  # counter, kind, where, "where: problem"

NAMED = 5  # places named for each kind of finding; all places are counted


class DataError(UserError):
    """A defect in the user's data: its place ("file:line" or "file: id"), what is wrong and what to do.

    `kind` groups equal defects in a report. It is a few words without values: "not UTF-8".
    """

    def __init__(self, where: str, problem: str, kind: str = "") -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where, self.problem, self.kind = where, problem, kind or problem.split(":")[0]


@dataclass(frozen=True)
class Conversation:
    """Role/content turns that end with the assistant's answer, and the place of their row."""

    messages: tuple[Message, ...]
    id: str
    where: str  # "file:line" or "file: id", for messages to the user
    answers: tuple[str, ...] = ()  # gold answers; empty if the question is unanswerable
    context: str = ""  # text that several conversations may share: a passage, a post, a prompt
    group: str = ""  # a split keeps it on one side, if it is larger than the context: a thread
    label: str = ""  # for classification
    question: str = ""  # SQuAD: the question without the rest of the prompt
    starts: tuple[int, ...] = ()  # SQuAD: the character of `context` at which each of `answers` begins
    not_learnt: tuple[int, ...] = ()  # places in `messages` of the assistant's turns that carry no loss
    template_arguments: dict[str, Any] = field(default_factory=dict)  # of this row, for the chat template; with TOOLS

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return str(self.messages[-1]["content"])

    @property
    def cluster(self) -> str:
        """Conversations of one cluster are not independent: a split and a bootstrap keep them together."""
        return self.group or self.context


@dataclass
class Ledger:
    """Findings about one source: defects (rows that can't be used) and notes (repaired or unusual rows).

    All findings are counted by kind; the first NAMED of each kind keep their full text. The ledger raises nothing:
    its reader decides at the end, so that a user sees all defects at once.
    """

    source: str
    rows: int = 0  # rows read, with or without defects
    formats: Counter[str] = field(default_factory=Counter)  # rows by recognised format
    defects: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)  # where reading of a file stopped, and why; the rest is unknown
    left_out: Counter[str] = field(default_factory=Counter)  # rows that are not trained on, by reason
    named: dict[str, list[str]] = field(default_factory=dict)  # kind -> "where: problem"
    places: dict[str, list[str]] = field(default_factory=dict)  # kind -> "where"
    postponed: list[Finding] | None = None  # findings that wait, see `ahead`

    def defect(self, error: DataError) -> None:
        self.record(self.defects, error.kind, error.where, str(error))

    def break_off(self, error: DataError) -> None:
        """Record that a file can't be read to its end. The number of lost rows is unknown, so a run must stop."""
        self.unread.append(str(error))

    def note(self, where: str, kind: str, problem: str = "") -> None:
        self.record(self.notes, kind, where, f"{where}: {problem or kind}")

    def leave_out(self, kind: str, error: DataError | None = None) -> None:
        """Count a row that is not trained on; `error` gives details, kept for the first rows of the kind."""
        self.record(self.left_out, kind, error.where if error else "", str(error or ""))

    def record(self, counts: Counter[str], kind: str, where: str, text: str) -> None:
        if self.postponed is not None:
            self.postponed.append((counts, kind, where, text))
            return
        counts[kind] += 1
        if text and len(named := self.named.setdefault(kind, [])) < NAMED:
            named.append(text)
            self.places.setdefault(kind, []).append(where)

    def ahead(self, rows: Iterable[Conversation]) -> Iterator[tuple[Conversation | None, list[Finding]]]:
        """Each row with the findings up to it, and None with those after the last. They are not recorded: the caller
        does so at the row's turn, so that they keep their order if rows are read while earlier ones wait."""
        iterator = iter(rows)
        row: Conversation | None
        while True:
            findings: list[Finding] = []
            self.postponed = findings
            try:
                row = next(iterator, None)
            finally:
                self.postponed = None
            yield row, findings
            if row is None:
                return

    def explain(self) -> Iterator[str]:
        """One line for each file that could not be read to its end, and for each kind of defect."""
        yield from self.unread
        for kind, count in self.defects.most_common():
            yield self.line(kind, count)

    def line(self, kind: str, count: int) -> str:
        """The first finding of a kind in full, the places of the next ones, and the count."""
        first, others = self.named[kind][0], self.places[kind][1:]
        places = f", also {', '.join(others)}" if others else ""
        return first + (f" ({count} such rows{places}{' ...' if count > NAMED else ''})" if count > 1 else "")
