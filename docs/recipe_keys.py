"""Write recipe-keys.md, a row for every key of a recipe, from the schemas: python docs/recipe_keys.py (make docs)."""

import json
import re
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]  # started as a file: the repository root, not docs/

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.schema import Recipe, Source

HEAD = """# Recipe keys

<!-- Written by docs/recipe_keys.py from sft/recipe/; `make docs` writes it again. Edit the schema, not this page. -->

Every key of both kinds of recipe. [Recipes](recipes.md) shows how they work together. `graft schema` prints the same as
a JSON schema, with which an editor completes keys and marks mistakes.

- A recipe without `objective` trains an [adapter or a whole model](#an-adapter-or-a-whole-model).
- A recipe with `objective` trains a [baseline](#a-baseline): an encoder with a head, or a classic floor.

A key without a default may be left out. Names in `train` are those of transformers' TrainingArguments, except
`examples_per_step`, `attn_implementation` and `compile_layers`; names in `model.quantization` are those of its
BitsAndBytesConfig.

"""
# of keys whose schema has no docstring: by the whole key, or by its last name
MEANING = {
    "model": "The base and how it is loaded.",
    "tune": "What is trained.",
    "data": "Training data and what happens to its rows.",
    "train": "The training loop.",
    "eval": "Held-out data.",
    "export": "The merged model.",
    "pretraining": "Continued pre-training.",
    "objective": "What the head learns: labels, answer spans, or masked tokens.",
    "model.revision": "Commit, tag or branch of a Hub model.",
    "quantization": "Load the base in 4 or 8 bits.",
    "load_in_4bit": "Weights in 4 bits, as QLoRA has them.",
    "load_in_8bit": "Weights in 8 bits.",
    "bnb_4bit_quant_type": "Data type of 4-bit weights.",
    "bnb_4bit_use_double_quant": "Quantize the scales of 4-bit weights too.",
    "tune.method": "A PEFT type in lower case (`lora`, `ia3`, ...), or `full`, `freeze`, `linear_probe`.",
    "data.train": "Training data.",
    "on_error": "What rows with defects do; skip leaves them out and counts them.",
    "too_long": "What rows longer than max_length do.",
    "audit": "Allowed numbers of rows with a defect.",
    "unanswerable_share": "With max_contexts and squad_v2: share of unanswerable questions among those drawn.",
    "max_new_tokens": "Tokens of the longest answer.",
    "n_best": "Candidate start and end positions of an answer span.",
    "dtype": "Precision of the merged weights.",
    "mlm_probability": "Share of tokens that are masked.",
    "num_train_epochs": "Passes over the data; a fraction is allowed.",
    "max_steps": "Optimizer steps, instead of epochs; -1: as num_train_epochs says.",
    "learning_rate": "Peak learning rate.",
    "lr_scheduler_type": "How the learning rate changes after the warm-up.",
    "weight_decay": "Weight decay of the optimizer.",
    "max_grad_norm": "Gradients above this norm are scaled down to it; 0: none are.",
    "optim": "The optimizer.",
    "adam_beta1": "Of AdamW.",
    "adam_beta2": "Of AdamW.",
    "adam_epsilon": "Of AdamW.",
    "logging_steps": "Optimizer steps between two rows of metrics.jsonl.",
    "save_strategy": "When a checkpoint is saved.",
    "save_steps": "Optimizer steps between two checkpoints, of save_strategy steps.",
    "save_total_limit": "Checkpoints that stay; older ones are removed.",
    "eval_steps": "Optimizer steps between two evaluations, of eval_strategy steps.",
    "seed": "Draws the contexts of max_contexts, the order of examples, dropout and new weights.",
    "output_dir": "The run folder; left out: runs/NAME-OF-RECIPE, numbered if it exists.",
}
NOTES = {
    "tune": "Further keys are those of the PEFT config of `method`, such as `r`, `lora_alpha` and `target_modules` of "
    "LoRA; a wrong one is refused with the nearest valid key.",
    "data.train": "A source is a path, or a mapping with these keys. `eval.data` and the sources of a baseline take "
    "them too, except `weight`.",
}
NAMES = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", Path: "path", date: "day"}
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    kinds = (("An adapter or a whole model", Recipe, ""), ("A baseline", BaselineRecipe, " of a baseline"))
    lines = [line for title, kind, suffix in kinds for line in (f"## {title}", "", *_section("", kind, suffix))]
    return HEAD + "\n".join(lines)


def _section(prefix: str, kind: type[BaseModel], suffix: str) -> Iterator[str]:
    """Heading and table of a section, then those of the sections in it."""
    if prefix:
        yield from (f"### `{prefix}`{suffix}", "")
    if prefix in NOTES:
        yield from (NOTES[prefix], "")
    yield from ("| key | values | default | meaning |", "|---|---|---|---|")
    below: list[tuple[str, type[BaseModel]]] = []
    for name, field in kind.model_fields.items():
        key = f"{prefix}.{name}".lstrip(".")
        if (inner := _model_in(field.annotation)) and inner is not Source:
            below.append((key, inner))
        yield _row(key, field)
    yield ""
    for key, inner in below:
        yield from _section(key, inner, suffix)


def _row(key: str, field: FieldInfo) -> str:
    meaning = re.sub(r"\s+", " ", field.description or "") or MEANING.get(key) or MEANING.get(key.rpartition(".")[2])
    if not meaning:
        raise SystemExit(f"{key}: its schema says nothing of it; write a docstring below the field in sft/recipe/")
    default = "required" if field.is_required() else _default(field.default)
    return f"| `{key}` | {_values(field.annotation, field.metadata)} | {default} | {meaning} |"


def _default(value: Any) -> str:
    if value in (None, (), {}) or isinstance(value, BaseModel):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _values(kind: Any, metadata: list[Any]) -> str:
    """What a key takes, in words: a field's type, and the limits that stand beside it."""
    if get_origin(kind) is Annotated:
        inner, *more = get_args(kind)
        return _values(inner, [*metadata, *more])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "a path or a source" if issubclass(kind, Source) else "a section"
    if get_origin(kind) is tuple:
        inner = _values(get_args(kind)[0], [])
        return f"{inner}, or a list of them" if inner == "a path or a source" else f"list of {inner}"
    if get_origin(kind) is dict:
        return "mapping of text to text"
    if parts := [part for part in get_args(kind) if part is not NoneType]:
        return " or ".join(_values(part, metadata) for part in parts)
    limits = [limit for part in metadata for limit in (part.metadata if isinstance(part, FieldInfo) else [part])]
    shown = [f"{SIGNS[n]} {v:g}" for limit in limits for n in SIGNS if (v := getattr(limit, n, None)) is not None]
    return " ".join([NAMES[kind], ", ".join(sign for sign in shown if "e+" not in sign)]).strip()


def _model_in(kind: Any) -> type[BaseModel] | None:
    """The section that a type holds, alone, in a list, or beside None."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((model for part in get_args(kind) if (model := _model_in(part))), None)


if __name__ == "__main__":
    Path(__file__).with_name("recipe-keys.md").write_text(page(), encoding="utf-8")
