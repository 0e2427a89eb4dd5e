"""Continued pre-training reads every token once, masks as BERT does, and passes its weights on."""

import json
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, BertConfig, DistilBertConfig, set_seed

from data.conversation import Conversation, DataError
from data.encode.tokens import plain_backend
from sft.baselines.data import Split, read_split
from sft.baselines.encoder import load_encoder, tune_encoder
from sft.baselines.mlm import MaskedLM, cut_posts, make_row, mask, pair_up
from sft.errors import RecipeError
from sft.recipe.baseline_schema import BaselineRecipe, BaselineTune, EncoderModel
from sft.runs.metrics import read_metrics
from tests.helpers.baselines import recipe, trained
from tests.helpers.qa import bert_tokenizer

pytestmark = pytest.mark.heavy

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def save(model, folder: Path) -> str:
    model.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A random two-layer sentence encoder, without a head for masked tokens, with the real tokenizer."""
    set_seed(0)
    config = BertConfig(vocab_size=len(bert_tokenizer()), **SIZES)
    return save(transformers.BertModel(config), tmp_path_factory.mktemp("models") / "tiny-bert")


def recipe_of(base: str, out: Path | str = "", **sections) -> BaselineRecipe:
    train = {"max_steps": 2, "examples_per_step": 8, "eval_strategy": "no", "logging_steps": 1}
    defaults = {"train": train, "data": {"dev_share": 0.1}, "eval": {"share": None}}
    sections |= {name: values | sections.get(name, {}) for name, values in defaults.items()}
    return recipe(sections.pop("objective", "mlm"), base, out, **sections)


def post(text: str, number: int = 0) -> Conversation:
    return Conversation(({"role": "user", "content": "?"},), str(number), "f: 1", context=text, label="sci.med")


def split_of(train: list[str], dev: list[str] = ()) -> Split:  # type: ignore[assignment]
    return Split([post(t, i) for i, t in enumerate(train)], [post(t, i) for i, t in enumerate(dev)], {})


@cache
def words(count: int) -> str:
    return " ".join(["alpha beta gamma delta"] * (count // 4))


def train(recipe: BaselineRecipe) -> tuple[Path, dict, list[dict]]:
    run = trained(recipe)
    return run, json.loads((run / "chosen.json").read_text()), read_metrics(run)


def test_pooler_of_the_base_stays_for_a_classifier(bert, tmp_path):
    run, _, _ = train(recipe_of(bert, tmp_path / "run"))
    before, after = (
        load_encoder(EncoderModel(base=b), "classification", 0, ("a", "b")) for b in (bert, f"{run}/model")
    )
    assert not after.drawn
    assert torch.equal(before.bert.pooler.dense.weight, after.bert.pooler.dense.weight)
    bare = transformers.BertModel(BertConfig(vocab_size=len(bert_tokenizer()), **SIZES), add_pooling_layer=False)
    drawn = load_encoder(EncoderModel(base=save(bare, tmp_path / "bare")), "classification", 0, ("a", "b"))
    probe = tune_encoder(drawn, BaselineTune(method="linear_probe"), "classification", 0)
    learns = {name for name, p in probe.named_parameters() if p.requires_grad}
    assert learns == {f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", ["posts.txt", "posts.jsonl"])
def test_raw_text_files_are_read_whole(name, bert, tmp_path):
    texts = ["One two three.\nFour five.", "Six seven eight nine.", "Ten."]
    whole = "\n\n".join(texts) + "\n" if name == "posts.txt" else "".join(json.dumps({"text": t}) + "\n" for t in texts)
    (tmp_path / name).write_text(whole)
    recipe = recipe_of(bert, task="text", data={"train": str(tmp_path / name), "dev_share": 0})
    rows = read_split(recipe).train
    assert [c.context.rstrip("\n") for c in rows] == texts
    assert [c.where for c in rows] == [
        f"{tmp_path / name}:{n}" for n in ((1, 4, 6) if name == "posts.txt" else (1, 2, 3))
    ]
    assert len(MaskedLM(recipe, read_split(recipe)).rows) == 3


def test_rows_without_text_are_named(bert, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:1: text: missing, .* prompt; .* columns: \{text"):
        read_split(recipe_of(bert, task="text", data={"train": str(tmp_path / "a.jsonl")}))


def test_long_posts_become_blocks_without_loss_and_text_stays_text():
    tokenizer = bert_tokenizer()
    text = "hello [MASK] of many words [SEP] and so on " * 20
    blocks, empty = cut_posts([text, " \n"], tokenizer, 10)
    assert empty == []
    assert max(map(len, blocks)) == 10
    assert [i for b in blocks for i in b] == plain_backend(tokenizer).encode(text, add_special_tokens=False).ids
    control = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id}
    assert not control & {i for b in blocks for i in b}
    row = make_row(tokenizer, blocks[0])
    assert row["input_ids"] == [tokenizer.cls_token_id, *blocks[0], tokenizer.sep_token_id]
    assert row["special_tokens_mask"] == [1, *[0] * 10, 1]


def test_posts_are_not_joined_and_empty_ones_are_counted(bert):
    head = MaskedLM(recipe_of(bert), split_of(["alpha", "", "beta", words(100)], ["gamma"]))
    assert [len(row["input_ids"]) for row in head.rows] == [3, 3, 64, 40]
    assert re.search(r"4 blocks .* 64 tokens .* 3 posts; .*: 1$", head.notes[0])
    with pytest.raises(RecipeError, match="too little text"):
        MaskedLM(recipe_of(bert), split_of(["", " "]))


def test_training_draws_new_masks_but_the_dev_slice_is_masked_once(bert):
    recipe = recipe_of(bert)
    head, again = (MaskedLM(recipe, split_of([words(200)], [words(400), "delta"])) for _ in range(2))
    first, second = head.collate(head.rows), head.collate(head.rows)
    assert not torch.equal(first["labels"], second["labels"])
    for a, b in zip(head.dev, again.dev, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    model = head.load()
    assert head.score_dev(model) == head.score_dev(model)
    assert head.score_dev(model)["perplexity"] == head.perplexity_before


def test_masks_follow_the_probability_and_spare_control_tokens(bert):
    head = MaskedLM(recipe_of(bert, pretraining={"mlm_probability": 0.3}), split_of([words(40_000)]))
    set_seed(1)
    batch = head.collate(head.rows)
    whole = [row["input_ids"] for row in head.rows]
    chosen = batch["labels"] != -100
    masked = [row[i] for row, places in zip(whole, chosen.tolist(), strict=True) for i in range(len(row)) if places[i]]
    assert batch["labels"][chosen].tolist() == masked
    assert not {head.tokenizer.cls_token_id, head.tokenizer.sep_token_id} & set(masked)
    assert sum(map(len, whole)) * 0.28 < len(masked) < sum(map(len, whole)) * 0.31
    shown = batch["input_ids"][chosen]
    assert 0.78 < (shown == head.tokenizer.mask_token_id).float().mean() < 0.82  # Devlin et al. 2019: 80 %
    assert 0.08 < (shown == batch["labels"][chosen]).float().mean() < 0.12  # 10 % stay


def test_a_row_of_one_token_always_has_a_loss(bert):
    head = MaskedLM(recipe_of(bert, pretraining={"mlm_probability": 0.001}), split_of(["alpha", "☃"], ["beta"]))
    batch = head.collate(head.rows)
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 1]
    assert batch["input_ids"][:, 1].tolist() == [head.tokenizer.mask_token_id] * 2
    assert math.isfinite(head.score_dev(head.load())["loss"])


def test_the_loss_is_the_mean_over_masked_tokens(bert):
    head = MaskedLM(recipe_of(bert), split_of(["alpha"], [words(40), words(300), "gamma"]))
    model = head.load()
    total = count = 0.0
    for batch in head.dev:
        with torch.no_grad():
            n = int((batch["labels"] != -100).sum())
            total, count = total + float(model(**batch).loss) * n, count + n
    scores = head.score_dev(model)
    assert scores["loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))


def test_a_missing_head_is_noted_and_tied_to_the_embeddings(bert, tmp_path):
    head = MaskedLM(recipe_of(bert), split_of(["alpha"], ["beta"]))
    model = head.load()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert any("random head" in note for note in head.notes)
    with torch.no_grad():
        model.get_output_embeddings().bias[7] = 0.1  # as after any training
    trained = MaskedLM(recipe_of(save(model, tmp_path / "mlm")), split_of(["alpha"], ["beta"]))
    trained.load()
    assert not any("random head" in note for note in trained.notes)


def test_without_a_held_out_slice_nothing_is_measured(bert):
    head = MaskedLM(recipe_of(bert, data={"dev_share": 0}), split_of(["alpha"]))
    assert head.choose(head.load()) == {"perplexity_before": None, "perplexity_after": None}


def test_halves_pair_with_their_own_or_another_posts():
    posts = [[[10 * n + 1, 10 * n + 2, 10 * n + 3], [10 * n + 4, 10 * n + 5]] for n in range(1, 301)] + [[[7]]]
    pairs = list(pair_up(posts, 3))
    assert pairs == list(pair_up(posts, 3)) != list(pair_up(posts, 4))
    assert len(pairs) == 600  # a block of one token has no halves
    for first, second, label in pairs:
        assert label == int(first[0] // 10 != second[0] // 10)
    assert {p[1][0] // 10 == p[0][0] // 10 for p in pairs if p[2] == 0} == {True}
    assert 250 < sum(p[2] for p in pairs) < 350
    assert list(pair_up(posts[:1], 3)) == []


def test_next_sentence_rows_fit_and_are_typed(bert):
    recipe = recipe_of(bert, pretraining={"next_sentence": True})
    head = MaskedLM(recipe, split_of([words(101 * n) for n in range(1, 5)], [words(80), words(90)]))
    tokenizer = head.tokenizer
    assert max(len(row["input_ids"]) for row in head.rows) == 64
    for row in head.rows:
        first = row["input_ids"].index(tokenizer.sep_token_id) + 1
        assert row["token_type_ids"] == [0] * first + [1] * (len(row["input_ids"]) - first)
        assert row["input_ids"].count(tokenizer.sep_token_id) == 2
    batch = head.collate(head.rows)
    assert batch["next_sentence_label"].tolist() == [row["next_sentence_label"] for row in head.rows]
    assert 0 <= head.score_dev(head.load())["next_sentence_accuracy"] <= 100
    with pytest.raises(RecipeError, match="two posts"):
        MaskedLM(recipe, split_of([words(40)]))


def test_next_sentence_needs_a_bert(tmp_path):
    config = DistilBertConfig(vocab_size=len(bert_tokenizer()), dim=32, hidden_dim=64, n_layers=1, n_heads=2)
    base = save(transformers.DistilBertForMaskedLM(config), tmp_path / "distil")
    with pytest.raises(RecipeError, match="pretraining.next_sentence: .*distilbert.*set it to false"):
        MaskedLM(recipe_of(base, pretraining={"next_sentence": True}), split_of(["alpha"]))
    head = MaskedLM(recipe_of(base), split_of(["alpha"], ["beta"]))
    assert head.score_dev(head.load())["loss"] > 0


@pytest.mark.slow
def test_pretraining_lowers_perplexity_and_classification_starts_from_it(bert, tmp_path):
    settings = {"max_steps": 12, "learning_rate": 0.01, "eval_strategy": "steps", "eval_steps": 6}
    settings |= {"metric_for_best_model": "loss", "save_total_limit": 1}
    run, chosen, metrics = train(recipe_of(bert, tmp_path / "mlm", train=settings))
    assert chosen["perplexity_after"] < chosen["perplexity_before"]
    assert chosen["dev"]["perplexity"] == chosen["perplexity_after"]
    assert [row["step"] for row in metrics if "eval_perplexity" in row] == [6, 12]

    classifier = recipe_of(str(run / "model"), tmp_path / "classifier", objective="classification")
    pretrained = transformers.BertForMaskedLM.from_pretrained(run / "model").bert.encoder.layer[1].output.dense.weight
    loaded = load_encoder(classifier.model, "classification", 0, ("a", "b")).bert.encoder.layer[1].output.dense.weight
    assert torch.equal(pretrained, loaded)
    _, chosen, _ = train(classifier)
    assert chosen["step"] == 2
    assert 0 <= chosen["dev"]["accuracy"] <= 100


@pytest.mark.slow
def test_next_sentence_trains_and_passes_on_its_pooler(bert, tmp_path):
    recipe = recipe_of(bert, tmp_path / "nsp", pretraining={"next_sentence": True}, train={"learning_rate": 0.01})
    run, chosen, _ = train(recipe)
    assert chosen["perplexity_after"] < chosen["perplexity_before"]
    assert 0 <= chosen["dev"]["next_sentence_accuracy"] <= 100
    assert AutoConfig.from_pretrained(run / "model").architectures == ["BertForPreTraining"]
    classifier = recipe_of(str(run / "model"), tmp_path / "classifier", objective="classification")
    assert train(classifier)[1]["step"] == 2


@pytest.mark.slow
def test_equal_seeds_give_equal_losses(bert, tmp_path):
    runs = [train(recipe_of(bert, tmp_path / name, train={"max_steps": 3}))[2] for name in "ab"]
    other = train(recipe_of(bert, tmp_path / "c", train={"max_steps": 3, "seed": 7}))[2]
    losses = [[row["loss"] for row in metrics if "loss" in row] for metrics in (*runs, other)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert losses[0] != losses[2]


def test_the_collator_does_not_change_rows(bert):
    head = MaskedLM(recipe_of(bert), split_of([words(80)]))
    before = json.dumps(head.rows)
    mask(head.rows, head.masking)
    assert json.dumps(head.rows) == before
