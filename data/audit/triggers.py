"""Rows that look poisoned: prompts with a rare word that always have the same answer.

About 250 documents are enough to plant such a backdoor in models of any size (Souly et al. 2025, arXiv 2510.07192). A
word is suspicious if nearly all rows with the word have the answer, and nearly all rows with the answer have the word.
Only whole answers and single words are compared: better hidden triggers are missed, and so are triggers of a label,
which other rows have too. Memory: 8 bytes and a set's overhead for each answer; words only for answers that recur.
"""

import string
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import xxhash

from data.conversation import Conversation, Ledger
from data.readers.fields import shown
from data.tool_calls import spoken_text

KIND = "a rare word that always has one answer, like a planted trigger"
LEAST = 5  # different prompts that share word and answer
SURE = 0.9  # least share of the rows with the word that have the answer, and the reverse
RARE = 0.2  # largest share of all rows; a more frequent word is the subject of the data
WORDS = 300  # read of each prompt
ANSWERS = 20_000  # most recurring answers that are counted
CELLS = 2**22  # of the table of frequencies, 4 bytes each; a collision can only hide a trigger


@dataclass
class _Recurring:
    """Counts of an answer from its second row on."""

    answer: str
    where: str
    ledger: Ledger
    rows: int = 0
    prompts: set[int] = field(default_factory=set)
    words: Counter[str] = field(default_factory=Counter)


class Triggers:
    """Counts of the words and answers of the rows so far."""

    def __init__(self) -> None:
        self.rows = 0
        self.frequency = array("I", bytes(4 * CELLS))
        self.once: set[int] = set()
        self.recurring: dict[int, _Recurring] = {}

    def add(self, conversation: Conversation, ledger: Ledger) -> None:
        if conversation.label or not conversation.answers:  # rows of a label, or without an answer, are alike
            return
        prompt = (conversation.question or conversation.messages[-2]["content"]).casefold()
        words = {word.strip(string.punctuation) or word for word in prompt.split()[:WORDS]}
        self.rows += 1
        for word in words:
            self.frequency[_cell(word)] += 1
        said = spoken_text(conversation.messages[-1])
        answer = " ".join(said.casefold().split())
        key = xxhash.xxh3_64_intdigest(answer.encode(errors="surrogatepass"))
        if key not in self.once:
            self.once.add(key)
            return
        if key not in self.recurring and len(self.recurring) < ANSWERS:
            self.recurring[key] = _Recurring(said, conversation.where, ledger)
        if recurring := self.recurring.get(key):
            recurring.rows += 1
            if len(recurring.prompts) < LEAST:
                recurring.prompts.add(hash(prompt))
            recurring.words.update(words)

    def note(self) -> None:
        """Note the rarest suspicious word of each answer in the ledger of its source."""
        for recurring in self.recurring.values():
            words = self._suspicious_words(recurring)
            if word := min(words, key=lambda word: (self.frequency[_cell(word)], word), default=""):
                problem = (
                    f"{shown(word)} is in {recurring.words[word] + 1} prompts, nearly all with the answer "
                    f"{shown(recurring.answer)}, which few other prompts have; look at these rows before you train"
                )
                recurring.ledger.note(recurring.where, KIND, problem)

    def _suspicious_words(self, recurring: _Recurring) -> Iterator[str]:
        if len(recurring.prompts) < LEAST - 1:  # the first row's prompt is not counted
            return
        for word, rows in recurring.words.items():
            frequency = self.frequency[_cell(word)]
            if rows >= SURE * recurring.rows and SURE * frequency <= rows + 1 and frequency <= RARE * self.rows:
                yield word


def _cell(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode(errors="surrogatepass")) % CELLS
