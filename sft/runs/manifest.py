"""The manifest of a run: versions, hardware, digests of its data and base."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from data.audit.report import DataReport
from data.cache import file_sha256
from sft.models.resolve import model_files, readable, resolve_base, stored_config
from sft.recipe.baseline_schema import AnyRecipe, BaselineRecipe
from sft.session import usable_cores
from sft.untrusted import brings_code

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def environment() -> dict[str, Any]:
    """Versions and hardware, for manifests and bug reports; no paths, no environment variables."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def manifest(recipe: AnyRecipe, report: DataReport, trainable: int, parameters: int) -> dict[str, Any]:
    """The content of manifest.json. report: on the data as it was read."""
    sources = report.all_sources
    model = recipe.encoder if isinstance(recipe, BaselineRecipe) else recipe.model
    stored = _stored_config(model.base, model.revision) if model else {}
    return {
        "command": " ".join(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv)),
        "commit": _commit(),
        **environment(),
        "base": {
            "name": (model or recipe.model).base,
            "revision": recipe.model.revision,
            **(identity(model.base, model.revision) if model else {"commit": None, "sha256": {}}),
            "auto_map": brings_code(stored),
        },
        "trust_remote_code": False,
        "data_sha256": {path: sha256 for source in sources for path, sha256 in source.sha256.items()},
        "data_revision": {source.name: source.revision for source in sources if source.revision},
        **({"chat_template_sha256": t["chat_template_sha256"]} if (t := report.tokenizer) else {}),
        **({"examples_sha256": report.examples_sha256} if report.examples_sha256 else {}),
        "seed": recipe.train.seed,
        "trainable_parameters": trainable,
        "parameters": parameters,
    }


def identity(base: str, revision: str | None) -> dict[str, Any]:
    """What identifies a base: the commit of a Hub id; sha256 of the files of a folder."""
    folder = Path(resolve_base(base))
    commit = _stored_config(base, revision).get("_commit_hash")
    return {"commit": commit, "sha256": {str(f.relative_to(folder)): file_sha256(f) for f in model_files(folder)}}


def _stored_config(base: str, revision: str | None) -> dict[str, Any]:
    with readable(f"model.base: {base}"):
        return stored_config(base, revision)


def machine() -> str:
    """The machine in words, with the cores that this process may use."""
    facts = environment()
    return ", ".join([facts["cpu"], f"cores: {usable_cores()}", *facts["gpus"]])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Commit of this checkout; None outside one."""
    root = Path(__file__).parents[2]
    git = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return git.stdout.strip() or None
