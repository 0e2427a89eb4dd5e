"""A YAML of Axolotl as a recipe."""

from pathlib import Path
from typing import Any

from data.readers.source import is_hub_id
from sft.recipe.draft import (
    Draft,
    names_of,
    one_line,
    put_batch,
    put_defaults,
    put_length,
    put_sources,
    put_training,
    put_tune,
)
from sft.recipe.peers import ADVICE

TRAINING_ARGUMENTS = {"num_epochs": "num_train_epochs", "lr_scheduler": "lr_scheduler_type", "optimizer": "optim"}
FIELDS = {
    "field_instruction": "instruction", "field_input": "input", "field_output": "output", "field_system": "system",
}  # fmt: skip


def from_axolotl(file: Path, given: dict[str, Any]) -> Draft:
    draft = Draft(file, "Axolotl", given)
    if (rl := draft.take("rl")) is not None:
        raise draft.refuse("rl", f"{rl}: a recipe is supervised fine-tuning; only that is converted")
    draft.put("model.base", draft.take("base_model"))
    if (revision := draft.take("revision_of_model")) is not None:
        draft.put("model.revision", revision)
    adapter = draft.take("adapter") or "full"
    four, eight = draft.take("load_in_4bit") or adapter == "qlora", draft.take("load_in_8bit")
    if adapter != "full" and (four or eight):
        draft.put("model.quantization", {"load_in_4bit" if four else "load_in_8bit": True})
    if template := draft.take("chat_template"):
        draft.leave("chat_template", "the base's own chat template is used, or that of model.chat_template", template)
    linear, modules = draft.take("lora_target_linear"), draft.take("lora_target_modules")
    for theirs in ("use_rslora", "use_dora", "init_lora_weights", "layers_to_transform"):
        if (value := draft.take(f"peft_{theirs}")) is not None:
            draft.given[theirs] = value
    settings = {"r": draft.take("lora_r"), "target_modules": "all-linear" if linear or modules is None else modules}
    settings["modules_to_save"] = draft.take("lora_modules_to_save") or None
    put_tune(draft, "adapter", "lora" if adapter == "qlora" else adapter, settings)
    trained = [_entry(draft, f"datasets[{i}]", e) for i, e in enumerate(_entries(draft, "datasets"))]
    held_out = [_entry(draft, f"test_datasets[{i}]", e) for i, e in enumerate(_entries(draft, "test_datasets"))]
    put_sources(draft, "datasets", trained, held_out)
    put_length(draft, draft.take("sequence_len", 512), "leaves out rows that are longer, or cuts them")
    put_batch(draft, "micro_batch_size", 1, bool(draft.given.get("sample_packing")))
    for theirs, ours in TRAINING_ARGUMENTS.items():
        if (value := draft.take(theirs)) is not None:
            draft.given[ours] = value
    floor = draft.given.get("cosine_min_lr_ratio")
    if floor is not None and draft.given.get("lr_scheduler_type", "cosine") == "cosine":
        draft.take("cosine_min_lr_ratio")
        draft.given |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": floor}}
    defaults: dict[str, Any] = {"lr_scheduler_type": "cosine"}
    if not {"warmup_steps", "warmup_ratio"} & draft.given.keys():
        defaults["warmup_steps"] = 0.03
    put_defaults(draft, defaults)
    for what, strategy in (("saves_per_epoch", "save_strategy"), ("evals_per_epoch", "eval_strategy")):
        if times := draft.take(what):
            draft.put(
                f"train.{strategy}", "epoch", "" if times == 1 else f"{what} {one_line(times)}; here once an epoch"
            )
    if draft.given.get("wandb_project"):
        draft.given.setdefault("report_to", "wandb")
    if name := draft.take("wandb_name"):
        draft.given["run_name"] = name
    put_training(draft, "val_set_size")
    return draft


def _entries(draft: Draft, key: str) -> list[Any]:
    entries = draft.take(key, [])
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and isinstance(e.get("path"), str) for e in entries
    ):
        raise draft.refuse(key, "is no list of datasets with a path; correct it")
    return entries


def _entry(draft: Draft, key: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The source of an Axolotl dataset."""
    entry = {name: value for name, value in entry.items() if value is not None}
    path, kind, files = entry.pop("path"), entry.pop("type", ""), names_of(entry.pop("data_files", None))
    local = Path(draft.locate(path))
    source: dict[str, Any] = {"path": str(local) if local.exists() or not is_hub_id(path) else path}
    if files and (path in ("json", "csv", "parquet") or local.is_dir()):
        source["path"] = draft.locate(files[0] if path in ("json", "csv", "parquet") else str(local / files[0]))
        files = files[1:]
    for file in files or []:
        draft.leave(f"{key}.data_files", "write a source for each file", file)
    hub = source["path"] == path and is_hub_id(path)
    for theirs, ours in (("name", "config"), ("split", "split"), ("revision", "revision")):
        if (value := entry.pop(theirs, None)) is not None and hub:
            source[ours] = value
    columns: dict[str, Any] = {}
    mapping = entry.pop("message_property_mappings", {})
    mapping = mapping if isinstance(mapping, dict) else {}
    role = entry.pop("message_field_role", mapping.get("role", "role"))
    content = entry.pop("message_field_content", mapping.get("content", "content"))
    if isinstance(kind, dict):
        columns |= {ours: kind[theirs] for theirs, ours in FIELDS.items() if kind.get(theirs) is not None}
        source["format"] = "alpaca"
        for name in kind.keys() - FIELDS.keys():
            draft.leave(f"{key}.type.{name}", "the base's chat template writes the prompt", kind[name])
    elif kind == "chat_template" and (role, content) == ("role", "content"):
        source["format"], columns["messages"] = "messages", entry.pop("field_messages", "messages")
    elif kind == "chat_template" or str(kind).startswith("sharegpt"):
        if kind == "chat_template" and (role, content) != ("from", "value"):
            draft.leave(f"{key}.message_property_mappings", "a turn has role and content, or from and value")
        source["format"], columns["conversations"] = "sharegpt", entry.pop("field_messages", "conversations")
    elif str(kind).startswith("alpaca"):
        source["format"] = "alpaca"
    elif kind in ("completion", "pretrain"):
        raise draft.refuse(f"{key}.type", f"{kind}: learns whole texts; a recipe learns answers")
    elif kind:
        draft.leave(f"{key}.type", "the format is recognised by the keys of the rows, see data.train[].format", kind)
    mapped = {ours: theirs for ours, theirs in columns.items() if ours != theirs}
    entry.pop("ds_type", None)  # the suffix says it
    for name in entry:
        draft.leave(f"{key}.{name}", ADVICE.get(name, "no key of a source does this"), entry[name])
    return {**source, **({"columns": mapped} if mapped else {})}
