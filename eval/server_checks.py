"""Checks that a server does what its model does in-process: prompt ids, first token, end of the answer, score."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.encode.pack import common_prefix
from eval.prediction import Prediction

TOP = 5
# nats: how much less likely in-process the server's first token may be. bfloat16 rounds logits near 20 to 1/8, and
# the merge of a quantized base moves them as much; another adapter or template moves the argmax by whole nats.
MARGIN = 0.5
LIKELY = 0.1  # least probability, at the server or in-process, of a first token to compare: rarer ones are noise


@dataclass(frozen=True)
class LocalAnswer:
    """In-process, for one prompt: its ids, the greedy answer, log-probabilities [vocab] of the first token."""

    prediction: Prediction
    prompt: list[int]
    first: torch.Tensor


@dataclass(frozen=True)
class ServerAnswer:
    """From the server, for the same prompt; None for what it does not report. top: log-probabilities of the likeliest
    first tokens."""

    prediction: Prediction
    prompt: list[int] | None = None
    answer: list[int] | None = None
    top: dict[int, float] | None = None


Pairs = Sequence[tuple[LocalAnswer, ServerAnswer]]  # both answers to each prompt


@dataclass(frozen=True)
class Check:
    """passed: None if the server does not report what the check needs, which counts as not passed. differing: indices
    of the prompts that differ."""

    name: str
    passed: bool | None
    text: str
    numbers: dict[str, Any]
    differing: Sequence[int] = ()


def check_render(pairs: Pairs) -> Check:
    """The token ids of the prompts, as the server renders them, equal those of training."""
    if any(server.prediction.asked and server.prompt is None for _, server in pairs):
        return Check("render", None, "not checked: the server returns no prompt_token_ids (vLLM does)", {})
    differing = [i for i, (local, server) in enumerate(pairs) if local.prompt != server.prompt]
    equal, n = len(pairs) - len(differing), len(pairs)
    text = f"token ids of {equal} of {n} prompts equal the training render"
    return Check("render", not differing, text, {"prompts": n, "equal": equal}, differing)


def check_stop(pairs: Pairs) -> Check:
    """Answers end at the same place and with the same token as in-process.

    The ends of two answers are compared if their tokens are equal up to the end of the shorter one: rounding may decide
    a near tie differently, and the answers then diverge. If more than half of the answers do, the check does not pass.
    """
    if any(server.prediction.asked and server.answer is None for _, server in pairs):
        return Check("stop", None, "not checked: the server returns no token_ids (vLLM does)", {})
    differing, equal, diverged, cut = [], 0, 0, 0
    for i, (local, server) in enumerate(pairs):
        own, answer = list(local.prediction.ids), server.answer or []
        ended = local.prediction.finished, server.prediction.finished
        if common_prefix(own, answer) < min(len(own), len(answer)):
            diverged += 1
            cut += ended == (True, False)
        elif own == answer and ended[0] == ended[1] and server.prediction.asked:
            equal += ended[0]
        else:
            differing.append(i)
    text = f"{equal} answers end by the same token as in-process, {len(differing)} do not"
    text += f"; {diverged} diverged before their end" if diverged else ""
    text += f", {cut} of them up to the length limit" if cut else ""
    if not equal and not differing:
        text += "; no answer ended in-process, so this proves nothing"
    if too_few := diverged > len(pairs) / 2:
        text += "; more than half diverged, so this proves too little"
    numbers = {"equal": equal, "wrong": len(differing), "diverged": diverged, "diverged_and_cut": cut}
    return Check("stop", bool(equal) and not differing and not too_few, text, numbers, differing)


def check_first_token(pairs: Pairs, margin: float | None = None) -> Check:
    """The server's likeliest first token is also the likeliest in-process, within the margin in nats, and the
    log-probabilities of likely first tokens differ by at most the margin. margin: MARGIN if None."""
    if any(server.prediction.asked and server.top is None for _, server in pairs):
        return Check("first token", None, "not checked: the server returns no logprobs by token id (vLLM does)", {})
    margin = MARGIN if margin is None else margin
    differing: list[int] = []
    gaps, spreads, equal_sets, same = [0.0], [0.0], 0, 0
    for i, (local, server) in enumerate(pairs):
        if not (top := server.top):
            differing.append(i)
            continue
        choice = max(top, key=lambda token: top[token])
        gaps.append(float(local.first.max()) - _logprob(local.first, choice))
        spreads.append(_spread(local.first, top))
        same += choice == int(local.first.argmax())
        equal_sets += set(top) == set(local.first.topk(len(top)).indices.tolist())
        if not (gaps[-1] <= margin and spreads[-1] <= margin):  # also if one is not a number
            differing.append(i)
    text = (
        f"{same} of {len(pairs)} first tokens are the same, {len(differing)} beyond the margin of {margin} nats (at "
        f"most {max(gaps):.3f}; likely ones differ by at most {max(spreads):.3f}); {equal_sets} sets of {TOP} equal"
    )
    numbers = {
        "same": same, "beyond_margin": len(differing), "margin_nats": margin, "largest_gap_nats": round(max(gaps), 4),
        "largest_difference_nats": round(max(spreads), 4), "top": TOP, "equal_sets": equal_sets,
    }  # fmt: skip
    return Check("first token", not differing, text, numbers, differing)


def _spread(first: torch.Tensor, top: dict[int, float]) -> float:
    """The largest difference in nats of a likely token's log-probability. A token that the server does not list counts
    with the lowest log-probability listed, which is its upper bound."""
    likely, least = math.log(LIKELY), min(top.values())
    tokens = {i for i, p in top.items() if p >= likely} | set((first >= likely).nonzero().flatten().tolist())
    differences = (abs(_logprob(first, i) - top[i]) if i in top else float(first[i]) - least for i in tokens)
    return max([0.0, *differences])


def _logprob(first: torch.Tensor, token: int) -> float:
    return float(first[token]) if token < len(first) else float("-inf")


def check_score(local: dict[str, Any], server: dict[str, Any]) -> Check:
    """Each total score over HTTP lies in the 95 % interval of the one in-process, or the reverse. Both are total scores
    of eval.results.summarize."""
    names = [name for name in local if f"{name}_95" in local]
    passed = all(_within(server[n], local[f"{n}_95"]) or _within(local[n], server[f"{n}_95"]) for n in names)
    text = ", ".join(
        "{} {:.1f} over HTTP, {:.1f} [{:.1f} - {:.1f}] in-process".format(n, server[n], local[n], *local[f"{n}_95"])
        for n in names
    )
    return Check("score", passed, text, {"server": server, "in_process": local})


def _within(value: float, bounds: Sequence[float]) -> bool:
    return bounds[0] <= value <= bounds[1]
