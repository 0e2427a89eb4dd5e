"""Examples -> packs: a forest of token ids that computes a common prefix once, or padded rows.

A pack is a trie over the ids of its examples, laid out in depth-first preorder. Token q may attend to token k
exactly when k <= q < end[k]: this rule isolates documents and siblings, and shares ancestors.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, islice
from typing import Literal

import numpy as np
import torch

from data.encode.chat import Example

LOOK_AHEAD = 64  # contexts that compete for the rest of a step
# time of a micro-batch in units of one token's time: SmolLM2-135M, 2 CPU cores, tests/benchmarks/throughput.py --growth
FIXED_TOKENS = 32  # to read all weights once
DENSE_TOKENS = 1000  # number of tokens at which attention over T^2 costs as much as everything else
SHARES = (1.05, 1.2, 1.5)  # several processes: pack size / equal share, above 1 as trees don't fill packs evenly


@dataclass(frozen=True)
class Layout:
    """How the examples of a step become micro-batches.

    pack_tokens: the most tokens of a micro-batch, to limit memory; only a single longer example exceeds it.
    attention: "dense" computes T^2 scores under a mask (SDPA, eager); "sparse" computes almost only the scores that the
    mask allows (forest, FlexAttention). Without a mask every example is its own row: "padded" to the longest row of the
    micro-batch, or "alone" in its micro-batch.
    """

    share_prefixes: bool = True
    pack_tokens: int = 512
    attention: Literal["dense", "sparse", "padded", "alone"] = "dense"

    def cost(self, tokens: int) -> float:
        """Time of a micro-batch of `tokens` tokens, in units of one token's time."""
        return FIXED_TOKENS + tokens + (tokens**2 / DENSE_TOKENS if self.attention == "dense" else 0)

    def joins(self, one: int, other: int, both: int) -> bool:
        """True if micro-batches of `one` and `other` tokens cost more than one of `both` tokens, and it may exist."""
        return both <= self.pack_tokens and self.cost(both) < self.cost(one) + self.cost(other)


@dataclass(frozen=True)
class PackTensors:
    """Arrays of a pack as tensors of int64 on one device."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    end: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor


@dataclass
class Pack:
    """Arrays of a forest with T tokens, M of which are trained.

    input_ids, position_ids (depth in the tree), end (one past the last index of the subtree): length T.
    source, target: length M, an entry for every trained token of every example: the index whose hidden state
    predicts it, and its id. A branch point predicts several targets; equal answers count as often as they occur.
    rows: the number of rows, of T / rows tokens each, that a model computes as a batch without a mask. None for a
    forest, which is a single sequence.
    """

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    leaf: list[int] = field(default_factory=list)  # index of the last token of each example, in the given order
    rows: int | None = None
    _on_device: PackTensors | None = field(default=None, repr=False, compare=False)

    @cached_property
    def host(self) -> torch.Tensor:
        """The arrays of PackTensors one after the other, so that one copy moves them all. Made at its first use, when
        the pack is complete."""
        arrays = self.input_ids, self.position_ids, self.end, self.source, self.target
        return torch.from_numpy(np.concatenate([np.array(array, dtype=np.int64) for array in arrays]))

    def pin_memory(self) -> None:
        """Move `host` to page-locked memory, from which a copy to CUDA doesn't stop the training thread."""
        self.host = self.host.pin_memory()

    def tensors(self, device: torch.device) -> PackTensors:
        """The arrays on the device, copied there once."""
        if self._on_device is None or self._on_device.target.device != device:
            tokens, targets = len(self.input_ids), len(self.target)
            parts = self.host.to(device, non_blocking=True).split([tokens] * 3 + [targets] * 2)
            self._on_device = PackTensors(*parts)
        return self._on_device


def build_pack(trees: Iterable[Sequence[Example]]) -> Pack:
    """One pack; examples of the same tree share their common prefixes, trees share nothing."""
    pack = Pack()
    for tree in trees:
        first = len(pack.leaf)
        pack.leaf += [0] * len(tree)
        order = sorted(range(len(tree)), key=lambda i: tree[i].ids)
        path: list[int] = []  # index in the pack of each token of the current example
        previous: list[int] = []
        for i in order:
            example = tree[i]
            shared = common_prefix(previous, example.ids)
            _close(pack, path[shared:])
            added = len(example.ids) - shared
            path = [*path[:shared], *range(len(pack.input_ids), len(pack.input_ids) + added)]
            pack.input_ids += example.ids[shared:]
            pack.position_ids += range(shared, len(example.ids))
            pack.end += [-1] * added
            _add_targets(pack, example, path)
            pack.leaf[first + i] = path[-1]
            previous = example.ids
        _close(pack, path)
    return pack


