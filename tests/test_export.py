"""Merges against PEFT's own in memory, and exports whose faults are planted."""

import json
import os
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig, Qwen2Config, set_seed
from typer.testing import CliRunner

import sft.export
from data.store import file_sha256, text_sha256
from sft import shards
from sft.cli import app
from sft.export import export
from sft.load import run_recipe
from sft.merge import read_merge, write_merge
from sft.model import bitsandbytes_config, load_base
from sft.parity import ParityError, Trace, compare
from sft.recipe import Model, Quantization
from sft.shards import INDEX, Tensor, read_header, writing
from sft.skeleton import CannotStream
from tests.conftest import save_tiny, write_recipe
from tests.families import build

CPU = torch.device("cpu")
SMALL = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TOKENS = torch.arange(12)[None]


def save_base(folder: Path, config, dtype=torch.bfloat16, **options) -> Path:
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    """A base in several files, with biases."""
    config = Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)
    return save_base(tmp_path_factory.mktemp("untied") / "base", config, max_shard_size="20KB")


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("tied") / "base", LlamaConfig(**SMALL, tie_word_embeddings=True))


def tune(base: Path, config, folder: Path, rows: int | None = None, **saving) -> PeftModel:
    """A model with an adapter that is saved as by training: all of its values are moved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on tied weights
        tuned = get_peft_model(model, config)
    set_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(folder, **saving)
    return tuned.eval()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=TOKENS).logits


def merge(base: Path, adapter: Path | None, out: Path, dtype=torch.float32):
    out.mkdir()
    return write_merge(read_merge(base, adapter, dtype), out)


ALL = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
ADAPTERS: dict[str, Callable] = {
    "lora": lambda: LoraConfig(**ALL),
    "rslora": lambda: LoraConfig(**ALL, use_rslora=True),
    "dora": lambda: LoraConfig(**ALL, use_dora=True),
    "bias": lambda: LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "embedding": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "modules_to_save": lambda: LoraConfig(**ALL, modules_to_save=["lm_head", "norm"]),
    "trainable_tokens": lambda: LoraConfig(**ALL, trainable_token_indices={"embed_tokens": [3, 7]}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_streamed_merge_equals_merge_in_memory(kind, untied, tmp_path):
    tuned = tune(untied, ADAPTERS[kind](), tmp_path / "adapter")
    told = merge(untied, tmp_path / "adapter", tmp_path / "out")
    assert told["adapted"] > 0
    assert not told["unchanged"]
    expected = tuned.merge_and_unload(safe_merge=True).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.float32
    assert merged.state_dict().keys() == expected.keys()
    for name, value in merged.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-6, atol=1e-7), name
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")].sort() == [
        p.name for p in untied.glob("*.safetensors")
    ].sort()


def test_bfloat16_is_the_float32_merge_rounded_once(untied, tmp_path, monkeypatch):
    """Also where a layer is merged in several slices of rows, the last one shorter."""
    monkeypatch.setattr("sft.merge.SLICE", 5 * 32)
    tuned = tune(untied, LoraConfig(**ALL), tmp_path / "adapter")
    merge(untied, tmp_path / "adapter", tmp_path / "out", torch.bfloat16)
    expected = tuned.merge_and_unload(safe_merge=True).to(torch.bfloat16).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    for name, value in merged.state_dict().items():
        assert (value == expected[name]).float().mean() > 0.999, name  # a last bit may fall the other way


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
def test_tied_embeddings_come_apart_where_the_adapter_makes_them_differ(config, stays_tied, tied, tmp_path):
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


def test_added_rows_that_nothing_holds_are_an_error(untied, tmp_path):
    """The head's new rows were drawn at random, and by this setting of PEFT saved nowhere."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM")
    tune(untied, config, tmp_path / "adapter", rows=108, save_embedding_layers=False)
    with pytest.raises(ParityError, match=r"lm_head.weight is stored as \(100, 32\) and was trained as \(108, 32\)"):
        merge(untied, tmp_path / "adapter", tmp_path / "out")


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
        found = {
            name: stored.read() for file in out.glob("*.safetensors") for name, stored in read_header(file).items()
        }
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name


