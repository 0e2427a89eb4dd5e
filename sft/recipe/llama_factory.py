"""A YAML of LLaMA-Factory as a recipe; its datasets are those of dataset_info.json."""

from pathlib import Path
from typing import Any

from sft.errors import RecipeError
from sft.recipe.draft import (
    Draft,
    names_of,
    put_batch,
    put_defaults,
    put_length,
    put_sources,
    put_training,
    put_tune,
    read_other,
)

USUAL_TAGS = (
    "from", "value", "human", "gpt", "role", "content", "user", "assistant", "system", "observation", "function_call",
)  # fmt: skip


def from_llama_factory(file: Path, given: dict[str, Any]) -> Draft:
    draft = Draft(file, "LLaMA-Factory", given)
    if (stage := draft.take("stage", "sft")) != "sft":
        raise draft.refuse("stage", f"{stage}: only sft is converted: a recipe is supervised fine-tuning")
    draft.put("model.base", draft.take("model_name_or_path"))
    if template := draft.take("template"):
        draft.leave("template", "the base's own chat template is used, or that of model.chat_template", template)
    bits = draft.take("quantization_bit")
    if bits in (4, 8):
        draft.put("model.quantization", {f"load_in_{bits}bit": True})
    elif bits is not None:
        draft.leave("quantization_bit", "4 and 8 bits are known", bits)
    if (thinking := draft.take("enable_thinking")) is not None:
        draft.put("model.template_arguments", {"enable_thinking": thinking})
    method = draft.take("finetuning_type", "lora")
    rank = draft.take("lora_rank", 8)
    target = draft.take("lora_target", "all")
    if draft.take("pissa_init"):
        draft.given["init_lora_weights"] = "pissa"
    if method == "lora" and isinstance(rank, int):
        draft.given.setdefault("lora_alpha", 2 * rank)
    target = "all-linear" if target == "all" else names_of(target)
    saved = names_of(draft.take("additional_target"))
    put_tune(draft, "finetuning_type", method, {"r": rank, "target_modules": target, "modules_to_save": saved})
    folder = draft.take("dataset_dir", "data")
    registry = _registry(draft, folder if isinstance(folder, str) else "data")
    trained = [_listed(draft, name, registry) for name in names_of(draft.take("dataset")) or []]
    held_out = [_listed(draft, name, registry) for name in names_of(draft.take("eval_dataset")) or []]
    put_sources(draft, "dataset", trained, held_out)
    put_length(draft, draft.take("cutoff_len", 2048), "cuts rows that are longer")
    if (most := draft.take("max_samples")) is not None:
        draft.put("data.max_contexts", most, "max_samples, there of each dataset, here of all together")
    if draft.take("mask_history"):
        draft.put("data.train_turns", "last", "mask_history")
    packing = draft.given.get("packing") or draft.given.get("neat_packing")
    put_batch(draft, "per_device_train_batch_size", 8, bool(packing))
    put_defaults(draft, {"learning_rate": 5e-5, "num_train_epochs": 3.0})
    put_training(draft, "val_size")
    return draft


def _registry(draft: Draft, folder: str) -> dict[str, Any]:
    """dataset_info.json: name -> entry, with the folder that its files are in. Empty if there is none."""
    beside = draft.file.parent
    for place in (Path(folder), beside / folder, beside):
        if (place / "dataset_info.json").is_file():
            entries = read_other(place / "dataset_info.json")
            if not isinstance(entries, dict):
                raise RecipeError(f"{place / 'dataset_info.json'}: is no mapping of names to datasets")
            return {"": place, **entries}
    return {}


def _listed(draft: Draft, name: str, registry: dict[str, Any]) -> dict[str, Any]:
    """The source that dataset_info.json has under a name."""
    entry = registry.get(name)
    if not isinstance(entry, dict):
        where = f"{registry['']}/dataset_info.json" if registry else "no dataset_info.json is beside the file; it"
        raise draft.refuse("dataset", f"{name}: {where} does not list it; add it there, or set dataset_dir")
    if entry.get("ranking"):
        raise draft.refuse("dataset", f"{name}: is a ranking of answers; only supervised data is converted")
    columns, tags = ({**value} if isinstance(value := entry.get(key), dict) else {} for key in ("columns", "tags"))
    if file := entry.get("file_name"):
        source = {"path": draft.locate(str(file), registry[""])}
    elif hub := entry.get("hf_hub_url"):
        source = {"path": hub}
    else:
        raise draft.refuse("dataset", f"{name}: has neither file_name nor hf_hub_url; download it and name its file")
    if entry.get("formatting", "alpaca") == "alpaca":
        names = {"prompt": "instruction", "query": "input", "response": "output"}
        source["format"] = "alpaca"
    else:
        openai = tags.get("role_tag", "from") == "role" and tags.get("content_tag", "value") == "content"
        names = {"messages": "messages" if openai else "conversations"}
        columns.setdefault("messages", "conversations")
        source["format"] = "messages" if openai else "sharegpt"
        for tag, value in tags.items():
            if value not in USUAL_TAGS:
                draft.leave(f"{name}.tags.{tag}", "turns have the usual names of roles here", value)
    names |= {"system": "system", "history": "history", "tools": "tools"}
    mapped = {names[key]: value for key, value in columns.items() if key in names and names[key] != value}
    for key in columns.keys() - names.keys():
        draft.leave(f"{name}.columns.{key}", "no column of a source is read as this", columns[key])
    for theirs, ours in (("subset", "config"), ("split", "split")):
        if not file and entry.get(theirs):
            source[ours] = entry[theirs]
    for key in ("num_samples", "folder"):
        if entry.get(key):
            draft.leave(f"{name}.{key}", "all rows are read; see data.max_contexts", entry[key])
    return {**source, **({"columns": mapped} if mapped else {})}
