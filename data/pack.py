"""Examples -> packs: a forest of token ids in which a common prefix stands, and is computed, once.

A pack is a trie over the ids of its examples, laid out in depth-first preorder. Token q may attend to token k
exactly when k <= q < end[k]: documents and siblings are isolated, ancestors shared, by that one rule.
"""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from data.chat import Example

LOOK_AHEAD = 64  # contexts that compete for the room left in a step


@dataclass
class Pack:
    """Arrays of a forest with T tokens that trains M tokens.

    input_ids, position_ids (depth in its tree), end (one past the last index of the subtree): length T.
    source, target: length M, an entry for every trained token of every example: the index whose hidden state
    predicts it, and its id. A branch point predicts several targets; equal answers count as often as they occur.
    """

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)
    leaf: list[int] = field(default_factory=list)  # per example, in the order given: the index of its last token


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


def make_packs(examples: Sequence[Example], share_prefixes: bool, pack_tokens: int | None = None) -> list[Pack]:
    """Micro-batches that hold the examples once each.

    pack_tokens: most tokens of a pack (one longer example still makes a pack); None: one tree a pack, the fastest on
    a CPU, where the T^2 of attention costs more than a larger matrix product saves.
    """
    trees = _trees(examples, share_prefixes, pack_tokens)
    if pack_tokens is None:
        return [build_pack([tree]) for tree in trees]
    return [build_pack(bin) for bin in _fill(trees, pack_tokens)]


def attention_mask(pack: Pack, device: torch.device | str = "cpu") -> torch.Tensor:
    """Boolean [1, 1, T, T]; [.., q, k] says whether token q attends to token k."""
    end = torch.tensor(pack.end, device=device)
    index = torch.arange(len(pack.end), device=device)
    return ((index[None, :] <= index[:, None]) & (index[:, None] < end[None, :]))[None, None]


def is_chain(pack: Pack) -> bool:
    """True for a single sequence, where the rule is plain causal attention and needs no mask."""
    return all(end == len(pack.end) for end in pack.end)


def step_order(
    contexts: Sequence[str], examples_per_step: int, seed: int, epoch: int, weights: Sequence[float] | None = None
) -> list[list[int]]:
    """Indices of the examples of each optimizer step of an epoch; each index occurs once, or `weights` times.

    A step holds at most examples_per_step, the same ones whether prefixes are shared or not. Contexts are shuffled and
    stay whole, because one that two steps divide is computed twice; only a context larger than a step is divided.
    weights: occurrences of each example in an epoch. Of 2.3, two are sure and 30 % of the contexts occur once more:
    others in the next epoch, until all have had their turn.
    """
    groups: dict[float, dict[str, list[int]]] = {}
    for i, context in enumerate(contexts):
        groups.setdefault(weights[i] if weights else 1.0, {}).setdefault(context, []).append(i)
    rng = random.Random(f"{seed}/{epoch}")
    waiting = [
        group[i : i + examples_per_step]
        for weight, alike in groups.items()
        for group in _occurrences(list(alike.values()), weight, seed, epoch)
        for i in range(0, len(group), examples_per_step)
    ]
    rng.shuffle(waiting)
    coming = iter(waiting)
    steps: list[list[int]] = []
    window = list(islice(coming, LOOK_AHEAD))  # a short look ahead keeps the order nearly as shuffled
    while window:
        step: list[int] = []
        left: list[list[int]] = []
        for group in window:
            if len(step) + len(group) <= examples_per_step:
                step += group
            else:
                left.append(group)
        steps.append(step)
        window = left + list(islice(coming, LOOK_AHEAD - len(left)))
    return steps


def count_executed(examples: Sequence[Example]) -> int:
    """Tokens that are computed for the examples of a step where prefixes are shared."""
    return sum(
        len(example.ids) - (common_prefix(tree[i - 1].ids, example.ids) if i else 0)
        for tree in _trees(examples, share_prefixes=True)
        for i, example in enumerate(tree)
    )


def _occurrences(groups: list[list[int]], weight: float, seed: int, epoch: int) -> list[list[int]]:
    whole = int(weight)
    more = math.ceil(round((weight - whole) * len(groups), 6))
    turns = random.Random(seed).sample(groups, len(groups))
    return groups * whole + [turns[i % len(turns)] for i in range(epoch * more, (epoch + 1) * more)]


def _trees(examples: Sequence[Example], share_prefixes: bool, pack_tokens: int | None = None) -> list[list[Example]]:
    """The examples in order of their ids, divided where sharing a prefix does not pay or a pack is full."""
    trees: list[list[Example]] = []
    size = 0
    for example in sorted(examples, key=lambda e: e.ids):
        if share_prefixes and trees:
            previous = trees[-1][-1].ids
            shared = common_prefix(previous, example.ids)
            # a short common prefix (a system prompt) saves less than attention over the joined trees costs
            joins = 2 * shared >= min(len(previous), len(example.ids))
            size += len(example.ids) - shared
            if joins and (pack_tokens is None or size <= pack_tokens):
                trees[-1].append(example)
                continue
        trees.append([example])
        size = len(example.ids)
    return trees


def _fill(trees: list[list[Example]], pack_tokens: int) -> list[list[list[Example]]]:
    """Trees into bins of at most pack_tokens, best fit decreasing."""
    sizes = {i: len(build_pack([tree]).input_ids) for i, tree in enumerate(trees)}
    bins: list[tuple[int, list[list[Example]]]] = []
    for i in sorted(sizes, key=lambda i: -sizes[i]):
        fits = [b for b, (used, _) in enumerate(bins) if used + sizes[i] <= pack_tokens]
        if fits:
            best = max(fits, key=lambda b: bins[b][0])
            bins[best] = (bins[best][0] + sizes[i], [*bins[best][1], trees[i]])
        else:
            bins.append((sizes[i], [trees[i]]))
    return [trees for _, trees in bins]


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
