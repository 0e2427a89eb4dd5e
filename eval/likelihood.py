"""Log-likelihoods of given answers -> the likeliest label with its probability; how near "unanswerable" was.

What all prompts begin with (the instruction, few-shot examples) is computed once and kept. Behind it, prompts and their
candidate answers are packs (see data/encode/pack.py): a prompt stands once, its answers are branches, and where it pays
several prompts share a pack, and what they have in common. The head is computed where an answer's tokens are predicted.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import cast

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.conversation import Conversation, DataError, Message
from data.encode.chat import Example, encode, encode_prompt
from data.encode.pack import Layout, Pack, attention_mask, build_pack, common_prefix, plan_packs
from data.progress import Bar, track
from data.readers.squad import UNANSWERABLE
from eval.decode_batch import takes_rows
from eval.metrics import normalize_answer
from eval.predict import max_positions
from eval.prediction import Prediction

WINDOW = 64  # prompts whose packs are made at once: an answer repeats its prompt's ids until they are packed


@dataclass(frozen=True)
class _Choice:
    """Ids of a prompt, and of each of its candidate answers through the token that ends the turn."""

    prompt: list[int]
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + max(map(len, self.answers), default=0)


def answer_logprobs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    answers: Sequence[Sequence[str]],
    batch_tokens: int,
    packed: bool = True,
) -> list[list[float]]:
    """Log-likelihood of each candidate answer as the assistant's turn behind its prompt, in nats, in order.

    The sum over the answer's tokens and the token that ends the turn, encoded as in training (see data/encode/chat.py).
    batch_tokens: most tokens of a pack; only a longer prompt with one answer makes a larger one. `packed=False`
    computes one candidate at a time, for models that can't take a pack's mask: the same numbers.
    Raises DataError for an empty candidate, and where prompt and answer need more positions than the model has.
    """
    choices = [_choice(p, a, tokenizer, f"prompt {i}") for i, (p, a) in enumerate(zip(prompts, answers, strict=True))]
    for i, choice in enumerate(choices):
        if not _fits(choice, model.config):
            problem = f"{choice.tokens} tokens with its longest answer exceed the model's {max_positions(model.config)}"
            raise DataError(f"prompt {i}", f"{problem} positions; shorten the prompt or leave it out", "too long")
    return _logprobs(model, choices, batch_tokens, packed)


def classify_by_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    labels: Sequence[str],
    batch_tokens: int,
    packed: bool = True,
) -> list[Prediction]:
    """The likeliest label for each conversation and its probability among the labels (all different), in order.

    Labels are compared by the sum of their tokens' log-likelihoods, not by the mean per token. With the token that
    ends the turn, "the answer is just this label" are disjoint events, no label being the beginning of another one.
    So the sums are comparable, and their softmax is P(label | the answer is one of the labels). A mean is the
    probability of nothing, and favours long labels whose last tokens follow from the first.
    Prompts that need more positions than the model has are not asked, as in eval.predict.generate.
    """
    choices = [_choice(c.prompt, labels, tokenizer, c.where) for c in track(conversations, "encode")]
    asked = [i for i, choice in enumerate(choices) if _fits(choice, model.config)]
    found = _logprobs(model, [choices[i] for i in asked], batch_tokens, packed)
    predictions = [Prediction("", 0, finished=False, asked=False)] * len(choices)
    for i, logprobs in zip(asked, found, strict=True):
        best, text = max(zip(logprobs, labels, strict=True))  # of equal ones by text: the labels' order doesn't matter
        probability = 1 / sum(math.exp(logprob - best) for logprob in logprobs)
        predictions[i] = Prediction(text, 0, finished=True, probability=probability)
    return predictions


def no_answer_differences(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    predictions: Sequence[Prediction],
    batch_tokens: int,
    packed: bool = True,
) -> list[float]:
    """log P("unanswerable") - log P(the predicted text) of each SQuAD v2 question, in nats; higher: rather no answer.

    A threshold on it trades wrong answers against missed ones; tune it on training questions, not on those scored.
    Infinite where there is no other answer to go back to: the prediction is "unanswerable" or empty already, or the
    question was not asked, so no threshold changes it. The predicted text is taken as a whole answer, encoded anew: of
    one that was cut at max_new_tokens that is what it would be if it ended there.
    """
    choices = {
        i: _choice(c.prompt, (UNANSWERABLE, p.text), tokenizer, c.where)
        for i, (c, p) in enumerate(zip(conversations, predictions, strict=True))
        if p.asked and normalize_answer(p.text) not in ("", UNANSWERABLE)
    }
    answered = {i: choice for i, choice in choices.items() if _fits(choice, model.config)}
    found = _logprobs(model, list(answered.values()), batch_tokens, packed)
    differences = {i: null - answer for i, (null, answer) in zip(answered, found, strict=True)}
    return [differences.get(i, math.inf) for i in range(len(conversations))]


def next_logprobs(
    model: PreTrainedModel, prompts: Sequence[list[int]], batch_tokens: int, packed: bool = True
) -> torch.Tensor:
    """Log-probabilities [prompts, vocab] of the token after each prompt's ids, in nats, float32 on the CPU."""
    examples = [Example([*ids, 0], [0] * len(ids) + [1]) for ids in prompts]  # the 0 stands for what is predicted
    number = {id(example): i for i, example in enumerate(examples)}
    device, rows = next(model.parameters()).device, dict[int, torch.Tensor]()
    together = packed and takes_rows(model)
    packs = plan_packs(examples, Layout(pack_tokens=batch_tokens)) if together else [[[e]] for e in examples]
    with torch.inference_mode():
        for trees in track(packs, "first tokens"):
            if together:
                pack = build_pack(trees)
                logits = model(
                    input_ids=torch.tensor([pack.input_ids], device=device),
                    position_ids=torch.tensor([pack.position_ids], device=device),
                    attention_mask=attention_mask(pack, device),
                    use_cache=False,
                    logits_to_keep=torch.tensor(pack.source, device=device),
                ).logits[0]
            else:
                ids = torch.tensor([trees[0][0].ids[:-1]], device=device)
                mask = torch.ones_like(ids)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[0, -1:]
            logprobs = logits.float().log_softmax(-1).cpu()
            rows |= {number[id(e)]: row for e, row in zip(chain.from_iterable(trees), logprobs, strict=True)}
    return torch.stack([rows[i] for i in range(len(prompts))]) if prompts else torch.empty(0, 0)


