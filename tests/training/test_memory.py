"""The count of a training's bytes: against real steps, against hand calculation, and what is decided by it."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from data.encode.chat import Example
from data.encode.pack import Layout, Pack
from sft.models.load import dequantizes, is_quantized
from sft.models.tune import tune_model
from sft.recipe.load import check_recipe, load_recipe
from sft.recipe.schema import changed
from sft.session import TUNABLES
from sft.training.auto import apply_auto, resolve_checkpointing, resolve_dequantize
from sft.training.examples import load_examples
from sft.training.memory import GIB, SHARE, Load, NotCounted, _LiveBytes, count_memory
from sft.training.plan import StepPlan
from sft.training.step import pack_loss, train_step
from tests.helpers.builders import write_recipe
from tests.helpers.graft import run
from tests.helpers.places import ROOT

pytestmark = pytest.mark.heavy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NF4 = {"load_in_4bit": True}
LORA = {"method": "lora", "r": 16, "target_modules": "all-linear"}
METHODS = {"lora": LORA, "dora": LORA | {"use_dora": True}, "full": {"method": "full"}}


def recipe_of(tune=LORA, dtype="bfloat16", quantization=None, **train):
    return check_recipe(
        {
            "task": "squad_v2",
            "model": {"base": "owner/name", "dtype": dtype, "quantization": quantization},
            "tune": tune,
            "data": {"train": "owner/data"},
            "train": train,
        }
    )


def small(layers=4) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=2000, hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip


def chain(tokens: int) -> Pack:
    """One sequence, of which a tenth is trained."""
    trained = tokens // 10
    ids = [5 + i % 900 for i in range(tokens)]
    return Pack(ids, list(range(tokens)), [tokens] * tokens, list(range(trained)), ids[:trained])


def trained_model(recipe, config, checkpointing):
    """The model as PackTrainer trains it."""
    base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, recipe.model.dtype))
    model = tune_model(base, recipe.tune, seed=0)
    apply_auto(changed(recipe, train={"compile_layers": False}), model)
    if checkpointing:
        model.gradient_checkpointing_enable()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
            p.grad = torch.zeros_like(p)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_count_is_within_a_tenth_of_what_a_real_step_holds(method, checkpointing, dtype):
    if method == "full" and dtype == "bfloat16":
        pytest.skip("a CPU trains weights of the base in float32")
    recipe = recipe_of(METHODS[method], dtype, attn_implementation="forest")
    model, tokens = trained_model(recipe, small(), checkpointing), 256
    live = _LiveBytes()
    live.leave_out(t for p in model.parameters() for t in (p, p.grad) if t is not None)
    with live:
        train_step(model, [(chain(tokens), 1.0)], tokens // 10, Accelerator(cpu=True))
    load = Load(tokens, tokens // 10, pairs=tokens**2)
    memory = count_memory(recipe, small(), load, CPU, checkpointing)
    assert memory.kept + memory.logits + memory.working == pytest.approx(live.most, rel=0.1)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_kept_bytes_are_those_of_autograds_saved_tensors(method):
    recipe = recipe_of(METHODS[method], "float32", attn_implementation="forest")
    model, tokens = trained_model(recipe, small(), False), 256
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pack_loss(model, chain(tokens), CPU)
    memory = count_memory(recipe, small(), Load(tokens, tokens // 10, pairs=tokens**2), CPU, False)
    assert memory.kept + memory.logits == pytest.approx(sum(size for size, _ in kept.values()), rel=0.03)


def test_bytes_of_a_token_and_layer_of_a_7b_model():
    """Saved: the inputs of the projections and of RMSNorm in bfloat16, gate, up and their product, attention's."""
    tokens = 4096

    def kept(layers, checkpointing=False, **train):
        load = Load(tokens, 1)
        return count_memory(recipe_of(**train), qwen(3584, layers, 28, 4, 18944), load, CUDA, checkpointing).kept

    layer = (kept(2) - kept(1)) / tokens
    assert layer == pytest.approx(159e3, rel=0.02)
    assert (kept(4) - kept(2)) / tokens == pytest.approx(2 * layer, rel=0.001)  # linear in layers
    assert (kept(2, True) - kept(1, True)) / tokens == pytest.approx(2 * 3584, rel=0.02)
    assert (kept(2, bf16=False) - kept(1, bf16=False)) / tokens == pytest.approx(layer, rel=0.001)


def qwen(hidden, layers, heads, kv_heads, inner, tied=False, vocab=152064) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
    )  # fmt: skip


