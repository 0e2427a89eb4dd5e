"""Training of an encoder: a DurableTrainer with the rows and the evaluation of a head, and a schedule of layers."""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from sft.baselines.encoder import depths
from sft.baselines.heads import Head
from sft.errors import RecipeError
from sft.models.speed import bfloat16_pays
from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.schema import changed
from sft.training.durable_trainer import DurableTrainer


class Unfreeze(TrainerCallback):
    """Gradual unfreezing (Howard and Ruder 2018, section 3.3): first the head is trained, then one more layer at a time
    from the top, and all of them after `share` of the steps."""

    def __init__(self, model: PreTrainedModel, share: float) -> None:
        self.depth, self.deepest = depths(model)
        self.share = share

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = min(1.0, state.global_step / max(1.0, self.share * state.max_steps))
        for name, parameter in kwargs["model"].named_parameters():
            parameter.requires_grad_(self.depth[name.removeprefix("module.")] <= int(done * self.deepest))


class EncoderTrainer(DurableTrainer):
    def __init__(self, model: PreTrainedModel, args: TrainingArguments, recipe: BaselineRecipe, head: Head) -> None:
        self.recipe, self.head, self.tune = recipe, head, recipe.tune
        super().__init__(
            model=model,
            args=args,
            train_dataset=cast(Any, head.rows),
            eval_dataset=cast(Any, head.rows),  # not read: evaluate() scores the head's dev slice
            # collated in the step: a loader reads a batch ahead, so its draws would not match the random state that a
            # checkpoint restores
            data_collator=cast(Any, lambda rows: {"rows": rows}),
        )
        self.remove_callback(PrinterCallback)
        if recipe.tune.method == "gradual_unfreezing":
            self.add_callback(Unfreeze(model, recipe.tune.unfreeze_share))
        # the heads' losses are means over the batch; Trainer would multiply them by the number of processes
        self.model_accepts_loss_kwargs = False

    def chosen(self) -> dict[str, Any]:
        """Content of chosen.json: the head's choices, the step of the final weights, and their scores on the dev
        slice."""
        best = self.state.best_model_checkpoint
        model = cast(nn.Module, self.model)
        step = int(best.rsplit("-", 1)[1]) if best else self.state.global_step
        scores = self.head.score_dev(model) if self.recipe.data.dev_share else {}
        return {**self.head.choose(model), "step": step, "dev": scores}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        inputs = self.head.collate(inputs["rows"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.check_loss(loss)
        counts = torch.tensor([inputs["attention_mask"].sum(), len(inputs["input_ids"])], device=loss.device)
        tokens, examples = self.accelerator.reduce(counts, reduction="sum").tolist()
        self.executed_tokens += tokens
        self.trained_examples += examples
        return loss

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Scores on the head's dev slice; each process scores all of it, so that all make the same choice."""
        scores = self.head.score_dev(cast(nn.Module, self.model))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        cast(nn.Module, self.model).train()
        return metrics

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; with tune.layer_decay the rate of a layer is that of the layer above times the decay."""
        if self.optimizer is not None or self.recipe.tune.layer_decay == 1.0:
            return super().create_optimizer(model)
        target = cast(PreTrainedModel, model or self.model)
        depth, _ = depths(target)
        decayed = set(self.get_decay_parameter_names(target))
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in target.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((depth[name], name in decayed), []).append(parameter)
        kind, settings = self.get_optimizer_cls_and_kwargs(self.args, target)
        self.optimizer = kind(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate * self.recipe.tune.layer_decay**level,
                    "weight_decay": self.args.weight_decay if with_decay else 0.0,
                }
                for (level, with_decay), parameters in groups.items()
            ],
            **settings,
        )
        return self.optimizer


def resolve_bf16(recipe: BaselineRecipe, device: torch.device) -> BaselineRecipe:
    """The recipe with train.bf16 set: the main process measures it for all."""
    if recipe.train.bf16 is not None:
        return recipe
    (fast,) = broadcast_object_list([device.type == "cuda" or bfloat16_pays()])
    return changed(recipe, train={"bf16": fast})


def check_processes(recipe: BaselineRecipe, processes: int) -> None:
    """Raise RecipeError if a step can't be divided over the processes."""
    examples = recipe.train.examples_per_step
    if examples % processes:
        raise RecipeError(f"train.examples_per_step {examples} is no multiple of the {processes} processes; change it")


def arguments_of(recipe: BaselineRecipe, run: Path, rows: int, processes: int, cuda: bool) -> TrainingArguments:
    """Arguments of a training whose steps are divided over the processes, see check_processes."""
    train = recipe.train
    per_epoch = -(-rows // train.examples_per_step)
    steps = train.max_steps if train.max_steps > 0 else max(1, round(train.num_train_epochs * per_epoch))
    strategy = "no" if train.eval_strategy == "no" or not recipe.data.dev_share else "steps"
    every = min(steps, per_epoch if train.eval_strategy == "epoch" else train.eval_steps)
    own = {
        "examples_per_step", "num_train_epochs", "max_steps", "output_dir", "eval_strategy", "eval_steps", "bf16",
        "metric_for_best_model", "report_to", "run_name",
    }  # fmt: skip
    best = train.metric_for_best_model
    arguments = TrainingArguments(
        **train.model_dump(exclude=own),
        output_dir=str(run),
        run_name=train.run_name or run.name,
        max_steps=steps,
        per_device_train_batch_size=train.examples_per_step // processes,
        bf16=bool(train.bf16),
        use_cpu=not cuda,
        eval_strategy=strategy,
        eval_steps=every,
        save_strategy=strategy,
        save_steps=every,
        load_best_model_at_end=best is not None,
        metric_for_best_model=best,
        greater_is_better=best != "loss" if best else None,
        train_sampling_strategy="group_by_length",  # rows of similar length share a step: little padding
        ddp_find_unused_parameters=recipe.tune.method == "gradual_unfreezing",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",  # open_run adds the trackers
        logging_nan_inf_filter=False,
    )
    arguments._n_gpu = 1
    return arguments
