"""Few-shot prompts: the same solved examples before every question, so that they are a shared prefix, computed once."""

import dataclasses
import random
from collections.abc import Sequence
from itertools import zip_longest

from data.audit.duplicates import normalize
from data.conversation import Conversation, DataError, Message
from data.readers.squad import UNANSWERABLE


def with_shots(
    conversations: Sequence[Conversation], examples: Sequence[Conversation], n: int, seed: int
) -> list[Conversation]:
    """The conversations with the turns of n of the examples (training data) after the system turn.

    All get the same examples in the same order, drawn by seed; their own system turns are left out. Labels alternate,
    so they are as balanced as n and the data allow; so do answerable and unanswerable questions, answerable first.
    Every prompt pays for its shots, so they are drawn from the half of each kind with the shorter prompts, and from the
    rest only if n needs it. An example is left out if a turn is empty, or if its context or cluster (see Conversation)
    is that of a scored conversation after normalisation (see data/audit/duplicates.py). Raises DataError if fewer than
    n remain.
    """
    scored = {normalize(text) for c in conversations for text in (c.context, c.cluster)} - {""}
    usable = [
        example
        for example in examples
        if all(turn["content"].strip() for turn in _split(example.messages)[1])
        and not scored & {normalize(example.context), normalize(example.cluster)}
    ]
    if len(usable) < n:
        problem = f"{len(usable)} of {len(examples)} examples have a question and no context or thread that is scored"
        raise DataError(f"{n} shots", f"only {problem}; take fewer shots or more training data", "too few examples")
    shots = [turn for example in _draw(usable, n, random.Random(seed)) for turn in _split(example.messages)[1]]
    prompted = []
    for c in conversations:
        system, turns = _split(c.messages)
        prompted.append(dataclasses.replace(c, messages=(*system, *shots, *turns)))
    return prompted


def _draw(examples: Sequence[Conversation], n: int, rng: random.Random) -> list[Conversation]:
    kinds: dict[tuple[bool, str], list[Conversation]] = {}
    for example in examples:
        unanswerable = not example.answers and example.answer == UNANSWERABLE
        kinds.setdefault((unanswerable, example.label), []).append(example)
    # labels in random order, since n may be smaller; answerable first, since a single shot should show an answer
    order = sorted(rng.sample(sorted(kinds), len(kinds)), key=lambda kind: kind[0])
    pools = []
    for kind in order:
        rising = sorted(kinds[kind], key=_prompt_characters)
        half = (len(rising) + 1) // 2
        pools.append([*rng.sample(rising[:half], half), *rising[half:]])
    drawn = [example for turn in zip_longest(*pools) for example in turn if example is not None][:n]
    return rng.sample(drawn, n)  # without shuffling, the order of labels would be a pattern to copy


def _prompt_characters(example: Conversation) -> int:
    return sum(len(turn["content"]) for turn in _split(example.prompt)[1])


def _split(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """The system turn, if there is one, and the other turns."""
    system = int(messages[0]["role"] == "system")
    return messages[:system], messages[system:]
