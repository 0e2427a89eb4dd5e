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
    """The conversations with the turns of n of the examples (training data) behind the system turn; else unchanged.

    All get the same ones, in the same order, drawn by seed. Labels take turns, so they are as balanced as n and the
    data allow; so do answerable and unanswerable questions, answerable first. Drawn is among the shorter half of the
    examples of a kind, by the characters of their prompts (more of them only where n needs it): every prompt pays for
    its shots. Never one whose context or cluster (see Conversation) is that of a scored conversation after
    normalisation (see data/audit/duplicates.py), nor one with an empty question. An example's own system turn is left
    out. Raises DataError where fewer than n are left.
    """
    if n == 0:
        return list(conversations)
    scored = {normalize(text) for c in conversations for text in (c.context, c.cluster)} - {""}
    usable = [e for e in examples if _asks(e) and not scored & {normalize(e.context), normalize(e.cluster)}]
    if len(usable) < n:
        problem = f"{len(usable)} of {len(examples)} examples have a question and no context or thread that is scored"
        raise DataError(f"{n} shots", f"only {problem}; take fewer shots or more training data", "too few examples")
    shots = _draw(usable, n, random.Random(seed))
    turns = tuple(turn for shot in shots for turn in _without_system(shot.messages))
    return [dataclasses.replace(c, messages=_behind_system(c.messages, turns)) for c in conversations]


def _draw(examples: Sequence[Conversation], n: int, rng: random.Random) -> list[Conversation]:
    kinds: dict[tuple[bool, str], list[Conversation]] = {}
    for example in examples:
        unanswerable = not example.answers and example.answer == UNANSWERABLE
        kinds.setdefault((unanswerable, example.label), []).append(example)
    # labels in random order, since not all may get a turn; answerable before unanswerable: 1 shot is to show an answer
    order = sorted(rng.sample(sorted(kinds), len(kinds)), key=lambda kind: kind[0])
    pools = []
    for kind in order:
        rising = sorted(kinds[kind], key=_prompt_characters)
        half = (len(rising) + 1) // 2
        pools.append([*rng.sample(rising[:half], half), *rising[half:]])
    drawn = [example for turn in zip_longest(*pools) for example in turn if example is not None][:n]
    return rng.sample(drawn, n)  # else the labels' turns, and what comes last, would be a pattern to copy


def _asks(example: Conversation) -> bool:
    return all(turn["content"].strip() for turn in _without_system(example.messages))


def _prompt_characters(example: Conversation) -> int:
    return sum(len(turn["content"]) for turn in _without_system(example.prompt))


def _without_system(messages: Sequence[Message]) -> Sequence[Message]:
    return messages[1:] if messages[0]["role"] == "system" else messages


def _behind_system(messages: Sequence[Message], turns: Sequence[Message]) -> tuple[Message, ...]:
    own = _without_system(messages)
    return (*messages[: len(messages) - len(own)], *turns, *own)
