"""Floors, which a fine-tuned model must beat, stored without pickles."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import ComplementNB
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC
from transformers import AutoModel, AutoTokenizer

from data.conversation import Conversation
from data.readers.squad import UNANSWERABLE
from sft.baselines.data import baseline_questions, read_split
from sft.baselines.floors import fit_floor, load_floor
from sft.errors import RecipeError, RunError
from sft.scoring.evaluate import evaluate
from tests.helpers.baselines import NEWS, recipe, trained
from tests.helpers.places import REAL_DATA, needs_real


@pytest.mark.parametrize(
    ("base", "classifier"),
    [("sklearn:linear_svc", LinearSVC(C=0.5, random_state=42)), ("sklearn:complement_nb", ComplementNB(alpha=0.1))],
)
def test_tfidf_answers_as_scikit_learn_does(base, classifier, tmp_path):
    settings = recipe("classification", base, tmp_path / "run", data={"dev_share": 0})
    run = trained(settings)
    train, test = read_split(settings).train, baseline_questions(settings)
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
    classifier.fit(vectorizer.fit_transform([c.context for c in train]), [c.label for c in train])
    expected = classifier.predict(vectorizer.transform([c.context for c in test]))
    assert [p.text for p in load_floor(settings, run / "model")(test)] == list(expected)
    assert not list(run.rglob("*.pkl")) + list(run.rglob("*.joblib"))


def test_embedding_is_put_beside_tfidf(tiny_bert, tmp_path):
    """As computed here from the output of transformers, one text at a time; a changed encoder is refused."""
    tiny_bert = Path(shutil.copytree(tiny_bert, tmp_path / "encoder"))
    model = {"base": "sklearn:linear_svc", "embedder": str(tiny_bert)}
    settings = recipe("classification", "", tmp_path / "run", model=model, data={"dev_share": 0, "max_seq_length": 64})
    run = trained(settings)
    assert json.loads((run / "manifest.json").read_text())["base"]["sha256"]["model.safetensors"]
    train, test = read_split(settings).train, baseline_questions(settings)
    tokenizer, encoder = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()

    def features(conversations, words):
        means = []
        for c in conversations:
            ids = tokenizer(c.context, truncation=True, max_length=64, return_tensors="pt")
            with torch.inference_mode():
                means.append(encoder(**ids).last_hidden_state[0].mean(0).numpy())
        return sparse.hstack([words, 0.5 * normalize(np.stack(means))]).tocsr()

    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
    x = features(train, vectorizer.fit_transform([c.context for c in train]))
    classifier = LinearSVC(C=0.5, random_state=42).fit(x, [c.label for c in train])
    expected = classifier.predict(features(test, vectorizer.transform([c.context for c in test])))
    assert [p.text for p in load_floor(settings, run / "model")(test)] == list(expected)
    cost = json.loads((run / "cost.json").read_text())
    assert cost["trainable_parameters"] == classifier.coef_.size + 20
    assert cost["parameters"] - cost["trainable_parameters"] == sum(p.numel() for p in encoder.parameters())
    saved = json.loads((tiny_bert / "tokenizer.json").read_text())
    (tiny_bert / "tokenizer.json").write_text(json.dumps(saved | {"normalizer": None}))
    with pytest.raises(RunError, match="model.embedder .* changed"):
        load_floor(settings, run / "model")


def test_embedder_that_cannot_be_used_is_refused_and_leaves_no_run(tmp_path, tiny_bert):
    for embedder, length, why in ((tmp_path, 64, "model.embedder: "), (tiny_bert, 100_000, "exceeds the")):
        model = {"base": "sklearn:linear_svc", "embedder": str(embedder)}
        settings = recipe("classification", "", tmp_path / "run", model=model, data={"max_seq_length": length})
        with pytest.raises(RecipeError, match=why):
            trained(settings)
        assert not (tmp_path / "run").exists()


def test_two_classes_are_classified(tmp_path):
    rows = [json.loads(line) for line in NEWS.read_text().splitlines()]
    names = sorted({row["label"] for row in rows})[:2]
    chosen = [row for row in rows if row["label"] in names]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    settings = recipe(
        "classification", "sklearn:linear_svc", tmp_path / "run", data={"train": str(tmp_path / "two.jsonl")}
    )
    train = read_split(settings).train
    answers = [p.text for p in load_floor(settings, trained(settings) / "model")(train)]
    assert answers == [c.label for c in train]  # the rows that it was fitted on


def test_a_floor_is_fitted_on_all_rows_since_it_chooses_nothing(tmp_path):
    vocabularies = []
    for share in (0, 0.15):
        settings = recipe("classification", "sklearn:linear_svc", tmp_path / str(share), data={"dev_share": share})
        vocabularies.append(set(json.loads((trained(settings) / "model" / "floor.json").read_text())["words"]))
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.slow
@needs_real("20newsgroups/train.jsonl.gz")
@pytest.mark.parametrize("base", ["sklearn:linear_svc", "sklearn:complement_nb"])
def test_tfidf_reaches_its_known_accuracy_on_the_stripped_by_date_split(base, tmp_path):
    news = REAL_DATA / "20newsgroups"
    settings = recipe(
        "classification", base, tmp_path / "run", data={"train": str(news / "train.jsonl.gz"), "dev_share": 0},
        eval={"data": str(news / "test.jsonl.gz"), "share": None},
    )  # fmt: skip
    results = evaluate(str(trained(settings)), tmp_path / "eval")
    assert results["questions"] > 5000
    assert results["scores"]["total"]["exact"] == pytest.approx(70, abs=1.5)


def test_always_unanswerable_scores_the_unanswerable_share(tmp_path):
    settings = recipe("extractive_qa", "floor:unanswerable", tmp_path / "run", eval={"limit": None})
    results = evaluate(str(trained(settings)), tmp_path / "eval")
    rows = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    share = sum(not row["gold"] for row in rows) / len(rows)
    assert results["scores"]["total"]["exact"] == pytest.approx(100 * share, abs=0.01)
    assert {row["predicted"] for row in rows} == {UNANSWERABLE}


def test_overlap_quotes_words_next_to_those_of_the_question(tmp_path):
    settings = recipe("extractive_qa", "floor:overlap", tmp_path / "run")
    results = evaluate(str(trained(settings)), tmp_path / "eval")
    rows = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    assert results["scores"]["HasAns"]["f1"] > 0
    assert all(row["predicted"] in row["prompt"] or row["predicted"] == UNANSWERABLE for row in rows)


def test_overlap_counts_the_same_words_in_every_process(tmp_path):
    """Of equally frequent words the first ones; the order of a set depends on PYTHONHASHSEED."""
    words = [f"w{i}" for i in range(50_100)]
    texts = [" ".join(words[:30_000]), " ".join(words[30_000:])]
    train = [Conversation((), str(i), "", context=text) for i, text in enumerate(texts)]
    fit_floor(recipe("extractive_qa", "floor:overlap", tmp_path / "run"), train, tmp_path / "model", lambda x, _: x)
    assert list(json.loads((tmp_path / "model" / "floor.json").read_text())["counts"]) == words[:50_000]