def pad_rows(examples: Sequence[Example]) -> Pack:
    """One pack with a row for each example. Padding is on the right, invisible to the tokens of a causal model."""
    width = max(len(example.ids) for example in examples)
    pack = Pack(rows=len(examples))
    for example in examples:
        first, tokens = len(pack.input_ids), len(example.ids)
        pack.input_ids += [*example.ids, *[0] * (width - tokens)]
        pack.position_ids += range(width)
        pack.end += [first + width] * width
        _add_targets(pack, example, range(first, first + tokens))
        pack.leaf.append(first + tokens - 1)
    return pack


def make_packs(examples: Sequence[Example], layout: Layout = Layout(), processes: int = 1) -> list[Pack]:
    """Micro-batches that hold each example once. With several processes, packs are sized so that the slowest
    process finishes as early as possible; they are dealt out largest first."""
    layout = _for_processes(examples, layout, processes) if processes > 1 else layout
    if layout.attention in ("padded", "alone"):
        return [pad_rows(rows) for rows in plan_rows(examples, layout)]
    return [build_pack(trees) for trees in plan_packs(examples, layout)]


def pack_sizes(examples: Sequence[Example], layout: Layout) -> list[int]:
    """Tokens of each micro-batch of make_packs, without building it."""
    if layout.attention in ("padded", "alone"):
        return [len(rows) * len(rows[0].ids) for rows in plan_rows(examples, layout)]
    return [sum(map(count_tokens, trees)) for trees in plan_packs(examples, layout)]


def _for_processes(examples: Sequence[Example], layout: Layout, processes: int) -> Layout:
    """The layout, with the pack_tokens that lets the slowest process finish first.

    Smaller packs compute more prefixes twice, so neither the largest packs nor equal shares are always best.
    """

    def slowest(candidate: Layout) -> float:
        return sum(map(layout.cost, sorted(pack_sizes(examples, candidate), reverse=True)[::processes]))

    tokens = sum(pack_sizes(examples, layout))
    rounds = math.ceil(tokens / (processes * layout.pack_tokens))
    shares = (math.ceil(factor * tokens / (processes * rounds)) for factor in SHARES)
    smaller = [replace(layout, pack_tokens=share) for share in shares if share < layout.pack_tokens]
    return min([layout, *smaller], key=slowest)


def attention_mask(pack: Pack, device: torch.device | str = "cpu") -> torch.Tensor:
    """Boolean [1, 1, T, T]; [.., q, k] says whether token q attends to token k."""
    end = pack.tensors(torch.device(device)).end
    index = torch.arange(len(pack.end), device=device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < end[None, :]))[None, None]


def is_chain(pack: Pack) -> bool:
    """True for a single chain of tokens: the rule is then plain causal attention and needs no mask."""
    return all(end == len(pack.end) for end in pack.end)


def step_order(
    contexts: Sequence[str],
    examples_per_step: int,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
    max_branches: int | None = None,
) -> list[list[int]]:
    """Indices of the examples of each optimizer step of an epoch; each index occurs once, or `weights` times.

    A step holds at most examples_per_step examples, the same ones with prefix sharing on or off. Contexts are shuffled
    and stay whole, because a context in two steps is computed twice; only a context larger than a step, or than
    max_branches, is divided.
    weights: occurrences of each example in an epoch. With 2.3 every context occurs twice, and 30 % of them a third
    time: others in each epoch, until all contexts had their turn.
    """
    groups: dict[float, dict[str, list[int]]] = {}
    for i, context in enumerate(contexts):
        groups.setdefault(weights[i] if weights else 1.0, {}).setdefault(context, []).append(i)
    rng = random.Random(f"{seed}/{epoch}")
    largest = min(examples_per_step, max_branches or examples_per_step)
    waiting = [
        group[i : i + largest]
        for weight, by_context in groups.items()
        for group in _occurrences(list(by_context.values()), weight, seed, epoch)
        for i in range(0, len(group), largest)
    ]
    rng.shuffle(waiting)
    coming = iter(waiting)
    steps: list[list[int]] = []
    window = list(islice(coming, LOOK_AHEAD))  # a short window nearly keeps the shuffled order
    while window:
        step: list[int] = []
        left: list[list[int]] = []
        used: set[str] = set()
        for group in window:
            context = contexts[group[0]]
            if len(step) + len(group) <= examples_per_step and not (max_branches and context in used):
                step += group
                used.add(context)
            else:
                left.append(group)
        steps.append(step)
        window = left + list(islice(coming, LOOK_AHEAD - len(left)))
    return steps


