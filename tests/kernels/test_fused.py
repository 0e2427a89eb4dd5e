"""Fused functions equal what they replace: values and gradients, on fresh inputs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen2Config

from sft.kernels.fused_layers import fuse_layers
from sft.kernels.fused_lora import fuse_lora
from tests.benchmarks import gpu_ladder

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip


def adapted(config, dtype=torch.float32, **lora):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(base, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def outcome(model, seed: int):
    """Logits, and the gradient of each trained parameter."""
    torch.manual_seed(seed)
    ids = torch.randint(0, 128, (1, 20))
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.float().square().mean().backward()
    return logits.detach().float(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("config", [Qwen2Config, LlamaConfig])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj", "up_proj"]])
def test_lora_of_layers_with_one_input_equals_pefts(config, targets):
    model = adapted(config(**SIZES), target_modules=targets)
    wanted = [outcome(model, seed) for seed in range(3)]
    assert fuse_lora(model) == 2 * (7 if targets == "all-linear" else 3)
    for seed, (logits, gradients) in enumerate(wanted):
        found, of_found = outcome(model, seed)
        assert distance(logits, found) < 1e-6
        assert max(distance(gradient, of_found[name]) for name, gradient in gradients.items()) < 3e-6


def test_lora_in_bfloat16_equals_pefts_up_to_rounding():
    model = adapted(Qwen2Config(**SIZES), torch.bfloat16)
    attention = model.base_model.model.model.layers[0].self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]

    def outcome(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        x = torch.randn(1, 20, 64, dtype=torch.bfloat16, requires_grad=True)
        outputs = [layer(x) for layer in layers]
        low = [layer.lora_A.default.weight for layer in layers] + [layer.lora_B.default.weight for layer in layers]
        total = sum((output * torch.randn_like(output)).float().sum() for output in outputs)
        return [t.float() for t in (*outputs, *torch.autograd.grad(total, [x, *low]))]

    plain = [outcome(seed) for seed in range(3)]
    fuse_lora(model)
    for seed, wanted in enumerate(plain):
        assert max(distance(a, b) for a, b in zip(wanted, outcome(seed), strict=True)) < 1e-2


def test_different_ranks_of_layers_with_one_input_are_kept_apart():
    model = adapted(Qwen2Config(**SIZES), rank_pattern={"k_proj": 2, "up_proj": 8})
    wanted, gradients = outcome(model, 1)
    fuse_lora(model)
    found, of_found = outcome(model, 1)
    assert distance(wanted, found) < 1e-6
    assert max(distance(gradient, of_found[name]) for name, gradient in gradients.items()) < 3e-6


def test_nothing_of_a_step_is_kept_by_the_layers():
    model = adapted(Qwen2Config(**SIZES))
    fuse_lora(model)
    outcome(model, 1)
    groups = {
        cell.cell_contents for m in model.modules() for cell in getattr(m.__dict__.get("forward"), "__closure__", None) or ()
        if type(cell.cell_contents).__name__ == "Group"
    }  # fmt: skip
    assert len(groups) == 2 * 4  # q, k and v; o; gate and up; down
    assert all(group.input is None and not any(o is not None for o in group.outputs) for group in groups)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_norms_and_gated_layers_equal_the_models_own(dtype, limit):
    model = adapted(Qwen2Config(**SIZES), dtype)
    wanted, gradients = outcome(model, 2)
    assert fuse_layers(model) == 2 * 3 + 1
    found, of_found = outcome(model, 2)
    assert distance(wanted, found) <= limit
    assert max(distance(gradient, of_found[name]) for name, gradient in gradients.items()) <= 3 * limit


def test_a_norm_that_computes_something_else_keeps_its_forward():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SIZES, head_dim=16))
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            nn.init.normal_(module.weight, std=0.3)  # it multiplies by 1 + weight; GELU is no SiLU either
    before = [module.forward for module in model.modules()]
    assert fuse_layers(model) == 0
    assert [module.forward for module in model.modules()] == before


def test_lora_on_packed_weights_equals_pefts():
    model = adapted(Qwen2Config(**SIZES), target_modules=["q_proj"])
    base = model.unload()
    gpu_ladder.quantize(base)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    wanted, gradients = outcome(model, 4)
    assert fuse_lora(model) == 14
    found, of_found = outcome(model, 4)
    assert distance(wanted, found) < 1e-6
    assert max(distance(gradient, of_found[name]) for name, gradient in gradients.items()) < 3e-6
