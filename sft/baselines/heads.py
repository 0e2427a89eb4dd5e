"""What an encoder is asked: the rows that it trains on, how the held-out slice is scored, and how it answers.

A head knows nothing of optimizers; sft/baselines/trainer.py knows nothing of labels and spans.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.metrics import f1_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.conversation import Conversation
from data.encode.qa_windows import Windows, load_windows, make_windows
from data.encode.tokens import encode_texts
from data.readers.squad import UNANSWERABLE
from eval.metrics import squad_scores
from eval.prediction import Prediction
from eval.spans import SpanAnswer, best_spans, choose, tune_threshold
from sft.baselines.data import Split
from sft.baselines.encoder import check_positions, load_encoder, load_tokenizer, load_trained, pad, predict
from sft.models.load import default_device
from sft.models.resolve import cache_dir
from sft.recipe.baseline_schema import BaselineRecipe

CHOSEN = "chosen.json"
Row = dict[str, Any]


class Head(Protocol):
    """`rows`: what a step draws from. `notes`: what a user should know of them before training."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    @property
    def rows(self) -> Sequence[Row]: ...
    @property
    def notes(self) -> list[str]: ...

    def load(self) -> PreTrainedModel: ...
    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]: ...
    def score_dev(self, model: torch.nn.Module, bf16: bool) -> dict[str, float]:
        """Of the slice that chooses the checkpoint: loss, and metrics from 0 to 100 (but perplexity)."""
        ...

    def choose(self, model: torch.nn.Module, bf16: bool) -> dict[str, Any]:
        """What scoring needs beside the weights, chosen on that slice: labels, or the no-answer threshold."""
        ...


class Classifier:
    def __init__(self, recipe: BaselineRecipe, split: Split) -> None:
        self.recipe, self.tokenizer = recipe, load_tokenizer(recipe.model)
        self.labels = sorted({c.label for c in split.train})
        number = {label: i for i, label in enumerate(self.labels)}
        length = recipe.data.max_seq_length
        rows, cut = encode_texts([c.context for c in split.train], self.tokenizer, length)
        self.rows = [row | {"labels": number[c.label]} for row, c in zip(rows, split.train, strict=True)]
        self.dev, _ = encode_texts([c.context for c in split.dev], self.tokenizer, length) if split.dev else ([], 0)
        self.gold = np.array([number.get(c.label, -1) for c in split.dev])  # -1: a label that training lacks
        self.notes = (
            [f"{cut} of {len(rows)} posts are longer than data.max_seq_length {length} and were cut"] if cut else []
        )

    def load(self) -> PreTrainedModel:
        model: Any = load_encoder(self.recipe.model, "classification", self.recipe.train.seed, self.labels)
        if model.drawn:
            trained = ", and trained with the head" if self.recipe.tune.method == "linear_probe" else ""
            self.notes.append(f"{self.recipe.model.base} has no pooler: it is drawn at random{trained}")
        return cast(PreTrainedModel, model)

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return pad(rows, self.tokenizer.pad_token_id) | {"labels": torch.tensor([row["labels"] for row in rows])}

    def score_dev(self, model: torch.nn.Module, bf16: bool) -> dict[str, float]:
        logits = np.array([row[0] for row in predict(model, self.dev, self.tokenizer.pad_token_id, ("logits",), bf16)])
        known = self.gold >= 0
        loss = -log_softmax(logits[known], axis=1)[np.arange(known.sum()), self.gold[known]].mean()
        chosen = logits.argmax(axis=1)
        macro = f1_score(self.gold[known], chosen[known], average="macro", zero_division=0)
        return {
            "loss": float(loss),
            "accuracy": 100 * float((chosen == self.gold).mean()),
            "macro_f1": 100 * float(macro),
        }

    def choose(self, model: torch.nn.Module, bf16: bool) -> dict[str, Any]:
        return {"labels": self.labels}


class SpanReader:
    def __init__(self, recipe: BaselineRecipe, split: Split) -> None:
        self.recipe, self.tokenizer = recipe, load_tokenizer(recipe.model)
        self.windows = read_windows(recipe, split.train, self.tokenizer)
        self.rows = WindowRows(self.windows, self.tokenizer)
        self.dev = split.dev
        self.dev_windows = read_windows(recipe, split.dev or split.train[:1], self.tokenizer)  # none without dev_share
        data = recipe.data
        self.notes = [f"{len(self.windows)} windows of at most {data.max_seq_length} tokens"]
        if cut := self.windows.cut_questions:
            self.notes.append(
                f"{cut} questions are longer than data.max_query_length {data.max_query_length} and were cut"
            )
        if lost := self.windows.lost_answers:
            self.notes.append(
                f"{lost} answers fit no window and are trained as if there were none; raise max_seq_length"
            )

    def load(self) -> PreTrainedModel:
        return load_encoder(self.recipe.model, "extractive_qa", self.recipe.train.seed)

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        targets = {name: torch.tensor([row[name] for row in rows]) for name in ("start_positions", "end_positions")}
        return pad(rows, self.tokenizer.pad_token_id) | targets

    def score_dev(self, model: torch.nn.Module, bf16: bool) -> dict[str, float]:
        answers, loss = read_spans(model, self.recipe, self.dev, self.dev_windows, self.tokenizer, bf16)
        threshold = best_threshold(self.recipe, self.dev, answers)
        texts = choose(answers, threshold, self.recipe.task == "squad_v2")
        scores = [squad_scores(c.answers, text) for c, text in zip(self.dev, texts, strict=True)]
        return {"loss": loss} | {name: 100 * float(np.mean([s[name] for s in scores])) for name in ("exact", "f1")}

    def choose(self, model: torch.nn.Module, bf16: bool) -> dict[str, Any]:
        if not self.dev:
            return {"null_threshold": 0.0}
        answers, _ = read_spans(model, self.recipe, self.dev, self.dev_windows, self.tokenizer, bf16)
        threshold = best_threshold(self.recipe, self.dev, answers)
        return {"null_threshold": threshold if math.isfinite(threshold) else None}  # null: always answer


