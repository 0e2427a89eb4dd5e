"""How much sharing prefixes saves, measured before training."""

from dataclasses import dataclass, replace

from data.encode.example_store import Examples
from data.encode.pack import Layout, pack_sizes, step_order

CONTEXTS = 2_000  # the most that are measured
PAYS = 1.03  # the smallest gain that turns sharing on, as masks and bookkeeping cost time too


@dataclass(frozen=True)
class Sharing:
    """ratio: tokens without sharing / tokens computed with it. gain: time without sharing / time with it."""

    ratio: float
    gain: float

    @property
    def pays(self) -> bool:
        return self.gain >= PAYS


def measure_sharing(
    examples: Examples, layout: Layout, examples_per_step: int, seed: int, max_branches: int | None = None
) -> Sharing:
    """Measured over one occurrence of each example (of a sample of contexts); times are the layout's costs."""
    contexts, count = examples.contexts, len(set(examples.contexts))
    below = f"{int(min(1, CONTEXTS / max(1, count)) * (2**64 - 1)):016x}"
    chosen = [
        i for i, context in enumerate(contexts) if context <= below
    ]  # keys are hashes, so this is a uniform sample
    keys = [contexts[i] for i in chosen]
    shared, alone = replace(layout, share_prefixes=True), replace(layout, share_prefixes=False)
    flat = executed = 0
    cost = cost_alone = 0.0
    for step in step_order(keys, examples_per_step, seed, epoch=0, max_branches=max_branches):
        rows = [examples[chosen[i]] for i in step]
        flat += sum(len(row.ids) for row in rows)
        sizes = pack_sizes(rows, shared)
        executed += sum(sizes)
        cost += sum(map(layout.cost, sizes))
        cost_alone += sum(map(layout.cost, pack_sizes(rows, alone)))
    return Sharing(flat / executed, cost_alone / cost) if executed else Sharing(1.0, 1.0)
