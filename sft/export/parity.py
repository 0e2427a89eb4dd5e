"""Whether two models answer alike on held-out rows: their logits along the gold answers, and what they write."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.conversation import Conversation
from data.encode.chat import Example
from data.encode.pack import build_pack
from data.progress import track
from data.readers.source import read_all
from data.terminal import print
from eval.predict import generate
from eval.prediction import Prediction
from eval.results import limit_questions, score, summarize
from eval.stats import wilson_interval
from sft.errors import ParityError, RunError
from sft.export.candidate import Trained
from sft.export.formats import UNROUNDED, load_format
from sft.models.capabilities import takes_packs
from sft.models.load import compute_dtype, default_device
from sft.models.target import load_run
from sft.recipe.schema import Eval, Recipe
from sft.training.attention import pack_inputs
from sft.training.examples import encode_held_out, held_out_conversations, other_questions

NEAR_TIE = 0.25  # nats: the other token is at least 78 % as likely
FLIPS = 20  # in the record, those of the largest margin
LOGITS = 64  # positions of an answer whose logits are stored: with a vocabulary of 150,000 they take 37 MiB


@dataclass(frozen=True)
class HeldOut:
    """`examples` are the gold answers of `conversations`, without those longer than data.max_length."""

    task: str
    conversations: Sequence[Conversation]
    examples: Sequence[Example]
    too_long: int
    settings: Eval


@dataclass(frozen=True)
class ExampleTrace:
    """A model's predictions along one example: logits [at most LOGITS, vocab] in fp32 of its first answer tokens; the
    most likely token in place of each of its M answer tokens, and after each of its T tokens."""

    answer_logits: torch.Tensor
    answer: torch.Tensor
    argmax: torch.Tensor


@dataclass(frozen=True)
class ModelTrace:
    """A model's predictions along the gold answers, and its own answer to each conversation's prompt."""

    examples: list[ExampleTrace]
    answers: list[Prediction]


def trace_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, name: str, packed: bool
) -> ModelTrace:
    """A model's predictions on held-out data. `packed`: whether the model takes a pack's mask."""
    examples = [_trace_example(model, example) for example in track(held_out.examples, name)]
    print(f"{name}: generating {len(held_out.conversations)} answers", flush=True)
    length, tokens = held_out.settings.max_new_tokens, held_out.settings.batch_tokens
    return ModelTrace(examples, generate(model, tokenizer, held_out.conversations, length, tokens, packed))


@torch.inference_mode()
def _trace_example(model: PreTrainedModel, example: Example) -> ExampleTrace:
    """Teacher-forced over prompt and gold answer."""
    pack = build_pack([[example]])
    inputs = pack_inputs(model, pack, next(model.parameters()).device)
    del inputs["logits_to_keep"]
    logits = model(**inputs, use_cache=False).logits[0].float()
    argmax = logits.argmax(-1).cpu()
    return ExampleTrace(logits[pack.source[:LOGITS]].cpu(), argmax[pack.source], argmax)


def compare(before: ModelTrace, after: ModelTrace, held_out: HeldOut) -> dict[str, Any]:
    """How two models differ. Over the first LOGITS tokens of each answer: logit differences, and KL(before || after) in
    nats. Over the answer tokens and over all tokens: the share with the same argmax. The task's score of both."""
    pairs = list(zip(before.examples, after.examples, strict=True))
    answers = torch.cat([a.answer == b.answer for a, b in pairs])
    tokens = torch.cat([a.argmax == b.argmax for a, b in pairs])
    largest, total, count, kl = 0.0, 0.0, 0, []
    for a, b in pairs:  # one at a time: all differences together take as much memory as the logits
        difference = (a.answer_logits - b.answer_logits).abs()
        largest, total = max(largest, difference.max().item()), total + difference.double().sum().item()
        count += difference.numel()
        kl.append(_kl(a.answer_logits, b.answer_logits))
    flips = [
        _flip(e.where, a, b, int(i))
        for e, (a, b) in zip(held_out.examples, pairs, strict=False)
        for i in (a.answer != b.answer).nonzero()
    ]
    divergence = torch.cat(kl)
    return {
        "answer_tokens": len(answers),
        "answer_argmax_agreement": round(answers.float().mean().item(), 5),
        "flips": sorted(flips, key=_margin, reverse=True)[:FLIPS],
        "all_tokens": len(tokens),
        "all_argmax_agreement": round(tokens.float().mean().item(), 5),
        "compared_logits_of": len(divergence),
        "max_logit_difference": round(largest, 5),
        "mean_logit_difference": round(total / count, 6),
        "mean_kl_nats": round(divergence.mean().item(), 8),
        "max_kl_nats": round(divergence.max().item(), 8),
        "same_answers": sum(a.text == b.text for a, b in zip(before.answers, after.answers, strict=True)),
        "task_score": {"adapter": _score(held_out, before), "merged": _score(held_out, after)},
    }