def _occurrences(groups: list[list[int]], weight: float, seed: int, epoch: int) -> list[list[int]]:
    """The groups as often as they occur in the epoch: int(weight) times, and some of them in turn once more."""
    whole = int(weight)
    extra = math.ceil(round((weight - whole) * len(groups), 6))
    turns = random.Random(seed).sample(groups, len(groups))
    return groups * whole + [turns[i % len(turns)] for i in range(epoch * extra, (epoch + 1) * extra)]


def plan_packs(examples: Sequence[Example], layout: Layout) -> list[list[list[Example]]]:
    """The trees of each micro-batch, with their examples sorted by ids.

    Examples share a tree, and trees share a pack, only if that saves time: attention over T^2 can cost more than a
    shared prefix, or one pass less over the weights, saves. Trees fill packs best fit decreasing: the largest first,
    each into the fullest pack that it joins. The trees of a pack then share their common prefixes.
    """
    packs: list[tuple[int, list[list[Example]]]] = []
    for size, tree in sorted(((count_tokens(t), t) for t in make_trees(examples, layout)), key=lambda pair: -pair[0]):
        fits = [i for i, (used, _) in enumerate(packs) if layout.joins(used, size, used + size)]
        if fits:
            best = max(fits, key=lambda i: packs[i][0])
            packs[best] = (packs[best][0] + size, [*packs[best][1], tree])
        else:
            packs.append((size, [tree]))
    if not layout.share_prefixes:
        return [trees for _, trees in packs]
    return [[sorted(chain.from_iterable(trees), key=lambda e: e.ids)] for _, trees in packs]


def plan_rows(examples: Sequence[Example], layout: Layout) -> list[list[Example]]:
    """The rows of each micro-batch without prefix sharing, longest first. A row joins the last micro-batch if its
    padding costs less than a new micro-batch."""
    packs: list[list[Example]] = []
    for example in sorted(examples, key=lambda e: (-len(e.ids), e.ids)):
        width = len(packs[-1][0].ids) if packs else 0
        fits = layout.attention == "padded" and packs and (len(packs[-1]) + 1) * width <= layout.pack_tokens
        if fits and width - len(example.ids) < FIXED_TOKENS:
            packs[-1].append(example)
        else:
            packs.append([example])
    return packs


def make_trees(examples: Sequence[Example], layout: Layout) -> list[list[Example]]:
    """The examples sorted by ids, and cut at the shortest common prefix until each tree fits into a pack and costs
    less than its parts."""
    rows = sorted(examples, key=lambda e: e.ids)
    if not layout.share_prefixes:
        return [[row] for row in rows]
    shared = [common_prefix(rows[i - 1].ids, row.ids) if i else 0 for i, row in enumerate(rows)]
    own = list(accumulate((len(row.ids) - n for row, n in zip(rows, shared, strict=True)), initial=0))

    def tokens(start: int, stop: int) -> int:
        return own[stop] - own[start] + shared[start]

    trees: list[list[Example]] = []
    ranges = [(0, len(rows))] if rows else []
    while ranges:
        start, stop = ranges.pop()
        if stop - start > 1:
            cut = min(range(start + 1, stop), key=lambda i: (shared[i], abs(2 * i - start - stop)))
            # a cut through no common prefix is free: plan_packs joins such trees again if that saves time
            if not shared[cut] or not layout.joins(tokens(start, cut), tokens(cut, stop), tokens(start, stop)):
                ranges += [(cut, stop), (start, cut)]
                continue
        trees.append(rows[start:stop])
    return trees


def count_tokens(tree: Sequence[Example]) -> int:
    """Tokens of the tree of examples, which must be sorted by ids."""
    return sum(
        len(example.ids) - (common_prefix(tree[i - 1].ids, example.ids) if i else 0) for i, example in enumerate(tree)
    )


def _add_targets(pack: Pack, example: Example, path: Sequence[int]) -> None:
    """Add the trained tokens of an example, whose tokens have the indices `path` in the pack."""
    for depth in range(1, len(example.ids)):
        if example.loss_mask[depth]:
            pack.source.append(path[depth - 1])
            pack.target.append(example.ids[depth])


def _close(pack: Pack, path: list[int]) -> None:
    """End the subtrees of the indices `path` here."""
    for index in path:
        pack.end[index] = len(pack.input_ids)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of equal ids at the beginning of both."""
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
