"""Prompts of token ids -> greedy answers of token ids, in-process.

The prompts of a row of questions on one context are computed as one tree of tokens. Then as many rows as memory allows
are decoded together (see decode_batch.py). If enough of their answers have ended, those leave the batch and waiting
rows join it.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel, TextStreamer

from data.encode.chat import Example
from data.encode.pack import Pack, attention_mask, build_pack, common_prefix
from data.progress import Bar
from eval.decode_batch import Batch, Question, Row, attention, room

ROW_QUESTIONS = 16  # 8 took 9 % longer (SmolLM2-135M, 10 questions a passage), 32 the same time
ROW_TOKENS = 1024  # of a row's prompts, which are computed at once, with attention over T^2
REBUILD = 0.75  # below this share of unended answers, a batch is rebuilt; 0.5 and 0.9 were within 8 %


def generate_ids(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    stop: set[int],
    max_new_tokens: int,
    batch_tokens: int,
    note: Callable[[int, list[int]], None] = lambda number, answer: None,
) -> list[list[int]]:
    """Answers in order, each through the token of `stop` that ends it, or of max_new_tokens.

    batch_tokens: most tokens in the cache, prompts and room for whole answers; only a single prompt with its answer may
    be more. note: called with each number and answer as it ends. For models that take packs (see
    sft/models/capabilities.py) and rows.
    """
    questions = [Question(prompt, max_new_tokens) for prompt in prompts]
    waiting = _divide(questions, batch_tokens)
    rows: list[Row] = []
    last: Row | None = None
    bar = Bar("answer", len(questions))
    unended = dict(enumerate(questions))
    with torch.inference_mode():
        while waiting or rows:
            while waiting and _fits(rows, *waiting[-1], batch_tokens):
                last = _prefill(model, waiting.pop()[0], last, stop)
                if going := [slot for slot, q in enumerate(last.questions) if q.left]:
                    rows.append(last.only(going))
            if rows:
                rows = _decode(model, rows, stop)
            for number in [n for n, q in unended.items() if not q.left]:
                note(number, unended.pop(number).answer)
            bar.update(len(questions) - len(unended))
    bar.close()
    return [q.answer for q in questions]


def generate_one(
    model: PreTrainedModel, prompt: list[int], stop: set[int], max_new_tokens: int, streamer: TextStreamer | None = None
) -> list[int]:
    """The answer to one prompt by transformers' own generate, for chat and for models that can't take a pack's mask;
    `streamer` gets the tokens as they come."""
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    with torch.inference_mode():
        out = cast(Any, model).generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
            eos_token_id=sorted(stop), pad_token_id=min(stop), use_cache=True, streamer=streamer,
        )  # fmt: skip
    return list(out[0, ids.shape[1] :].tolist())


def _divide(questions: list[Question], batch_tokens: int) -> list[tuple[list[Question], int]]:
    """The questions of each row and the tokens of their prompts' tree; the rows that need most room come last."""
    trees: list[list[Question]] = []
    for q in sorted(questions, key=lambda q: q.prompt):
        before = trees[-1][-1].prompt if trees else []
        # a short common prefix (a system prompt) saves less than attention over the others' columns costs
        if not before or 2 * common_prefix(before, q.prompt) < min(len(before), len(q.prompt)):
            trees.append([])
        trees[-1].append(q)
    divided = [_divide_tree(tree, batch_tokens) for tree in trees]
    divided.sort(key=lambda rows: max(room(*row) for row in rows))
    return [row for rows in divided for row in reversed(rows)]  # neighbours of one tree share most


def _divide_tree(tree: list[Question], batch_tokens: int) -> list[tuple[list[Question], int]]:
    most = -(-len(tree) // -(-len(tree) // ROW_QUESTIONS))  # evenly: 9 and 8, not 16 and 1
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
    """The row after one forward, with the first token of each answer. What all its prompts share with the last prompt
    of the row `last` is copied from there."""
    prompts, cache, shared = [q.prompt for q in questions], DynamicCache(config=model.config), 0
    if last:
        shared = min(common_prefix(last.questions[-1].prompt, ids[:-1]) for ids in prompts)
        path = last.sees[-1].nonzero()[:shared, 0]
        for i, (keys, values) in enumerate(last.layers):
            cache.update(keys[None, :, path], values[None, :, path], i)
    pack = build_pack([[Example(ids[shared:], [0] * (len(ids) - shared)) for ids in prompts]])
    logits = pack_logits(model, pack, pack.leaf, cache)
    for q, token in zip(questions, logits.argmax(-1).tolist(), strict=True):
        q.add(token, stop)
    sees = pad(attention_mask(pack, logits.device)[0, 0, pack.leaf], (shared, 0), value=True)
    return Row(questions, sees, [(layer.keys[0], layer.values[0]) for layer in cast(Any, cache.layers)])


def pack_logits(
    model: PreTrainedModel, pack: Pack, at: Sequence[int] | torch.Tensor, cache: DynamicCache | None = None
) -> torch.Tensor:
    """Logits [len(at), vocab] at these tokens of the pack. All see the tokens in the cache, and are added to it."""
    device, before = next(model.parameters()).device, cache.get_seq_length() if cache is not None else 0
    return model(
        input_ids=torch.tensor([pack.input_ids], device=device),
        position_ids=torch.tensor([pack.position_ids], device=device) + before,
        attention_mask=pad(attention_mask(pack, device), (before, 0), value=True),
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=torch.as_tensor(at, device=device),
    ).logits[0]


def _decode(model: PreTrainedModel, rows: list[Row], stop: set[int]) -> list[Row]:
    """The rows that remain after enough of their answers have ended."""
    batch = Batch(rows)
    rows.clear()  # frees their keys and values, which the batch has copied
    with attention(model, batch):
        while len(batch.going()) >= max(1, REBUILD * len(batch.questions)):
            batch.step(model, stop)
    return batch.rows()
