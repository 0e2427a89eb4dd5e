"""Which examples each optimizer step of a run trains on."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.encode.chat import Example
from data.encode.example_store import Examples
from data.encode.pack import Layout, Pack, make_packs, step_order
from sft.recipe.schema import Train


@dataclass(frozen=True)
class StepPlan:
    """Which examples each optimizer step of the whole run trains on; the same on every process."""

    examples: Sequence[Example]
    steps: Sequence[Sequence[int]]  # of all epochs
    steps_per_epoch: int
    layout: Layout

    def packs(self, step: int, processes: int = 1) -> list[Pack]:
        return make_packs([self.examples[i] for i in self.steps[step]], self.layout, processes)


def plan_steps(examples: Examples, train: Train, layout: Layout, max_branches: int | None = None) -> StepPlan:
    """The steps of all epochs, or the first max_steps of them."""

    def epoch(number: int) -> list[list[int]]:
        size, weights = train.examples_per_step, examples.weights
        return step_order(examples.contexts, size, train.seed, number, weights, max_branches)

    steps = epoch(0)
    per_epoch = len(steps)
    total = train.max_steps if train.max_steps > 0 else max(1, round(train.num_train_epochs * per_epoch))
    number = 1
    while len(steps) < total:
        steps += epoch(number)
        number += 1
    return StepPlan(examples, steps[:total], per_epoch, layout)
