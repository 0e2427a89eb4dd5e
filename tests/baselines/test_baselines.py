"""Baselines: encoders with each method, and a checkpoint and threshold that are never chosen on the test set."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForSequenceClassification

from data.conversation import Conversation, DataError
from eval.compare import CompareError, compare
from eval.spans import SpanAnswer
from sft.baselines.data import baseline_questions, read_split
from sft.baselines.encoder import depths, load_encoder, load_trained, predict
from sft.baselines.heads import best_threshold
from sft.baselines.train import train_baseline
from sft.baselines.trainer import EncoderTrainer, Unfreeze
from sft.errors import RecipeError
from sft.recipe.baseline_schema import MOVES_POSITIONS, EncoderModel
from sft.recipe.load import check_baseline, dump_recipe, load_any_recipe, load_recipe
from sft.runs.metrics import read_metrics
from sft.runs.resume import Resume
from sft.scoring.answerers import AnswerOptions
from sft.scoring.ask import ask_run, classify_text
from sft.scoring.evaluate import evaluate, print_scores
from tests.helpers.baselines import NEWS, SQUAD, recipe, trained
from tests.helpers.places import ROOT, SAMPLES
from tests.helpers.qa import bert_tokenizer

pytestmark = pytest.mark.heavy


METHODS = (
    {"method": "full"}, {"method": "gradual_unfreezing", "layer_decay": 0.9},
    {"method": "lora", "r": 2, "target_modules": "all-linear"}, {"method": "linear_probe"}, {"method": "ia3"},
    {"method": "prompt_tuning", "num_virtual_tokens": 2}, {"method": "prefix_tuning", "num_virtual_tokens": 2},
)  # fmt: skip
QUICK = {("classification", "full"), ("extractive_qa", "lora")}  # the others are slow


@pytest.mark.parametrize(
    ("objective", "tune"),
    [
        pytest.param(
            objective,
            tune,
            id=f"{objective}-{tune['method']}",
            marks=[] if (objective, tune["method"]) in QUICK else [pytest.mark.slow],
        )
        for objective in ("classification", "extractive_qa")
        for tune in METHODS
    ],
)
def test_each_method_trains_its_part_and_is_scored(objective, tune, tiny_bert, tmp_path):
    if objective == "extractive_qa" and tune["method"] in MOVES_POSITIONS:
        with pytest.raises(RecipeError, match=f"tune.method {tune['method']} .*; use prefix_tuning"):
            recipe(objective, tiny_bert, tmp_path / "run", tune=tune)
        return
    run = trained(recipe(objective, tiny_bert, tmp_path / "run", tune=tune))
    results = evaluate(str(run), tmp_path / "eval")
    assert results["questions"] == 20 if objective == "extractive_qa" else results["questions"] > 20
    cost = json.loads((run / "cost.json").read_text())
    assert 0 < cost["trainable_parameters"] <= cost["parameters"]
    assert (cost["trainable_parameters"] == cost["parameters"]) == (tune["method"] in ("full", "gradual_unfreezing"))
    assert results["system"]["method"] == tune["method"]
    assert results["latency_ms"]["p50"] > 0


def test_linear_probe_leaves_the_encoder_as_it_was(tiny_bert, tmp_path):
    run = trained(recipe("classification", tiny_bert, tmp_path / "run", tune={"method": "linear_probe"}))
    before, after = load_file(tiny_bert / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    shared = [name for name in after if name in before and "pooler" not in name]
    assert len(shared) > 30
    assert all(torch.equal(before[name], after[name]) for name in shared)
    assert not torch.equal(after["classifier.bias"], torch.zeros(20))


def test_attention_dropout_is_that_of_the_recipe_or_else_of_the_base(tiny_bert):
    for value, expected in ((None, 0.1), (0, 0), (0.3, 0.3)):
        base = EncoderModel(base=str(tiny_bert), attention_dropout=value)
        config = load_encoder(base, "classification", 0, ("a", "b")).config
        assert (config.attention_probs_dropout_prob, config.hidden_dropout_prob) == (expected, 0.1)


def test_gradual_unfreezing_goes_from_the_head_to_the_embeddings(tiny_bert):
    model = load_encoder(EncoderModel(base=str(tiny_bert)), "classification", 0, ("a", "b"))
    depth, deepest = depths(model)
    assert depth["classifier.weight"] == 0
    assert depth["bert.encoder.layer.1.output.dense.weight"] == 1
    assert depth["bert.encoder.layer.0.output.dense.weight"] == 2
    assert depth["bert.embeddings.word_embeddings.weight"] == deepest == 3

    class State:
        max_steps = 12

    trained_depths = []
    for State.global_step in range(12):
        Unfreeze(model, 0.5).on_step_begin(None, State, None, model=model)
        trained_depths.append(max(depth[n] for n, p in model.named_parameters() if p.requires_grad))
    assert trained_depths == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]


def test_checkpoint_and_threshold_never_see_the_test_set(tiny_bert, tmp_path):
    """The held-out data may have other answers or be missing: the run is the same, bit by bit."""
    squad = json.loads((SAMPLES / "squad_dev.json").read_text())
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                question |= {"answers": [], "is_impossible": True}
    (tmp_path / "none.json").write_text(json.dumps(squad))
    runs = []
    for name, held_out in (("a", str(SAMPLES / "squad_dev.json")), ("b", str(tmp_path / "none.json")), ("c", None)):
        changed = recipe("extractive_qa", tiny_bert, tmp_path / name, train={"metric_for_best_model": "exact"})
        source = changed.eval.model_copy(update={"data": changed.eval.data and held_out and changed.eval.data.model_copy(
            update={"path": held_out})})  # fmt: skip
        run = trained(changed.model_copy(update={"eval": source}))
        runs.append((load_file(run / "model" / "model.safetensors"), (run / "chosen.json").read_text()))
    for weights, chosen in runs[1:]:
        assert chosen == runs[0][1]
        assert all(torch.equal(value, weights[name]) for name, value in runs[0][0].items())


def test_the_dev_slice_shares_no_thread_with_training_or_test(tmp_path):
    settings = recipe("classification", "sklearn:linear_svc", tmp_path)
    split, test = read_split(settings), baseline_questions(settings)
    clusters = [{c.cluster for c in part} for part in (split.train, split.dev, test)]
    assert all(clusters)
    assert not (clusters[0] & clusters[1])
    assert not (clusters[0] & clusters[2])
    assert not (clusters[1] & clusters[2])
    rows = len(split.train) + len(split.dev) + len(test)
    assert rows == len(NEWS.read_text().splitlines())


def test_no_answer_threshold_is_chosen_for_the_share_that_is_expected(tiny_bert, tmp_path):
    """Right quotes are at -2, -1 and 0.5, questions without an answer at -0.5 and 1."""
    thresholds = {}
    places = [(-2, True), (-1, True), (-0.5, False), (0.5, True), (1, False)]
    questions = [Conversation((), str(d), str(d), answers=("x",) if has else (), context="x") for d, has in places]
    answers = [SpanAnswer("x", 0.0, 0.0, d, 0.5, 0.5, []) for d, _ in places]
    for share in (0.2, None, 0.7):
        settings = recipe("extractive_qa", tiny_bert, tmp_path, eval={"unanswerable_share": share})
        thresholds[share] = best_threshold(settings, questions, answers)
    assert 0.5 <= thresholds[0.2] < 1
    assert -1 <= thresholds[0.7] < -0.5
    assert thresholds[0.7] <= thresholds[None] <= thresholds[0.2]
    with pytest.raises(RecipeError, match="eval.unanswerable_share needs an encoder.* data.dev_share"):
        recipe("extractive_qa", tiny_bert, tmp_path, data={"dev_share": 0}, eval={"unanswerable_share": 0.5})


def test_other_training_seeds_hold_out_the_same(tmp_path):
    ids = [
        [c.id for c in baseline_questions(recipe("classification", "sklearn:linear_svc", tmp_path, train={"seed": s}))]
        for s in (1, 2)
    ]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("leaks", ["keep", "remove"])
def test_training_rows_that_are_also_held_out_are_reported_and_can_be_left_out(leaks, tmp_path):
    rows = [json.loads(line) for line in NEWS.read_text().splitlines()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    settings = recipe(
        "classification", "sklearn:linear_svc", tmp_path, data={"leaks": leaks},
        eval={"share": None, "data": str(tmp_path / "test.jsonl")},
    )  # fmt: skip
    split = read_split(settings)
    (note,) = split.notes
    assert "5 training rows" in note
    assert f"{NEWS}:1 repeats {tmp_path}/test.jsonl:1" in note
    assert len(split.train) + len(split.dev) == len(rows) - (5 if leaks == "remove" else 0)
    assert split.report.leaks.rows == 5
    assert split.report.leaks.removed == (5 if leaks == "remove" else 0)


def test_a_score_on_training_data_says_so_and_is_not_compared(tmp_path, capsys):
    run = trained(recipe("classification", "sklearn:linear_svc", tmp_path / "run"))
    evaluate(str(run), tmp_path / "a")
    results = evaluate(str(run), tmp_path / "b", data=str(NEWS))
    assert results["trained_on"] == [str(NEWS)]
    print_scores(results)
    assert re.search(f"warning: .* {NEWS}: .* held-out", capsys.readouterr().out)
    with pytest.raises(CompareError, match="was trained on"):
        compare([tmp_path / "b", tmp_path / "b"], tmp_path / "out")
    assert compare([tmp_path / "a", tmp_path / "a"], tmp_path / "out")["pairs"][0]["p"] == 1


def test_a_score_of_labels_has_a_confusion_matrix(tmp_path):
    run = trained(recipe("classification", "sklearn:linear_svc", tmp_path / "run"))
    classes = evaluate(str(run), tmp_path / "a")["classes"]
    assert sum(map(sum, classes["confusion"])) == sum(row["questions"] for row in classes["table"])
    assert (tmp_path / "a" / "confusion.png").read_bytes()[:4] == b"\x89PNG"


def test_questions_of_another_task_are_refused(tmp_path):
    run = str(trained(recipe("classification", "sklearn:linear_svc", tmp_path / "run")))
    with pytest.raises(RecipeError, match="--task squad_v2: .* newsgroups"):
        evaluate(run, tmp_path / "a", task="squad_v2", data=str(SQUAD))
    with pytest.raises(RecipeError, match="none of the 20 labels .* newsgroups"):
        evaluate(run, tmp_path / "a", data=str(SQUAD))


def test_one_label_trains_no_classifier(tmp_path):
    row = NEWS.read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text("".join(row.replace("Subject: ", f"Subject: {i} ") + "\n" for i in range(20)))
    settings = recipe("classification", "sklearn:linear_svc", tmp_path, data={"train": str(tmp_path / "one.jsonl")})
    with pytest.raises(DataError, match="classifier needs two"):
        read_split(settings)


def test_the_last_step_is_scored_if_a_run_is_shorter_than_eval_steps(tiny_bert, tmp_path):
    steps = {"eval_strategy": "steps", "eval_steps": 400, "metric_for_best_model": "accuracy"}
    run = trained(recipe("classification", tiny_bert, tmp_path / "run", train=steps))
    assert [row["step"] for row in read_metrics(run) if "eval_accuracy" in row] == [3]


def test_loraplus_and_a_schedule_with_arguments_train_an_encoder(tiny_bert, tmp_path, monkeypatch):
    made, original = [], EncoderTrainer.create_optimizer
    monkeypatch.setattr(EncoderTrainer, "create_optimizer", lambda self, model=None: made.append(original(self, model)))
    steps = {"max_steps": 3, "logging_steps": 1, "warmup_steps": 1, "lr_scheduler_type": "cosine_with_min_lr"}
    train = steps | {"lr_scheduler_kwargs": {"min_lr_rate": 0.5}, "learning_rate": 1e-3}
    tune = {"method": "lora", "r": 2, "target_modules": "all-linear", "loraplus_lr_ratio": 8}
    run = trained(recipe("classification", tiny_bert, tmp_path / "run", train=train, tune=tune))
    rates = [row["learning_rate"] for row in read_metrics(run) if "loss" in row]
    assert rates == pytest.approx([0, 1e-3, 7.5e-4])
    groups = [group["initial_lr"] for group in made[0].param_groups if group["params"]]
    assert sorted(set(groups)) == pytest.approx([1e-3, 8e-3])


def test_settings_that_a_method_does_not_read_are_refused(tiny_bert, tmp_path):
    with pytest.raises(RecipeError, match="layer_decay"):
        recipe("classification", tiny_bert, tmp_path, tune={"method": "linear_probe", "layer_decay": 0.9})
    with pytest.raises(RecipeError, match="names no layers"):
        depths(AlbertForSequenceClassification(AlbertConfig(vocab_size=9, hidden_size=8, num_attention_heads=1)))
    with pytest.raises(RecipeError, match="num_virtual_tokens"):
        trained(recipe("classification", tiny_bert, tmp_path / "run", tune={"method": "prompt_tuning"}))


def test_a_row_stays_on_its_side_however_its_file_is_named(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in NEWS.read_text().splitlines()]
    (tmp_path / "posts.jsonl").write_text(
        "".join(json.dumps({k: r[k] for k in ("label", "text")}) + "\n" for r in rows)
    )
    monkeypatch.chdir(tmp_path)
    contexts = []
    for path in ("posts.jsonl", str(tmp_path / "posts.jsonl")):
        settings = recipe(
            "classification", "sklearn:linear_svc", tmp_path, data={"train": path}, eval={"share_of": "rows"}
        )
        contexts.append([c.context for c in baseline_questions(settings)])
    assert contexts[0]
    assert contexts[0] == contexts[1]


def test_an_adapter_is_scored_on_the_pooler_that_it_was_trained_on(tiny_bert, tmp_path):
    """The base has no pooler: the run's seed draws it, in training and again when the run is loaded."""
    changes = {"tune": {"method": "lora", "r": 2}, "train": {"max_steps": 1, "seed": 7}}
    settings = recipe("classification", tiny_bert, tmp_path / "run", **changes)
    run = trained(settings)
    labels = json.loads((run / "chosen.json").read_text())["labels"]
    pooler = [
        {n: p for n, p in model.named_parameters() if "pooler" in n and "dense.weight" in n}
        for model in (
            load_encoder(settings.model, "classification", 7, labels),
            load_trained(run, "classification", settings.model, settings.train.seed, labels),
        )
    ]
    first, second = (next(iter(p.values())) for p in pooler)
    assert torch.equal(first, second)


