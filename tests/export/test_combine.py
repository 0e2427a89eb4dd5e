"""Several adapters as one."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.exports import ADAPTERS, chatml_base, command, make_run, tune

pytestmark = pytest.mark.heavy

combine = partial(command, name="combine")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("combine")
    return make_run(folder / "plain", chatml_base(folder / "base"), quantized=False)


def test_runs_are_combined_and_compared_with_each(plain, tmp_path):
    other = make_run(tmp_path / "other", plain.parent / "base", seed=2, quantized=False)
    command(plain, "--out", tmp_path / "alone", "--no-parity")
    combine(plain, other, "--weights", "1,0", "--out", tmp_path / "first", "--no-parity")
    alone, first = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "first"))
    assert all((value == first[name]).float().mean() > 0.99 for name, value in alone.items())
    combine(plain, other, "--method", "ties", "--density", "0.5", "--out", tmp_path / "both")
    parity = json.loads((tmp_path / "both" / "parity.json").read_text())
    assert parity["combination"] == {
        "runs": ["plain", "other"], "method": "ties", "weights": [0.5, 0.5], "density": 0.5
    }  # fmt: skip
    assert parity["answer_argmax_agreement"] > 0.9  # with the combined adapter
    assert all(parity["against"][name]["mean_kl_nats"] > 10 * parity["mean_kl_nats"] for name in ("plain", "other"))
    command(tmp_path / "both", "--run", plain, name="verify")


def test_runs_of_the_same_name_are_recorded_by_their_paths(plain, tmp_path):
    (tmp_path / "b").mkdir()
    other = make_run(tmp_path / "b" / "plain", plain.parent / "base", seed=2, quantized=False)
    combine(plain, other, "--out", tmp_path / "both", "--allow-mismatch")
    parity = json.loads((tmp_path / "both" / "parity.json").read_text())
    assert list(parity["against"]) == parity["combination"]["runs"] == [str(plain), str(other)]


def test_single_run_is_not_combined(plain, tmp_path):
    assert "name two runs" in combine(plain, "--out", tmp_path / "out", code=2).stderr


@pytest.mark.parametrize("kind", ["dora", "rslora", "bias", "trainable_tokens", "ia3"])
def test_adapters_that_peft_would_combine_wrongly_are_refused(kind, plain, tmp_path):
    base = plain.parent / "base"
    other = make_run(tmp_path / "other", base, quantized=False)
    tune(base, ADAPTERS[kind](), other / "adapter")
    done = combine(plain, other, "--weights", "1,0", "--out", tmp_path / "out", code=2)
    assert re.search("can't be combined|not IA3", " ".join(done.stderr.split())), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "1"), "--weights holds 1 numbers for 2 runs"),
        (("--weights", "a,b"), "write comma-separated numbers"),
        (("--method", "mean"), "--method mean is none of linear, cat"),
        (("--method", "ties"), "needs --density"),
        (("--density", "0.5"), "leave --density out"),
    ],
)
def test_invalid_combination_is_named(options, message, plain, tmp_path):
    done = combine(plain, plain, *options, "--out", tmp_path / "out", code=2)
    assert message in " ".join(done.stderr.split())
