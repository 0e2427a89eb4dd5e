"""Fine-tune a language model as its recipe says: load, resolve what is left to `auto`, train, publish."""

from pathlib import Path

from accelerate.utils import broadcast_object_list

from data.encode.pack import make_packs
from sft.models.capabilities import takes_packs
from sft.models.load import check_length, load_base
from sft.models.resolve import resolve_base
from sft.models.tune import count_parameters, tune_model
from sft.recipe.schema import Recipe
from sft.runs.checkpoint import check_space
from sft.runs.folder import warnings_of
from sft.runs.model_card import write_model_card
from sft.runs.resume import Resume
from sft.session import shards_parameters
from sft.training.auto import (
    apply_auto,
    resolve_auto,
    resolve_checkpointing,
    resolve_compile,
    resolve_dequantize,
    resolve_dtype,
)
from sft.training.examples import (
    decide_date,
    decide_template_arguments,
    decide_tool_call_parser,
    frozen_tokens,
    load_examples,
    load_held_out,
    training_tokenizer,
)
from sft.training.open_run import open_run
from sft.training.plan import plan_steps
from sft.training.trainer import PackTrainer, training_arguments


def finetune(recipe: Recipe, recipe_path: Path, resume: Resume | None = None) -> Path | None:
    """The run folder on the main process, None on others.

    Raises SystemExit with the signal's exit code if one ended the training.
    """
    sharded = shards_parameters()
    with open_run(recipe, recipe_path, resume) as run:
        with run.state.main_process_first():  # a .gguf base is written to the cache once
            resolve_base(recipe.model.base)
        check_length(recipe)
        recipe = resolve_dtype(recipe, run.device)
        tokenizer = training_tokenizer(recipe)
        recipe, dating = decide_date(recipe, tokenizer)
        with run.state.main_process_first():  # encoded once; other processes read the cache
            examples, report = load_examples(recipe, tokenizer)
        recipe, asking = decide_template_arguments(recipe, tokenizer, report)
        asking += decide_tool_call_parser(recipe, tokenizer, report)
        held_out = load_held_out(recipe, tokenizer)
        recipe, unpacking = resolve_dequantize(recipe, examples, run.device)

        model = load_base(recipe.model, run.device)
        (takes_mask,) = broadcast_object_list([takes_packs(model, recipe.data.max_length)])
        model = tune_model(model, recipe.tune, recipe.train.seed, one_dtype=sharded)
        recipe, layout, decided = resolve_auto(recipe, model, examples, takes_mask, resume is not None)
        plan = plan_steps(examples, recipe.train, layout, recipe.data.max_branches)
        recipe, checkpointing = resolve_checkpointing(recipe, model, plan, run.device)
        recipe, compiling = resolve_compile(recipe, model, plan, resume is not None)
        fusing = apply_auto(recipe, model, sharded)

        frozen = frozen_tokens(model, tokenizer, examples)
        trainable, parameters = count_parameters(model)
        folder = run.claim(recipe, report, (trainable, parameters))
        if recipe.train.save_strategy != "no":
            check_space(folder, model, recipe.train.optim)
        trainer = PackTrainer(
            model,
            tokenizer,
            training_arguments(recipe.train, plan, folder, run.device.type == "cuda"),
            plan,
            make_packs(held_out, layout) if recipe.train.eval_strategy != "no" else (),
            one_dtype=sharded,
            tune=recipe.tune,
            smoothing=recipe.train.label_smoothing_factor,
            noise_alpha=recipe.train.neftune_noise_alpha,
        )
        summary = (
            f"{report.totals.examples} examples of {report.totals.contexts} contexts, {len(plan.steps)} steps; "
            f"{trainable:,} of {parameters:,} parameters trained; {recipe.model.dtype}; run folder {folder}"
        )
        lines = (
            summary, *dating, *asking, *unpacking, *decided, *checkpointing, *compiling, *fusing, *frozen,
            *warnings_of(report, folder),
        )  # fmt: skip
        with run.record(trainer, plan.steps_per_epoch, lines) as checkpoint:
            trainer.train(resume_from_checkpoint=checkpoint)
        weights = run.save_weights(trainer)
        if run.main:
            write_model_card(weights, recipe, run.facts, report)
        return run.finish(weights)