def test_logits_of_classes_are_not_cut_if_a_row_is_as_long_as_the_number_of_classes(tiny_bert):
    model = load_encoder(EncoderModel(base=str(tiny_bert)), "classification", 0, [str(i) for i in range(5)])
    rows = [{"input_ids": [101] * n} for n in (2, 3, 5)]
    assert [logits.shape for (logits,) in predict(model, rows, bert_tokenizer(), ("logits",), False)] == [(5,)] * 3


def test_the_best_checkpoint_is_restored(tiny_bert, tmp_path):
    best = {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 6}
    run = trained(recipe("classification", tiny_bert, tmp_path / "run", train=best | {"learning_rate": 3e-2}))
    losses = {row["step"]: row["eval_loss"] for row in read_metrics(run) if "eval_loss" in row}
    chosen = json.loads((run / "chosen.json").read_text())
    assert losses[chosen["step"]] == min(losses.values())
    assert chosen["dev"]["loss"] == pytest.approx(min(losses.values()), abs=1e-6)


@pytest.mark.parametrize(
    ("objective", "train", "tune"),
    [
        # stops in the second epoch, whose order is drawn at its start
        ("classification", {"metric_for_best_model": "loss"}, {"method": "gradual_unfreezing"}),
        pytest.param("extractive_qa", {}, {"method": "full"}, marks=pytest.mark.slow),
        pytest.param("mlm", {}, {"method": "full"}, marks=pytest.mark.slow),  # masks are drawn at each step
    ],
)
def test_resumed_run_equals_the_undisturbed_one(objective, train, tune, tiny_bert, tmp_path, monkeypatch):
    settings = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 9, "logging_steps": 3, "examples_per_step": 24}
    tuned = {"train": settings | train, "tune": tune}
    whole = trained(recipe(objective, tiny_bert, tmp_path / "whole", **tuned))
    broken = recipe(objective, tiny_bert, tmp_path / "broken", **tuned)
    original = EncoderTrainer.training_step

    def stop(self, *args, **kwargs):
        if self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(EncoderTrainer, "training_step", stop)
        with pytest.raises(SystemExit) as stopped:
            train_baseline(broken, Path("test.yaml"))
    assert stopped.value.code == 143
    assert (tmp_path / "broken" / "checkpoint-7").is_dir()
    assert train_baseline(broken, Path("test.yaml"), Resume(tmp_path / "broken")) == tmp_path / "broken"
    weights = [load_file(run / "model" / "model.safetensors") for run in (whole, tmp_path / "broken")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    losses = [
        [(row.get("loss"), row.get("eval_loss"), row.get("grad_norm")) for row in read_metrics(run)]
        for run in (whole, tmp_path / "broken")
    ]
    assert losses[0] == losses[1]
    assert sum(loss is not None for loss, _, _ in losses[0]) == 3


def test_one_question_is_answered_before_and_after_training(tiny_bert, tmp_path):
    run = trained(recipe("extractive_qa", tiny_bert, tmp_path / "run"))
    text = "The population of Shenzhen is approximately 13 million."
    lines = list(ask_run(run, "What is the population of Shenzhen?", text, 2))
    assert lines[0].startswith("before training: ")
    assert lines[1].startswith("after training: ")
    assert lines[1].removeprefix("after training: ") in text
    assert len(lines) in (4, 5)


def test_one_text_is_classified_with_probabilities(tiny_bert, tmp_path):
    run = trained(recipe("classification", tiny_bert, tmp_path / "run"))
    lines = list(classify_text(run, "The pitcher threw a no-hitter.", 20))
    assert len(lines) == 20
    assert sum(float(line.split()[1]) for line in lines) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("task", "squad_v2", "objective classification .* newsgroups"),
        ("model", {"base": "floor:overlap"}, "model.base floor:overlap .* newsgroups"),
        (
            "model",
            {"base": "floor:majority", "embedder": "x"},
            "model.embedder",
        ),
        ("train", {"metric_for_best_model": "f1"}, "train.metric_for_best_model f1"),
        ("train", {"learning_rat": 1}, "train.learning_rat: unknown key, .* learning_rate"),
        ("tune", {"method": "gradual"}, "tune.method: 'gradual' is none of"),
        ("tune", {"method": "lora", "rr": 1}, "tune.rr: unknown key .*lora, .* r"),
        ("tune", {"method": "freeze"}, "tune: method freeze needs trainable"),
        ("data", {"dev_share": 1}, "data.dev_share: .*less than 1"),
    ],
)
def test_mistake_in_a_baseline_recipe_is_named(section, values, message, tmp_path):
    tree = recipe("classification", "sklearn:linear_svc", tmp_path).model_dump(mode="json")
    tree[section] = {**tree[section], **values} if isinstance(values, dict) else values
    with pytest.raises(RecipeError, match=message):
        check_baseline(tree)


