"""Checks of an untrusted model, adapter or recipe before a library opens it.

Weights are safetensors, no code of a repository runs, and no file of a folder names a file outside it. transformers
and PEFT ensure most of that; this module reports it in one line and adds what they leave open: shards of an index
(transformers joins any path), kernels that a config names (they are code), and files that PEFT opens for a config.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.inside import first_stray
from sft.errors import RecipeError

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")
# keys that may name a repository of kernels, which transformers would fetch and run
IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
PLAIN = re.compile(r"[a-z0-9_|]+")
# keys of a config whose value PEFT imports, unpickles or loads from elsewhere
OPENED = ("megatron_config", "adapters", "cache_file", "covariance_file", "tokenizer_kwargs")
# a shell or a terminal would act on it when a user copies the name from a printed line
UNSAFE = re.compile(r"""[;&|$`<>*?"'!#\\~(){}\[\]]""")


def check_run_folder(folder: Path, key: str) -> None:
    """Raise RecipeError if a shell would act on the run folder's name, or if it leads out of the current folder."""
    text = str(folder)
    if odd := [character for character in text if UNSAFE.match(character) or not character.isprintable()]:
        why = f"holds {odd[0]!a}, which a shell or terminal would act on; use letters, digits, . _ - and spaces"
    elif any(word.startswith("-") for part in folder.parts for word in part.split(" ")):
        why = "has a word that begins with -, like an option; name it otherwise"
    elif re.match("[A-Za-z]:", text) and not folder.is_absolute():
        why = "is a Windows path; write it as a path of this machine"
    elif not folder.is_absolute() and not folder.resolve().is_relative_to(Path.cwd()):
        why = f"leads out of the current folder, to {folder.resolve()}; if that is meant, write that path"
    else:
        return
    raise RecipeError(f"{key}: {text!r} {why}")


def check_contents(folder: Path, name: str, **limits: Any) -> None:
    """Raise RecipeError if a folder holds links out of it, FIFOs or devices. limits: of first_stray."""
    if stray := first_stray(folder, **limits):
        raise RecipeError(f"{name}: {stray}")


def check_run(run: Path) -> None:
    """Raise RecipeError if a run folder holds links out of it, FIFOs or devices. Old checkpoints may lie on another
    disk: they are read only if their manifest vouches for each file, and written never."""
    check_contents(run, str(run), linked=r"(damaged-)?checkpoint-\d+")


def check_folder(folder: Path, name: str) -> None:
    """Raise RecipeError if a local model holds irregular files, or names code or files elsewhere; runs nothing."""
    check_contents(folder, name, depth=1)  # libraries look no deeper, and a project's folder may hold .venv/
    check_configs(folder, name)
    index = folder / "model.safetensors.index.json"  # transformers reads this index
    shards = _read(index, name).get("weight_map", {}) if index.is_file() else {}
    for shard in set(map(str, shards.values())) if isinstance(shards, dict) else ():
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise RecipeError(
                f"{name}: {index.name} names the weights {shard!r}, which is no file of this folder; "
                "weights lie beside their index"
            )


def check_configs(folder: Path, name: str) -> None:
    for file in CONFIGS:
        if (folder / file).is_file():
            check_config(_read(folder / file, name), f"{name}: {file}")


def check_config(config: dict[str, Any], name: str) -> None:
    """Raise RecipeError if a config asks for code: trust_remote_code, or kernels of a repository."""
    for key, value in _members(config):
        if key == "trust_remote_code" and value:
            raise RecipeError(f"{name} sets trust_remote_code, and Graft runs no code of a model; remove that line")
        values = value.values() if isinstance(value, dict) else [value]
        if IMPLEMENTATIONS.fullmatch(key) and not all(v is None or PLAIN.fullmatch(str(v)) for v in values):
            raise RecipeError(f"{name}: {key} {value!r} names code to be fetched and run; remove that line")


def brings_code(config: dict[str, Any]) -> bool:
    """Whether a config names classes of its own repository; they are never run."""
    return any(key == "auto_map" and value for key, value in _members(config))


def check_peft(settings: dict[str, Any], name: str) -> None:
    """Raise RecipeError if the settings make PEFT import, unpickle or load something."""
    for key, value in _members(settings):
        state = key == "prompt_tuning_init_state_dict_path" and not str(value).endswith(".safetensors")
        if value and (key in OPENED or state):
            raise RecipeError(f"{name}{key}: PEFT would open what {str(value)[:60]!r} names, code or pickle; remove it")


def check_adapter(adapter: Path, bases: tuple[str, ...]) -> None:
    """Raise RecipeError for an adapter without safetensors, with settings that open other files, or of another base.

    bases: names of its base that the adapter may hold.
    """
    if not (adapter / "adapter_model.safetensors").is_file():
        pickled = sorted(p.name for p in adapter.glob("*.bin"))
        why = f"; {', '.join(pickled)} may be a pickle, which can hold code, and is not read" if pickled else ""
        raise RecipeError(f"{adapter}: holds no adapter_model.safetensors{why}")
    check_folder(adapter, str(adapter))
    config = _read(adapter / "adapter_config.json", str(adapter))
    check_config(config, f"{adapter}: adapter_config.json")
    check_peft(config, f"{adapter}: adapter_config.json: ")
    named = config.get("base_model_name_or_path")
    if named and not any(_same_base(str(named), base) for base in bases):
        raise RecipeError(
            f"{adapter}: adapter_config.json names base {named!r}, the run's recipe {bases[0]!r}; on another base "
            "an adapter gives random answers. If it is the same one, write its name into adapter_config.json"
        )


def _same_base(named: str, base: str) -> bool:
    """Whether both name one base: the adapter may hold the end of the recipe's absolute path."""
    tail = Path(named).parts
    return named == base or (Path(base).is_absolute() and Path(base).parts[-len(tail) :] == tail)


def _members(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value at any depth."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from ((str(key), item) for key, item in value.items())
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _read(path: Path, name: str) -> dict[str, Any]:
    remedy = "name a folder that save_pretrained has written"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{name} can't be loaded: {path.name} is not a valid JSON file: {error}; {remedy}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"{name} can't be loaded: {path.name} holds no JSON object; {remedy}")
    return value
