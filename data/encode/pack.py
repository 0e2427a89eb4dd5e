"""Examples -> packs: a forest of token ids that holds, and computes, a common prefix once; or rows, padded.

A pack is a trie over the ids of its examples, laid out in depth-first preorder. Token q may attend to token k
exactly when k <= q < end[k]: documents and siblings are isolated, ancestors shared, by that one rule.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, islice
from typing import Literal

import torch

from data.encode.chat import Example

LOOK_AHEAD = 64  # contexts that compete for the room left in a step
# Time of a micro-batch in units of a token's: SmolLM2-135M on 2 CPU cores, see tests/benchmarks/throughput.py --growth
FIXED_TOKENS = 32  # reading all weights once
DENSE_TOKENS = 1000  # tokens that spend as much on attention over T^2 as on all else
SHARES = (1.05, 1.2, 1.5)  # packs of several processes: room above equal shares, as trees don't fill them evenly


@dataclass(frozen=True)
class Layout:
    """How the examples of a step become micro-batches.

    pack_tokens: most tokens of one, so that memory is bounded; only a longer example makes a larger one.
    attention: "dense" computes T^2 scores under a mask (SDPA, eager), "sparse" nearly none but those that the mask
    lets through (forest, FlexAttention). Where no mask says who sees whom, every example is a row of its own: "padded"
    to the longest of the micro-batch, or "alone" in it.
    """

    share_prefixes: bool = True
    pack_tokens: int = 512
    attention: Literal["dense", "sparse", "padded", "alone"] = "dense"

    def cost(self, tokens: int) -> float:
        """Time of a micro-batch of `tokens` tokens, in units of one token's time."""
        return FIXED_TOKENS + tokens + (tokens**2 / DENSE_TOKENS if self.attention == "dense" else 0)

    def share(self, one: int, other: int, both: int) -> bool:
        """Whether trees of `one` and `other` tokens had better be a single one of `both` tokens."""
        if both > self.pack_tokens:
            return False
        return self.cost(both) < min(self.cost(one + other), self.cost(one) + self.cost(other))

    def joins(self, one: int, other: int) -> bool:
        """Whether micro-batches of `one` and `other` tokens had better be a single one."""
        return one + other <= self.pack_tokens and self.cost(one + other) < self.cost(one) + self.cost(other)


@dataclass
class Pack:
    """Arrays of a forest with T tokens that trains M tokens.

    input_ids, position_ids (depth in its tree), end (one past the last index of the subtree): length T.
    source, target: length M, an entry for every trained token of every example: the index whose hidden state
    predicts it, and its id. A branch point predicts several targets; equal answers count as often as they occur.
    rows: of T / rows tokens, that a model computes as a batch, without a mask. None: a forest, a single sequence.
    """

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    leaf: list[int] = field(default_factory=list)  # per example, in the order given: the index of its last token
    rows: int | None = None


def build_pack(trees: Iterable[Sequence[Example]]) -> Pack:
    """One pack; the examples of one tree share their common prefixes, trees share nothing."""
    pack = Pack()
    leaf: dict[int, int] = {}
    position = 0
    for tree in trees:
        order = sorted(range(len(tree)), key=lambda i: tree[i].ids)
        path: list[int] = []  # index in the pack of each token of the current example
        previous: list[int] = []
        for i in order:
            example = tree[i]
            shared = common_prefix(previous, example.ids)
            _close(pack, path[shared:])
            path = path[:shared]
            for depth in range(shared, len(example.ids)):
                path.append(len(pack.input_ids))
                pack.input_ids.append(example.ids[depth])
                pack.position_ids.append(depth)
                pack.end.append(-1)
            for depth in range(1, len(example.ids)):
                if example.loss_mask[depth]:
                    pack.source.append(path[depth - 1])
                    pack.target.append(example.ids[depth])
            leaf[position + i] = path[-1]
            previous = example.ids
        _close(pack, path)
        position += len(tree)
    pack.leaf = [leaf[i] for i in range(position)]
    return pack


def pad_rows(examples: Sequence[Example]) -> Pack:
    """One pack with a row for each example. Padding comes last, where no earlier token of a causal model sees it."""
    width = max(len(example.ids) for example in examples)
    pack = Pack(rows=len(examples))
    for example in examples:
        first, tokens = len(pack.input_ids), len(example.ids)
        pack.input_ids += [*example.ids, *[0] * (width - tokens)]
        pack.position_ids += range(width)
        pack.end += [first + width] * width
        for depth in range(1, tokens):
            if example.loss_mask[depth]:
                pack.source.append(first + depth - 1)
                pack.target.append(example.ids[depth])
        pack.leaf.append(first + tokens - 1)
    return pack


def make_packs(examples: Sequence[Example], layout: Layout = Layout(), processes: int = 1) -> list[Pack]:
    """Micro-batches that hold the examples once each. With several processes, packs are sized so that the slowest
    process finishes as early as possible; they are dealt out largest first."""
    layout = _for_processes(examples, layout, processes) if processes > 1 else layout
    if layout.attention in ("padded", "alone"):
        return [pad_rows(rows) for rows in plan_rows(examples, layout)]
    return [build_pack(trees) for trees in plan_packs(examples, layout)]


def pack_sizes(examples: Sequence[Example], layout: Layout) -> list[int]:
    """Tokens of each micro-batch that make_packs would make."""
    if layout.attention in ("padded", "alone"):
        return [len(rows) * len(rows[0].ids) for rows in plan_rows(examples, layout)]
    return [sum(map(count_tokens, trees)) for trees in plan_packs(examples, layout)]


