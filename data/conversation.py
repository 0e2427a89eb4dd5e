"""What every reader yields and every later step takes: a conversation that knows where it came from."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from data.errors import UserError

Message = dict[str, str]

NAMED = 5  # places that are named for each kind of finding; all are counted


class DataError(UserError):
    """A defect in the user's data: where it is ("file:line" or "file: id"), what is wrong and what to do.

    `kind` groups equal defects in a report, a few words without values: "not UTF-8".
    """

    def __init__(self, where: str, problem: str, kind: str = "") -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where, self.problem, self.kind = where, problem, kind or problem.split(":")[0]


@dataclass(frozen=True)
class Conversation:
    """Role/content turns that end with the assistant's answer, and where they came from."""

    messages: tuple[Message, ...]
    id: str
    where: str  # "file:line" or "file: id", for messages to the user
    answers: tuple[str, ...] = ()  # gold answers; empty: the right answer is that there is none
    context: str = ""  # the text that several conversations may share (a passage, a post, a prompt)
    group: str = ""  # what a split must keep on one side, if that is more than the context: a thread
    label: str = ""  # of a classification
    question: str = ""  # alone, without what the prompt puts around it: SQuAD
    starts: tuple[int, ...] = ()  # where each of `answers` begins in `context`, in characters: SQuAD

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]

    @property
    def cluster(self) -> str:
        """Conversations of one cluster are not independent: one side of a split, one draw of a bootstrap."""
        return self.group or self.context


@dataclass
class Ledger:
    """Findings on one source while it is read: defects (rows that can't be used) and notes (what was mended or is
    worth knowing). All are counted by kind, the first NAMED of each kind kept word for word. Nothing is raised: who
    reads decides at the end, so that a user sees all defects at once.
    """

    source: str
    rows: int = 0  # read, with or without defects
    formats: Counter[str] = field(default_factory=Counter)  # rows of each format that was recognised
    defects: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    unread: list[str] = field(default_factory=list)  # where reading of a file broke off, and why; its rest is unknown
    left_out: Counter[str] = field(default_factory=Counter)  # whole rows that are not trained on, by reason
    named: dict[str, list[str]] = field(default_factory=dict)  # kind -> "where: problem"
    places: dict[str, list[str]] = field(default_factory=dict)  # kind -> "where"

    def defect(self, error: DataError) -> None:
        self.defects[error.kind] += 1
        self._name(error.kind, error.where, str(error))

    def break_off(self, error: DataError) -> None:
        """Say that a file could not be read to its end: how many rows are lost is not known, so nothing may go on."""
        self.unread.append(str(error))

    def note(self, where: str, kind: str, problem: str = "") -> None:
        self.notes[kind] += 1
        self._name(kind, where, f"{where}: {problem or kind}")

    def leave_out(self, kind: str, error: DataError | None = None) -> None:
        """Count a row that is not trained on; `error` says of the first ones what the kind does not."""
        self.left_out[kind] += 1
        if error:
            self._name(kind, error.where, str(error))

    def _name(self, kind: str, where: str, text: str) -> None:
        named = self.named.setdefault(kind, [])
        if len(named) < NAMED:
            named.append(text)
            self.places.setdefault(kind, []).append(where)

    def explain(self) -> Iterator[str]:
        """One line for each file that could not be read to its end, and for each kind of defect."""
        yield from self.unread
        for kind, count in self.defects.most_common():
            yield self.line(kind, count)

    def line(self, kind: str, count: int) -> str:
        """The first place of a kind in full, the next ones by place, and how many there are."""
        first, others = self.named[kind][0], self.places[kind][1:]
        places = f", also {', '.join(others)}" if others else ""
        return first + (f" ({count} such rows{places}{' ...' if count > NAMED else ''})" if count > 1 else "")