class WindowRows(Sequence[Row]):
    def __init__(self, windows: Windows, tokenizer: PreTrainedTokenizerBase) -> None:
        self.windows, self.with_types = windows, "token_type_ids" in tokenizer.model_input_names

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> Any:
        window = self.windows.row(index)
        row = {"input_ids": window.input_ids, "start_positions": window.start, "end_positions": window.end}
        return row | ({"token_type_ids": window.token_type_ids} if self.with_types else {})


def head_of(recipe: BaselineRecipe, split: Split) -> Head:
    check_positions(recipe.model, recipe.data.max_seq_length, recipe.tune.peft.get("num_virtual_tokens") or 0)
    if recipe.objective == "mlm":
        from sft.baselines.mlm import MaskedLM

        return MaskedLM(recipe, split)
    return Classifier(recipe, split) if recipe.objective == "classification" else SpanReader(recipe, split)


def load_answerer(run: Path, recipe: BaselineRecipe) -> Callable[[Sequence[Conversation]], list[Prediction]]:
    """The run's answers, in order: a label with its probability, or a quote of the passage or UNANSWERABLE."""
    chosen: Mapping[str, Any] = json.loads((run / CHOSEN).read_text())
    tokenizer, labels, bf16 = load_tokenizer(recipe.model), chosen.get("labels", ()), bool(recipe.train.bf16)
    model = load_trained(run, recipe.objective, recipe.model, recipe.train.seed, labels)
    torch.nn.Module.to(model, default_device())

    def classify(asked: Sequence[Conversation]) -> list[Prediction]:
        rows, _ = encode_texts([c.context for c in asked], tokenizer, recipe.data.max_seq_length)
        logits = np.array([row[0] for row in predict(model, rows, tokenizer.pad_token_id, ("logits",), bf16)])
        probabilities = np.exp(log_softmax(logits, axis=1))
        best = logits.argmax(axis=1)
        return [
            Prediction(labels[i], 0, True, probability=float(p[i])) for i, p in zip(best, probabilities, strict=True)
        ]

    def read(asked: Sequence[Conversation]) -> list[Prediction]:
        data = recipe.data
        windows = make_windows(asked, tokenizer, data.max_seq_length, data.doc_stride, data.max_query_length)
        answers, _ = read_spans(model, recipe, asked, windows, tokenizer, bf16)
        threshold = math.inf if chosen["null_threshold"] is None else chosen["null_threshold"]
        texts = choose(answers, threshold, recipe.task == "squad_v2")
        return [
            Prediction(text, 0, True, probability=a.null_probability if text == UNANSWERABLE else a.probability)
            for a, text in zip(answers, texts, strict=True)
        ]

    return classify if recipe.objective == "classification" else read


def read_windows(
    recipe: BaselineRecipe, conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> Windows:
    data = recipe.data
    lengths = (data.max_seq_length, data.doc_stride, data.max_query_length)
    return load_windows(conversations, tokenizer, cache_dir() / "windows", *lengths)


def read_spans(
    model: torch.nn.Module,
    recipe: BaselineRecipe,
    conversations: Sequence[Conversation],
    windows: Windows,
    tokenizer: PreTrainedTokenizerBase,
    bf16: bool,
) -> tuple[list[SpanAnswer], float]:
    """An answer for each question, and the mean loss of the windows' start and end."""
    found = predict(model, WindowRows(windows, tokenizer), tokenizer.pad_token_id, ("start_logits", "end_logits"), bf16)
    starts, ends = [row[0] for row in found], [row[1] for row in found]
    targets = zip(starts, windows.start.tolist(), ends, windows.end.tolist(), strict=True)
    loss = np.mean([-(log_softmax(s)[i] + log_softmax(e)[j]) / 2 for s, i, e, j in targets])
    settings = recipe.eval
    answers = best_spans(windows, starts, ends, conversations, settings.n_best, settings.max_answer_length)
    return answers, float(loss)


def best_threshold(recipe: BaselineRecipe, questions: Sequence[Conversation], answers: Sequence[SpanAnswer]) -> float:
    """The null_difference above which there is no answer, by EM on these questions, those without an answer weighted
    to the share that the recipe expects; inf in version 1."""
    if recipe.task == "squad_v1":
        return math.inf
    texts = np.array([squad_scores(c.answers, a.text)["exact"] for c, a in zip(questions, answers, strict=True)])
    nulls = np.array([squad_scores(c.answers, "")["exact"] for c in questions])
    weights, expected, seen = np.ones(len(nulls)), recipe.eval.unanswerable_share, nulls.mean()
    if expected and 0 < seen < 1:
        weights = np.where(nulls == 1, expected / seen, (1 - expected) / (1 - seen))
    scores = (weights * texts).tolist(), (weights * nulls).tolist()
    return tune_threshold([a.null_difference for a in answers], *scores)[0]