def llama(hidden, layers, heads, kv_heads, inner) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=False,
    )  # fmt: skip


MODELS = {
    "qwen2.5-0.5b": (qwen, 896, 24, 14, 2, 4864, True),
    "qwen2.5-1.5b": (qwen, 1536, 28, 12, 2, 8960, True),
    "qwen2.5-7b": (qwen, 3584, 28, 28, 4, 18944),
    "qwen2.5-14b": (qwen, 5120, 48, 40, 8, 13824),
    "qwen2.5-32b": (qwen, 5120, 64, 40, 8, 27648),
    "llama-3-8b": (llama, 4096, 32, 32, 8, 14336),
    "llama-3-70b": (llama, 8192, 80, 64, 8, 28672),
}


def by_hand(name: str, nf4: bool, tokens: int, answers: int) -> float:
    """GiB without checkpointing: of frozen weights, of LoRA's with gradients and AdamW's states, of activations, of
    logits, and 0.8 for libraries."""
    kind, hidden, layers, heads, kv_heads, inner, *tied = MODELS[name]
    vocab = 152064 if kind is qwen else 128256
    kv, rank, bias = hidden // heads * kv_heads, 16, kind is qwen
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), *[(hidden, inner)] * 3]
    linear = layers * sum(a * b for a, b in shapes)
    rest = vocab * hidden * (1 if tied else 2) + layers * (2 * hidden + bias * (hidden + 2 * kv)) + hidden
    weights = linear * (4.127 / 8 if nf4 else 2) + rest * 2
    adapter = layers * rank * sum(a + b for a, b in shapes) * 16
    # in bytes of 2, except where said: RMSNorm keeps its input, and its result for the projections; attention q, k, v,
    # its output and an fp32 number a head; the MLP gate, up and silu(gate) up; LoRA its low rank
    norms = 2 * (2 * hidden + 2 * hidden)
    attention = 2 * (2 * hidden + 2 * kv) + 4 * heads
    mlp = 2 * 3 * inner
    lora = 2 * 7 * rank
    kept = tokens * layers * (norms + attention + mlp + lora)
    return (weights + adapter + kept + answers * vocab * 4) / GIB + 0.8


PAIRS = [
    ("qwen2.5-0.5b", False, 12, 4096), ("qwen2.5-1.5b", False, 12, 4096), ("qwen2.5-1.5b", False, 24, 4096),
    ("qwen2.5-7b", True, 12, 4096), ("qwen2.5-7b", True, 24, 1536), ("qwen2.5-7b", False, 24, 2048),
    ("qwen2.5-7b", False, 48, 2048), ("qwen2.5-7b", False, 48, 8192), ("llama-3-8b", False, 80, 4096),
    ("qwen2.5-14b", True, 24, 2048), ("qwen2.5-14b", False, 80, 2048), ("qwen2.5-32b", True, 48, 4096),
    ("qwen2.5-32b", True, 80, 2048), ("llama-3-70b", True, 80, 2048), ("llama-3-70b", True, 141, 2048),
]  # fmt: skip


