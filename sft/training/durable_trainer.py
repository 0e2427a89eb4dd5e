"""transformers' Trainer for a run that can't be lost: whole checkpoints, exact resume, only finite weights.

Trainer's own checkpoints are written in place, chosen unchecked, and hold pickles. FSDP and DeepSpeed still write
optimizer and sharded weights in their own formats, within our folder and manifest.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_pt_utils import nested_gather

from sft.errors import RunError, TrainingDiverged
from sft.recipe.schema import Tune
from sft.runs.checkpoint import commit_checkpoint, damage, rotate, shared_folder
from sft.runs.state import State, load_state, random_state, save_state, set_random_state

OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"


@dataclass
class UnreadStep:
    """What the host has not read yet of a step that CUDA may still compute."""

    step: int
    epoch: float
    values: torch.Tensor  # loss, norm of the gradient, sum of the losses since the last log; on the host after `copied`
    copied: torch.cuda.Event | None
    logs: dict[str, float] | None  # what is logged beside them; None if the step is not logged
    steps: int  # since the last log


class DurableTrainer(Trainer):
    """Mixin for a Trainer: list it before the Trainer base class.

    Reading a number from CUDA waits for all work that is queued there. With `reads_late` the host therefore reads loss
    and gradient norm of a step after it has queued the next one, and logs or refuses them then; until it does, the
    optimizer's `found_inf` keeps CUDA from changing weights after a loss or gradient that is not finite.
    """

    reads_late = False  # needs an optimizer with found_inf (torch's fused ones), and one training_step for each step
    _step_loss: torch.Tensor
    _step_values: torch.Tensor | None = None  # loss and gradient norm of the current step
    _found_inf: torch.Tensor | None = None  # 1 from the first step on whose loss or gradient is not finite, else 0
    made_from: dict[str, Any] | None = None  # stored in each checkpoint; runs/resume.py compares it
    executed_tokens = trained_examples = 0  # over all processes
    resumed: State = None  # this process's state at the checkpoint that it resumes from
    epoch_start: State = None  # random state from which the sampler draws the epoch's order
    tune = Tune()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._unread: list[UnreadStep] = []
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The recipe's optimizer; with tune.loraplus_lr_ratio that of LoRA+ (Hayou et al. 2024)."""
        if self.optimizer is None and self.tune.loraplus_lr_ratio is not None:
            target: Any = model or self.model
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
            on_embedding = self.tune.loraplus_lr_embedding
            self.optimizer = create_loraplus_optimizer(
                target,
                kind,
                loraplus_lr_ratio=self.tune.loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **({"loraplus_lr_embedding": on_embedding} if on_embedding else {}),
                **settings,
            )
        return super().create_optimizer(model)

    def load_own_state(self, checkpoint: Path) -> None:
        """Read this process's state from the checkpoint; train() loads the rest."""
        own = checkpoint / _process_file(self.args.process_index)
        # with more processes than before, each new one takes the first one's
        self.resumed = load_state(own if own.exists() else checkpoint / _process_file(0))
        self.set_own_state(self.resumed["own"])

    def own_state(self) -> State:
        """Counts and decisions of the training so far, for a resume; a subclass adds its own."""
        return {"executed_tokens": self.executed_tokens, "trained_examples": self.trained_examples}

    def set_own_state(self, state: State) -> None:
        self.executed_tokens, self.trained_examples = state["executed_tokens"], state["trained_examples"]

    def check_finite(self) -> None:
        """Raise TrainingDiverged if a trained parameter is not finite; such weights are never written."""
        for name, parameter in cast(nn.Module, self.model).named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter).all():
                raise TrainingDiverged(
                    f"{name} is not finite after step {self.state.global_step}; lower train.learning_rate"
                )

    def check_loss(self, loss: torch.Tensor) -> None:
        """Raise TrainingDiverged if the step's loss is not finite; with reads_late only in a later step."""
        if self.reads_late:
            self._step_loss = loss.detach()
        else:
            _require_finite("loss", float(loss), self.state.global_step + 1)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.reads_late:
            self._step_values = torch.stack([self._step_loss, norm]).float()
            found_inf = (~torch.isfinite(self._step_values).all()).float()
            optimizer = cast(Any, self.optimizer).optimizer  # within accelerate's
            if self._found_inf is not None:  # an earlier step's, which the host may not have read yet
                found_inf = torch.maximum(found_inf, self._found_inf)
            self._found_inf = optimizer.found_inf = found_inf
        elif norm is not None:
            _require_finite("gradient", float(norm), self.state.global_step + 1)
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        if self.reads_late:
            if self._step_values is not None:  # Trainer calls this once more at the end of an epoch
                self._unread.append(self._queue_copy(self._step_values, tr_loss, kwargs["learning_rate"]))
                self._step_values = None
            control = self.control
            ends = control.should_save or control.should_evaluate or control.should_training_stop
            while len(self._unread) > (0 if ends or control.should_epoch_stop else 1):
                self._read(self._unread.pop(0))
            control.should_log = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _queue_copy(self, step_values: torch.Tensor, tr_loss: torch.Tensor, learning_rate: float) -> UnreadStep:
        """The step just queued, with its values on their way to the host."""
        step, logs, steps, since_log = self.state.global_step, None, 0, tr_loss.clone()
        if self.control.should_log:
            since_log = nested_gather(tr_loss, self.args.parallel_mode).mean()
            tr_loss.zero_()
            steps, self._globalstep_last_logged = step - self._globalstep_last_logged, step
            logs = {"learning_rate": learning_rate, **self._counts()}
        values = torch.cat([step_values, since_log[None]]).to("cpu", non_blocking=True)
        copied = torch.cuda.Event() if tr_loss.is_cuda else None
        if copied is not None:
            copied.record()
        return UnreadStep(step, self.state.epoch, values, copied, logs, steps)

    def _read(self, unread: UnreadStep) -> None:
        """Wait for the step's values; log them, or raise TrainingDiverged."""
        if unread.copied is not None:
            unread.copied.synchronize()
        loss, norm, loss_since_log = unread.values.tolist()
        _require_finite("loss", loss, unread.step)
        _require_finite("gradient", norm, unread.step)
        if unread.logs is None:
            return
        self._total_loss_scalar += loss_since_log
        state, now = self.state, (self.state.global_step, self.state.epoch)
        state.global_step, state.epoch = unread.step, unread.epoch
        try:
            self.log({"loss": loss_since_log / unread.steps, "grad_norm": norm, **unread.logs})
        finally:
            state.global_step, state.epoch = now

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # without Trainer's training_args.bin, which is a pickle
        cast(Any, self.model).save_pretrained(output_dir, state_dict=state_dict)
        if self.processing_class is not None:
            cast(Any, self.processing_class).save_pretrained(output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The run folder has a card of its own."""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's estimate needs padded rows

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs if "eval_loss" in logs else {**self._counts(), **logs}, start_time)

    def _counts(self) -> dict[str, int]:
        return {"executed_tokens": self.executed_tokens, "examples": self.trained_examples}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, state, main = Path(cast(str, self.args.output_dir)), self.state, self.args.should_save
        final = run / f"checkpoint-{state.global_step}"
        best = [self._best()] if state.best_global_step else []
        self.check_finite()
        temporary = shared_folder(final, main)
        try:
            self.save_model(str(temporary), _internal_call=True)
            self._save_optimizer_and_scheduler(str(temporary))
            self._save_rng_state(str(temporary))
            if main:
                state.save_to_json(str(temporary / STATE))
            self.accelerator.wait_for_everyone()
            if main:
                commit_checkpoint(temporary, final, {"step": state.global_step, "made_from": self.made_from})
                rotate(run, self.args.save_total_limit, [final, *best])
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
            state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            save_state(Path(output_dir) / OPTIMIZER, state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = load_state(Path(checkpoint) / OPTIMIZER)
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        # a changed recipe decides on weight decay, betas and the schedule; the checkpoint only on what was done so far
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        scheduler.last_epoch, scheduler._step_count = (state["scheduler"][k] for k in ("last_epoch", "_step_count"))
        scheduler._last_lr = list(scheduler.get_lr()) if isinstance(scheduler, LambdaLR) else scheduler._last_lr
        for group, own, rate in zip(optimizer.param_groups, asked, scheduler._last_lr, strict=True):
            group.update(own, lr=rate)

    def _save_rng_state(self, output_dir: str) -> None:
        state = {
            "random": random_state(),
            "epoch_start": self.epoch_start,
            "loss_since_log": self._tr_loss,
            "logged_step": self._globalstep_last_logged,
            "own": self.own_state(),
        }
        save_state(Path(output_dir) / _process_file(self.args.process_index), state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer calls this after it has read the rows of the first new step, so reading them changes nothing."""
        if checkpoint is not None:
            set_random_state(self.resumed["random"])
            self._tr_loss = self.resumed["loss_since_log"].to(self.args.device)
            self._globalstep_last_logged = self.resumed["logged_step"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            # a sampler draws the order of an epoch at its start
            within = kwargs["steps_trained_in_current_epoch"] > 0
            set_random_state(self.resumed["epoch_start" if within else "random"])
        self.epoch_start = random_state()
        super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        progress = super()._init_training_state(*args)
        if self.state.best_global_step:
            self._check_best()
        return progress

    def _load_best_model(self) -> None:
        self._check_best()
        super()._load_best_model()

    def _best(self) -> Path:
        """The best checkpoint so far, in the run folder, which may have moved."""
        best = Path(cast(str, self.args.output_dir)) / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = str(best)
        return best

    def _check_best(self) -> None:
        best = self._best()
        if problem := damage(best, self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise RunError(f"{best}: the best checkpoint so far can't be used: {problem}; start a new run")


def _require_finite(name: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise TrainingDiverged(f"the {name} of step {step} is {value}; lower train.learning_rate")


def _process_file(index: int) -> str:
    return f"process-{index}.safetensors"
