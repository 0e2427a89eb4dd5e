"""Which models take packs, and that they train in packs as on each example alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.chat import encode
from data.pack import Layout, make_packs
from sft.model import sliding_window, takes_packs
from sft.trainer import pack_loss

CPU = torch.device("cpu")


def test_examples_that_may_not_fit_into_a_sliding_window_are_not_packed(tiny_qwen):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen)
    assert takes_packs(model)
    model.config.layer_types, model.config.sliding_window = ["full_attention", "sliding_attention"], 128
    assert sliding_window(model) == 128
    assert not takes_packs(model)
    assert not takes_packs(model, longest=129)
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert not takes_packs(model, longest=128)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text", "qwen2"])
def test_packs_of_short_examples_train_as_they_do_alone_where_windows_slide(kind, questions, tokenizer):
    """Loss and gradients, with each implementation that a CPU has."""
    examples = [encode(q, tokenizer, 512) for q in questions[:4]]
    longest = max(len(e.ids) for e in examples)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": longest, "pad_token_id": 0, "bos_token_id": 1}
    if kind == "qwen2":
        more |= {"use_sliding_window": True, "max_window_layers": 1}
    config = AutoConfig.for_model(kind, vocab_size=1 + max(max(e.ids) for e in examples), **sizes, **more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert sliding_window(model) == longest
    assert takes_packs(model, longest)
    found = []
    for implementation in ("alone", "sdpa", "forest"):
        if implementation == "forest":
            model.set_attn_implementation("forest")
        layout = Layout(False, 1, "causal") if implementation == "alone" else Layout(True, 512, "dense")
        model.zero_grad()
        loss = sum(pack_loss(model, pack, CPU) for pack in make_packs(examples, layout))
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert (gradient - found[0][1]).norm() < 1e-4 * found[0][1].norm()


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_positions_that_mean_another_angle_beside_a_longer_example_are_not_packed(rope):
    """transformers picks the angles of a whole forward pass by its largest position."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ropes = {"rope_type": rope, "rope_theta": 10000.0}
    if rope == "longrope":
        ropes |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        sizes |= {"pad_token_id": 0, "max_position_embeddings": 256, "original_max_position_embeddings": 64}
    else:
        ropes, sizes = ropes | {"factor": 4.0}, sizes | {"max_position_embeddings": 64}
    kind = "phi3" if rope == "longrope" else "llama"
    config = AutoConfig.for_model(kind, vocab_size=64, **sizes, rope_parameters=ropes)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not takes_packs(model)
    assert not takes_packs(model, longest=65)
    assert takes_packs(model, longest=64)


@pytest.mark.parametrize("kind", ["bloom", "mamba", "mistral"])
def test_models_that_do_not_obey_the_mask_do_not_take_packs(kind):
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "num_hidden_layers": 2, "vocab_size": 64}
    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **small)).eval()
    assert not takes_packs(model)
