"""Conversations -> examples, with an account of every row: what is trained, what was left out, and why."""

import random
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.chat import Conversation, DataError, Example, TooLong, encode
from data.pack import make_packs, step_order
from data.progress import track

NAMED = 5  # rows with defects that are named; all are counted


def encode_all(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    too_long: str = "stop",
) -> tuple[list[Example], list[str]]:
    """Examples, and what is said of each row that `too_long: skip` left out.

    Raises DataError that names the first defects and counts the rest.
    """
    examples: list[Example] = []
    defects: list[str] = []
    left_out: list[str] = []
    for conversation in track(conversations, "encode"):
        try:
            examples.append(encode(conversation, tokenizer, max_length))
        except TooLong as error:
            (left_out if too_long == "skip" else defects).append(str(error))
        except DataError as error:
            defects.append(str(error))
    if defects:
        others = ", ".join(defect.split(": ")[0] for defect in defects[1:NAMED])
        more = f"; {len(defects) - 1} more rows have defects: {others}" if others else ""
        raise DataError(defects[0] + more + (" ..." if len(defects) > NAMED else ""))
    if not examples:
        raise DataError(f"no row of {len(conversations)} can be trained on; the first: {left_out[0]}")
    return examples, left_out


def draw_contexts(
    conversations: Sequence[Conversation], count: int | None, seed: int, unanswerable_share: float | None = None
) -> list[Conversation]:
    """The conversations of `count` contexts drawn at random, in their order; all of them where count is None.

    unanswerable_share: how many of the drawn conversations have no answer, as nearly as the data allows, by drawing
    more or fewer contexts that hold such ones. Raises DataError where the data has too few.
    """
    contexts: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        contexts.setdefault(conversation.context, []).append(conversation)
    if count is None or count >= len(contexts):
        return list(conversations)
    drawn = random.Random(seed).sample(list(contexts), len(contexts))
    chosen = drawn[:count]
    if unanswerable_share is not None:
        mixed = [c for c in drawn if any(not q.answers for q in contexts[c])]
        others = [c for c in drawn if all(q.answers for q in contexts[c])]
        mixes = (
            (mixed[:k], others[: count - k]) for k in range(max(0, count - len(others)), min(count, len(mixed)) + 1)
        )
        best = min(mixes, key=lambda mix: abs(_unanswerable(contexts, [*mix[0], *mix[1]]) - unanswerable_share))
        chosen = [*best[0], *best[1]]
        found = _unanswerable(contexts, chosen)
        if abs(found - unanswerable_share) > 0.02:
            raise DataError(
                f"data.unanswerable_share {unanswerable_share}: the nearest that {count} contexts allow is {found:.2f}"
            )
    kept = set(chosen)
    return [c for c in conversations if c.context in kept]


def _unanswerable(contexts: dict[str, list[Conversation]], chosen: Sequence[str]) -> float:
    rows = [c for name in chosen for c in contexts[name]]
    return sum(not c.answers for c in rows) / len(rows)


def data_report(
    read: int, examples: Sequence[Example], left_out: Sequence[str], examples_per_step: int, seed: int
) -> dict[str, Any]:
    """Counts of rows and tokens, and how many tokens one epoch executes with and without shared prefixes."""
    steps = step_order([e.context for e in examples], examples_per_step, seed, epoch=0)
    flat = sum(len(e.ids) for e in examples)
    shared = sum(
        len(pack.input_ids) for step in steps for pack in make_packs([examples[i] for i in step], share_prefixes=True)
    )
    return {
        "rows_read": read,
        "examples": len(examples),
        "rows_left_out": len(left_out),
        "left_out": list(left_out[:100]),
        "contexts": len({e.context for e in examples}),
        "tokens": flat,
        "trained_tokens": sum(sum(e.loss_mask) for e in examples),
        "longest_example_tokens": max(len(e.ids) for e in examples),
        "tokens_with_shared_prefixes": shared,
        "flat_tokens_per_executed_token": round(flat / shared, 3),
    }