def test_question_that_fills_the_window_is_refused(tiny_bert, tmp_path):
    with pytest.raises(RecipeError, match="data.max_query_length 400 leaves no room"):
        recipe("extractive_qa", tiny_bert, tmp_path, data={"max_query_length": 400})


def test_commands_of_adapters_say_that_a_recipe_is_a_baseline(tmp_path):
    with pytest.raises(RecipeError, match="minilm_newsgroups.yaml: objective classification .*adapter"):
        load_recipe(Path("recipes/minilm_newsgroups.yaml"))
    run = trained(recipe("classification", "floor:majority", tmp_path / "run"))
    with pytest.raises(RecipeError, match="baseline .*--labels"):
        evaluate(str(run), tmp_path / "eval", options=AnswerOptions(labels=True))


def test_scored_runs_of_different_kinds_are_compared_on_the_same_questions(tiny_bert, tmp_path):
    folders = []
    for name, base in (("bert", tiny_bert), ("tfidf", "sklearn:complement_nb")):
        run = trained(recipe("classification", base, tmp_path / name))
        evaluate(str(run), run / "eval")
        folders.append(run)
    report = compare(folders, tmp_path / "report")
    assert [system["name"] for system in report["systems"]] == ["bert", "tfidf"]
    assert report["systems"][0]["cost"]["train_seconds"] > 0
    assert report["systems"][0]["classes"] is not None
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    other = recipe("classification", "floor:majority", tmp_path / "other", eval={"limit": 5})
    evaluate(str(trained(other)), tmp_path / "other" / "eval")
    with pytest.raises(CompareError, match="evaluation_sha256"):
        compare([folders[0], tmp_path / "other"], tmp_path / "report")


