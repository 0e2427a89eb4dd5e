"""The recipe of the tests on a GPU."""

import json
from pathlib import Path

from tests.helpers.builders import write_recipe
from tests.helpers.places import SAMPLES


def gpu_recipe(folder: Path, base: Path, quantized: bool = False, dtype: str = "float32", **train: object) -> Path:
    """A recipe of four steps, most of several packs; `train` overrides its section."""
    settings = {
        "examples_per_step": 32, "learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 4, "report_to": [], "output_dir": str(folder / "run"), **train,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    nf4 = {"quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}} if quantized else {}
    sections = {
        "model": {"base": str(base), "dtype": dtype, **nf4},
        "data": {
            "train": str(SAMPLES / "squad_train.json"),
            "max_contexts": 12,
            "max_length": 2048,
            "pack_tokens": 2048,
        },
        "train": settings,
        "eval": {"data": str(SAMPLES / "squad_dev.json"), "limit": 12, "max_new_tokens": 8},
    }
    return write_recipe(folder / "recipe.yaml", base, **{key: json.dumps(value) for key, value in sections.items()})