def _choice(
    prompt: Sequence[Message], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, where: str
) -> _Choice:
    return _Choice(encode_prompt(prompt, tokenizer), [_answer_ids(prompt, a, tokenizer, where) for a in answers])


def _answer_ids(prompt: Sequence[Message], answer: str, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    # without earlier turns (few-shot examples), on which an answer's ids don't depend: encoding 20 labels behind 20
    # examples took 109 ms a prompt with them, and takes 2 without
    turns = (*(m for m in prompt[:-1] if m["role"] == "system"), prompt[-1], {"role": "assistant", "content": answer})
    example = encode(Conversation(turns, "", where), tokenizer, sys.maxsize)
    return example.ids[len(example.ids) - example.loss_mask[::-1].index(0) :]  # behind the last token of a prompt


def _fits(choice: _Choice, config: PretrainedConfig) -> bool:
    limit = max_positions(config)
    return limit is None or choice.tokens <= limit


def _logprobs(model: PreTrainedModel, choices: Sequence[_Choice], batch_tokens: int, packed: bool) -> list[list[float]]:
    order = sorted(range(len(choices)), key=lambda i: choices[i].prompt)
    ordered = [choices[i] for i in order]
    bar = Bar("compare answers", sum(len(choice.answers) for choice in choices))
    model.eval()
    compute = _in_packs if packed and takes_rows(model) else _one_by_one
    try:
        with torch.inference_mode():
            found = dict(zip(order, compute(model, ordered, batch_tokens, bar.update), strict=True))
    finally:
        bar.close()
    return [found[i] for i in range(len(choices))]


def _one_by_one(
    model: PreTrainedModel, choices: Sequence[_Choice], batch_tokens: int, show: Callable[[int], None]
) -> list[list[float]]:
    device, done = next(model.parameters()).device, 0
    found: list[list[float]] = [[] for _ in choices]
    for choice, logprobs in zip(choices, found, strict=True):
        for answer in choice.answers:
            ids, n = torch.tensor([[*choice.prompt, *answer[:-1]]], device=device), len(answer)
            # from the end: prompt learning puts virtual tokens in front
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=n)
            target = torch.tensor(answer, device=device)
            logprobs.append(-cross_entropy(out.logits[0, -n:].float(), target, reduction="sum").item())
            done += 1
            show(done)
    return found


def _in_packs(
    model: PreTrainedModel, choices: Sequence[_Choice], batch_tokens: int, show: Callable[[int], None]
) -> list[list[float]]:
    """The choices are in order of their prompts, so the first and the last one have in common what all have."""
    found = [[0.0] * len(choice.answers) for choice in choices]
    if not choices:
        return found
    layout, cache, done = Layout(pack_tokens=batch_tokens), DynamicCache(config=model.config), 0
    first, last = choices[0].prompt, choices[-1].prompt
    shared = min(common_prefix(first, last), len(first) - 1)  # a prompt's last token predicts, so it is in a pack
    if shared:
        ids = torch.tensor([first[:shared]], device=next(model.parameters()).device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for start in range(0, len(choices), WINDOW):
        examples: list[Example] = []
        places: dict[int, tuple[int, int]] = {}
        for i, choice in enumerate(choices[start : start + WINDOW], start):
            own = choice.prompt[shared:]
            for j, answer in enumerate(choice.answers):
                examples.append(Example([*own, *answer], [0] * len(own) + [1] * len(answer)))
                places[id(examples[-1])] = i, j
        for trees in plan_packs(examples, layout):
            targets = iter(_target_logprobs(model, build_pack(trees), cache, shared))
            for example in chain.from_iterable(trees):  # in the order of build_pack's targets
                i, j = places[id(example)]
                found[i][j] = sum(next(targets) for _ in range(sum(example.loss_mask)))
                done += 1
            show(done)
    return found


def _target_logprobs(model: PreTrainedModel, pack: Pack, cache: DynamicCache, shared: int) -> list[float]:
    """log P of each of the pack's M targets, behind the `shared` tokens that the cache holds, before and after."""
    device, tokens = next(model.parameters()).device, len(pack.input_ids)
    sees = attention_mask(pack, device)
    # a branch point predicts several targets: the head and its softmax are computed once for all
    source, which = torch.tensor(pack.source, device=device).unique(return_inverse=True)
    logits = model(
        input_ids=torch.tensor([pack.input_ids], device=device),
        position_ids=torch.tensor([pack.position_ids], device=device) + shared,
        attention_mask=torch.cat([sees.new_ones(1, 1, tokens, shared), sees], dim=-1),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=source,
    ).logits[0]
    cache.crop(-tokens)
    logits = logits.float()
    target = torch.tensor(pack.target, device=device)
    return cast(list[float], (logits[which, target] - logits.logsumexp(-1)[which]).tolist())
