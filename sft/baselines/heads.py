"""Heads of an encoder: the rows that it trains on, the scores on the dev slice, and its answers.

Heads do not depend on optimizers, and sft/baselines/trainer.py does not depend on labels and spans.
"""

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from scipy.special import log_softmax
from sklearn.metrics import f1_score
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.cache import CacheUnwritable
from data.conversation import Conversation
from data.encode.qa_windows import load_windows, make_windows
from data.encode.tokens import encode_texts
from data.readers.squad import UNANSWERABLE
from data.terminal import print, quoted
from eval.metrics import squad_scores
from eval.prediction import Prediction
from eval.spans import SpanAnswer, best_spans, choose, tune_threshold
from sft.baselines.data import Split
from sft.baselines.encoder import (
    PER_TOKEN,
    Row,
    load_encoder,
    load_tokenizer,
    load_trained,
    pad,
    predict,
)
from sft.errors import RunError
from sft.models.load import default_device
from sft.models.resolve import cache_dir
from sft.recipe.baseline_schema import BaselineRecipe

CHOSEN = "chosen.json"


class Head(ABC):
    """Task of an encoder. `rows`: the training rows. `notes`: lines for the user before training."""

    rows: Sequence[Row]

    def __init__(self, recipe: BaselineRecipe) -> None:
        self.recipe, self.tokenizer, self.notes = recipe, load_tokenizer(recipe.model), list[str]()

    def load(self) -> PreTrainedModel:
        return load_encoder(self.recipe.model, self.recipe.objective, self.recipe.train.seed)

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return pad(rows, self.tokenizer)

    @abstractmethod
    def score_dev(self, model: nn.Module) -> dict[str, float]:
        """Loss and metrics on the dev slice, which chooses the checkpoint; metrics are from 0 to 100, except
        perplexity."""

    @abstractmethod
    def choose(self, model: nn.Module) -> dict[str, Any]:
        """What scoring needs besides the weights, chosen on the dev slice: labels, or the no-answer threshold."""


class Classifier(Head):
    def __init__(self, recipe: BaselineRecipe, split: Split) -> None:
        super().__init__(recipe)
        self.labels = sorted({c.label for c in split.train})
        number = {label: i for i, label in enumerate(self.labels)}
        length = recipe.data.max_seq_length
        rows, cut = encode_texts([c.context for c in split.train], self.tokenizer, length)
        self.rows = [row | {"labels": number[c.label]} for row, c in zip(rows, split.train, strict=True)]
        self.dev, _ = encode_texts([c.context for c in split.dev], self.tokenizer, length)
        self.gold = np.array([number.get(c.label, -1) for c in split.dev])  # -1: not a training label
        if cut:
            self.notes.append(f"{cut} of {len(rows)} posts are longer than data.max_seq_length {length} and were cut")

    def load(self) -> PreTrainedModel:
        model: Any = load_encoder(self.recipe.model, "classification", self.recipe.train.seed, self.labels)
        if model.drawn:
            trained = ", and trained with the head" if self.recipe.tune.method == "linear_probe" else ""
            self.notes.append(f"{self.recipe.model.base} has no pooler: a new one is drawn at random{trained}")
        return cast(PreTrainedModel, model)

    def score_dev(self, model: nn.Module) -> dict[str, float]:
        logits, known = class_logits(model, self.recipe, self.dev, self.tokenizer), self.gold >= 0
        loss = -log_softmax(logits[known], axis=1)[np.arange(known.sum()), self.gold[known]].mean()
        chosen = logits.argmax(axis=1)
        macro = f1_score(self.gold[known], chosen[known], average="macro", zero_division=0)
        accuracy = (chosen == self.gold).mean()
        return {"loss": float(loss), "accuracy": 100 * float(accuracy), "macro_f1": 100 * float(macro)}

    def choose(self, model: nn.Module) -> dict[str, Any]:
        return {"labels": self.labels}


class SpanReader(Head):
    def __init__(self, recipe: BaselineRecipe, split: Split) -> None:
        super().__init__(recipe)
        windows, data = windows_of(recipe, split.train, self.tokenizer, cached=True), recipe.data
        self.rows = inputs_of(windows, self.tokenizer, "start_positions", "end_positions")
        self.dev = split.dev
        self.dev_windows = windows_of(recipe, self.dev, self.tokenizer, cached=True) if self.dev else None
        self.notes.append(f"{len(windows)} windows of at most {data.max_seq_length} tokens")
        if cut := sum(windows["cut_question"][:]):
            longest = f"data.max_query_length {data.max_query_length}"
            self.notes.append(f"{cut} questions are longer than {longest} and were cut")
        if lost := sum(windows["lost_answer"][:]):
            self.notes.append(f"{lost} answers fit no window and are trained as no answer; raise data.max_seq_length")

    def score_dev(self, model: nn.Module) -> dict[str, float]:
        answers, loss = read_spans(model, self.recipe, self.dev, self.tokenizer, self.dev_windows)
        texts = choose(answers, best_threshold(self.recipe, self.dev, answers), self.recipe.task == "squad_v2")
        scores = [squad_scores(c.answers, text, c.context) for c, text in zip(self.dev, texts, strict=True)]
        return {"loss": loss} | {name: 100 * float(np.mean([s[name] for s in scores])) for name in ("exact", "f1")}

    def choose(self, model: nn.Module) -> dict[str, Any]:
        if not self.dev:
            return {"null_threshold": 0.0}
        answers, _ = read_spans(model, self.recipe, self.dev, self.tokenizer, self.dev_windows)
        threshold = best_threshold(self.recipe, self.dev, answers)
        return {"null_threshold": threshold if math.isfinite(threshold) else None}  # null: always answer