@pytest.mark.parametrize(("name", "nf4", "card", "tokens"), PAIRS)
def test_decision_is_that_of_a_hand_calculation(name, nf4, card, tokens):
    kind, *shape = MODELS[name]
    needed = by_hand(name, nf4, tokens, tokens // 10)
    recipe = recipe_of(quantization=NF4 if nf4 else None)
    memory = count_memory(recipe, kind(*shape), Load(tokens, tokens // 10), CUDA, False)
    assert abs(needed / (SHARE * card) - 1) > 0.1, "a pair nearer to its limit than the stated error proves nothing"
    assert (memory.total <= SHARE * card * GIB) == (needed <= SHARE * card)
    assert memory.total / GIB == pytest.approx(needed, rel=0.03)


def test_packed_weights_take_what_bitsandbytes_stores():
    from bitsandbytes.functional import quantize_4bit

    model = tune_model(AutoModelForCausalLM.from_config(small(1), dtype=torch.bfloat16), recipe_of().tune, seed=0)
    stored = 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            if "_proj" in name:
                packed, state = quantize_4bit(p.detach(), quant_type="nf4", compress_statistics=True)
                inner = state.state2
                tensors = [packed, state.absmax, state.code, state.offset, inner.absmax, inner.code]
                stored += sum(t.numel() * t.itemsize for t in tensors)
            else:
                stored += p.numel() * p.itemsize
    memory = count_memory(recipe_of(quantization=NF4), small(1), Load(16, 1), CUDA, False)
    assert memory.weights == pytest.approx(stored, rel=0.001)


@pytest.mark.parametrize(("optim", "bytes_"), [("adamw_torch", 16), ("paged_adamw_8bit", 10.03), ("sgd", 8)])
def test_trained_weights_have_gradients_and_states(optim, bytes_):
    memory = count_memory(recipe_of({"method": "full"}, optim=optim), small(1), Load(16, 1), CUDA, False)
    numbers = sum(p.numel() for p in AutoModelForCausalLM.from_config(small(1)).parameters())
    assert memory.trained == pytest.approx(numbers * bytes_, rel=0.001)


def peak_of(method: str, checkpointing: bool, tokens: int) -> float:
    """Growth of this process's memory in a step, bytes: its second one, for which libraries have their buffers."""
    torch.set_num_threads(1)
    recipe = recipe_of(METHODS[method], "float32", attn_implementation="forest")
    model, accelerator = trained_model(recipe, small(12), checkpointing), Accelerator(cpu=True)

    def memory(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

    for _ in range(2):
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = memory("VmRSS")
        train_step(model, [(chain(tokens), 1.0)], tokens // 10, accelerator)
    return memory("VmHWM") - before


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="reads a peak as Linux shows it")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_count_is_within_a_tenth_of_what_a_process_grows_by(method, checkpointing):
    """With each tensor in pages of its own: glibc's heap keeps holes, which are not the training's."""
    tokens, tunables = 2048, f"{TUNABLES}:glibc.malloc.mmap_threshold=65536"
    code = f"from tests.training.test_memory import *; print(peak_of({method!r}, {checkpointing}, {tokens}))"
    environment = os.environ | {"GLIBC_TUNABLES": tunables}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    recipe = recipe_of(METHODS[method], "float32", attn_implementation="forest")
    memory = count_memory(recipe, small(12), Load(tokens, tokens // 10, pairs=tokens**2), CPU, checkpointing)
    assert memory.kept + memory.logits + memory.working == pytest.approx(float(done.stdout.split()[-1]), rel=0.1)


def test_decision_follows_the_memory_that_is_free(tiny, tmp_path, monkeypatch):
    recipe = write_recipe(tmp_path / "r.yaml", tiny)
    for free, checkpointing in ((100 * GIB, False), (0.5 * GIB, True)):
        monkeypatch.setattr("sft.training.auto.memory_of", lambda device, processes, free=free: free)
        loaded = load_recipe(recipe)
        model = trained_model(changed(loaded, train={"attn_implementation": "sdpa"}), small(2), False)
        plan = StepPlan([Example([5] * 60, [0] * 50 + [1] * 10, "a")] * 6, [[0, 1, 2], [3, 4, 5]], 2, Layout())
        decided, lines = resolve_checkpointing(loaded, model, plan, CPU)
        assert decided.train.gradient_checkpointing is checkpointing
        assert "GiB" in lines[0]
        assert resolve_checkpointing(decided, model, plan, CPU) == (decided, [])  # as a resume does


def test_nf4_is_unpacked_once_where_it_fits(tiny, tmp_path, monkeypatch, tokenizer):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["model.quantization={load_in_4bit: true}"])
    examples, _ = load_examples(recipe, tokenizer)
    assert resolve_dequantize(recipe, examples, CPU) == (recipe, [])  # a CPU always does
    for free, unpacked in ((100 * GIB, True), (0.5 * GIB, False)):
        monkeypatch.setattr("sft.training.auto.memory_of", lambda device, processes, free=free: free)
        decided, lines = resolve_dequantize(recipe, examples, CUDA)
        assert decided.model.dequantize is unpacked
        assert dequantizes(decided.model, CUDA) is unpacked
        assert len(lines) == 1
        assert resolve_dequantize(decided, examples, CUDA) == (decided, [])
    assert is_quantized(decided.model.quantization)  # the hand-over still sees a quantized base


def test_what_can_not_be_counted_says_so_and_trains_as_before(monkeypatch, tiny, tmp_path):
    recipe = load_recipe(
        write_recipe(tmp_path / "r.yaml", tiny), ["tune={method: loha, r: 4, target_modules: [q_proj]}"]
    )
    with pytest.raises(NotCounted, match="DataDependent"):
        count_memory(recipe, small(), Load(64, 6), CPU, False)
    run("train", tmp_path / "r.yaml", "--set", "tune={method: loha, r: 4, target_modules: [q_proj]}")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").train.gradient_checkpointing is False