def test_layers_untouched_by_the_adapter_are_copied_byte_for_byte(untied, tmp_path):
    tune(untied, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path / "adapter")
    told = merge(untied, tmp_path / "adapter", tmp_path / "out", torch.bfloat16)
    assert told["adapted"] == 4  # weight and bias of two layers
    index = json.loads((untied / INDEX).read_text())
    written = json.loads((tmp_path / "out" / INDEX).read_text())
    assert (written["weight_map"], written["metadata"]["total_size"]) == (
        index["weight_map"], index["metadata"]["total_size"]
    )  # fmt: skip
    for file in sorted(untied.glob("*.safetensors")):
        before, after = load_file(file), load_file(tmp_path / "out" / file.name)
        for name, value in before.items():
            assert torch.equal(value, after[name]) is ("q_proj.weight" not in name), name


def test_files_are_read_by_the_safetensors_library(tmp_path):
    """Also where an odd number of bytes stands before wider items."""
    values = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(5, 3),
        "c": torch.randn(2, 2).bfloat16(),
        "empty": torch.zeros(0, 4),
    }
    layout = {"model.safetensors": {n: Tensor(v.dtype, tuple(v.shape)) for n, v in values.items()}}
    with writing(tmp_path, layout) as shards:
        for name, value in values.items():
            shards[name].write(name, value)
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert value.dtype == values[name].dtype
        assert torch.equal(value, values[name])
    for name, stored in read_header(tmp_path / "model.safetensors").items():
        assert torch.equal(stored.read(), values[name]), name
        assert stored.start % stored.dtype.itemsize == 0


def test_copy_goes_on_where_the_kernel_cannot(untied, tmp_path, monkeypatch):
    def refused(*_arguments):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.copy_file_range", refused)
    merge(untied, None, tmp_path / "out", torch.bfloat16)
    for file in untied.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "out" / file.name)
        assert all(torch.equal(value, after[name]) for name, value in before.items())


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


def test_two_weights_are_all_that_is_in_memory(untied, tmp_path, monkeypatch):
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


