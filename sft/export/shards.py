"""The safetensors files of a model folder: one, or several with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from sft.models.resolve import readable

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def shard_files(folder: Path) -> list[Path]:
    """The files of a model, in the index's order; a single file takes precedence, as in transformers."""
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        with readable(str(folder / INDEX)):
            names = dict.fromkeys(json.loads((folder / INDEX).read_text())["weight_map"].values())
        if strange := [name for name in names if Path(name).name != name]:
            raise OSError(f"{folder / INDEX} names {strange[0]}, which is no file beside it")
        return [folder / name for name in names]
    return [folder / SINGLE]


def read_shards(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """A model's weights by file and name. The files are mapped: a weight is read when its values are used."""
    shards = {}
    for file in shard_files(folder):
        with readable(str(file)):
            shards[file.name] = load_file(file)
    return shards


def write_index(folder: Path, total_size: int, files: Mapping[str, list[str]]) -> None:
    """`files`: the names of each file's weights."""
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
