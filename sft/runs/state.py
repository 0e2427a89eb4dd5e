"""Optimizer, scheduler and random state as safetensors, with all that is no tensor as JSON in the header.

PyTorch's own format is a pickle, and reading one may run code.
"""

import json
import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

State = Any  # None, bool, int, float, str, tensors, and lists, tuples and dicts of them


def save_state(path: Path, state: State) -> None:
    """Write a state of the kinds above; raises TypeError for any other."""
    tensors: dict[str, torch.Tensor] = {}
    names: dict[int, str] = {}  # by id: a tensor that occurs several times is stored once
    text = json.dumps(_to_json(state, tensors, names))
    save_file(tensors, path, metadata={"state": text})


def load_state(path: Path) -> State:
    """The state that save_state wrote, bit for bit, on the CPU."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _from_json(json.loads(file.metadata()["state"]), tensors)


def random_state() -> State:
    """State of the generators of Python, NumPy and PyTorch, and of this process's GPU."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(tuple[Any, ...], np.random.get_state(legacy=True))
    return {
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: State) -> None:
    """Set the generators; a GPU's part is ignored if there is no GPU."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _to_json(value: State, tensors: dict[str, torch.Tensor], names: dict[int, str]) -> Any:
    if isinstance(value, torch.Tensor):
        if id(value) not in names:
            names[id(value)] = name = f"t{len(names)}"
            copy = value.detach().to("cpu").contiguous()
            whole = copy.untyped_storage().nbytes() == copy.nbytes
            tensors[name] = copy if whole else copy.clone()  # safetensors takes no two views of one storage
        return {"tensor": names[id(value)]}
    if isinstance(value, dict):  # pairs: keys may be numbers, as an optimizer's are
        return {"dict": [[key, _to_json(item, tensors, names)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_to_json(item, tensors, names) for item in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")


def _from_json(value: Any, tensors: dict[str, torch.Tensor]) -> State:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _from_json(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_from_json(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content