def command(*arguments: object, code: int = 0):
    done = CliRunner().invoke(app, ["export", *(str(a) for a in arguments)])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def make_run(folder: Path, base: Path, seed: int = 1, quantized: bool = True) -> Path:
    """A run folder as training leaves it, with an adapter that nobody trained."""
    folder.mkdir()
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n} and no more."} for n in ("blue", "the sea", "7")]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nf4 = ", quantization: {load_in_4bit: true}" if quantized else ""
    write_recipe(
        folder / "recipe.yaml",
        base,
        task="instruct",
        model=f"{{base: '{base}', dtype: float32{nf4}}}",
        eval=f"{{data: '{folder / 'held_out.jsonl'}'}}",
        export="{min_agreement: 0.9}",
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**ALL))
    set_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    tuned.save_pretrained(folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder / "adapter")
    facts = {
        "base": {"sha256": {f.name: file_sha256(f) for f in sorted(base.glob("*.safetensors"))}},
        "data_sha256": {"rows.jsonl": "0" * 64},
        "chat_template_sha256": text_sha256(tokenizer.chat_template),
    }
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tokenizer = build("chatml")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_tiny(config, folder / "base", tokenizer)
    (folder / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    return make_run(folder / "run", folder / "base")


@pytest.fixture(scope="module")
def plain(run) -> Path:
    """The same on the base as it is."""
    return make_run(run.parent / "plain", run.parent / "base", quantized=False)


@pytest.fixture(scope="module")
def record(run) -> dict:
    """Of the run's export, in its folder."""
    command(run)
    return json.loads((run / "export" / "parity.json").read_text())


def test_both_bases_are_measured_and_the_nearer_one_is_written(run, record):
    tried = record["candidates"]
    assert set(tried) == {"dequantized, as trained", "original"}
    assert tried["dequantized, as trained"]["mean_kl_nats"] < tried["original"]["mean_kl_nats"]
    assert record["base"] == "dequantized, as trained"
    assert record["reason"].startswith("dequantized, as trained is written, because its answers diverge least")
    assert record["merge"]["streamed"]
    assert record["merge"]["adapted"] == 14
    assert 0 < record["mean_kl_nats"] < record["max_kl_nats"] < 0.01
    merged = load_file(run / "export" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    base = load_file(run.parent / "base" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert len((merged - base.bfloat16()).unique()) > 16  # NF4's rounding and the adapter


def test_original_base_is_written_where_it_is_nearer(run, tmp_path, monkeypatch):
    divergences = iter([0.2, 0.1])
    monkeypatch.setattr("sft.export.compare", lambda *t: compare(*t) | {"mean_kl_nats": next(divergences)})
    command(run, "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert told["base"] == "original"
    assert not list(tmp_path.glob(".*"))


def test_equal_models_do_not_diverge_and_others_do():
    same = Trace(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    other = Trace(torch.tensor([[0.0, 2.0], [0.0, 1.0]]), torch.tensor([0, 1]), torch.tensor([1, 1]))
    equal, differ = compare([same], [same]), compare([same, same], [same, other])
    assert (equal["mean_kl_nats"], equal["max_logit_difference"], equal["answer_argmax_agreement"]) == (0, 0, 1)
    p = torch.tensor([2.0, 0.0]).softmax(0)
    kl = (p * (p.log() - p.flip(0).log())).sum().item()
    assert differ["max_kl_nats"] == pytest.approx(kl, abs=1e-6)
    assert differ["mean_kl_nats"] == pytest.approx(kl / 4, abs=1e-6)
    assert differ["teacher_forced_exact"] == {"adapter": 1.0, "merged": 0.5}
    assert differ["answer_argmax_agreement"] == 0.75


def test_card_names_base_licence_data_and_proof(run, record):
    card = (run / "export" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["base_model"]) == ("apache-2.0", str(run.parent / "base"))
    for text in ("0" * 64, f"{record['answer_tokens']} answer tokens", "load_in_4bit: true"):
        assert text in card, text


def test_finished_export_is_proven_anew(run, record):
    before = {p: p.stat().st_mtime_ns for p in (run / "export").rglob("*")}
    done = command(run, "--check")
    assert "weights, template, stops and answers are those of" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in (run / "export").rglob("*")} == before


def edit_weights(folder: Path, change: Callable) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def dequantized(run: Path) -> dict[str, torch.Tensor]:
    """What the export was merged into."""
    return {n: v.bfloat16() for n, v in load_base(run_recipe(run).model, CPU).state_dict().items()}


def twice(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    base = dequantized(run)
    for name, value in tensors.items():
        value += (value.float() - base[name].float()).bfloat16()


LAYER = "model.layers.1.mlp.down_proj.weight"
FAULTS: dict[str, tuple[Callable, str]] = {
    "one layer's adapter dropped": (
        lambda run, out: edit_weights(out, lambda t: t.update({LAYER: dequantized(run)[LAYER]})),
        f"{LAYER} equals the base's: its adapter was dropped",
    ),
    "equals the base": (
        lambda run, out: edit_weights(out, lambda t: t.update({n: dequantized(run)[n] for n in t})),
        "the merged model equals its base",
    ),
    "merged twice": (
        lambda run, out: edit_weights(out, lambda t: twice(run, t)),
        "q_proj.weight holds the adapter twice",
    ),
    "another weight": (
        lambda run, out: edit_weights(out, lambda t: t["model.norm.weight"].add_(0.1)),
        "model.norm.weight is not the merged weight",
    ),
    "weight missing": (
        lambda run, out: edit_weights(out, lambda t: t.pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
    "template changed": (
        lambda run, out: (out / "chat_template.jinja").write_text("{{ messages[0]['content'] }}"),
        "the chat template has changed",
    ),
    "EOS of the server changed": (
        lambda run, out: edit_json(out / "generation_config.json", eos_token_id=0),
        "generation_config.json stops at EOS [0], training taught to stop at",
    ),
    "EOS of the tokenizer changed": (
        lambda run, out: edit_json(out / "tokenizer_config.json", eos_token="<|endoftext|>"),
        "the tokenizer's eos_token is <|endoftext|>, the run's is <|im_end|>",
    ),
    "configuration changed": (
        lambda run, out: edit_json(out / "config.json", rms_norm_eps=0.5),
        "config.json: rms_norm_eps is 0.5",
    ),
    "adapter of another training": (
        lambda run, out: edit_json(out / "parity.json", adapter_sha256="0"),
        "is not the adapter that was merged",
    ),
    "no finished export": (lambda run, out: (out / "parity.json").unlink(), "holds no parity.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault, run, record, tmp_path):
    plant, message = FAULTS[fault]
    out = tmp_path / "export"
    shutil.copytree(run / "export", out)
    plant(run, out)
    assert message in " ".join(command(run, "--check", "--out", out, code=2).stderr.split())


def test_adapter_is_merged_into_no_other_base(run, record, tmp_path):
    """Neither weights that changed, nor a base that already contains it, nor what its own configuration denies."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    recipe, base = (copy / "recipe.yaml").read_text(), str(run.parent / "base")
    (copy / "recipe.yaml").write_text(recipe.replace(base, str(run / "export")))
    edit_json(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(run / "export"))
    assert "already contains this adapter, which would be merged twice" in command(copy, code=2).stderr
    (copy / "recipe.yaml").write_text(recipe.replace(base, str(tmp_path / "base")))
    edit_json(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    shutil.copytree(run.parent / "base", tmp_path / "base")
    edit_weights(tmp_path / "base", lambda t: t["model.norm.weight"].add_(0.1))
    for arguments in ((), ("--check", "--out", run / "export")):
        assert "it is another base" in command(copy, *arguments, code=2).stderr
    (copy / "recipe.yaml").write_text(recipe)
    assert "an adapter on another base answers at random" in command(copy, code=2).stderr
    assert not (copy / "export").exists()


def test_layer_that_the_adapter_leaves_as_it_was_needs_leave(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    file = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].zero_()
    save_file(tensors, file)
    assert f"1 of 14 adapted weights equal their base's in bfloat16, first {LAYER}" in command(copy, code=2).stderr
    command(copy, "--allow-mismatch")
    assert json.loads((copy / "export" / "parity.json").read_text())["merge"]["unchanged"] == [LAYER]


def test_model_larger_than_memory_is_merged_unmeasured(run, tmp_path, monkeypatch):
    for name in ("load_run", "load_plain"):
        monkeypatch.setattr(f"sft.export.{name}", lambda *_: pytest.fail("a model was loaded"))
    command(run, "--no-parity", "--out", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert (told["measured"], told["base"]) == (False, "dequantized, as trained")
    assert told["reason"].endswith("not measured")
    assert "was **not** measured" in (tmp_path / "out" / "README.md").read_text()


def kill_at(patch: Callable, run: Path, out: Path) -> None:
    """An export in a process of its own that dies, as by kill -9, where `patch` says."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            torch.set_num_threads(1)  # threads of the parent are not there
            patch()
            export(run, out, measure=False)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die_after(calls: int, owner, name: str) -> Callable:
    def patch():
        whole, left = getattr(owner, name), iter(range(calls))

        def dying(*arguments):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*arguments)

        setattr(owner, name, dying)

    return patch


def test_killed_export_leaves_nothing_that_looks_finished(plain, tmp_path):
    out = tmp_path / "out"
    for patch in (die_after(5, shards.Shard, "write"), die_after(2, sft.export, "_sync")):
        kill_at(patch, plain, out)
        assert not out.exists()
    out.mkdir()
    kill_at(die_after(1, Path, "rename"), plain, out)  # in an empty folder that is there, files come one by one
    assert not (out / "config.json").exists()
    shutil.rmtree(out)
    command(plain, "--out", out, "--no-parity")
    assert (out / "config.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_runs_are_combined_and_compared_with_each(plain, tmp_path):
    other = make_run(tmp_path / "other", plain.parent / "base", seed=2, quantized=False)
    command(plain, "--out", tmp_path / "alone", "--no-parity")
    command(plain, "--with", other, "--weights", "1,0", "--out", tmp_path / "first", "--no-parity")
    alone, first = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "first"))
    assert all((value == first[name]).float().mean() > 0.99 for name, value in alone.items())
    command(plain, "--with", other, "--combine", "ties", "--density", "0.5", "--out", tmp_path / "both")
    told = json.loads((tmp_path / "both" / "parity.json").read_text())
    assert told["combination"] == {
        "runs": ["plain", "other"], "method": "ties", "weights": [0.5, 0.5], "density": 0.5
    }  # fmt: skip
    assert told["answer_argmax_agreement"] > 0.9  # with the combined adapter
    assert all(told["against"][name]["mean_kl_nats"] > 10 * told["mean_kl_nats"] for name in ("plain", "other"))
    command(plain, "--check", "--out", tmp_path / "both")


@pytest.mark.parametrize("kind", ["dora", "rslora", "bias", "trainable_tokens", "ia3"])
def test_adapters_that_peft_would_combine_wrongly_are_refused(kind, plain, tmp_path):
    base = plain.parent / "base"
    other = make_run(tmp_path / "other", base, quantized=False)
    tune(base, ADAPTERS[kind](), other / "adapter")
    done = command(plain, "--with", other, "--weights", "1,0", "--out", tmp_path / "out", code=2)
    assert re.search("can't be combined|not IA3", " ".join(done.stderr.split())), done.stderr
    assert not (tmp_path / "out").exists()


def test_second_export_to_a_folder_is_refused_while_the_first_writes(plain, tmp_path):
    out = tmp_path / "out"
    with sft.export._aside(out) as aside:
        (aside / "half").touch()
        done = command(plain, "--out", out, "--no-parity", code=5)
        assert "another export writes there" in done.stderr
        assert (aside / "half").exists()
    command(plain, "--out", out, "--no-parity")


def test_base_that_names_a_temperature_without_sampling_is_exported(plain, tmp_path):
    """transformers reads such a generation_config.json, as older bases have it, and refuses to write it."""
    base = shutil.copytree(plain.parent / "base", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    run = make_run(tmp_path / "run", base, quantized=False)
    command(run, "--out", tmp_path / "out", "--no-parity")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "1"), "--weights holds 1 numbers for 2 runs"),
        (("--weights", "a,b"), "write numbers with commas between"),
        (("--combine", "mean"), "--combine mean is none of linear, cat"),
        (("--combine", "ties"), "needs --density"),
        (("--density", "0.5"), "leave --density out"),
    ],
)
def test_combination_that_makes_no_sense_is_named(options, message, run, tmp_path):
    done = command(run, "--with", run, *options, "--out", tmp_path / "out", code=2)
    assert message in " ".join(done.stderr.split())


def test_base_whose_experts_are_fused_is_merged_in_memory_and_says_so(tmp_path):
    tokenizer = build("chatml")
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    folder = make_run(tmp_path / "run", save_tiny(config, tmp_path / "base", tokenizer), quantized=False)
    done = command(folder)
    assert "merged in memory, not streamed: transformers loads" in done.stdout
    told = json.loads((folder / "export" / "parity.json").read_text())
    assert told["merge"]["streamed"] is False
    assert told["merge"]["adapted"] == 14  # of two layers: q, k, v, o, the gate and both of the experts
    assert told["answer_argmax_agreement"] > 0.9
    done = command(folder, "--check")
    assert "weights are not compared one by one" in done.stdout
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    assert "equals its base" in command(folder, "--out", tmp_path / "o", code=2).stderr


def test_push_is_dry_unless_told(run, record, monkeypatch):
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: sent.append((a, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: sent.append(k) or "address")
    told = command(run, "--check", "--push", "someone/model").stdout
    assert "licence of the base: apache-2.0" in told
    assert "nothing was sent" in told
    assert not sent
    told = command(run, "--check", "--push", "someone/model", "--no-dry-run").stdout
    assert "sent: address" in told
    assert sent[0] == (("someone/model",), {"private": True, "exist_ok": True})
    assert sent[1]["folder_path"] == run / "export"
    assert "write OWNER/NAME" in command(run, "--check", "--push", "model", code=2).stderr


def test_run_with_added_tokens_is_exported_and_proven(plain, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(plain, copy, ignore=shutil.ignore_patterns("export"))
    base = plain.parent / "base"
    rows = json.loads((base / "config.json").read_text())["vocab_size"] + 8
    tune(base, LoraConfig(**ALL, modules_to_save=["embed_tokens", "lm_head"]), copy / "adapter", rows=rows)
    command(copy)
    assert json.loads((copy / "export" / "config.json").read_text())["vocab_size"] == rows
    command(copy, "--check")
