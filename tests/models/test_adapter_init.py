"""A saved adapter is one of the base that everybody has, whatever its first values are."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sft.errors import RecipeError
from sft.models.load import load_base
from sft.models.tune import tune_model
from sft.recipe.schema import Model, Tune
from tests.helpers.builders import write_recipe
from tests.helpers.graft import run as graft
from tests.helpers.runs import recipe_of, signal_at

pytestmark = pytest.mark.heavy
IDS = torch.tensor([[5, 17, 300, 42, 7, 1000]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def served(base: Path, adapter: Path) -> torch.Tensor:
    """The logits of W + s B A, as vLLM and llama.cpp apply an adapter to the base."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config, values = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    assert config["init_lora_weights"] is True
    ranks = {}
    for name in [n for n in values if n.endswith("lora_A.weight")]:
        module = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        a, b = values[name], values[name.replace("lora_A", "lora_B")]
        ranks[name] = len(a)
        pattern = next((k for k in config["rank_pattern"] if k in name), None)
        rank = config["rank_pattern"].get(pattern, config["r"])
        alpha = config["alpha_pattern"].get(pattern, config["lora_alpha"])
        assert len(a) == rank
        module.weight.data += alpha / (rank**0.5 if config["use_rslora"] else rank) * b @ a
    return logits(model)


INITS = ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal", "mica"]


@pytest.mark.parametrize("init", INITS)
def test_adapter_of_any_first_values_fits_the_base_as_servers_apply_it(init, tiny, tmp_path):
    keys = f"r: 4, lora_alpha: 8, target_modules: all-linear, init_lora_weights: {init}"
    train = f"{{examples_per_step: 6, learning_rate: 1e-2, max_steps: 4, output_dir: '{tmp_path / 'run'}'}}"
    recipe = write_recipe(tmp_path / "r.yaml", tiny, tune=f"{{method: lora, {keys}}}", train=train)
    graft("train", recipe)
    adapter = tmp_path / "run" / "adapter"
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), adapter)
    assert float((logits(tuned) - served(tiny, adapter)).abs().max()) < 1e-4
    assert float((logits(tuned) - logits(AutoModelForCausalLM.from_pretrained(tiny))).abs().max()) > 1e-3
    graft("export", tmp_path / "run")
    graft("eval", tmp_path / "run")
    graft("verify", tmp_path / "run" / "export")


@pytest.mark.parametrize("extra", [{"use_rslora": True}, {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}, {"use_rslora": True, "rank_pattern": {"layers.1.mlp.up_proj": 6}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}}])  # fmt: skip
def test_plain_lora_of_pissa_keeps_ranks_and_scales(extra, tiny, tmp_path):
    """Trained by hand, without rounding: what the tuned model computed is what the saved file computes."""
    from sft.models.adapter_init import save_plain

    tune = {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": "pissa"}
    model = tune_model(load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu")), Tune(**tune, **extra), 0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    trained = logits(model)
    model.save_pretrained(tmp_path)
    save_plain(tmp_path, model)
    assert float((served(tiny, tmp_path) - trained).abs().max()) < 1e-3
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path)
    assert float((logits(loaded) - trained).abs().max()) < 1e-3


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_resumed_run_goes_on_with_the_same_first_values(init, tiny, tmp_path, monkeypatch):
    def recipe(name: str) -> Path:
        path = recipe_of(tmp_path / name, tiny, steps=6)
        path.write_text(path.read_text().replace('"r": 4', f'"r": 4, "init_lora_weights": "{init}"'))
        return path

    graft("train", recipe("whole"))
    with monkeypatch.context() as patch:
        signal_at(patch, 3, signal.SIGTERM)
        graft("train", recipe("cut"), code=143)
    graft("train", "--resume", tmp_path / "cut" / "run")
    whole, resumed = (
        load_file(tmp_path / n / "run" / "adapter" / "adapter_model.safetensors") for n in ("whole", "cut")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"init_lora_weights": "eva"}, "tune.init_lora_weights: eva"),
        ({"init_lora_weights": "corda"}, "tune.init_lora_weights: corda"),
        ({"init_lora_weights": "loftq", "loftq_config": {}}, "tune.init_lora_weights: loftq"),
        ({"init_lora_weights": "lora_ga"}, "tune.init_lora_weights: lora_ga"),
        ({"init_lora_weights": "pisa"}, "tune.init_lora_weights: pisa"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "use_dora"),
        ({"init_lora_weights": "olora", "layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"target_modules": ["lm_head", "q_proj"]}, "modules_to_save: [lm_head]"),
        ({"target_modules": ".*(q_proj|lm_head)"}, "modules_to_save: [lm_head]"),
    ],
)  # fmt: skip
def test_adapter_that_could_not_be_saved_or_trained_is_refused_before_training(keys, message, tiny):
    base = load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu"))
    tune = Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"} | keys)
    with pytest.raises(RecipeError) as refused:
        tune_model(base, tune, 0)
    assert message in str(refused.value)


