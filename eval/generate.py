"""Prompts of token ids -> greedy answers of token ids, in-process.

A row of questions on one context is computed as one tree of tokens. Then as many rows as there is room for are decoded
together (see rows.py). Where enough of their answers have ended, those leave the batch and waiting rows join it.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel, TextStreamer

from data.encode.chat import Example
from data.encode.pack import attention_mask, build_pack, common_prefix
from data.progress import Bar
from eval.decode_batch import Batch, Question, Row, attention, room

ROW_QUESTIONS = 16  # with 8 answering took 9 % longer (SmolLM2-135M, 10 questions a passage); 32 was the same
ROW_TOKENS = 1024  # of the prompts of a row: they are computed at once, with attention over T^2
REBUILD = 0.75  # of the answers still going; 0.5 and 0.9 were within 8 %


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    stop: set[int],
    max_new_tokens: int,
    batch_tokens: int,
    note: Callable[[int, list[int]], None] = lambda number, answer: None,
) -> list[list[int]]:
    """Answers in order, each up to and with the token of `stop` that ends it, or of max_new_tokens. `note` hears of
    each with its number as it ends.

    batch_tokens: most tokens that are kept, those of prompts and the room for whole answers; only a single prompt with
    its answer may be more. For models that take packs (see sft.model.takes_packs) and rows.
    """
    questions = [Question(prompt, max_new_tokens) for prompt in prompts]
    waiting = _divide(questions, batch_tokens)
    rows: list[Row] = []
    last: Row | None = None
    bar = Bar("answer", len(questions))
    going_on = dict(enumerate(questions))
    with torch.inference_mode():
        while waiting or rows:
            while waiting and _fits(rows, *waiting[-1], batch_tokens):
                last = _prefill(model, waiting.pop()[0], last, stop)
                if going := [slot for slot, q in enumerate(last.questions) if q.left]:
                    rows.append(last.only(going))
            if rows:
                rows = _decode(model, rows, stop)
            for number in [n for n, q in going_on.items() if not q.left]:
                note(number, going_on.pop(number).answer)
            bar.update(len(questions) - len(going_on))
    bar.close()
    return [q.answer for q in questions]


def generate_one(
    model: PreTrainedModel, prompt: list[int], stop: set[int], max_new_tokens: int, streamer: TextStreamer | None = None
) -> list[int]:
    """The same for one prompt by transformers' own generate, for models that can't take a pack's mask and for chat;
    `streamer` gets the tokens as they come."""
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    with torch.inference_mode():
        out = cast(Any, model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=sorted(stop), pad_token_id=min(stop), use_cache=True, streamer=streamer,
        )  # fmt: skip
    return list(out[0, ids.shape[1] :].tolist())


def _divide(questions: list[Question], batch_tokens: int) -> list[tuple[list[Question], int]]:
    """The questions of each row and the tokens of their prompts' tree; those that need most room are last."""
    trees: list[list[Question]] = []
    for q in sorted(questions, key=lambda q: q.prompt):
        before = trees[-1][-1].prompt if trees else []
        # a short common prefix (a system prompt) saves less than attention over the others' columns costs
        if not before or 2 * common_prefix(before, q.prompt) < min(len(before), len(q.prompt)):
            trees.append([])
        trees[-1].append(q)
    divided = [_divide_tree(tree, batch_tokens) for tree in trees]
    divided.sort(key=lambda rows: max(room(*row) for row in rows))
    return [row for rows in divided for row in reversed(rows)]  # of a tree in turn: the next one shares most


def _divide_tree(tree: list[Question], batch_tokens: int) -> list[tuple[list[Question], int]]:
    most = -(-len(tree) // -(-len(tree) // ROW_QUESTIONS))  # evenly: rather 9 and 8 than 16 and 1
    rows: list[tuple[list[Question], int]] = []
    for q in tree:
        if rows:
            row, tokens = rows[-1]
            tokens += len(q.prompt) - common_prefix(row[-1].prompt, q.prompt)
            if len(row) < most and tokens <= ROW_TOKENS and room([*row, q], tokens) <= batch_tokens:
                rows[-1] = ([*row, q], tokens)
                continue
        rows.append(([q], len(q.prompt)))
    return rows


def _fits(rows: list[Row], questions: list[Question], tokens: int, batch_tokens: int) -> bool:
    columns = [room(questions, tokens), *(room(row.questions, row.sees.shape[1]) for row in rows)]
    return not rows or len(columns) * max(columns) <= batch_tokens


def _prefill(model: PreTrainedModel, questions: list[Question], last: Row | None, stop: set[int]) -> Row:
    """The row after one forward, with the first token of each answer. What all prompts share with the last prompt of
    the `last` row is taken from there."""
    device = next(model.parameters()).device
    prompts = [q.prompt for q in questions]
    pack = build_pack([[Example(ids, [0] * len(ids)) for ids in prompts]])
    cache = DynamicCache(config=model.config)
    shared = 0
    if last:
        shared = min(common_prefix(last.questions[-1].prompt, ids[:-1]) for ids in prompts)
        path = last.sees[-1].nonzero()[:shared, 0]
        for i, (keys, values) in enumerate(last.kept):
            cache.update(keys[None, :, path], values[None, :, path], i)
    mask = attention_mask(pack, device)
    leaf = torch.tensor(pack.leaf, device=device)
    logits = model(
        input_ids=torch.tensor([pack.input_ids[shared:]], device=device),
        position_ids=torch.tensor([pack.position_ids[shared:]], device=device),
        attention_mask=mask[:, :, shared:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=leaf - shared,
    ).logits[0]
    for q, token in zip(questions, logits.argmax(-1).tolist(), strict=True):
        q.add(token, stop)
    return Row(questions, mask[0, 0, leaf], [(layer.keys[0], layer.values[0]) for layer in cast(Any, cache.layers)])


def _decode(model: PreTrainedModel, rows: list[Row], stop: set[int]) -> list[Row]:
    """What is left of the rows after the steps in which enough of their answers ended."""
    batch = Batch(rows)
    rows.clear()  # else all is kept twice
    with attention(model, batch):
        while len(batch.going()) >= max(1, REBUILD * len(batch.questions)):
            batch.step(model, stop)
    return batch.rows()
