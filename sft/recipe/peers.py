"""Keys of other programs (transformers, TRL, LLaMA-Factory, Axolotl, Unsloth), and what a recipe has instead."""

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

# the same value under another name
RENAMED = {
    "model_name_or_path": "model.base",
    "base_model": "model.base",
    "model_name": "model.base",
    "model_id": "model.base",
    "model_revision": "model.revision",
    "revision_of_model": "model.revision",
    "torch_dtype": "model.dtype",
    "chat_template_path": "model.chat_template",
    "chat_template_kwargs": "model.template_arguments",
    "use_bnb_nested_quant": "model.quantization.bnb_4bit_use_double_quant",
    "double_quantization": "model.quantization.bnb_4bit_use_double_quant",
    "finetuning_type": "tune.method",
    "adapter": "tune.method",
    "peft_type": "tune.method",
    "r": "tune.r",
    "rank": "tune.r",
    "lora_r": "tune.r",
    "lora_rank": "tune.r",
    "lora_alpha": "tune.lora_alpha",
    "lora_dropout": "tune.lora_dropout",
    "target_modules": "tune.target_modules",
    "lora_target": "tune.target_modules",
    "lora_target_modules": "tune.target_modules",
    "modules_to_save": "tune.modules_to_save",
    "lora_modules_to_save": "tune.modules_to_save",
    "additional_target": "tune.modules_to_save",
    "use_rslora": "tune.use_rslora",
    "peft_use_rslora": "tune.use_rslora",
    "use_dora": "tune.use_dora",
    "peft_use_dora": "tune.use_dora",
    "init_lora_weights": "tune.init_lora_weights",
    "peft_init_lora_weights": "tune.init_lora_weights",
    "peft_layers_to_transform": "tune.layers_to_transform",
    "lora_layers_to_transform": "tune.layers_to_transform",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "data_path": "data.train",
    "data_files": "data.train",
    "train_file": "data.train",
    "train_data": "data.train",
    "training_file": "data.train",
    "eval_dataset": "eval.data",
    "test_datasets": "eval.data",
    "validation_file": "eval.data",
    "val_size": "eval.share",
    "val_set_size": "eval.share",
    "test_size": "eval.share",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "block_size": "data.max_length",
    "batch_size": "train.examples_per_step",
    "global_batch_size": "train.examples_per_step",
    "train_batch_size": "train.examples_per_step",
    "epochs": "train.num_train_epochs",
    "n_epochs": "train.num_train_epochs",
    "num_epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "lr_scheduler": "train.lr_scheduler_type",
    "scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "gradient_clipping": "train.max_grad_norm",
    "evaluation_strategy": "train.eval_strategy",
    "label_smoothing": "train.label_smoothing_factor",
    "neftune_alpha": "train.neftune_noise_alpha",
    "noisy_embedding_alpha": "train.neftune_noise_alpha",
    "random_state": "train.seed",
    "data_seed": "train.seed",
    "wandb_name": "train.run_name",
    "generation_max_length": "eval.max_new_tokens",
}
# the name of a source's key at a peer
OF_A_SOURCE = {
    "file": "path",
    "file_name": "path",
    "data_files": "path",
    "hf_hub_url": "path",
    "name": "config",
    "subset": "config",
    "formatting": "format",
    "type": "format",
}
_STEP = "the batch over all processes"
_PRECISION = "use model.dtype or train.bf16"
_PROCESSES = "use accelerate or torchrun; leave it out"
# no single key says the same
ADVICE = {
    "per_device_train_batch_size": f"use train.examples_per_step, {_STEP}",
    "micro_batch_size": f"use train.examples_per_step, {_STEP}",
    "gradient_accumulation_steps": "use train.examples_per_step; micro-batches follow from data.pack_tokens",
    "per_device_eval_batch_size": "use eval.batch_tokens",
    "eval_batch_size": "use eval.batch_tokens",
    "warmup_ratio": "use train.warmup_steps; a value below 1 is a share of all steps",
    "overwrite_output_dir": "a run folder is never overwritten; name another or resume it",
    "resume_from_checkpoint": "use graft train --resume RUN",
    "auto_resume_from_checkpoints": "use graft train --resume RUN",
    "packing": "use data.pack_tokens",
    "neat_packing": "use data.pack_tokens; packed examples never see each other",
    "sample_packing": "use data.pack_tokens; packed examples never see each other",
    "eval_sample_packing": "use data.pack_tokens; packed examples never see each other",
    "pad_to_sequence_len": "nothing is padded; leave it out",
    "padding_free": "nothing is padded; leave it out",
    "group_by_length": "nothing is padded; leave it out",
    "train_on_inputs": "only answers are trained; leave it out",
    "train_on_prompt": "only answers are trained; leave it out",
    "completion_only_loss": "only answers are trained; leave it out",
    "assistant_only_loss": "only answers are trained; leave it out",
    "mask_history": "use data.train_turns: last",
    "roles_to_train": "assistant turns are trained; see data.train_turns and a turn's weight",
    "max_samples": "use data.max_contexts",
    "max_train_samples": "use data.max_contexts",
    "max_eval_samples": "use eval.limit",
    "template": "the base's chat template is used, or that of model.chat_template",
    "dataset_text_field": "use data.train with columns and a format",
    "dataset_dir": "write the path of each source in data.train",
    "dataset_prepared_path": "encoded examples are cached by their content; leave it out",
    "overwrite_cache": "encoded examples are cached by their content; leave it out",
    "preprocessing_num_workers": "rows are encoded once and cached; leave it out",
    "dataset_processes": "rows are encoded once and cached; leave it out",
    "dataset_num_proc": "rows are encoded once and cached; leave it out",
    "dataloader_num_workers": "a thread makes the packs ahead; leave it out",
    "dataloader_pin_memory": "a thread makes the packs ahead; leave it out",
    "fp16": f"half precision without a loss scale would lose small gradients; {_PRECISION}",
    "tf32": _PRECISION,
    "pure_bf16": _PRECISION,
    "load_best_model_at_end": "the last weights are published; earlier ones stay in checkpoints (save_total_limit)",
    "metric_for_best_model": "the last weights are published; earlier ones stay in checkpoints (save_total_limit)",
    "early_stopping_patience": "the last weights are published; earlier ones stay in checkpoints (save_total_limit)",
    "saves_per_epoch": "use train.save_strategy and train.save_steps",
    "evals_per_epoch": "use train.eval_strategy and train.eval_steps",
    "logging_first_step": "use train.logging_steps: 1",
    "logging_strategy": "use train.logging_steps",
    "quantization_bit": "use model.quantization.load_in_4bit or load_in_8bit",
    "quantization_method": "use model.quantization; bitsandbytes is the only one",
    "flash_attention": "use train.attn_implementation; auto chooses the fastest",
    "flash_attn": "use train.attn_implementation; auto chooses the fastest",
    "sdp_attention": "use train.attn_implementation; auto chooses the fastest",
    "xformers_attention": "use train.attn_implementation; auto chooses the fastest",
    "use_flash_attention_2": "use train.attn_implementation; auto chooses the fastest",
    "torch_compile": "use train.compile_layers",
    "use_liger_kernel": "the head's loss is fused already; see also model.use_kernels",
    "enable_liger_kernel": "the head's loss is fused already; see also model.use_kernels",
    "use_unsloth": "LoRA is fused already on a CPU; leave it out",
    "gradient_checkpointing_kwargs": "use train.gradient_checkpointing",
    "use_gradient_checkpointing": "use train.gradient_checkpointing",
    "use_peft": "use tune.method",
    "lora_target_linear": "use tune.target_modules: all-linear",
    "lora_task_type": "it follows from the recipe; leave it out",
    "task_type": "it follows from the recipe; leave it out",
    "pissa_init": "use tune.init_lora_weights: pissa",
    "enable_thinking": "use model.template_arguments: {enable_thinking: true or false}",
    "stage": "supervised fine-tuning is the only one; leave it out",
    "do_train": "use graft train, graft eval; leave it out",
    "do_eval": "use graft train, graft eval; leave it out",
    "plot_loss": "loss.png is in each run folder; leave it out",
    "trust_remote_code": "code of a model is never run; leave it out",
    "deepspeed": _PROCESSES,
    "fsdp": _PROCESSES,
    "fsdp_config": _PROCESSES,
    "ddp_timeout": _PROCESSES,
    "ddp_find_unused_parameters": _PROCESSES,
    "push_to_hub": "use graft push EXPORT OWNER/NAME",
    "hub_model_id": "use graft push EXPORT OWNER/NAME",
    "wandb_project": "set WANDB_PROJECT in the environment, and train.report_to: wandb",
    "wandb_entity": "set WANDB_ENTITY in the environment, and train.report_to: wandb",
    "use_wandb": "use train.report_to: wandb",
    "loraplus_lr": "use tune.loraplus_lr_ratio",
    "neftune": "use train.neftune_noise_alpha",
    "loss_type": "the loss is the mean over all trained tokens of a step; see train.label_smoothing_factor",
}