def test_method_that_changes_the_base_is_refused(tiny, monkeypatch):
    """No adapter file holds what a method did to the base's own weights."""
    import peft

    original = peft.get_peft_model

    def changing(base, *args, **options):
        base.get_input_embeddings().weight.data = base.get_input_embeddings().weight.data + 1
        return original(base, *args, **options)

    monkeypatch.setattr(peft, "get_peft_model", changing)
    base = load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu"))
    with pytest.raises(RecipeError, match="changes the base's weights"):
        tune_model(base, Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"}), 0)


def test_token_without_a_row_of_the_embedding_is_named_before_training(tiny, tokenizer, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "base")
    tokenizer = type(tokenizer).from_pretrained(base)
    tokenizer.add_tokens(["zyntrix", "<unused>"], special_tokens=False)
    tokenizer.save_pretrained(base)
    recipe = write_recipe(tmp_path / "r.yaml", base)
    for verb in ("check", "train"):
        done = graft(verb, recipe, code=2)
        assert "zyntrix" in done.stderr
        assert "resize_token_embeddings" in done.stderr
    assert not (tmp_path / "run").exists()


def test_control_token_that_nothing_writes_needs_no_row(tiny, tmp_path):
    from transformers import AutoTokenizer

    from sft.models.load import load_tokenizer

    base = shutil.copytree(tiny, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    tokenizer.save_pretrained(base)
    assert len(load_tokenizer(Model(base=str(base)))) == len(tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("trains", [False, True])
def test_added_tokens_whose_rows_stay_random_are_named_with_a_remedy_that_works(trains, tied, tiny, tmp_path):
    """An answer of new tokens is learnt as tokens: after the remedy the rows move, and the merge equals the adapter."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens(["<loc_1>", "<loc_2>"])
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    ids = tokenizer.convert_tokens_to_ids(["<loc_1>", "<loc_2>"])
    rows = [{"prompt": f"Where is ferry {i}?", "completion": f"<loc_{i % 2 + 1}>"} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    remedy = f"trainable_token_indices: {ids}" if tied else "modules_to_save: [embed_tokens, lm_head]"
    keys = "method: lora, r: 4, target_modules: [q_proj]" + (f", {remedy}" if trains else "")
    recipe = write_recipe(
        tmp_path / "r.yaml", base, task="instruct", tune=f"{{{keys}}}", data=f"{{train: '{tmp_path / 'a.jsonl'}'}}",
        train=f"{{examples_per_step: 6, learning_rate: 1e-2, max_steps: 3, output_dir: '{tmp_path / 'run'}'}}",
        eval="{share: 0.3, max_new_tokens: 4}",
    )  # fmt: skip
    said = graft("train", recipe).stdout
    assert (remedy in said) == (not trains)
    if trains:
        graft("export", tmp_path / "run", "--allow-mismatch")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export", dtype=torch.float32)
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "run" / "adapter")
        assert float((logits(merged) - logits(tuned)).abs().max()) < 0.05  # export.dtype is bfloat16
        for name in ("get_input_embeddings", "get_output_embeddings"):
            moved = getattr(merged, name)().weight[ids].float() - getattr(model, name)().weight[ids]
            assert float(moved.abs().max()) > 1e-3
