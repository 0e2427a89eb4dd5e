"""Whether two models answer alike: their logits on held-out examples, teacher-forced, and how far they differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from data.chat import Example
from data.errors import UserError
from data.pack import build_pack
from data.progress import track
from sft.attention import pack_inputs


class ParityError(UserError):
    """The merged model does not answer like the adapter, or like the base as if nothing had been learnt."""


@dataclass(frozen=True)
class Trace:
    """What a model says of one example: logits [M, vocab] in fp32 that predict its M answer tokens, the M tokens, and
    the most likely token after each of its T tokens."""

    answer_logits: torch.Tensor
    answer: torch.Tensor
    argmax: torch.Tensor


def trace(model: PreTrainedModel, examples: Sequence[Example], name: str) -> list[Trace]:
    """Teacher-forced over prompt and gold answer."""
    device = next(model.parameters()).device
    traces = []
    with torch.inference_mode():
        for example in track(examples, name):
            pack = build_pack([[example]])
            inputs = pack_inputs(model, pack, device)
            virtual = inputs.pop("logits_to_keep").min() - min(pack.source)
            logits = model(**inputs, use_cache=False).logits[0, int(virtual) :].float()
            answer = torch.tensor(pack.target)
            traces.append(Trace(logits[pack.source].cpu(), answer, logits.argmax(-1).cpu()))
    return traces


def compare(before: Sequence[Trace], after: Sequence[Trace]) -> dict[str, Any]:
    """Over the answer tokens: differences of logits, KL(before || after) in nats, the share with the same argmax (also
    over all tokens), and the share of answers whose every token is the most likely one."""
    pairs = list(zip(before, after, strict=True))
    differences = [(a.answer_logits - b.answer_logits).abs() for a, b in pairs]
    answers = torch.cat([a.answer_logits.argmax(-1) == b.answer_logits.argmax(-1) for a, b in pairs])
    tokens = torch.cat([a.argmax == b.argmax for a, b in pairs])
    divergence = torch.cat([_kl(a.answer_logits, b.answer_logits) for a, b in pairs])
    return {
        "answer_tokens": len(answers),
        "answer_argmax_agreement": round(answers.float().mean().item(), 5),
        "all_tokens": len(tokens),
        "all_argmax_agreement": round(tokens.float().mean().item(), 5),
        "max_logit_difference": round(max(d.max().item() for d in differences), 5),
        "mean_logit_difference": round(torch.cat([d.flatten() for d in differences]).mean().item(), 6),
        "mean_kl_nats": round(divergence.mean().item(), 8),
        "max_kl_nats": round(divergence.max().item(), 8),
        "teacher_forced_exact": {"adapter": teacher_forced_exact(before), "merged": teacher_forced_exact(after)},
    }


def teacher_forced_exact(traces: Sequence[Trace]) -> float:
    """Share of examples of which each gold token is the most likely one after those before it. A cheap proxy of the
    task's score, not the score: the model writes nothing by itself."""
    exact = [bool((t.answer_logits.argmax(-1) == t.answer).all()) for t in traces]
    return round(sum(exact) / len(exact), 5)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL divergence of each position, [M]. p, q: logits [M, vocab]."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)  # rounding makes some a little negative
