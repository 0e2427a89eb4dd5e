"""Exports of runs, and exports with planted faults."""

import json
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, PreTrainedConfig

import sft.export.pipeline
from data.conversation import Conversation
from data.encode.chat import Example
from eval.prediction import Prediction
from sft.errors import ParityError
from sft.export.parity import ExampleTrace, HeldOut, ModelTrace, check_agreement, compare
from sft.export.pipeline import export
from sft.models.load import load_base
from sft.models.target import run_recipe
from sft.recipe.schema import Eval
from tests.helpers.builders import save_tiny
from tests.helpers.exports import ALL, chatml_base, command, make_run, tune
from tests.helpers.families import build

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return make_run(folder / "run", chatml_base(folder / "base"))


@pytest.fixture(scope="module")
def plain(run) -> Path:
    """The same on the unquantized base."""
    return make_run(run.parent / "plain", run.parent / "base", quantized=False)


@pytest.fixture(scope="module")
def record(run) -> dict:
    """The parity record of the run's export, in the run folder."""
    command(run)
    return json.loads((run / "export" / "parity.json").read_text())


def test_both_bases_are_measured_and_the_nearer_one_is_written(run, record):
    tried = record["candidates"]
    assert set(tried) == {"dequantized, as trained", "original"}
    assert tried["dequantized, as trained"]["mean_kl_nats"] < tried["original"]["mean_kl_nats"]
    assert record["base"] == "dequantized, as trained"
    assert re.match("dequantized, as trained .* diverge least", record["reason"])
    assert record["merge"]["streamed"]
    assert record["merge"]["adapted"] == 14
    assert 0 < record["mean_kl_nats"] < record["max_kl_nats"] < 0.01
    merged = load_file(run / "export" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    base = load_file(run.parent / "base" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert len((merged - base.bfloat16()).unique()) > 16  # NF4's rounding and the adapter


def test_original_base_is_written_if_it_is_nearer(run, tmp_path, monkeypatch):
    divergences = iter([0.2, 0.1])
    monkeypatch.setattr("sft.export.parity.compare", lambda *t: compare(*t) | {"mean_kl_nats": next(divergences)})
    command(run, "--out", tmp_path / "out")
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["base"] == "original"
    assert not list(tmp_path.glob(".*"))


def test_equal_models_do_not_diverge_and_others_do():
    same = ExampleTrace(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    other = ExampleTrace(torch.tensor([[0.0, 2.0], [0.0, 1.0]]), torch.tensor([1, 1]), torch.tensor([1, 1]))
    conversations = [
        Conversation(({"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}), str(i), "", ("a",))
        for i in range(2)
    ]
    held_out = HeldOut("squad_v1", conversations, [], 0, Eval())
    right, half = [Prediction("a", 1, True)] * 2, [Prediction("a", 1, True), Prediction("b", 1, True)]
    equal = compare(ModelTrace([same], right), ModelTrace([same], right), held_out)
    differ = compare(ModelTrace([same, same], right), ModelTrace([same, other], half), held_out)
    assert (equal["mean_kl_nats"], equal["max_logit_difference"], equal["answer_argmax_agreement"]) == (0, 0, 1)
    p = torch.tensor([2.0, 0.0]).softmax(0)
    kl = (p * (p.log() - p.flip(0).log())).sum().item()
    assert differ["max_kl_nats"] == pytest.approx(kl, abs=1e-6)
    assert differ["mean_kl_nats"] == pytest.approx(kl / 4, abs=1e-6)
    assert differ["answer_argmax_agreement"] == 0.75
    assert [differ["task_score"][side]["exact"] for side in ("adapter", "merged")] == [100.0, 50.0]
    assert (equal["same_answers"], differ["same_answers"]) == (2, 1)


@pytest.mark.parametrize(
    ("agreeing", "tokens", "margins", "allowed"),
    [
        (84, 85, [0.1], True),
        (84, 85, [1.0], False),  # the other token was far from likely
        (84, 85, [None], False),  # not known
        (80, 85, [0.1] * 5, False),  # too many, even of so few
        (9800, 10000, [0.1] * 20, False),
        (8, 10, [0.1] * 2, False),
        (842, 850, [0.1] * 8, True),
        (99, 100, [9.0], True),  # as many as are demanded
    ],
)
def test_few_tokens_are_judged_by_an_interval_and_by_the_margin_of_those_that_differ(
    agreeing, tokens, margins, allowed, capsys
):
    flips = [
        {"where": f"rows.jsonl:{i}", "answer_token": 3, "ids": [1, 2], "margin_nats": m} for i, m in enumerate(margins)
    ]
    measured = {"answer_argmax_agreement": round(agreeing / tokens, 5), "answer_tokens": tokens, "flips": flips}
    recipe = SimpleNamespace(export=SimpleNamespace(min_agreement=0.99, min_format_agreement=0.95))
    if not allowed:
        with pytest.raises(ParityError, match="export.min_agreement 99.00%.*rows.jsonl:0, answer token 3"):
            check_agreement(measured, recipe)
    else:
        check_agreement(measured, recipe)
        assert ("rows.jsonl:0, answer token 3" in capsys.readouterr().out) is (agreeing < 99 * tokens / 100)


def test_record_names_the_answer_token_that_differs_and_its_margin():
    before = ExampleTrace(torch.tensor([[2.0, 0.0], [0.5, 0.3]]), torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]))
    after = ExampleTrace(torch.tensor([[2.0, 0.0], [0.3, 0.5]]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0]))
    conversations = [Conversation(({"role": "assistant", "content": "a"},), "0", "", ("a",))]
    held_out = HeldOut("squad_v1", conversations, [Example([1], [1], "", "/home/me/rows.jsonl:7")], 0, Eval())
    answers = [Prediction("a", 1, True)]
    flips = compare(ModelTrace([before], answers), ModelTrace([after], answers), held_out)["flips"]
    assert [(f["where"], f["answer_token"], f["margin_nats"]) for f in flips] == [
        ("rows.jsonl:7", 2, None), ("rows.jsonl:7", 1, 0.2)
    ]  # fmt: skip


def test_card_names_base_licence_data_and_parity(run, record):
    card = (run / "export" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["base_model"]) == ("apache-2.0", str(run.parent / "base"))
    for text in ("0" * 64, f"{record['answer_tokens']} answer tokens", "load_in_4bit: true"):
        assert text in card, text


def test_finished_export_is_verified_again(run, record):
    before = {p: p.stat().st_mtime_ns for p in (run / "export").rglob("*")}
    assert "run run" in command(run / "export", name="verify").stdout
    assert json.loads(command(run / "export", "--json", name="verify").stdout)["faults"] == 0
    assert {p: p.stat().st_mtime_ns for p in (run / "export").rglob("*")} == before


def edit_weights(folder: Path, change: Callable) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def dequantized(run: Path) -> dict[str, torch.Tensor]:
    """The weights that the export was merged into."""
    return {n: v.bfloat16() for n, v in load_base(run_recipe(run).model, torch.device("cpu")).state_dict().items()}


def twice(run: Path, tensors: dict[str, torch.Tensor]) -> None:
    base = dequantized(run)
    for name, value in tensors.items():
        value += (value.float() - base[name].float()).bfloat16()


LAYER = "model.layers.1.mlp.down_proj.weight"
FAULTS: dict[str, tuple[Callable, str]] = {
    "one layer's adapter dropped": (
        lambda run, out: edit_weights(out, lambda t: t.update({LAYER: dequantized(run)[LAYER]})),
        f"{LAYER} equals the base's",
    ),
    "equals the base": (
        lambda run, out: edit_weights(out, lambda t: t.update({n: dequantized(run)[n] for n in t})),
        "model equals its base",
    ),
    "merged twice": (
        lambda run, out: edit_weights(out, lambda t: twice(run, t)),
        "q_proj.weight holds the adapter",
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
        "chat template has changed",
    ),
    "EOS of the server changed": (
        lambda run, out: edit_json(out / "generation_config.json", eos_token_id=0),
        "generation_config.json stops at EOS [0]",
    ),
    "EOS of the tokenizer changed": (
        lambda run, out: edit_json(out / "tokenizer_config.json", eos_token="<|endoftext|>"),
        "the tokenizer's eos_token is <|endoftext|>, the run's is <|im_end|>",
    ),
    "text split differently": (
        lambda run, out: edit_json(out / "tokenizer.json", pre_tokenizer={"type": "Digits", "individual_digits": True}),
        "tokenizer splits text",
    ),
    "configuration changed": (
        lambda run, out: edit_json(out / "config.json", rms_norm_eps=0.5),
        "config.json: rms_norm_eps is 0.5",
    ),
    "adapter of another training": (
        lambda run, out: edit_json(out / "parity.json", adapter_sha256="0"),
        "is not the adapter",
    ),
    "no finished export": (lambda run, out: (out / "parity.json").unlink(), "holds no parity.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault, run, record, tmp_path):
    plant, message = FAULTS[fault]
    out = tmp_path / "export"
    shutil.copytree(run / "export", out)
    plant(run, out)
    assert message in " ".join(command(out, "--run", run, code=2, name="verify").stderr.split())


def test_adapter_is_merged_into_no_other_base(run, record, tmp_path):
    """Neither weights that changed, nor a base that already contains it, nor what its own configuration denies."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    recipe, base = (copy / "recipe.yaml").read_text(), str(run.parent / "base")
    (copy / "recipe.yaml").write_text(recipe.replace(base, str(run / "export")))
    edit_json(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(run / "export"))
    assert "contains this adapter" in command(copy, code=2).stderr
    (copy / "recipe.yaml").write_text(recipe.replace(base, str(tmp_path / "base")))
    edit_json(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    shutil.copytree(run.parent / "base", tmp_path / "base")
    edit_weights(tmp_path / "base", lambda t: t["model.norm.weight"].add_(0.1))
    for done in (command(copy, code=2), command(run / "export", "--run", copy, code=2, name="verify")):
        assert "is another base" in done.stderr
    (copy / "recipe.yaml").write_text(recipe)
    assert "adapter_config.json names base" in command(copy, code=2).stderr
    assert not (copy / "export").exists()


def test_layer_that_the_adapter_leaves_unchanged_needs_allow_mismatch(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    file = copy / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].zero_()
    save_file(tensors, file)
    assert re.search(f"1 of 14 adapted weights .* bfloat16, first {LAYER}", command(copy, code=2).stderr)
    command(copy, "--allow-mismatch")
    assert json.loads((copy / "export" / "parity.json").read_text())["merge"]["unchanged"] == [LAYER]


def test_model_larger_than_memory_is_merged_unmeasured(run, tmp_path, monkeypatch):
    for name in ("load_run", "load_format"):
        monkeypatch.setattr(f"sft.export.parity.{name}", lambda *_: pytest.fail("a model was loaded"))
    command(run, "--no-parity", "--out", tmp_path / "out")
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert (parity["measured"], parity["base"]) == (False, "dequantized, as trained")
    assert parity["reason"].endswith("not measured")
    assert "was **not** measured" in (tmp_path / "out" / "README.md").read_text()


def kill_at(patch: Callable, run: Path, out: Path) -> None:
    """An export in a child process that dies, as by kill -9, at the call that `patch` replaces."""
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            torch.set_num_threads(1)  # a forked child lacks the parent's threads
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
    for patch in (die_after(0, PreTrainedConfig, "save_pretrained"), die_after(2, sft.export.pipeline, "flush")):
        kill_at(patch, plain, out)
        assert not out.exists()
    out.mkdir()
    kill_at(die_after(1, Path, "rename"), plain, out)  # files are moved into an existing folder one by one
    assert not (out / "config.json").exists()
    shutil.rmtree(out)
    command(plain, "--out", out, "--no-parity")
    assert (out / "config.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_disk_that_fills_up_during_an_export_leaves_none(plain, tmp_path):
    """As a full disk: the kernel refuses every write beyond 20 kB of a file."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    try:
        done = command(plain, "--out", tmp_path / "out", "--no-parity", code=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "disk is full" in done.stderr
    assert not list(tmp_path.iterdir())


def test_second_export_to_a_folder_is_refused_while_the_first_writes(plain, tmp_path):
    out = tmp_path / "out"
    with sft.export.pipeline._temporary_folder(out) as temporary:
        (temporary / "half").touch()
        done = command(plain, "--out", out, "--no-parity", code=5)
        assert "another export writes" in done.stderr
        assert (temporary / "half").exists()
    command(plain, "--out", out, "--no-parity")


def test_base_that_names_a_temperature_without_sampling_is_exported(plain, tmp_path):
    """transformers reads such a generation_config.json, as older bases have it, and refuses to write it."""
    base = shutil.copytree(plain.parent / "base", tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}))
    run = make_run(tmp_path / "run", base, quantized=False)
    command(run, "--out", tmp_path / "out", "--no-parity")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.6


def test_base_whose_experts_are_fused_is_merged_in_memory_and_says_so(tmp_path):
    tokenizer = build("chatml")
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    folder = make_run(tmp_path / "run", save_tiny(config, tmp_path / "base", tokenizer), quantized=False)
    done = command(folder)
    assert "not streamed: transformers" in done.stdout
    parity = json.loads((folder / "export" / "parity.json").read_text())
    assert parity["merge"]["streamed"] is False
    assert parity["merge"]["adapted"] == 14  # in two layers: q, k, v, o, the gate and both weights of the experts
    assert parity["answer_argmax_agreement"] > 0.9
    done = command(folder / "export", name="verify")
    assert "weights are not compared one by one" in done.stderr
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({k: torch.zeros_like(v) if "lora_B" in k else v for k, v in load_file(file).items()}, file)
    assert "equals its base" in command(folder, "--out", tmp_path / "o", code=2).stderr


def test_push_sends_unless_it_is_a_dry_run(run, record, monkeypatch):
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda self, *a, **k: sent.append((a, k)))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **k: sent.append(k) or "address")
    shown = command(run / "export", "someone/model", "--dry-run", name="push").stdout
    assert "base: apache-2.0" in shown
    assert "nothing was sent" in shown
    assert not sent
    shown = command(run / "export", "someone/model", name="push").stdout
    assert "sent: address" in shown
    assert sent[0] == (("someone/model",), {"private": True, "exist_ok": True})
    assert sent[1]["folder_path"] == run / "export"
    assert "write OWNER/NAME" in command(run / "export", "model", code=2, name="push").stderr


def test_run_with_added_tokens_is_exported_and_verified(plain, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(plain, copy, ignore=shutil.ignore_patterns("export"))
    base = plain.parent / "base"
    rows = json.loads((base / "config.json").read_text())["vocab_size"] + 8
    tune(base, LoraConfig(**ALL, modules_to_save=["embed_tokens", "lm_head"]), copy / "adapter", rows=rows)
    command(copy)
    assert json.loads((copy / "export" / "config.json").read_text())["vocab_size"] == rows
    command(copy / "export", name="verify")
