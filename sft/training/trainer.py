"""TRL's SFTTrainer over packs; the only file that knows TRL.

A row of the trainer's dataset is one process's share of one optimizer step: a list of packs, see step.py.
"""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from data.encode.pack import Pack
from data.terminal import print
from sft.recipe.schema import Train, Tune
from sft.runs.state import State, random_state, set_random_state
from sft.session import is_out_of_memory
from sft.training.durable_trainer import DurableTrainer
from sft.training.plan import StepPlan
from sft.training.step import pack_loss, shard_packs, train_step


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Turn off PEFT's cast of LoRA's input to float32, which autocast casts back: the values stay, without a copy of
    twice the size for the backward pass. For autocast only. PEFT itself skips the cast in 4-bit layers."""
    for module in model.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = False


@dataclass(frozen=True)
class PackedRow:
    """One process's share of one optimizer step; the counts are those of the whole step."""

    row: int
    pack_tokens: int  # that it was packed for
    packs: list[tuple[Pack, float]]
    trained_tokens: int
    executed_tokens: int
    examples: int


class AllocateRanks(TrainerCallback):
    """AdaLoRA prunes ranks by the gradients of each step, before they are cleared."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].base_model.update_and_allocate(state.global_step)


class PackTrainer(DurableTrainer, SFTTrainer):
    """SFTTrainer whose step is a list of packs, see the file's docstring."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: SFTConfig,
        plan: StepPlan,
        held_out: Sequence[Pack] = (),
        one_dtype: bool = False,
        tune: Tune = Tune(),
        smoothing: float = 0.0,
        noise_alpha: float | None = None,
    ) -> None:
        """smoothing, noise_alpha: see train_step."""
        self.tune, self.smoothing, self.noise_alpha = tune, smoothing, noise_alpha
        self.plan, self.held_out, self.asked_pack_tokens = plan, held_out, plan.layout.pack_tokens
        processes, self.cuda = args.world_size, args.device.type == "cuda"
        # accelerate's loader collates a row while the step before it is about to start: this thread packs it meanwhile
        packer = ThreadPoolExecutor(1, "packs", *((torch.cuda.set_device, (args.device,)) if self.cuda else ()))
        # accelerate deals rows out in turn: row step * processes + rank
        rows = Dataset.from_dict({"row": list(range(len(plan.steps) * processes))})
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows.select([0]) if held_out else None,
            data_collator=lambda batch: {"packed": packer.submit(self._pack_row, batch[0]["row"], processes)},
            processing_class=tokenizer,
        )
        allocates = isinstance(model, PeftModel) and hasattr(model.base_model, "update_and_allocate")
        if allocates:
            self.add_callback(AllocateRanks())
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        fused = args.optim == OptimizerNames.ADAMW_TORCH_FUSED
        self.reads_late = self.cuda and fused and not sharded and not allocates  # AllocateRanks changes weights too
        self.remove_callback(PrinterCallback)  # Monitor prints the progress
        if not one_dtype:
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    # TRL casts a 4-bit model's adapter to bf16, in which AdamW's second moment stalls
                    parameter.data = parameter.data.float()
        if args.bf16:
            leave_casts_to_autocast(model)
        self.gradients: list[tuple[nn.Parameter, torch.Tensor]] = []
        if args.device.type == "cpu":
            # allocated before any activation: among them they would leave holes of about 0.3 GiB
            self.gradients = [(p, torch.zeros_like(p)) for p in model.parameters() if p.requires_grad]

    def _pack_row(self, row: int, processes: int) -> PackedRow:
        plan = self.plan  # another thread may replace it
        packs = plan.packs(row // processes, processes)
        mine = shard_packs(packs, row % processes, processes)
        if self.cuda:
            for pack, _ in mine:
                pack.pin_memory()
        return PackedRow(
            row=row,
            pack_tokens=plan.layout.pack_tokens,
            packs=mine,
            trained_tokens=sum(len(p.target) for p in packs),
            executed_tokens=sum(len(p.input_ids) for p in packs),
            examples=len(plan.steps[row // processes]),
        )

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(cast(Dataset, self.train_dataset))  # the plan has shuffled already

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> None:
        return None  # the rows carry trained_tokens of the whole step

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The step's loss; if memory does not suffice, the same examples are tried again in smaller packs."""
        step = cast(Future[PackedRow], inputs["packed"]).result()
        while True:
            if step.pack_tokens != self.plan.layout.pack_tokens:  # packed before they had to become smaller
                step = self._pack_row(step.row, self.accelerator.num_processes)
            before = random_state()
            for parameter, gradient in self.gradients:
                parameter.grad = gradient.zero_()
            try:
                loss = train_step(
                    model, step.packs, step.trained_tokens, self.accelerator, self.smoothing, self.noise_alpha
                )
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._make_packs_smaller(step.packs, error)
            set_random_state(before)
            model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        self.check_loss(loss)
        self.executed_tokens += step.executed_tokens
        self.trained_examples += step.examples
        return loss

    def _make_packs_smaller(self, packs: Sequence[tuple[Pack, float]], error: RuntimeError) -> None:
        """Halve the size that did not fit, for the rest of the run. Raises the error if other processes train too, or
        if a single example does not fit."""
        step = self.state.global_step
        largest = max(len(pack.input_ids) for pack, _ in packs)
        longest = max(len(self.plan.examples[i].ids) for i in self.plan.steps[step])
        if self.accelerator.num_processes > 1 or largest <= longest:
            raise error
        smaller = largest // 2
        self.plan = replace(self.plan, layout=replace(self.plan.layout, pack_tokens=smaller))
        print(
            f"warning: step {step + 1}: out of memory at {largest} tokens in a micro-batch; from now on at most "
            f"{smaller} (data.pack_tokens); a step keeps its examples",
            flush=True,
        )

    def own_state(self) -> State:
        return {**super().own_state(), "pack_tokens": (self.asked_pack_tokens, self.plan.layout.pack_tokens)}

    def set_own_state(self, state: State) -> None:
        super().set_own_state(state)
        asked, smaller = state["pack_tokens"]
        if asked == self.asked_pack_tokens:  # else the user has changed the recipe since
            self.plan = replace(self.plan, layout=replace(self.plan.layout, pack_tokens=smaller))

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Held-out loss: mean over the trained tokens of the held-out packs."""
        model, accelerator = self.model_wrapped, self.accelerator
        model.eval()
        packs = shard_packs(self.held_out, accelerator.process_index, accelerator.num_processes)
        with torch.no_grad():
            sums = torch.stack([pack_loss(model, pack, accelerator.device) * weight for pack, weight in packs])
        loss = accelerator.reduce(sums.sum(), reduction="sum") / sum(len(p.target) for p in self.held_out)
        metrics = {f"{metric_key_prefix}_loss": float(loss)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        model.train()
        return metrics


def training_arguments(train: Train, plan: StepPlan, run: Path, cuda: bool) -> SFTConfig:
    """TrainingArguments of a run whose dataset has a row for each optimizer step and process."""
    own = {
        "examples_per_step", "output_dir", "num_train_epochs", "max_steps", "save_strategy", "eval_strategy", "bf16",
        "attn_implementation", "compile_layers", "report_to", "run_name",
        "label_smoothing_factor", "neftune_noise_alpha",  # Trainer's own know no packs
    }  # fmt: skip
    every = {"save": train.save_strategy, "eval": train.eval_strategy}
    arguments = SFTConfig(
        **{
            **train.model_dump(exclude=own),
            **{f"{k}_strategy": "no" if v == "no" else "steps" for k, v in every.items()},
            **{f"{k}_steps": plan.steps_per_epoch for k, v in every.items() if v == "epoch"},
        },
        output_dir=str(run),
        run_name=train.run_name or run.name,
        max_steps=len(plan.steps),
        bf16=cuda if train.bf16 is None else train.bf16,
        use_cpu=not cuda,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",  # open_run adds the trackers
        logging_nan_inf_filter=False,  # it would hide NaN in the log
    )
    arguments._n_gpu = 1  # one process, one device: Trainer would split a step over all GPUs
    return arguments
