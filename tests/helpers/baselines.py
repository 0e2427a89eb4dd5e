"""Recipes of baselines, and their runs."""

from pathlib import Path

from sft.baselines.train import train_baseline
from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.load import check_baseline
from tests.helpers.places import SAMPLES

NEWS = SAMPLES / "newsgroups.jsonl"


SQUAD = SAMPLES / "squad_train.json"


def recipe(objective: str, base: Path | str, out: Path | str, **changes: dict | str) -> BaselineRecipe:
    news = objective != "extractive_qa"
    tree = {
        "objective": objective,
        "task": "newsgroups" if news else "squad_v2",
        "model": {"base": str(base)},
        "data": {"train": str(NEWS if news else SQUAD), "max_seq_length": 64 if news else 384, "dev_share": 0.15},
        "train": {
            "examples_per_step": 16, "learning_rate": 1e-3, "num_train_epochs": 1, "bf16": False,
            "output_dir": str(out), "max_steps": 3,
        },
        "eval": {"share": 0.2} if news else {"data": str(SAMPLES / "squad_dev.json"), "limit": 20},
    }  # fmt: skip
    for section, values in changes.items():
        tree[section] = values if isinstance(values, str) else tree.get(section, {}) | values  # type: ignore[operator]
    return check_baseline(tree)


def trained(recipe: BaselineRecipe) -> Path:
    run = train_baseline(recipe, Path("test.yaml"))
    assert run is not None
    return run