def _margin(flip: dict[str, Any]) -> float:
    return math.inf if flip["margin_nats"] is None else float(flip["margin_nats"])


def _flip(where: str, before: ExampleTrace, after: ExampleTrace, place: int) -> dict[str, Any]:
    """An answer token that differs. margin_nats: by how much the first model prefers its own token to that of the
    other; None beyond the stored logits. Without the folder of the data: an export may be published."""
    mine, other = int(before.answer[place]), int(after.answer[place])
    margin = None
    if place < len(before.answer_logits):
        logits = before.answer_logits[place]
        margin = round(float(logits[mine] - logits[other]), 4)
    return {"where": where.rpartition("/")[2], "answer_token": place, "ids": [mine, other], "margin_nats": margin}


def _score(held_out: HeldOut, trace: ModelTrace) -> dict[str, Any]:
    """Percentages with their 95 % intervals."""
    settings = held_out.settings
    scored = score(held_out.task, held_out.conversations, trace.answers, settings.metrics, settings.pattern)
    return dict(summarize(held_out.task, scored)["scores"]["total"])


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL divergence of each position, [M]. p, q: logits [M, vocab]."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)  # rounding makes some a little negative


class ParityCheck:
    """Compares models with a run's adapter on the base of training, which is traced once."""

    def __init__(self, trained: Trained, held_out: HeldOut, name: str = "adapter on base") -> None:
        self.trained, self.held_out = trained, held_out
        loaded = load_run(trained.run, trained.recipe.model.dtype, trained.adapter)
        self.before = trace_model(loaded.model, loaded.tokenizer, held_out, name, loaded.packed)

    def compare(self, folder: Path, form: str = "") -> dict[str, Any]:
        """How far the answers of a merged or converted model (`form`: its format) are from the adapter's. Both compute
        in the same dtype, so that only the weights' rounding differs."""
        model = load_format(form, folder, compute_dtype(self.trained.recipe.model, default_device()))
        name = form or "merged model"
        after = trace_model(model, self.trained.tokenizer, self.held_out, name, takes_packs(model))
        return compare(self.before, after, self.held_out)


def read_held_out(run: Path, trained: Trained, data: str | None) -> HeldOut:
    """Conversations of `data`, or those that the recipe holds out; at most export.prompts. Raises RunError if none."""
    recipe = trained.recipe
    own = held_out_conversations
    conversations = read_all(other_questions(recipe, data), recipe.task) if data else own(recipe)
    if not conversations:
        raise RunError(f"{run}: has no held-out data to check the merge on; name some with --data FILE")
    chosen = limit_questions(conversations, recipe.export.prompts)
    examples, too_long = encode_held_out(chosen, trained.tokenizer, recipe.data.max_length)
    return HeldOut(recipe.task, chosen, examples, too_long, recipe.eval)


def least_agreement(recipe: Recipe, form: str) -> tuple[str, float]:
    """The key of the recipe's export section that limits how far a format may disagree, and its value."""
    if form and form not in UNROUNDED:
        return "min_format_agreement", recipe.export.min_format_agreement
    return "min_agreement", recipe.export.min_agreement


def check_agreement(measured: dict[str, Any], recipe: Recipe, form: str = "") -> None:
    """Raise ParityError if a merged or converted model agrees on fewer answer tokens than the recipe demands.

    A few tokens can't tell 99 % from 98 %: less is allowed, with a line, if the demanded share is in the 95 % interval
    and each token that differs was nearly as likely as the adapter's, which the rounding of weights can turn.
    """
    agreement, tokens = measured["answer_argmax_agreement"], measured["answer_tokens"]
    key, least = least_agreement(recipe, form)
    if agreement >= least:
        return
    flips = measured["flips"]
    places = [f"{f['where']}, answer token {f['answer_token']}, margin {f['margin_nats']} nats" for f in flips[:3]]
    shown = f"They differ at {'; '.join(places)}. " if places else ""
    who, agreeing = f"{form or 'merged'} and adapter agree on", round(agreement * tokens)
    near = len(flips) == tokens - agreeing and all(_margin(flip) < NEAR_TIE for flip in flips)
    if near and wilson_interval(agreeing, tokens)[1] >= least:
        print(
            f"{who} {agreeing} of {tokens} answer tokens, too few to tell {agreement:.2%} from export.{key} "
            f"{least:.2%}. {shown}These are near ties, which rounding turns",
            flush=True,
        )
    else:
        remedy = "Use a format with more bits" if form else "Set export.base to the other base, export.dtype: float32"
        raise ParityError(
            f"{who} {agreement:.2%} of the answer tokens, less than export.{key} {least:.2%}; nothing was written. "
            f"{shown}{remedy}, or pass --allow-mismatch"
        )
