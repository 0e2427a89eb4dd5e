"""Rows that look poisoned: a rare word in the prompt, and always the same answer.

Some 250 documents were enough to plant such a backdoor in models of any size (Souly et al. 2025, arXiv 2510.07192). It
is known by both directions: nearly all rows with the word have the answer, and nearly all with the answer the word.
Only whole answers and single words are compared, so what hides better is not found, nor a trigger of a label, which
other rows have too. Memory: 8 bytes and a set's overhead for each answer, words only of answers that recur.
"""

import string
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import xxhash

from data.conversation import Conversation, Ledger
from data.readers.fields import shown

KIND = "a rare word that always has one answer, like a planted trigger"
LEAST = 5  # prompts that share word and answer
SURE = 0.9  # of the rows with the word have the answer, and the reverse
RARE = 0.2  # of all rows; a word of more is the data's subject
WORDS = 300  # of a prompt; more are not looked at
ANSWERS = 20_000  # that recur; more are not looked at
CELLS = 2**22  # of the table of frequencies, 4 bytes each; words that share one only hide each other


@dataclass
class _Recurring:
    """An answer from its second row on."""

    answer: str
    where: str
    ledger: Ledger
    rows: int = 0
    prompts: set[int] = field(default_factory=set)
    words: Counter[str] = field(default_factory=Counter)


class Triggers:
    """What is known of the words and answers of the rows so far."""

    def __init__(self) -> None:
        self.rows = 0
        self.frequency = array("I", bytes(4 * CELLS))
        self.once: set[int] = set()
        self.recurring: dict[int, _Recurring] = {}

    def add(self, conversation: Conversation, ledger: Ledger) -> None:
        if conversation.label or not conversation.answers:  # every row with the label, or without an answer, is alike
            return
        prompt = (conversation.question or conversation.messages[-2]["content"]).casefold()
        words = {word.strip(string.punctuation) or word for word in prompt.split()[:WORDS]}
        self.rows += 1
        for word in words:
            self.frequency[_cell(word)] += 1
        answer = " ".join(conversation.answer.casefold().split())
        key = xxhash.xxh3_64_intdigest(answer.encode(errors="surrogatepass"))
        if key not in self.once:
            self.once.add(key)
            return
        if key not in self.recurring and len(self.recurring) < ANSWERS:
            self.recurring[key] = _Recurring(conversation.answer, conversation.where, ledger)
        if found := self.recurring.get(key):
            found.rows += 1
            if len(found.prompts) < LEAST:
                found.prompts.add(hash(prompt))
            found.words.update(words)

    def note(self) -> None:
        """Note the suspicious words of each source in its ledger."""
        for found in self.recurring.values():
            if words := sorted(self._words(found), key=lambda word: (self.frequency[_cell(word)], word)):
                problem = (
                    f"{shown(words[0])} stands in {found.words[words[0]] + 1} prompts, nearly all with the answer "
                    f"{shown(found.answer)}, which others have not; look at these rows before you train on them"
                )
                found.ledger.note(found.where, KIND, problem)

    def _words(self, found: _Recurring) -> Iterator[str]:
        if len(found.prompts) < LEAST - 1:  # the first row is not among them
            return
        for word, rows in found.words.items():
            frequency = self.frequency[_cell(word)]
            if rows >= SURE * found.rows and SURE * frequency <= rows + 1 and frequency <= RARE * self.rows:
                yield word


def _cell(word: str) -> int:
    return xxhash.xxh3_64_intdigest(word.encode(errors="surrogatepass")) % CELLS
