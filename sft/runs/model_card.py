"""The model card beside the weights: Markdown with the Hub's front matter."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data.atomic import write_json, write_text
from data.audit.report import DataReport
from data.redact import scrub
from sft.recipe.load import dump_recipe
from sft.recipe.schema import OTHER_METHODS, Recipe
from sft.runs.metrics import read_metrics


def write_model_card(weights: Path, recipe: Recipe, facts: dict[str, Any], report: DataReport) -> None:
    """README.md beside the weights of a run; PEFT's config gets the base's name in place of a cache folder's."""
    config = weights / "adapter_config.json"
    if config.is_file():
        write_json(config, json.loads(config.read_text()) | {"base_model_name_or_path": recipe.model.base})
    write_text(weights / "README.md", model_card(recipe, facts, report, read_metrics(weights.parent)))


def model_card(recipe: Recipe, facts: dict[str, Any], report: DataReport, metrics: Sequence[dict[str, Any]]) -> str:
    """Base, method, data by hash and licence, and how to load the adapter; without secrets."""
    losses, counts = [m["loss"] for m in metrics if "loss" in m], report.totals
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

Trained by Graft on the task `{recipe.task}`: {counts.examples} examples from {counts.contexts} contexts,
{counts.trained_tokens} trained tokens. {facts["trainable_parameters"]:,} of {facts["parameters"]:,} parameters
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


def export_card(run: Path, recipe: Recipe, base: Path, parity: dict[str, Any]) -> str:
    """Markdown with the Hub's front matter."""
    facts = json.loads((run / "manifest.json").read_text())
    licence = licence_of(base)
    front: dict[str, Any] = {
        "base_model": recipe.model.base,
        "license": licence or "unknown",
        "library_name": "transformers",
    }
    made = parity.get("format", {})
    form = f", then {made['name']}" if made else ""
    use = (
        "Serve it with `llama-server --jinja -m model.gguf`; its chat template is inside."
        if form.startswith(", then gguf-")
        else "Load it with `AutoModelForCausalLM.from_pretrained(FOLDER)`"
        + (", which needs `compressed-tensors`," if made else "")
        + " and format prompts with the chat template of the tokenizer beside it."
    )
    front |= {"pipeline_tag": "text-generation", "tags": ["graft", recipe.tune.method, "sft"]}
    data = "\n".join(f"- `{Path(path).name}` sha256 `{digest}`" for path, digest in facts["data_sha256"].items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---
# {recipe.model.base}, tuned by {recipe.tune.method} on {recipe.task}

Made by Graft's `graft export` from the run `{run.name}`: {parity["base"]}, {parity["dtype"]}{form}.
{use}

Licence of the base: {licence or "not named in its model card here; look it up before you pass this on"}.

{_proof(parity)}

Scores:
{_scores(run) or "- none yet: `graft eval`"}

Data:
{data or "- from a Hub dataset, see the recipe"}

The recipe:
```yaml
{dump_recipe(recipe)}```
"""


def licence_of(folder: Path) -> str | None:
    """What the front matter of a model card names as its licence."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        front = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    named = front.get("license") if isinstance(front, dict) else None
    return named if isinstance(named, str) else None


def _proof(parity: dict[str, Any]) -> str:
    if not parity["measured"]:
        whose = "The merged model's" if "format" in parity else "Its"
        return f"{whose} weights were checked against adapter and base. What it answers was **not** measured."
    merged = _agreement("it" if "format" not in parity else "the merged model", parity)
    made = f" {_agreement('This format', parity['format'])}" if "format" in parity else ""
    return f"On {parity['held_out_examples']} held-out examples {merged}{made} All figures: `parity.json`."


def _agreement(what: str, found: dict[str, Any]) -> str:
    return (
        f"{what} agrees with the adapter on {found['answer_argmax_agreement']:.2%} of {found['answer_tokens']} answer "
        f"tokens; mean KL divergence {found['mean_kl_nats']:.2e} nats, largest logit difference "
        f"{found['max_logit_difference']:.3g}."
    )


def _scores(run: Path) -> str:
    """A line for each evaluation in the run folder."""
    lines = []
    for file in sorted(run.glob("eval*/results.json")):
        results = json.loads(file.read_text())
        total = results["scores"]["total"]
        figures = ", ".join(f"{n} {v:.1f}" for n, v in total.items() if isinstance(v, float) and n != "questions")
        lines.append(f"- `{file.parent.name}`, {results['questions']} questions: {figures}")
    return "\n".join(lines)
