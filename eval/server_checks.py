"""Whether a server does with a prompt what the model it serves does in-process: ids, first token, end, score."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from data.encode.pack import common_prefix

TOP = 5
# nats: how much less likely in-process the server's first token may be. bfloat16 rounds logits near 20 to 1/8, and
# the merge of a quantized base moves them by as much; another adapter or template moves the argmax by whole nats.
MARGIN = 0.5
LIKELY = 0.1  # probability, at the server or in-process, from which a first token is compared: rare ones rest on noise


@dataclass(frozen=True)
class Here:
    """One prompt in-process: its ids, the greedy answer with the token that ends it, and the first token's
    log-probabilities [vocab]."""

    prompt: list[int]
    answer: list[int]
    ended: bool
    first: torch.Tensor


@dataclass(frozen=True)
class There:
    """The same at the server; None where it does not tell. top: log-probabilities of the likeliest first tokens.
    asked: False where the prompt is too long for the server."""

    prompt: list[int] | None
    answer: list[int] | None
    ended: bool
    top: dict[int, float] | None
    text: str
    asked: bool = True


@dataclass(frozen=True)
class Check:
    """passed: None where the server does not tell what the check needs, which is no pass; `first`: the number of the
    first prompt that differs."""

    name: str
    passed: bool | None
    text: str
    numbers: dict[str, Any]
    first: int | None = None


def check_render(here: Sequence[Here], there: Sequence[There]) -> Check:
    """Token ids of the prompts, as the server renders them, equal those of training."""
    if any(t.asked and t.prompt is None for t in there):
        return Check("render", None, "not made: the server returns no prompt_token_ids (vLLM does)", {})
    wrong = [i for i, (h, t) in enumerate(zip(here, there, strict=True)) if h.prompt != t.prompt]
    equal, n = len(here) - len(wrong), len(here)
    text = f"token ids of {equal} of {n} prompts equal the training render"
    return Check("render", not wrong, text, {"prompts": n, "equal": equal}, wrong[0] if wrong else None)


def check_stop(here: Sequence[Here], there: Sequence[There]) -> Check:
    """Answers end where and with what they end in-process.

    Compared where the tokens are the same up to the end of the shorter answer: rounding may turn a near tie, and what
    follows then has another end for a good reason. Where that happens to more than half of the answers, too few ends
    are compared to pass.
    """
    if any(t.asked and t.answer is None for t in there):
        return Check("stop", None, "not made: the server returns no token_ids (vLLM does)", {})
    wrong, equal, diverged, cut = [], 0, 0, 0
    for i, (h, t) in enumerate(zip(here, there, strict=True)):
        answer = t.answer or []
        if common_prefix(h.answer, answer) < min(len(h.answer), len(answer)):
            diverged += 1
            cut += h.ended and not t.ended
        elif h.answer == answer and h.ended == t.ended and t.asked:
            equal += h.ended
        else:
            wrong.append(i)
    text = f"{equal} answers end by the same token as in-process, {len(wrong)} do not"
    text += f"; {diverged} went other ways before" if diverged else ""
    text += f", {cut} of them to the limit of length" if cut else ""
    if not equal and not wrong:
        text += "; no answer ended in-process, so nothing is proven"
    if few := diverged > len(here) / 2:
        text += "; more than half went other ways, so too little is proven"
    numbers = {"equal": equal, "wrong": len(wrong), "diverged": diverged, "diverged_and_cut": cut}
    return Check("stop", bool(equal) and not wrong and not few, text, numbers, wrong[0] if wrong else None)


def check_first_token(here: Sequence[Here], there: Sequence[There], margin: float = MARGIN) -> Check:
    """The server's likeliest first token is that of the model in-process, or nearly as likely there; and every likely
    first token has about the same log-probability on both sides."""
    if any(t.asked and t.top is None for t in there):
        return Check("first token", None, "not made: the server returns no logprobs by token id (vLLM does)", {})
    wrong: list[int] = []
    gaps, spreads, sets, same = [0.0], [0.0], 0, 0
    for i, (h, t) in enumerate(zip(here, there, strict=True)):
        if not t.top:
            wrong.append(i)
            continue
        choice = max(t.top, key=lambda token: t.top[token] if t.top else 0.0)
        gaps.append(float(h.first.max()) - _logprob(h.first, choice))
        spreads.append(_spread(h.first, t.top))
        same += choice == int(h.first.argmax())
        sets += set(t.top) == set(h.first.topk(len(t.top)).indices.tolist())
        if not (gaps[-1] <= margin and spreads[-1] <= margin):  # also where one is not a number
            wrong.append(i)
    n = len(here)
    text = (
        f"{same} of {n} first tokens are the same, {len(wrong)} beyond the margin of {margin} nats (at most "
        f"{max(gaps):.3f}; likely ones differ by at most {max(spreads):.3f}); {sets} sets of {TOP} equal"
    )
    numbers = {
        "same": same, "beyond_margin": len(wrong), "margin_nats": margin, "largest_gap_nats": round(max(gaps), 4),
        "largest_difference_nats": round(max(spreads), 4), "top": TOP, "equal_sets": sets,
    }  # fmt: skip
    return Check("first token", not wrong, text, numbers, wrong[0] if wrong else None)


def _spread(first: torch.Tensor, top: dict[int, float]) -> float:
    """Nats by which the log-probability of a likely token differs most. Of a token that the server does not list it
    tells only that it is no likelier than those listed."""
    likely = math.log(LIKELY)
    listed = [abs(_logprob(first, i) - p) for i, p in top.items() if max(p, _logprob(first, i)) >= likely]
    unlisted = [
        float(first[i]) - min(top.values()) for i in (first >= likely).nonzero().flatten().tolist() if i not in top
    ]
    return max([0.0, *listed, *unlisted])


def _logprob(first: torch.Tensor, token: int) -> float:
    return float(first[token]) if token < len(first) else float("-inf")


def check_score(here: dict[str, Any], there: dict[str, Any]) -> Check:
    """Each total score over HTTP lies in the 95 % interval of the one in-process, or that in the server's; both as
    eval.run.summarize gives them."""
    names = [name for name in here if f"{name}_95" in here]
    passed = all(_within(there[n], here[f"{n}_95"]) or _within(here[n], there[f"{n}_95"]) for n in names)
    text = ", ".join(
        f"{n} {there[n]:.1f} over HTTP, {here[n]:.1f} [{here[f'{n}_95'][0]:.1f} - {here[f'{n}_95'][1]:.1f}] in-process"
        for n in names
    )
    return Check("score", passed, text, {"server": there, "in_process": here})


def _within(value: float, bounds: Sequence[float]) -> bool:
    return bounds[0] <= value <= bounds[1]