def program_of(tree: Any) -> str | None:
    """The program whose training file this is, by its keys; None for a recipe and for others."""
    if not isinstance(tree, dict) or "task" in tree:
        return None
    if "model_name_or_path" in tree and {"finetuning_type", "stage", "template", "cutoff_len"} & tree.keys():
        return "LLaMA-Factory"
    if "base_model" in tree and {"datasets", "adapter", "micro_batch_size", "sequence_len"} & tree.keys():
        return "Axolotl"
    return "OpenAI fine-tuning" if {"model", "training_file"} <= tree.keys() else None


def instead(location: tuple[Any, ...], kind: type[BaseModel]) -> str:
    """What to write for an unknown key at a location of a recipe of this kind; empty if that is not known."""
    name = str(location[-1])
    keys = list(_keys(kind))
    if name in OF_A_SOURCE and location[:2] == ("data", "train") and len(location) > 2:
        return f"; write {OF_A_SOURCE[name]} instead"
    targets = [RENAMED.get(name, ""), *(key for key in keys if key.rsplit(".", 1)[-1] == name)]
    for target in targets:
        if (target in keys or target.startswith("tune.")) and target != ".".join(map(str, location)):
            return f"; write {target} instead"
    return f"; {ADVICE[name]}" if name in ADVICE else ""


def _keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys of a recipe."""
    for name, field in kind.model_fields.items():
        yield prefix + name
        several = "[]" if get_origin(field.annotation) is tuple else ""
        for section in (field.annotation, *get_args(field.annotation)):
            if isinstance(section, type) and issubclass(section, BaseModel):
                yield from _keys(section, f"{prefix}{name}{several}.")
