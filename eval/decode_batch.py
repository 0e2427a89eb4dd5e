"""A batch of rows, whose answers are decoded together.

A row holds questions on one context. What they share is cached once, and a mask says which of the row's columns (the
cached tokens) each question sees. A step computes the next token of every answer that has not ended, in one forward
for all rows; only attention is computed row by row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

NAME = "rows"  # of the attention function
KeysValues = tuple[torch.Tensor, ...]  # two of [heads, columns, size]


@dataclass(eq=False)
class Question:
    prompt: list[int]
    left: int  # tokens that may still come; 0: the answer has ended
    answer: list[int] = field(default_factory=list)

    def add(self, token: int, stop: set[int]) -> None:
        self.answer.append(token)
        self.left = 0 if token in stop else self.left - 1


@dataclass
class Row:
    """n questions on L columns. sees: bool [n, L]; layers: the keys and values of each layer."""

    questions: list[Question]
    sees: torch.Tensor
    layers: list[KeysValues]

    def only(self, slots: list[int]) -> "Row":
        """The questions in these slots, with the columns that they see."""
        sees = self.sees[slots]
        columns = sees.any(0).nonzero()[:, 0]
        layers = [tuple(part[:, columns] for part in layer) for layer in self.layers]
        return Row([self.questions[slot] for slot in slots], sees[:, columns], layers)


def room(questions: Sequence[Question], columns: int) -> int:
    """Columns of a row, which has `columns` now, once it has the questions' whole answers."""
    return columns + len(questions) * max(q.left for q in questions)


@dataclass
class _Places:
    """Row, slot and column of each token of a step, after which no row has more than `used` columns.

    Batch and layers share it, and do not refer to each other: such a cycle would keep the memory of an old batch.
    """

    row: torch.Tensor
    slot: torch.Tensor
    column: torch.Tensor
    used: int


class Batch:
    """Rows in one tensor, with room for their whole answers."""

    def __init__(self, rows: list[Row]) -> None:
        self.questions = [(i, slot, q) for i, row in enumerate(rows) for slot, q in enumerate(row.questions)]
        self.widths = [len(row.questions) for row in rows]
        self.ends = [row.sees.shape[1] for row in rows]
        columns = max(room(row.questions, end) for row, end in zip(rows, self.ends, strict=True))
        self.sees = rows[0].sees.new_zeros(len(rows), max(self.widths), columns)
        for sees, row in zip(self.sees, rows, strict=True):
            sees[: row.sees.shape[0], : row.sees.shape[1]] = row.sees
        nowhere = torch.empty(0, dtype=torch.long, device=self.sees.device)
        self.places = _Places(nowhere, nowhere, nowhere, max(self.ends))
        self.layers = [
            _Layer(self.places, [row.layers[i] for row in rows], columns) for i in range(len(rows[0].layers))
        ]
        self.cache = Cache(layers=cast(Any, self.layers))

    def going(self) -> list[tuple[int, int, Question]]:
        """Row, slot and question of each answer that has not ended."""
        return [(i, slot, q) for i, slot, q in self.questions if q.left]

    def rows(self) -> list[Row]:
        """The rows without the answers that have ended."""
        rows = []
        for i, places in groupby(self.going(), key=lambda place: place[0]):
            questions = [q for row, _, q in self.questions if row == i]
            layers = [tuple(part[i, :, : self.places.used] for part in layer.whole) for layer in self.layers]
            whole = Row(questions, self.sees[i, :, : self.places.used], layers)
            rows.append(whole.only([slot for _, slot, _ in places]))
        return rows

    def step(self, model: PreTrainedModel, stop: set[int]) -> None:
        """Add a token to every answer that has not ended. Call it inside `attention(model, batch)`."""
        going, places = self.going(), self.places
        numbers = [
            (i, slot, self.ends[i] + slot, q.answer[-1], len(q.prompt) + len(q.answer) - 1) for i, slot, q in going
        ]
        places.row, places.slot, places.column, ids, position = torch.tensor(numbers, device=self.sees.device).T
        self.ends = [end + width for end, width in zip(self.ends, self.widths, strict=True)]
        places.used = max(self.ends)
        self.sees[places.row, places.slot, places.column] = True
        logits = model(
            input_ids=ids[None],
            position_ids=position[None],
            attention_mask=self.sees[:, None, :, : places.used],
            past_key_values=self.cache,
            use_cache=True,
        ).logits[0]
        for (_, _, q), token in zip(going, logits.argmax(-1).tolist(), strict=True):
            q.add(token, stop)


class _Layer(DynamicLayer):
    """Keys and values of a layer, [rows, heads, columns, size] each, allocated at their final size: a DynamicLayer
    copies all of them at every step."""

    def __init__(self, places: _Places, parts: Sequence[KeysValues], columns: int) -> None:
        super().__init__()
        self.is_initialized = True
        self.places, self.used = places, places.used
        self.whole = [part.new_empty(len(parts), part.shape[0], columns, part.shape[2]) for part in parts[0]]
        for i, row in enumerate(parts):
            for whole, part in zip(self.whole, row, strict=True):
                whole[i, :, : part.shape[1]] = part
                whole[i, :, part.shape[1] : self.used] = 0  # masked for all questions, but 0 * NaN is NaN
        self.keys, self.values = (whole[:, :, : self.used] for whole in self.whole)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Adds [1, heads, tokens, size] each; returns all keys and values in use."""
        places = self.places
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, self.used : places.used] = 0
            whole[places.row, :, places.column] = new[0].transpose(0, 1)
        self.used = places.used
        self.keys, self.values = (whole[:, :, : self.used] for whole in self.whole)
        return self.keys, self.values


def _attend(
    places: _Places,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: query [1, heads, tokens, size], key and value [rows, key heads, columns,
    size], attention_mask [rows, 1, width, columns] -> [1, tokens, heads, size]."""
    heads, rows, width, groups = query.shape[1], len(key), attention_mask.shape[2], query.shape[1] // key.shape[1]
    wide = query.new_zeros(rows, width, heads, query.shape[3])
    wide[places.row, places.slot] = query[0].transpose(0, 1)
    # heads that share keys are folded into the width; to copy the keys for each head takes 13 % of decoding
    folded = wide.transpose(1, 2).reshape(rows, key.shape[1], groups * width, -1)
    mask = attention_mask.repeat(1, 1, groups, 1)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.view(rows, heads, width, -1).transpose(1, 2)[places.row, places.slot][None], None


@contextmanager
def attention(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Gives the model the attention of the batch's steps; restores its own at the end."""
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, partial(_attend, batch.places))
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def takes_rows(model: PreTrainedModel) -> bool:
    """Whether its attention is SDPA that can be replaced: all language models of transformers except a few old ones."""
    return model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation()
