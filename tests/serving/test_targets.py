"""A run that can't be served, or not be merged, names the command that works."""

import pytest

from eval.client import ServerError
from sft.serving.targets import resolve_targets
from tests.helpers.builders import write_recipe
from tests.helpers.graft import run as graft

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize(
    ("tune", "merges"),
    [
        ("method: lora, r: 4, lora_bias: true, target_modules: [q_proj, o_proj]", False),
        ("method: prompt_tuning, num_virtual_tokens: 4", False),
        ("method: lora, r: 4, use_dora: true, target_modules: [q_proj]", True),
        ("method: lora, r: 4, bias: all, target_modules: [q_proj]", True),
        ("method: lora, r: 4, target_modules: [q_proj], trainable_token_indices: [5, 6]", True),
        ("method: ia3, target_modules: [k_proj, down_proj], feedforward_modules: [down_proj]", True),
    ],
)
def test_command_that_a_refusal_names_works(tune, merges, tiny, tmp_path):
    """No refusal of graft export points to graft serve while that points to graft export."""
    run = tmp_path / "run"
    train = f"{{examples_per_step: 6, learning_rate: 1e-1, max_steps: 2, output_dir: '{run}'}}"
    graft("train", write_recipe(tmp_path / "r.yaml", tiny, tune=f"{{{tune}}}", train=train))
    with pytest.raises(ServerError) as refused:
        resolve_targets([str(run)])
    if merges:
        assert f"graft export {run}" in str(refused.value)
        graft("export", run, "--allow-mismatch")
        return
    for message in (str(refused.value), graft("export", run, code=2).stderr):
        assert f"graft eval {run}" in message
        assert "graft serve" not in message
        assert "graft export" not in message
    graft("eval", run)