def load_run(
    run: Path, recipe: BaselineRecipe, base: bool = False
) -> tuple[nn.Module, PreTrainedTokenizerBase, dict[str, Any]]:
    """The run's model (`base`: the untrained one), tokenizer, and content of chosen.json. Raises RunError if the run is
    not finished."""
    if not (run / CHOSEN).is_file():
        raise RunError(f"{run}: is not finished; continue it with `graft train --resume {quoted(run)}`")
    chosen = json.loads((run / CHOSEN).read_text())
    seed = recipe.train.seed
    if base:
        model: Any = load_encoder(recipe.model, recipe.objective, seed)
    else:
        model = load_trained(run, recipe.objective, recipe.model, seed, chosen.get("labels", ()))
    return model.to(default_device()), load_tokenizer(recipe.model), chosen


def load_answerer(run: Path, recipe: BaselineRecipe) -> Callable[[Sequence[Conversation]], list[Prediction]]:
    """A function from questions to the run's answers: a label with its probability, or a quote or UNANSWERABLE."""
    model, tokenizer, chosen = load_run(run, recipe)

    def classify(questions: Sequence[Conversation]) -> list[Prediction]:
        rows, _ = encode_texts([c.context for c in questions], tokenizer, recipe.data.max_seq_length)
        logits = class_logits(model, recipe, rows, tokenizer)
        best = zip(logits.argmax(axis=1), np.exp(log_softmax(logits, axis=1)), strict=True)
        return [Prediction(chosen["labels"][i], 0, True, probability=float(p[i])) for i, p in best]

    def read(questions: Sequence[Conversation]) -> list[Prediction]:
        answers, _ = read_spans(model, recipe, questions, tokenizer)
        threshold = math.inf if chosen["null_threshold"] is None else chosen["null_threshold"]
        texts = choose(answers, threshold, recipe.task == "squad_v2")
        return [
            Prediction(text, 0, True, probability=a.null_probability if text == UNANSWERABLE else a.probability)
            for a, text in zip(answers, texts, strict=True)
        ]

    return classify if recipe.objective == "classification" else read


def class_logits(
    model: nn.Module, recipe: BaselineRecipe, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase
) -> np.ndarray:
    """Logits [rows, labels] in float32."""
    bf16 = bool(recipe.train.bf16)
    return np.array([logits for (logits,) in predict(model, rows, tokenizer, ("logits",), bf16)])


def read_spans(
    model: nn.Module,
    recipe: BaselineRecipe,
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    windows: Dataset | None = None,
) -> tuple[list[SpanAnswer], float]:
    """An answer to each question, and the mean loss of the windows' start and end."""
    windows = windows or windows_of(recipe, conversations, tokenizer)
    logits = predict(model, inputs_of(windows, tokenizer), tokenizer, PER_TOKEN, bool(recipe.train.bf16))
    starts, ends = [start for start, _ in logits], [end for _, end in logits]
    targets = zip(starts, windows["start_positions"][:], ends, windows["end_positions"][:], strict=True)
    loss = np.mean([-(log_softmax(s)[i] + log_softmax(e)[j]) / 2 for s, i, e, j in targets])
    answers = best_spans(windows, starts, ends, conversations, recipe.eval.n_best, recipe.eval.max_answer_length)
    return answers, float(loss)


def windows_of(
    recipe: BaselineRecipe, questions: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, cached: bool = False
) -> Dataset:
    """Questions as windows of the recipe's lengths; `cached`: from the cache folder if it has them."""
    lengths = recipe.data.max_seq_length, recipe.data.doc_stride, recipe.data.max_query_length
    if cached:
        try:
            return load_windows(questions, tokenizer, cache_dir() / "windows", *lengths)
        except CacheUnwritable as error:
            print(f"{error}; the passages are cut for this run alone", file=sys.stderr, flush=True)
    return make_windows(questions, tokenizer, *lengths)


def inputs_of(windows: Dataset, tokenizer: PreTrainedTokenizerBase, *targets: str) -> Sequence[Row]:
    """The columns that the model reads, and targets."""
    inputs = [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]
    return cast(Sequence[Row], windows.select_columns([*inputs, *targets]))


def best_threshold(recipe: BaselineRecipe, questions: Sequence[Conversation], answers: Sequence[SpanAnswer]) -> float:
    """The null_difference above which a question counts as unanswerable: the best by EM on these questions, with those
    without an answer weighted to the share that the recipe expects; inf for squad_v1."""
    if recipe.task == "squad_v1":
        return math.inf
    texts = np.array(
        [squad_scores(c.answers, a.text, c.context)["exact"] for c, a in zip(questions, answers, strict=True)]
    )
    nulls = np.array([squad_scores(c.answers, "", c.context)["exact"] for c in questions])
    weights, expected, actual = np.ones(len(nulls)), recipe.eval.unanswerable_share, nulls.mean()
    if expected and 0 < actual < 1:
        weights = np.where(nulls == 1, expected / actual, (1 - expected) / (1 - actual))
    scores = (weights * texts).tolist(), (weights * nulls).tolist()
    return tune_threshold([a.null_difference for a in answers], *scores)[0]
