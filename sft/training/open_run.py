"""One training in its run folder, from the lock to the published weights: what adapters and baselines share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState

from data.atomic import write_json
from data.audit.report import DataReport
from sft.recipe.baseline_schema import AnyRecipe
from sft.runs.checkpoint import commit_folder, explain_full_disk, last_checkpoint, step_of
from sft.runs.cost import COST, Stopwatch
from sft.runs.folder import choose_folder, make_folder
from sft.runs.interrupt import CODES, SaveOnSignal, locked
from sft.runs.manifest import manifest
from sft.runs.metrics import plot_loss, read_metrics
from sft.runs.monitor import Monitor, trackers
from sft.runs.resume import Resume, begin, note_changed_data
from sft.session import keeps_pickles, use_all_cores
from sft.training.durable_trainer import DurableTrainer


@contextmanager
def open_run(recipe: AnyRecipe, recipe_path: Path, resume: Resume | None) -> Iterator["OpenRun"]:
    """A run that is locked until the end of the block.

    Before anything is loaded, a resumed run gets its lock and its checkpoint, and the folder of a new one is checked.
    Raises RunLocked, RunError for a run that can't go on, RecipeError for a folder that can't be made.
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
    """`main`: whether this is the process that writes the folder. checkpoint: where a resumed run goes on."""

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
        """The run folder, made for a new run, and locked. parameters: how many are trained, and all."""
        self.recipe, self.report, self.parameters = recipe, report, parameters
        self.folder = self.resume.folder if self.resume else make_folder(recipe, self.recipe_path)
        if not self.resume:
            self.held.enter_context(locked(self.folder, self.main))
        self.held.enter_context(explain_full_disk(self.folder))
        self.facts = manifest(recipe, report, *parameters)
        return self.folder

    @contextmanager
    def record(self, trainer: DurableTrainer, steps_per_epoch: int, lines: Sequence[str]) -> Iterator[str | None]:
        """Ready the folder, print the lines, and record what the block trains; the path of the checkpoint to resume.

        Raises SystemExit with a signal's exit code where one ended the training, once a checkpoint is saved;
        TrainingDiverged for weights that are not finite.
        """
        if self.main:
            trainer.made_from, more = self.begin()
            print(*lines, *more, sep="\n", flush=True)
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
            yield str(self.checkpoint) if self.checkpoint else None
        finally:
            interrupt.restore()
            if self.monitor:
                self.monitor.close()
        if interrupt.stopped:
            if self.main:
                print(f"stopped and saved; go on with: graft train --resume {self.folder}", flush=True)
            raise SystemExit(CODES[cast(Any, interrupt.stopped)])
        trainer.check_finite()

    def begin(self) -> tuple[dict[str, Any], list[str]]:
        """Write what the run is made from, or check it against the checkpoint's: see runs/resume.py."""
        checkpoint, processes = (self.checkpoint, self.damaged), self.state.num_processes
        return begin(self.folder, self.recipe, self.facts, self.report, self.resume, checkpoint, processes)

    def save_weights(self, trainer: DurableTrainer, save: Callable[[str], None] | None = None) -> Path:
        """adapter/ or model/, written whole by `save` (the trainer's, if None) on every process."""
        weights = self.folder / ("adapter" if hasattr(trainer.model, "peft_config") else "model")
        commit_folder(weights, save or trainer.save_model, self.main)
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
