"""Streamed merges against PEFT's merge in memory, weight by weight."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen2Config

from data.errors import DiskFull
from sft.errors import ParityError
from sft.export.merge import read_merge, write_merge
from sft.export.shards import INDEX, read_shards
from sft.export.skeleton import CannotStream
from sft.models.load import bitsandbytes_config, load_base
from sft.recipe.schema import Model, Quantization
from tests.helpers.exports import ADAPTERS, ALL, SMALL, save_base, tune

CPU = torch.device("cpu")
TOKENS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A base in several files, with biases."""
    config = Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)
    return save_base(tmp_path_factory.mktemp("untied") / "base", config, max_shard_size="20KB")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("tied") / "base", LlamaConfig(**SMALL, tie_word_embeddings=True))


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def merge(base: Path, adapter: Path | None, out: Path, dtype=torch.float32):
    out.mkdir()
    return write_merge(read_merge(base, adapter, dtype), out)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_streamed_merge_equals_merge_in_memory(kind, untied, tmp_path):
    tuned = tune(untied, ADAPTERS[kind](), tmp_path / "adapter")
    counts = merge(untied, tmp_path / "adapter", tmp_path / "out")
    assert counts["adapted"] > 0
    assert not counts["unchanged"]
    expected = tuned.merge_and_unload(safe_merge=True).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32
    assert merged.state_dict().keys() == expected.keys()
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted(
        p.name for p in untied.glob("*.safetensors")
    )
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").glob("*.safetensors")} == {0o644}


def test_bfloat16_is_the_float32_merge_rounded_once(untied, tmp_path):
    tuned = tune(untied, LoraConfig(**ALL), tmp_path / "adapter")
    merge(untied, tmp_path / "adapter", tmp_path / "out", torch.bfloat16)
    expected = tuned.merge_and_unload(safe_merge=True).to(torch.bfloat16).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    for name, value in merged.state_dict().items():
        assert (value == expected[name]).float().mean() > 0.999, name  # a last bit may round differently


@pytest.mark.parametrize(
    ("config", "stays_tied"),
    [
        (LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), True),
        (LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM"), False),
        (LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"), False),
        (LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"), False),
        (
            LoraConfig(
                r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
            ),
            False,
        ),
        (
            LoraConfig(
                r=4, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}, task_type="CAUSAL_LM"
            ),
            True,
        ),
    ],
    ids=["neither", "lora on the embedding", "embedding saved", "head saved", "both saved", "trainable tokens"],
)
def test_tied_embeddings_are_untied_if_the_adapter_makes_them_differ(config, stays_tied, tied, tmp_path):
    tuned = tune(tied, config, tmp_path / "adapter")
    expected = logits(tuned)
    merge(tied, tmp_path / "adapter", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(model), expected, atol=1e-5)  # of the adapter, not of PEFT's merge, which ties again
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is stays_tied
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) is not stays_tied


