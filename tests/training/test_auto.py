"""The values of `auto`: decided by measurement, printed, and written to the run's recipe."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from data.encode.chat import Example, encode
from data.encode.pack import Layout, make_packs
from sft.errors import RecipeError
from sft.kernels.fused_lora import fuse_lora
from sft.models.capabilities import takes_packs
from sft.models.tune import tune_model
from sft.recipe.load import load_recipe
from sft.recipe.schema import Model, Tune, changed
from sft.training.attention import choose_attention
from sft.training.auto import apply_auto, expected_plan, resolve_auto, resolve_compile, resolve_dtype
from sft.training.compile_layers import compile_pays, decoder_layers, missing_compiler, training_seconds
from sft.training.plan import plan_steps
from sft.training.step import pack_loss
from tests.helpers.builders import save_tiny, stored, write_recipe
from tests.helpers.graft import run

pytestmark = pytest.mark.heavy

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def lora(**keys) -> Tune:
    return Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"} | keys)


def tuned(folder, tune: Tune | None = None, dtype=torch.float32):
    return tune_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), tune or lora(), seed=0)


@pytest.fixture
def squad(questions, tokenizer, tmp_path):
    rows = [encode(q, tokenizer, 1024) for q in questions[:36]]
    return stored(tmp_path / "s", [Example(r.ids, r.loss_mask, f"{i // 6:016x}") for i, r in enumerate(rows)])


@pytest.fixture
def unrelated(tmp_path):
    """Rows that share only a short system prompt, like instructions."""
    rng = random.Random(0)
    ids = [[*range(20, 40), *(rng.randrange(100, 9000) for _ in range(150))] for _ in range(40)]
    return stored(tmp_path / "u", [Example(i, [0] * 160 + [1] * 10, f"{n:016x}") for n, i in enumerate(ids)])


def test_prefixes_are_shared_if_that_pays_and_the_ratio_is_printed(tiny, squad, unrelated, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny))
    resolved, layout, lines = resolve_auto(recipe, tuned(tiny), squad, True)
    assert resolved.data.share_prefixes is layout.share_prefixes is True
    assert "flat tokens per" in lines[0]
    assert lines[0].endswith("on")
    _, layout, _ = resolve_auto(recipe, tuned(tiny), unrelated, True)
    assert layout.share_prefixes is True  # attention by pieces costs the same with it
    dense = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["train.attn_implementation=sdpa"])
    resolved, layout, lines = resolve_auto(dense, tuned(tiny), unrelated, True)
    assert resolved.data.share_prefixes is layout.share_prefixes is False
    assert lines[0].endswith("off")


def test_a_base_that_takes_no_mask_trains_unshared_and_says_so(tokenizer, squad, tmp_path):
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=8, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    windows = save_tiny(config, tmp_path / "windows", tokenizer)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", windows))
    resolved, layout, lines = resolve_auto(recipe, tuned(windows), squad, takes_packs(tuned(windows)))
    assert resolved.data.share_prefixes is False
    assert layout.attention == "padded"
    assert "prefixes are not" in lines[0]
    asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"share_prefixes": True})})
    with pytest.raises(RecipeError, match="auto or false"):
        resolve_auto(asked, tuned(windows), squad, False)


def test_virtual_tokens_leave_no_place_for_packs(tiny, squad, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny))
    tune = Tune.model_validate({"method": "prompt_tuning", "num_virtual_tokens": 4})
    _, layout, _ = resolve_auto(recipe, tuned(tiny, tune), squad, True)
    assert layout.attention == "padded"


def test_attention_follows_device_and_architecture(tiny):
    model = tuned(tiny)
    assert choose_attention(model, CPU) == "forest"
    assert choose_attention(model, GPU) == "flex_attention"
    assert choose_attention(model, GPU, half=True) == "forest"
    model.set_attn_implementation("eager")  # an architecture whose own attention is not SDPA, which forest replaces
    assert choose_attention(model, CPU) == "sdpa"
    assert choose_attention(model, GPU, half=True) == "flex_attention"
    wide = tuned(tiny)
    wide.config.head_dim = 320  # FlashAttention takes 256
    assert choose_attention(wide, GPU, half=True) == "flex_attention"
    wide.config.attention_dropout = 0.1
    assert choose_attention(wide, GPU, half=True) == "sdpa"


@pytest.mark.parametrize(("gib", "tokens"), [(80, 8192), (0.2, 4096), (1e-3, 4096)])
def test_packs_of_a_gpu_are_the_largest_that_fit(tiny, squad, tmp_path, monkeypatch, gib, tokens):
    """If none fits, gradient checkpointing follows, and packs are of the usual size."""
    monkeypatch.setattr("sft.training.memory.LIBRARIES", 0)
    monkeypatch.setattr("sft.training.auto.memory_of", lambda *_: gib * 2**30)
    recipe = changed(load_recipe(write_recipe(tmp_path / "r.yaml", tiny)), train={"examples_per_step": 256})
    recipe = changed(recipe, data={"pack_tokens": "auto"})
    plan = expected_plan(recipe, tuned(tiny), squad, GPU)
    assert plan.layout.pack_tokens == tokens
    assert expected_plan(changed(recipe, data={"pack_tokens": 512}), tuned(tiny), squad, GPU).layout.pack_tokens == 512
    assert expected_plan(recipe, tuned(tiny), squad, CPU).layout.pack_tokens == 1024


def test_flex_attention_on_a_cpu_is_a_mistake_with_a_remedy(tiny, squad, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["train.attn_implementation=flex_attention"])
    with pytest.raises(RecipeError, match="train.attn_implementation flex_attention: .* CPU; use auto"):
        resolve_auto(recipe, tuned(tiny), squad, True)
    resolved, _, lines = resolve_auto(recipe, tuned(tiny), squad, True, resumed=True)  # a run that began on a GPU
    assert resolved.train.attn_implementation == "forest"
    assert "flex_attention" in lines[0]


def test_decisions_are_in_the_recipe_of_the_run(tiny, tmp_path):
    recipe = write_recipe(tmp_path / "r.yaml", tiny)
    run("train", recipe)
    decided = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (decided.data.share_prefixes, decided.train.attn_implementation) == (True, "forest")
    assert decided.train.compile_layers is False
    assert decided.model.dtype == "float32"


@pytest.mark.parametrize(
    ("tune", "dtype"),
    [
        ("{method: lora, target_modules: all-linear}", "bfloat16"),
        ("{method: full}", "float32"),
        ("{method: lora, target_modules: all-linear, modules_to_save: [lm_head]}", "float32"),
        ("{method: ln_tuning}", "float32"),
    ],
)
def test_bfloat16_on_a_cpu_is_for_lora(tiny, tmp_path, tune, dtype, monkeypatch):
    monkeypatch.setattr("sft.models.load.bfloat16_pays", lambda: True)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny, model=f"{{base: '{tiny}'}}", tune=tune))
    assert resolve_dtype(recipe, CPU).model.dtype == dtype
    if dtype == "float32":
        with pytest.raises(RecipeError, match="use auto"):
            resolve_dtype(recipe.model_copy(update={"model": Model(base=str(tiny), dtype="bfloat16")}), CPU)


@pytest.mark.slow
def test_bfloat16_trains_from_end_to_end_as_float32_does_up_to_rounding(tiny, tmp_path):
    curves = []
    for dtype in ("float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        recipe = write_recipe(tmp_path / dtype / "r.yaml", tiny, model=f"{{base: '{tiny}', dtype: {dtype}}}")
        run("train", recipe)
        rows = (tmp_path / dtype / "run" / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(row)["loss"] for row in rows])
    assert len(curves[0]) == 4
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], abs=0.01)
    run("eval", tmp_path / "bfloat16" / "run")


def test_kernels_without_a_gpu_are_a_mistake_with_a_remedy(tiny, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["model.use_kernels=true"])
    with pytest.raises(RecipeError, match="pip install kernels"):
        resolve_dtype(recipe, CPU)


def test_dtype_auto_becomes_the_name_of_a_dtype(tiny, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny, model=f"{{base: '{tiny}'}}"))
    assert resolve_dtype(recipe, CPU).model.dtype in ("float32", "bfloat16")


@pytest.mark.parametrize(
    ("seconds", "dtype", "pays"),
    [(20, torch.bfloat16, False), (100_000, torch.bfloat16, True), (100_000, torch.float32, False)],
)
def test_layers_are_compiled_if_the_dtype_gains_and_the_run_is_long_enough(seconds, dtype, pays):
    decided, why = compile_pays(seconds, CPU, dtype)
    assert decided is pays
    assert "s of " in why


def test_without_a_compiler_training_goes_on_uncompiled_and_says_so(monkeypatch, tiny, squad, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    decided, why = compile_pays(100_000, CPU, torch.bfloat16, missing_compiler())
    assert not decided
    assert "no-such-compiler" in why
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["train.compile_layers=true"])
    with pytest.raises(RecipeError, match="no-such-compiler"):
        resolve_compile(recipe, tuned(tiny), plan_steps(squad, recipe.train, Layout()))


def test_time_is_estimated_from_a_part_of_the_steps(tiny, squad, tmp_path, monkeypatch):
    monkeypatch.setattr("sft.training.compile_layers.matmul_flops_per_s", lambda device, dtype: 1e9)
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["train.num_train_epochs=40"])
    plan = plan_steps(squad, recipe.train, Layout())
    every = training_seconds(tuned(tiny), plan, False, CPU, torch.float32)
    monkeypatch.setattr("sft.training.compile_layers.SAMPLED", 12)
    assert training_seconds(tuned(tiny), plan, False, CPU, torch.float32) == pytest.approx(every, rel=0.1)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_lora_layers_that_are_not_plain_keep_pefts_forward(tiny, change):
    assert fuse_lora(tuned(tiny, lora(**change))) == 0


def test_a_disabled_adapter_is_off_in_fused_layers_too(tiny, squad):
    model = tuned(tiny)
    ids = torch.tensor([squad[0].ids])
    before = model(ids).logits
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert fuse_lora(model) == 14
    assert not torch.allclose(before, model(ids).logits, atol=1e-3)
    with model.disable_adapter():
        assert torch.allclose(before, model(ids).logits, atol=1e-5)


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss_and_gradients(tiny, squad, tmp_path):
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["train.attn_implementation=eager"])
    packs = make_packs(squad[:12])
    results = []
    for compiled in (False, True):
        train = recipe.train.model_copy(update={"compile_layers": compiled})
        model = tuned(tiny)
        apply_auto(recipe.model_copy(update={"train": train}), model)
        loss = sum(pack_loss(model, pack, CPU) for pack in packs)
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert len(results[0][1]) == 14
    for name, gradient in results[0][1].items():
        assert (gradient - results[1][1][name]).norm() <= 1e-4 * gradient.norm(), name


def test_every_decoder_layer_is_found(tiny):
    assert len(decoder_layers(tuned(tiny))) == 2


def test_compiled_kernels_are_kept_where_only_this_user_may_open_them(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    recipe = load_recipe(write_recipe(tmp_path / "r.yaml", tiny), ["train.attn_implementation=sdpa"])
    apply_auto(changed(recipe, train={"compile_layers": False}), tuned(tiny))
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    apply_auto(changed(recipe, train={"compile_layers": True}), tuned(tiny))
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder.is_relative_to(tmp_path / "cache")
    assert folder.stat().st_mode & 0o777 == 0o700
