"""Floors: systems without a trained encoder, which a fine-tuned one must beat to be worth its cost.

TF-IDF with a linear classifier, alone or beside a frozen encoder's embedding; the most frequent label; always
"unanswerable"; and a quote by lexical overlap.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.naive_bayes import ComplementNB
from sklearn.svm import LinearSVC

from data.conversation import Conversation
from data.readers.squad import UNANSWERABLE
from eval.prediction import Prediction
from sft.errors import RecipeError, RunError
from sft.recipe.baseline_schema import BaselineRecipe
from sft.runs.manifest import identity

Features = Callable[[sparse.csr_matrix, Sequence[str]], sparse.csr_matrix]  # TF-IDF, texts -> input of the classifier
FACTS, WEIGHTS = "floor.json", "floor.safetensors"
EMBEDDING = 0.5  # its length if TF-IDF has 1: the best of 0, 1/4, 1/2, 1, 2 in 5 folds of the newsgroups training posts
LONGEST = 4  # most words of an answer by overlap
WORD = re.compile(r"\w+(?:[-'’.,]\w+)*")


def fit_floor(recipe: BaselineRecipe, train: Sequence[Conversation], folder: Path, features: Features) -> int:
    """Fit a floor and write it into `folder` as JSON and safetensors, never as a pickle; return the number of fitted
    values. features: see beside_embedding."""
    fitted = 0
    folder.mkdir(parents=True)
    base = recipe.model.base
    facts: dict[str, Any] = {}
    if base == "floor:majority":
        facts["label"] = min(Counter(c.label for c in train).most_common(), key=lambda pair: (-pair[1], pair[0]))[0]
    elif base == "floor:overlap":
        documents = dict.fromkeys(c.context for c in train)  # a set has another order in each process
        counts = Counter(word for text in documents for word in dict.fromkeys(_words(text)))
        facts |= {"documents": len(documents), "counts": dict(counts.most_common(50_000))}
    elif base.startswith("sklearn:"):
        vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
        texts = [c.context for c in train]
        x = features(vectorizer.fit_transform(texts), texts)
        classifier: Any = LinearSVC(C=0.5, random_state=recipe.train.seed)
        if base == "sklearn:complement_nb":
            classifier = ComplementNB(alpha=0.1)
        classifier.fit(x, [c.label for c in train])
        linear = isinstance(classifier, LinearSVC)
        weights = classifier.coef_ if linear else classifier.feature_log_prob_  # [classes, words]
        bias = classifier.intercept_ if linear else np.zeros(len(weights))
        if len(weights) == 1:  # for two classes a linear SVM has one weight vector, that of the second class
            weights, bias = np.vstack([-weights, weights]), np.concatenate([-bias, bias])
        fitted = weights.size + bias.size
        arrays = {"idf": vectorizer.idf_, "weights": weights, "bias": bias}
        # coef_ is in column order; safetensors would write its bytes as rows
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, folder / WEIGHTS)
        facts |= {"labels": [str(c) for c in classifier.classes_], "words": vectorizer.get_feature_names_out().tolist()}
    (folder / FACTS).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    return fitted


def load_floor(recipe: BaselineRecipe, folder: Path) -> Callable[[Sequence[Conversation]], list[Prediction]]:
    """A function from questions to the floor's answers. Raises RunError if the encoder has changed since training."""
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if recipe.model.base in ("floor:majority", "floor:unanswerable"):
        return lambda questions: [Prediction(facts.get("label", UNANSWERABLE), 0, True) for _ in questions]
    if recipe.model.base == "floor:overlap":
        return lambda questions: [Prediction(_by_overlap(c, facts), 0, True) for c in questions]
    arrays = load_file(folder / WEIGHTS)
    vectorizer = TfidfVectorizer(sublinear_tf=True, vocabulary={word: i for i, word in enumerate(facts["words"])})
    vectorizer.idf_ = arrays["idf"]
    features, _ = beside_embedding(recipe)
    if encoder := recipe.encoder:
        trained = json.loads((folder.parent / "manifest.json").read_text())["base"]
        current = identity(encoder.base, encoder.revision)
        if current["commit"] != trained["commit"] or not trained["sha256"].items() <= current["sha256"].items():
            raise RunError(f"model.embedder {encoder.base} has changed since training; restore that version")

    def classify(questions: Sequence[Conversation]) -> list[Prediction]:
        texts = [c.context for c in questions]
        scores = features(vectorizer.transform(texts), texts) @ arrays["weights"].T + arrays["bias"]
        return [Prediction(facts["labels"][i], 0, True) for i in scores.argmax(axis=1)]

    return classify


def beside_embedding(recipe: BaselineRecipe) -> tuple[Features, int]:
    """A function that puts a text's embedding beside its TF-IDF, if the recipe names an encoder, and the number of
    parameters of that encoder. Raises RecipeError."""
    if not recipe.encoder:
        return lambda words, texts: words, 0
    from sft.baselines.embed import embedder

    try:
        embed, parameters = embedder(recipe.encoder, recipe.data.max_seq_length)
    except RecipeError as error:
        raise RecipeError(str(error).replace("model.base: ", "model.embedder: ")) from error
    return lambda words, texts: sparse.hstack([words, EMBEDDING * embed(texts)]).tocsr(), parameters


def _by_overlap(conversation: Conversation, facts: dict[str, Any]) -> str:
    """The run of at most LONGEST words, without the question's rare words, that is nearest to them: each adds its
    inverse document frequency over its distance (the distance-based baseline of Richardson et al. 2013, MCTest)."""

    def idf(word: str) -> float:
        return math.log((facts["documents"] + 1) / (facts["counts"].get(word, 0) + 1))

    rare = {word for word in _words(conversation.question) if idf(word) > 1}
    words_at = [(m.group().lower(), m.start(), m.end()) for m in WORD.finditer(conversation.context)]
    places = [(i, idf(word)) for i, (word, _, _) in enumerate(words_at) if word in rare]
    best_score, answer = -math.inf, ""
    for first in range(len(words_at)):
        for last in range(first, min(first + LONGEST, len(words_at))):
            words = [word for word, _, _ in words_at[first : last + 1]]
            text = conversation.context[words_at[first][1] : words_at[last][2]]
            if rare & set(words) or idf(words[0]) < 2 or idf(words[-1]) < 2 or re.search(r"[.;:!?]\s|\n", text):
                continue
            near = sum(weight / (1 + min(abs(i - first), abs(i - last))) for i, weight in places)
            score = near + 0.1 * sum(map(idf, words)) / len(words)
            if score > best_score:
                best_score, answer = score, text
    return answer or UNANSWERABLE


def _words(text: str) -> list[str]:
    return [m.group().lower() for m in WORD.finditer(text)]