@pytest.mark.parametrize("base", ["tied", "untied"])
def test_added_tokens_keep_the_rows_that_training_gave_them(base, request, tmp_path):
    folder = request.getfixturevalue(base)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    tuned = tune(folder, config, tmp_path / "adapter", rows=108)
    merge(folder, tmp_path / "adapter", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 108
    assert torch.allclose(logits(model), logits(tuned), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the base is stored in bfloat16
def test_added_rows_that_nothing_holds_are_an_error(dtype, untied, tmp_path):
    """The head's new rows were drawn at random, and by this setting of PEFT saved nowhere."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    tune(untied, config, tmp_path / "adapter", rows=108, save_embedding_layers=False)
    with pytest.raises(ParityError, match=r"lm_head.weight .*\(100, 32\) .*\(108, 32\), .*modules_to_save"):
        merge(untied, tmp_path / "adapter", tmp_path / "out", dtype)


def test_dequantized_base_is_bit_for_bit_that_of_training(untied, tmp_path):
    for double in (True, False):
        model = Model(
            base=str(untied),
            dtype="float32",
            quantization=Quantization(load_in_4bit=True, bnb_4bit_use_double_quant=double),
        )
        expected = load_base(model, CPU).state_dict()
        plan = read_merge(untied, None, torch.float32, bitsandbytes_config(model, CPU))
        assert len(plan.quantize) == 14
        out = tmp_path / str(double)
        out.mkdir()
        write_merge(plan, out)
        written = {name: value for shard in read_shards(out).values() for name, value in shard.items()}
        assert written.keys() == expected.keys()
        for name, value in written.items():
            assert torch.equal(value, expected[name]), name


def test_layers_untouched_by_the_adapter_are_copied_byte_for_byte(untied, tmp_path):
    tune(untied, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    counts = merge(untied, tmp_path / "adapter", tmp_path / "out", torch.bfloat16)
    assert counts["adapted"] == 4  # weight and bias of two layers
    index = json.loads((untied / INDEX).read_text())
    written = json.loads((tmp_path / "out" / INDEX).read_text())
    assert (written["weight_map"], written["metadata"]["total_size"]) == (
        index["weight_map"], index["metadata"]["total_size"]
    )  # fmt: skip
    for file in sorted(untied.glob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "out" / file.name)
        for name, value in before.items():
            assert torch.equal(value, after[name]) is ("q_proj.weight" not in name), name


def test_experts_that_transformers_fuses_are_not_streamed(tmp_path):
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    base = save_base(tmp_path / "base", config)
    with pytest.raises(CannotStream, match="under another name"):
        read_merge(base, None, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"), "is missing"),
        (lambda t: t.update({"base_model.model.model.layers.9.q_proj.lora_B.weight": torch.zeros(2)}), "has no place"),
        (lambda t: next(iter(t.values())).fill_(float("nan")), "is not finite"),
    ],
)
def test_adapter_that_does_not_fit_is_named(change, message, untied, tmp_path):
    tune(untied, LoraConfig(**ALL), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ParityError, match=message):
        merge(untied, tmp_path / "adapter", tmp_path / "out")


def test_weights_too_large_for_float16_are_not_written(tmp_path):
    base = save_base(tmp_path / "base", LlamaConfig(**SMALL))
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(1e5)
    save_file(tensors, file)
    with pytest.raises(ParityError, match=r"model\.norm\.weight.*float16"):
        merge(base, None, tmp_path / "out", torch.float16)


def test_module_whose_weights_are_in_two_files_is_unchanged_only_if_all_of_them_are(untied, tmp_path):
    base = shutil.copytree(untied, tmp_path / "base")
    index = json.loads((base / INDEX).read_text())
    name = "model.layers.0.self_attn.q_proj.bias"
    file = index["weight_map"].pop(name)
    weights = load_file(base / file)
    save_file({name: (bias := weights.pop(name))}, base / "bias.safetensors", {"format": "pt"})
    save_file(weights, base / file, {"format": "pt"})
    index["weight_map"][name] = "bias.safetensors"
    (base / INDEX).write_text(json.dumps(index))
    tune(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    assert not merge(base, tmp_path / "adapter", tmp_path / "out")["unchanged"]  # the bias is; the weight is not
    assert torch.equal(load_file(tmp_path / "out" / "bias.safetensors")[name], bias.float())


def test_full_disk_is_reported_before_anything_is_written(untied, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(DiskFull, match="0.00 GB"):
        merge(untied, None, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_plan_of_a_merge_holds_no_weight_of_the_base(untied, tmp_path, monkeypatch):
    """The architecture and PEFT's layers on it hold no weight of the base, before and after."""
    tune(untied, LoraConfig(**ALL), tmp_path / "adapter")
    plan = read_merge(untied, tmp_path / "adapter", torch.float32)
    (tmp_path / "out").mkdir()
    for _ in range(2):
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in plan.model.parameters()}
        adapter = sum(p.nbytes for n, p in plan.model.named_parameters() if "lora_" in n)
        assert sum(held.values()) - adapter <= 4
        if not list((tmp_path / "out").iterdir()):
            write_merge(plan, tmp_path / "out")
    assert isinstance(plan.model, nn.Module)
