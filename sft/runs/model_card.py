"""The model card beside the weights: Markdown with the Hub's front matter."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data.redact import scrub
from sft.recipe.load import dump_recipe
from sft.recipe.schema import OTHER_METHODS, Recipe


def model_card(recipe: Recipe, facts: dict[str, Any], report: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> str:
    """Base, method, data by hash and licence, and how to load the adapter; without secrets."""
    losses, counts = [m["loss"] for m in metrics if "loss" in m], report["totals"]
    whole = recipe.tune.method in OTHER_METHODS
    use = "AutoModelForCausalLM.from_pretrained(FOLDER)" if whole else "PeftModel.from_pretrained(base, FOLDER)"
    data = "\n".join(f"- {_code(Path(path).name)} sha256 `{digest}`" for path, digest in facts["data_sha256"].items())
    last = losses[-max(1, len(losses) // 20) :]
    front = {
        "base_model": recipe.model.base,
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["graft", recipe.tune.method, "sft"],
    }
    card = f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---
# {_code(recipe.model.base)}, tuned by {recipe.tune.method}

Trained by Graft on the task `{recipe.task}`: {counts["examples"]} examples from {counts["contexts"]} contexts,
{counts["trained_tokens"]} trained tokens. {facts["trainable_parameters"]:,} of {facts["parameters"]:,} parameters
were trained. Loss per trained token at the end: {sum(last) / max(1, len(last)):.4f}.

Load it with `{use}`, and format prompts with the chat template of the tokenizer beside it.

Data:
{data or "- from a Hub dataset, see recipe.yaml"}

{_licenses(recipe)}

Chat template sha256 `{facts["chat_template_sha256"]}`; seed {facts["seed"]}; torch {facts["packages"]["torch"]},
transformers {facts["packages"]["transformers"]}, peft {facts["packages"]["peft"]}.

The recipe:
```yaml
{dump_recipe(recipe)}```
"""
    return scrub(card)


def _licenses(recipe: Recipe) -> str:
    """A line for each source of training data; a warning where its licence is not known."""
    lines = []
    for source in recipe.data.train:
        known = f"licence {_code(source.license)}" if source.license else ""
        unknown = "**warning: no licence is named** (`license` of `data.train`); find out whether you may pass this on"
        lines.append(f"- {_code(Path(source.path).name)}: {known or unknown}")
    return "Licences of the data:\n" + "\n".join(lines)


def _code(name: str) -> str:
    """A name in one line of Markdown, as code, where it can't become markup."""
    return f"`{' '.join(name.replace('`', chr(39)).split())}`"