def _for_processes(examples: Sequence[Example], layout: Layout, processes: int) -> Layout:
    """Smaller packs compute more prefixes twice, so that neither the largest nor equal shares are always best."""

    def busiest(candidate: Layout) -> float:
        return sum(map(layout.cost, sorted(pack_sizes(examples, candidate), reverse=True)[::processes]))

    tokens = sum(pack_sizes(examples, layout))
    rounds = math.ceil(tokens / (processes * layout.pack_tokens))
    shares = (math.ceil(more * tokens / (processes * rounds)) for more in SHARES)
    smaller = [replace(layout, pack_tokens=share) for share in shares if share < layout.pack_tokens]
    return min([layout, *smaller], key=busiest)


def attention_mask(pack: Pack, device: torch.device | str = "cpu") -> torch.Tensor:
    """Boolean [1, 1, T, T]; [.., q, k] says whether token q attends to token k."""
    end = torch.tensor(pack.end, device=device)
    index = torch.arange(len(pack.end), device=device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < end[None, :]))[None, None]


def is_chain(pack: Pack) -> bool:
    """True for a single sequence: the rule is then plain causal attention and needs no mask."""
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

    A step holds at most examples_per_step, the same ones whether prefixes are shared or not. Contexts are shuffled and
    stay whole, because one that two steps divide is computed twice; only one larger than a step, or than max_branches,
    is divided.
    weights: occurrences of each example in an epoch. Of 2.3, two are sure and 30 % of the contexts occur once more:
    others in the next epoch, until all have had their turn.
    """
    groups: dict[float, dict[str, list[int]]] = {}
    for i, context in enumerate(contexts):
        groups.setdefault(weights[i] if weights else 1.0, {}).setdefault(context, []).append(i)
    rng = random.Random(f"{seed}/{epoch}")
    most = min(examples_per_step, max_branches or examples_per_step)
    waiting = [
        group[i : i + most]
        for weight, alike in groups.items()
        for group in _occurrences(list(alike.values()), weight, seed, epoch)
        for i in range(0, len(group), most)
    ]
    rng.shuffle(waiting)
    coming = iter(waiting)
    steps: list[list[int]] = []
    window = list(islice(coming, LOOK_AHEAD))  # a short look ahead keeps the order nearly as shuffled
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
    whole = int(weight)
    more = math.ceil(round((weight - whole) * len(groups), 6))
    turns = random.Random(seed).sample(groups, len(groups))
    return groups * whole + [turns[i % len(turns)] for i in range(epoch * more, (epoch + 1) * more)]


def plan_packs(examples: Sequence[Example], layout: Layout) -> list[list[list[Example]]]:
    """The trees of each micro-batch, their examples in order of their ids.

    Examples stay in a tree, and trees join in a pack, if that saves time: attention over T^2 can cost more than a
    shared prefix or one pass over the weights less saves. Trees fill packs best fit decreasing: the largest first, each
    into the fullest pack that it joins; those of a pack then share what they have in common.
    """
    packs: list[tuple[int, list[list[Example]]]] = []
    for size, tree in sorted(((count_tokens(t), t) for t in make_trees(examples, layout)), key=lambda pair: -pair[0]):
        fits = [i for i, (used, _) in enumerate(packs) if layout.joins(used, size)]
        if fits:
            best = max(fits, key=lambda i: packs[i][0])
            packs[best] = (packs[best][0] + size, [*packs[best][1], tree])
        else:
            packs.append((size, [tree]))
    if not layout.share_prefixes:
        return [trees for _, trees in packs]
    return [[sorted(chain.from_iterable(trees), key=lambda e: e.ids)] for _, trees in packs]


def plan_rows(examples: Sequence[Example], layout: Layout) -> list[list[Example]]:
    """The rows of each micro-batch without prefix sharing: the longest first, as long as the padding of the next one
    costs less than a micro-batch of its own."""
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
    """The examples in order of their ids, cut where least is shared until each tree fits into a pack and costs less
    than its parts."""
    rows = sorted(examples, key=lambda e: e.ids)
    if not layout.share_prefixes:
        return [[row] for row in rows]
    shared = [common_prefix(rows[i - 1].ids, row.ids) if i else 0 for i, row in enumerate(rows)]
    own = list(accumulate((len(row.ids) - n for row, n in zip(rows, shared, strict=True)), initial=0))

    def tokens(start: int, stop: int) -> int:
        return own[stop] - own[start] + shared[start]

    trees: list[list[Example]] = []
    left = [(0, len(rows))] if rows else []
    while left:
        start, stop = left.pop()
        if stop - start > 1:
            cut = min(range(start + 1, stop), key=lambda i: (shared[i], abs(2 * i - start - stop)))
            if not layout.share(tokens(start, cut), tokens(cut, stop), tokens(start, stop)):
                left += [(cut, stop), (start, cut)]
                continue
        trees.append(rows[start:stop])
    return trees


def count_tokens(tree: Sequence[Example]) -> int:
    """Tokens of the tree of examples that are in order of their ids."""
    return sum(
        len(example.ids) - (common_prefix(tree[i - 1].ids, example.ids) if i else 0) for i, example in enumerate(tree)
    )


def _close(pack: Pack, path: list[int]) -> None:
    for index in path:
        pack.end[index] = len(pack.input_ids)


def common_prefix(a: list[int], b: list[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n
