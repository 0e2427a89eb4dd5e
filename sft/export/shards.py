"""The safetensors files of a model folder: one, or several with an index."""

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file

from sft.models.resolve import readable, resolve_base
from sft.recipe.schema import Model, is_hub_id

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def base_folder(model: Model) -> Path:
    """The folder of a base's configuration and weights, which are downloaded for a Hub id unless they are cached."""
    name = resolve_base(model.base)
    if not is_hub_id(name):
        return Path(name)
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    options: dict[str, Any] = {"revision": model.revision}
    with readable(f"model.base: {name}"):
        config = cached_file(name, "config.json", **options)
        cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False, **options)
        index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **options)
        if index:
            get_checkpoint_shard_files(name, index, **options)
        else:
            cached_file(name, SINGLE, _raise_exceptions_for_missing_entries=False, **options)
    return Path(cast(str, config)).parent


def shard_files(folder: Path) -> list[Path]:
    """The files of a model, in the index's order; a single file takes precedence, as in transformers."""
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        with readable(str(folder / INDEX)):
            names = dict.fromkeys(json.loads((folder / INDEX).read_text())["weight_map"].values())
        if strange := [name for name in names if Path(name).name != name]:
            raise OSError(f"{folder / INDEX} names {strange[0]}, which is not a file beside it")
        return [folder / name for name in names]
    return [folder / SINGLE]


def read_shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A model's weights by file and name. The files are mapped: a weight is read when its values are used."""
    shards = {}
    for file in shard_files(folder):
        with readable(str(file)):
            shards[file.name] = load_file(file)
    return shards