@pytest.mark.slow
def test_two_processes_train_as_one(tiny_bert, tmp_path):
    """Without dropout, which each process draws by itself. A step that can't be divided leaves no folder."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bert, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0})
    )
    finished = []
    for processes, options in ((1, []), (2, []), (2, ["--set", "train.examples_per_step=7"])):
        run = tmp_path / f"run{len(finished)}"
        (tmp_path / "r.yaml").write_text(dump_recipe(recipe("classification", base, run, train={"logging_steps": 1})))
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        port = ["--master_port", str(29900 + os.getpid() % 90)]
        command = [*launch, *port, "sft/train.py", str(tmp_path / "r.yaml"), *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        finished.append((done, run))
    (_, one), (_, two), (refused, folder) = finished
    assert [done.returncode for done, _ in finished[:2]] == [0, 0]
    losses = [[row["loss"] for row in read_metrics(run) if "loss" in row] for run in (one, two)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert re.search("train.examples_per_step 7 .* 2 processes", refused.stdout + refused.stderr)
    assert not folder.exists()


def test_a_run_older_than_eval_seed_keeps_its_held_out_rows(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    text = dump_recipe(recipe("classification", "sklearn:linear_svc", run, train={"seed": 7}))
    before = "\n".join(line for line in text.splitlines() if line != "  seed: 42") + "\n"
    assert before != text
    (run / "recipe.yaml").write_text(before)
    assert load_any_recipe(run / "recipe.yaml").eval.seed == 42
    (run / "manifest.json").write_text("{}")
    assert load_any_recipe(run / "recipe.yaml").eval.seed == 7
