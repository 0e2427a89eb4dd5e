"""The first losses of each recipe that runs on the samples, on a tiny random base.

A change that should not move numbers moves none of these. To accept new ones: GRAFT_GOLDEN=write python -m pytest
tests/training/test_golden.py -m "slow or not slow". They are compared up to the last digits, which processors round
differently.
"""

import json
import os
from pathlib import Path

import pytest

from sft.recipe.baseline_schema import BaselineRecipe
from sft.recipe.load import load_any_recipe
from sft.runs.metrics import read_metrics
from tests.helpers.graft import run as graft
from tests.helpers.places import ROOT

pytestmark = pytest.mark.heavy

GOLDEN = ROOT / "tests" / "golden" / "losses.json"
STEPS = 4
QUICK = ("smollm_qlora",)


def recipes() -> list[object]:
    """All that train weights on data in the repository."""
    cases = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        recipe = load_any_recipe(path)
        floor = isinstance(recipe, BaselineRecipe) and recipe.is_floor
        if not floor and all(Path(source.path).is_file() for source in recipe.data.train):
            cases.append(pytest.param(path.stem, marks=[] if path.stem in QUICK else pytest.mark.slow))
    return cases


@pytest.mark.parametrize("name", recipes())
def test_losses_of_a_recipe_are_the_golden_ones(name, tiny, tiny_bert, tmp_path):
    """R13"""
    path = ROOT / "recipes" / f"{name}.yaml"
    encoder = isinstance(load_any_recipe(path), BaselineRecipe)
    changes = {
        "model.base": tiny_bert if encoder else tiny, "train.bf16": "false", "train.max_steps": STEPS,
        "train.logging_steps": 1, "train.output_dir": tmp_path / "run",
        **({"train.eval_steps": 100, "train.eval_strategy": "steps"} if encoder else {}),
        **({} if encoder else {"model.dtype": "float32", "train.eval_strategy": "no", "train.save_strategy": "no"}),
    }  # fmt: skip
    graft("train", path, *(word for key, value in changes.items() for word in ("--set", f"{key}={value}")))
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == STEPS
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    if os.environ.get("GRAFT_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(dict(sorted((golden | {name: losses}).items())), indent=1) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())[name], abs=2e-4)
