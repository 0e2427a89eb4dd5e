"""Models that take packs or padding train in them as on each example alone."""

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data.encode.chat import Example, encode
from data.encode.pack import Layout, make_packs
from data.errors import UserError
from sft.models.capabilities import sliding_window, takes_packs, takes_padding
from sft.models.tune import tune_model
from sft.recipe.schema import Tune
from sft.training.step import pack_loss

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
def test_packs_of_short_examples_train_as_each_alone_under_sliding_windows(kind, questions, tokenizer):
    """Loss and gradients, with each implementation that a CPU has."""
    examples = [encode(q, tokenizer, 512) for q in questions[:4]]
    longest = max(len(e.ids) for e in examples)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": longest, "pad_token_id": 0, "bos_token_id": 1}
    if kind == "qwen2":
        sizes |= {"use_sliding_window": True, "max_window_layers": 1}
    config = AutoConfig.for_model(kind, vocab_size=1 + max(max(e.ids) for e in examples), **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert sliding_window(model) == longest
    assert takes_packs(model, longest)
    results = []
    for implementation in ("alone", "sdpa", "forest"):
        if implementation == "forest":
            model.set_attn_implementation("forest")
        layout = Layout(False, 1, "alone") if implementation == "alone" else Layout(True, 512, "dense")
        model.zero_grad()
        loss = sum(pack_loss(model, pack, CPU) for pack in make_packs(examples, layout))
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert (gradient - results[0][1]).norm() < 1e-4 * results[0][1].norm()


@pytest.mark.parametrize("rope", ["longrope", "dynamic"])
def test_examples_whose_angles_depend_on_a_longer_one_are_not_packed(rope):
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
    assert takes_padding(model, 64)
    assert not takes_padding(model, 65)


def small_model(kind: str, **keys: object) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "num_hidden_layers": 2, "vocab_size": 64}
    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | small | keys))


@pytest.mark.parametrize(
    "kind", ["bloom", "mamba", "mistral", "qwen3_next", "prompt_tuning", "p_tuning", "prefix_tuning", "forest"]
)
def test_padded_rows_train_as_each_example_alone(kind):
    """Loss and gradients; an attention that the recipe names sees windows too."""
    keys = {"sliding_window": 4} if kind in ("mistral", "forest") else {}
    if kind == "qwen3_next":
        keys = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "head_dim": 8}
        keys |= {"linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        keys |= {"shared_expert_intermediate_size": 16, "layer_types": ["linear_attention", "full_attention"]}
    model: Any = small_model(kind if kind in ("bloom", "mamba", "qwen3_next") else "mistral", **keys)
    if kind.endswith("tuning"):
        tune = {"method": kind, "num_virtual_tokens": 3} | ({"encoder_hidden_size": 16} if kind == "p_tuning" else {})
        model = tune_model(model, Tune.model_validate(tune), 0)
    if kind == "forest":
        model.set_attn_implementation("forest")
    assert takes_padding(model, 64)
    rng = random.Random(0)
    lengths = [20, 17, 12, 9, 9]
    rows = [Example([rng.randrange(5, 60) for _ in range(n)], [i > n - 4 for i in range(n)]) for n in lengths]
    results = []
    for attention in ("alone", "padded"):
        packs = make_packs(rows, Layout(False, 64, attention))
        model.zero_grad()
        loss = sum(pack_loss(model, pack, CPU) for pack in packs)
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert [len(make_packs(rows, Layout(False, 64, a))) for a in ("alone", "padded")] == [5, 2]
    reference = sum(nll_alone(model, row) for row in rows)
    (alone, of_alone), (padded, of_padded) = results
    assert alone == pytest.approx(reference, rel=1e-5)
    assert padded == pytest.approx(reference, rel=1e-5)
    assert (of_padded - of_alone).norm() < 1e-4 * of_alone.norm()


def nll_alone(model: Any, row: Example) -> float:
    """transformers' own loss, as a sum."""
    labels = torch.tensor([[t if m else -100 for t, m in zip(row.ids, row.loss_mask, strict=True)]])
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        return float(model(ids, attention_mask=torch.ones_like(ids), labels=labels).loss * sum(row.loss_mask))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.01), (torch.bfloat16, 0.1), (torch.bfloat16, 0.0)])
def test_a_model_that_looks_ahead_takes_no_padding(dtype, share):
    model = small_model("mistral").to(dtype)
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda states, *a, forward=forward, **k: forward(
            states + share * states.mean(1, keepdim=True), *a, **k
        )
    model.lm_head.eval()
    model.model.train()
    assert takes_padding(model, 64) is (share == 0)
    assert (model.training, model.lm_head.training, model.model.training) == (True, False, True)


def test_logits_of_other_tokens_than_the_sources_are_refused():
    """Two rows of four tokens, four of them trained: each row of logits has the expected number."""
    model = small_model("mistral")
    unused = torch.nn.Linear(32, 64)
    model.get_output_embeddings = lambda: unused  # which the forward does not call
    rows = [Example([5, 6, 7, 8], [0, 0, 1, 1]), Example([5, 6, 9, 10], [0, 0, 1, 1])]
    (pack,) = make_packs(rows, Layout(False, 64, "padded"))
    with pytest.raises(UserError, match="MistralForCausalLM .* 2 x 4 tokens .* 4;"):
        pack_loss(model, pack, CPU)


@pytest.mark.parametrize("kind", ["bloom", "mamba", "mistral"])
def test_models_that_do_not_obey_the_mask_do_not_take_packs(kind):
    assert not takes_packs(small_model(kind).eval())


@pytest.mark.parametrize("kind", ["mistral", "bloom", "deaf to the mask", "deaf to positions"])
def test_coarse_rounding_refuses_no_sound_model_and_hides_no_wrong_one(kind):
    """Logits that change with the length of the input by a third of their spread, as in bfloat16 on some CPUs."""
    model: Any = small_model("bloom" if kind == "bloom" else "mistral", sliding_window=None).eval()
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:  # else positions hardly matter
            weight.data *= 30
    forward = model.forward
    scale = 0.33 * forward(torch.arange(5, 11)[None]).logits[0, -1].std().item()

    def rounded(ids: torch.Tensor | None = None, **inputs: Any) -> Any:
        ids = inputs.pop("input_ids", ids)
        if kind == "deaf to the mask":
            inputs.pop("attention_mask", None)
        if kind == "deaf to positions":
            inputs.pop("position_ids", None)
        out = forward(input_ids=ids, **inputs)
        noise = torch.randn(out.logits.shape[-1], generator=torch.Generator().manual_seed(ids.shape[1]))
        out.logits = out.logits + scale * noise
        return out

    model.forward = rounded
    assert takes_packs(model) is (kind == "mistral")
