"""Model cards of runs and exports: Markdown with the Hub's front matter, without secrets."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from data.atomic import write_json, write_text
from data.audit.report import DataReport
from data.redact import scrub
from sft.recipe.load import dump_recipe
from sft.recipe.schema import OTHER_METHODS, Recipe
from sft.runs.metrics import read_metrics

LOAD_WHOLE = "Load it with `AutoModelForCausalLM.from_pretrained(FOLDER)`"
TEMPLATE = "and format prompts with the chat template of the tokenizer beside it."


def write_model_card(weights: Path, recipe: Recipe, facts: dict[str, Any], report: DataReport) -> None:
    """Write README.md beside a run's weights, and into PEFT's config the base's name instead of its cache folder."""
    config = weights / "adapter_config.json"
    if config.is_file():
        write_json(config, json.loads(config.read_text()) | {"base_model_name_or_path": recipe.model.base})
    write_text(weights / "README.md", model_card(recipe, facts, report, read_metrics(weights.parent)))


def model_card(recipe: Recipe, facts: dict[str, Any], report: DataReport, metrics: Sequence[dict[str, Any]]) -> str:
    """The card of a run. facts: manifest.json; metrics: rows of metrics.jsonl."""
    losses, totals, packages = [m["loss"] for m in metrics if "loss" in m], report.totals, facts["packages"]
    last = losses[-max(1, len(losses) // 20) :]
    whole = recipe.tune.method in OTHER_METHODS
    load = LOAD_WHOLE if whole else "Load it with `PeftModel.from_pretrained(base, FOLDER)`"
    return _card(
        recipe,
        facts,
        {"library_name": "transformers" if whole else "peft"},
        f"""Trained by Graft on the task `{recipe.task}`: {totals.examples} examples from {totals.contexts} contexts,
{totals.trained_tokens} trained tokens. {facts["trainable_parameters"]:,} of {facts["parameters"]:,} parameters
were trained. Loss per trained token at the end: {sum(last) / max(1, len(last)):.4f}.

{load}, {TEMPLATE}

{_licenses(recipe)}

Chat template sha256 `{facts["chat_template_sha256"]}`; seed {facts["seed"]}; torch {packages["torch"]},
transformers {packages["transformers"]}, peft {packages["peft"]}.""",
    )


def export_card(run: Path, recipe: Recipe, base: Path, parity: dict[str, Any]) -> str:
    """The card of an export. parity: parity.json."""
    licence, form = licence_of(base), parity.get("format", {}).get("name", "")
    then = f", then {form}" if form else ""
    load = f"{LOAD_WHOLE}{', which needs `compressed-tensors`,' if form else ''} {TEMPLATE}"
    if form.startswith("gguf-"):
        load = "Serve it with `llama-server --jinja -m model.gguf`; its chat template is inside."
    return _card(
        recipe,
        json.loads((run / "manifest.json").read_text()),
        {"license": licence or "unknown", "library_name": "transformers"},
        f"""Made by Graft from the run `{run.name}`: {parity["base"]}, {parity["dtype"]}{then}.
{load}

Licence of the base: {licence or "not named in its model card here; look it up before you pass this on"}.

{_agreements(parity)}

Scores:
{_scores(run) or "- none yet: `graft eval`"}""",
    )


def licence_of(folder: Path) -> str | None:
    """The licence in the front matter of a folder's model card; None if it names none."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    try:
        front = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError):  # no mapping, no YAML, no UTF-8
        return None
    licence = (front or {}).get("license")
    return licence if isinstance(licence, str) else None


def _card(recipe: Recipe, facts: Mapping[str, Any], front: dict[str, Any], body: str) -> str:
    files = "\n".join(f"- {_code(Path(path).name)} sha256 `{digest}`" for path, digest in facts["data_sha256"].items())
    front = {
        "base_model": recipe.model.base,
        **front,
        "pipeline_tag": "text-generation",
        "tags": ["graft", recipe.tune.method, "sft"],
    }
    return scrub(f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---
# {_code(recipe.model.base)}, tuned by {recipe.tune.method} on {recipe.task}

{body}

Data:
{files or "- from a Hub dataset, see the recipe"}

The recipe:
```yaml
{dump_recipe(recipe)}```
""")


def _licenses(recipe: Recipe) -> str:
    """A line for each source of training data; a warning if its licence is not known."""
    lines = []
    for source in recipe.data.train:
        known = f"licence {_code(source.license)}" if source.license else ""
        unknown = "**warning: no licence is named** (`license` of `data.train`); find out whether you may pass this on"
        lines.append(f"- {_code(Path(source.path).name)}: {known or unknown}")
    return "Licences of the data:\n" + "\n".join(lines)


def _code(name: str) -> str:
    """A name as inline code of Markdown, in one line, so that it can't become markup."""
    return f"`{' '.join(name.replace('`', chr(39)).split())}`"


def _agreements(parity: dict[str, Any]) -> str:
    form = parity.get("format")
    if not parity["measured"]:
        whose = "The merged model's" if form else "Its"
        return f"{whose} weights were checked against adapter and base. What it answers was **not** measured."
    sentences = [_agreement("the merged model" if form else "it", parity)]
    sentences += [_agreement("This format", form)] if form else []
    return f"On {parity['held_out_examples']} held-out examples {' '.join(sentences)} All figures: `parity.json`."


def _agreement(what: str, figures: dict[str, Any]) -> str:
    return (
        f"{what} agrees with the adapter on {figures['answer_argmax_agreement']:.2%} of {figures['answer_tokens']} "
        f"answer tokens; mean KL divergence {figures['mean_kl_nats']:.2e} nats, largest logit difference "
        f"{figures['max_logit_difference']:.3g}."
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
