"""A training in its run folder, from the lock to the published weights, for adapters and baselines."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from data.atomic import write_json
from data.audit.report import DataReport
from data.terminal import print, quoted
from sft.errors import RunError
from sft.models.adapter_init import save_plain
from sft.recipe.baseline_schema import AnyRecipe
from sft.runs.checkpoint import (
    commit_folder,
    explain_full_disk,
    last_checkpoint,
    read_manifest,
    remove_leftovers,
    set_aside,
    step_of,
)
from sft.runs.cost import COST, Stopwatch
from sft.runs.folder import choose_folder, make_folder, start_run
from sft.runs.interrupt import CODES, SaveOnSignal, handle_signals, locked
from sft.runs.manifest import manifest
from sft.runs.metrics import plot_loss, read_metrics, rewind_metrics
from sft.runs.monitor import Monitor, trackers
from sft.runs.resume import Resume, check_unchanged, made_from, note_changed_data
from sft.session import keeps_pickles, use_all_cores
from sft.training.durable_trainer import DurableTrainer


@contextmanager
def open_run(recipe: AnyRecipe, recipe_path: Path, resume: Resume | None) -> Iterator["OpenRun"]:
    """A run that stays locked until the end of the block.

    A resumed run gets its lock and its checkpoint, and the folder of a new one is checked, before anything is loaded.
    Raises RunLocked, RunError for a run that can't be resumed, RecipeError for a folder that can't be made.
    """
    use_all_cores()
    state = PartialState(cpu=not torch.cuda.is_available())
    with ExitStack() as held:
        run = OpenRun(recipe_path, resume, state, held)
        if resume:
            held.enter_context(locked(resume.folder, run.main))
            run.checkpoint, run.damaged = last_checkpoint(resume.folder, keeps_pickles())
        else:
            choose_folder(recipe, recipe_path)
        yield run


class OpenRun:
    """`main`: whether this process writes the folder. checkpoint: the one that a resumed run starts from."""

    folder: Path
    facts: dict[str, Any]  # of the manifest
    monitor: Monitor | None = None
    checkpoint: Path | None = None

    def __init__(self, recipe_path: Path, resume: Resume | None, state: PartialState, held: ExitStack) -> None:
        self.recipe_path, self.resume, self.state, self.held = recipe_path, resume, state, held
        self.main, self.device = state.is_main_process, state.device
        self.damaged: dict[Path, str] = {}
        self.watch = Stopwatch()

    def claim(self, recipe: AnyRecipe, report: DataReport, parameters: tuple[int, int]) -> Path:
        """The locked run folder, made for a new run. parameters: the numbers of trained ones and of all."""
        self.recipe, self.report, self.parameters = recipe, report, parameters
        self.folder = self.resume.folder if self.resume else make_folder(recipe, self.recipe_path)
        if not self.resume:
            self.held.enter_context(locked(self.folder, self.main))
        self.held.enter_context(explain_full_disk(self.folder))
        self.facts = manifest(recipe, report, *parameters)
        return self.folder

    @contextmanager
    def record(self, trainer: DurableTrainer, steps_per_epoch: int, lines: Sequence[str]) -> Iterator[str | None]:
        """Ready the folder, print the lines, and record what the block trains; yields the checkpoint to resume.

        Raises SystemExit with the exit code of a signal that ended the training, once a checkpoint is saved;
        TrainingDiverged for weights that are not finite.
        """
        if self.main:
            trainer.made_from, begun = self.begin()
            print(*lines, *begun, sep="\n", flush=True)
            self.monitor = Monitor(self.folder, steps_per_epoch, read_metrics(self.folder))
            step = step_of(self.checkpoint) if self.checkpoint else 0
            for callback in (self.monitor, *trackers(self.recipe.train.report_to, self.folder, step)):
                trainer.add_callback(callback)
        interrupt = SaveOnSignal()
        trainer.add_callback(interrupt)
        self.watch = Stopwatch()
        if self.checkpoint:
            trainer.load_own_state(self.checkpoint)
        try:
            with handle_signals(interrupt.receive):
                yield str(self.checkpoint) if self.checkpoint else None
        finally:
            if self.monitor:
                self.monitor.close()
        if interrupt.stopped:
            if self.main:
                print(f"stopped and saved; resume with: graft train --resume {quoted(self.folder)}", flush=True)
            raise SystemExit(CODES[interrupt.stopped])
        trainer.check_finite()

    def begin(self) -> tuple[dict[str, Any], list[str]]:
        """Ready the folder; what the run is made from, for its checkpoints, and lines for the user.

        Raises RunError if something changed since the checkpoint that the resume does not allow.
        """
        run, last, resume, lines = self.folder, self.checkpoint, self.resume, list[str]()
        if last is None:
            start_run(run, self.recipe, self.facts, self.report)
            if resume:
                lines.append("no checkpoint was saved yet: the run starts at its first step")
        made = made_from(run, self.facts, self.state.num_processes)
        if last and resume:
            if self.recipe.tune.method == "adalora":
                raise RunError(
                    f"{run}: adalora can't resume from a checkpoint: PEFT saves pruned weights, which don't fit the "
                    "state of the optimizer; start a new run"
                )
            lines += check_unchanged(run, read_manifest(last)["made_from"], made, resume.allowed, resume.elastic)
            lines += [
                f"warning: {p.name}: {problem}; renamed to damaged-{p.name}" for p, problem in self.damaged.items()
            ]
            set_aside(self.damaged)
            lines.append(f"resumes from {last.name}")
        remove_leftovers(run)
        rewind_metrics(run, step_of(last) if last else 0)
        return made, lines

    def save_weights(self, trainer: DurableTrainer, save: Callable[[str], None] | None = None) -> Path:
        """adapter/ or model/, written whole by `save` (the trainer's, if None) on every process."""
        weights = self.folder / ("adapter" if hasattr(trainer.model, "peft_config") else "model")

        def write(folder: str) -> None:
            (save or trainer.save_model)(folder)
            if self.main:
                save_plain(Path(folder), trainer.model)

        commit_folder(weights, write, self.main)
        return weights

    def finish(self, weights: Path) -> Path | None:
        """Write what the training cost and the plot of its loss; the run folder on the main process, else None."""
        if not self.main:
            return None
        before = self.monitor.last.get("seconds") if self.monitor else None
        write_json(self.folder / COST, self.watch.cost(weights, *self.parameters, before))
        note_changed_data(self.folder, self.facts)
        plot_loss(self.folder)
        return self.folder
