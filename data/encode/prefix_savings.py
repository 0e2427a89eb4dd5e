"""What sharing prefixes saves, measured before anything is trained."""

from dataclasses import dataclass, replace

from data.encode.example_store import Examples
from data.encode.pack import Layout, pack_sizes, step_order

CONTEXTS = 2_000  # that are measured at most
PAYS = 1.03  # the least gain that turns sharing on: masks and bookkeeping are not free


@dataclass(frozen=True)
class Sharing:
    """Flat tokens for each one that is executed, and how many times as long training would take without sharing."""

    ratio: float
    gain: float

    @property
    def pays(self) -> bool:
        return self.gain >= PAYS


def measure_sharing(
    examples: Examples, layout: Layout, examples_per_step: int, seed: int, max_branches: int | None = None
) -> Sharing:
    """Over one occurrence of each example, as if the layout shared prefixes; times are the layout's costs."""
    contexts, count = examples.contexts, len(set(examples.contexts))
    below = f"{int(min(1, CONTEXTS / max(1, count)) * (2**64 - 1)):016x}"
    chosen = [i for i, context in enumerate(contexts) if context <= below]  # keys are hashes: this draws evenly
    keys = [contexts[i] for i in chosen]
    shared, alone = replace(layout, share_prefixes=True), replace(layout, share_prefixes=False)
    flat = executed = 0
    costs = {True: 0.0, False: 0.0}
    for step in step_order(keys, examples_per_step, seed, epoch=0, max_branches=max_branches):
        rows = [examples[chosen[i]] for i in step]
        flat += sum(len(row.ids) for row in rows)
        for share, layout in ((True, shared), (False, alone)):
            sizes = pack_sizes(rows, layout)
            costs[share] += sum(map(layout.cost, sizes))
            executed += sum(sizes) if share else 0
    return Sharing(flat / executed, costs[False] / costs[True]) if executed else Sharing(1.0, 1.0)
