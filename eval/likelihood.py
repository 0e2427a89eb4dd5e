"""Log-likelihoods of given answers -> the likeliest label with its probability; how near "unanswerable" was.

What all prompts begin with (the instruction, few-shot examples) is computed once and cached. After it, prompts and
their candidate answers are packs (see data/encode/pack.py): a prompt occurs once, its answers are branches, and if it
saves time, prompts share a pack and their common tokens. The head is computed only at tokens that predict an answer.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from data.conversation import Conversation, DataError, Message
from data.encode.chat import Example, encode, encode_prompt
from data.encode.pack import Layout, build_pack, common_prefix, plan_packs
from data.encode.template import row_arguments
from data.progress import track
from data.readers.squad import UNANSWERABLE
from eval.decode_batch import takes_rows
from eval.generate import pack_logits
from eval.metrics import normalize_answer
from eval.predict import fits, max_positions
from eval.prediction import NOT_ASKED, Prediction

WINDOW = 64  # prompts whose packs are built at once: until then, each answer holds a copy of its prompt's ids


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
    """Log-likelihood of each candidate answer as the assistant's turn after its prompt, in nats, in order.

    The sum over the answer's tokens and the token that ends the turn, encoded as in training (see data/encode/chat.py).
    batch_tokens: most tokens of a pack; only a longer prompt with one answer makes a larger one. `packed=False`
    computes one candidate at a time, for models that can't take a pack's mask: the same numbers.
    Raises DataError for an empty candidate, and if prompt and answer need more positions than the model has.
    """
    choices = {
        i: _choice(p, a, tokenizer, f"prompt {i}") for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    }
    for i, choice in choices.items():
        if not fits(choice.tokens, model.config):
            problem = f"{choice.tokens} tokens with its longest answer exceed the model's {max_positions(model.config)}"
            raise DataError(f"prompt {i}", f"{problem} positions; shorten the prompt or leave it out", "too long")
    return list(_logprobs(model, choices, batch_tokens, packed).values())


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
    ends the turn, "the answer is exactly this label" are disjoint events, since no label begins another one. So the
    sums are comparable, and their softmax is P(label | the answer is one of the labels). A mean is no probability,
    and favours long labels whose last tokens follow from the first.
    Prompts that need more positions than the model has are not asked, as in eval.predict.generate.
    """
    choices = {
        i: _choice(c.prompt, labels, tokenizer, c.where, c.template_arguments)
        for i, c in enumerate(track(conversations, "encode"))
    }
    predictions = [NOT_ASKED] * len(conversations)
    for i, logprobs in _logprobs(model, choices, batch_tokens, packed).items():
        best, text = max(zip(logprobs, labels, strict=True))  # ties go by text, so the labels' order does not matter
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
    Infinite if no threshold changes the prediction: it is "unanswerable" or empty already, or the question was not
    asked. The predicted text is encoded as a whole answer, even if it was cut at max_new_tokens.
    """
    choices = {
        i: _choice(c.prompt, (UNANSWERABLE, p.text), tokenizer, c.where, c.template_arguments)
        for i, (c, p) in enumerate(zip(conversations, predictions, strict=True))
        if p.asked and normalize_answer(p.text) not in ("", UNANSWERABLE)
    }
    logprobs = _logprobs(model, choices, batch_tokens, packed)
    differences = {i: null - answer for i, (null, answer) in logprobs.items()}
    return [differences.get(i, math.inf) for i in range(len(conversations))]


def next_logprobs(
    model: PreTrainedModel, prompts: Sequence[list[int]], batch_tokens: int, packed: bool = True
) -> torch.Tensor:
    """Log-probabilities [prompts, vocab] of the token after each prompt's ids, in nats, float32 on the CPU."""
    examples = [Example([*ids, 0], [0] * len(ids) + [1]) for ids in prompts]  # 0: in place of the token to predict
    number = {id(example): i for i, example in enumerate(examples)}
    device, rows = next(model.parameters()).device, dict[int, torch.Tensor]()
    together = packed and takes_rows(model)
    packs = plan_packs(examples, Layout(pack_tokens=batch_tokens)) if together else [[[e]] for e in examples]
    with torch.inference_mode():
        for trees in track(packs, "first tokens"):
            if together:
                pack = build_pack(trees)
                logits = pack_logits(model, pack, pack.source)
            else:
                ids = torch.tensor([trees[0][0].ids[:-1]], device=device)
                mask = torch.ones_like(ids)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[0, -1:]
            logprobs = logits.float().log_softmax(-1).cpu()
            rows |= {number[id(e)]: row for e, row in zip(chain.from_iterable(trees), logprobs, strict=True)}
    return torch.stack([rows[i] for i in range(len(prompts))]) if prompts else torch.empty(0, 0)


def _choice(
    prompt: Sequence[Message],
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    arguments: Mapping[str, Any] | None = None,
) -> _Choice:
    own = row_arguments(tokenizer, arguments)
    # an answer's ids do not depend on earlier turns (few-shot examples), so those are left out: encoding 20 labels
    # after 20 examples takes 2 ms a prompt instead of 109
    last = (*(m for m in prompt[:-1] if m["role"] == "system"), prompt[-1])
    turns = ((*last, {"role": "assistant", "content": answer}) for answer in answers)
    examples = [
        encode(Conversation(messages, "", where, template_arguments=own), tokenizer, sys.maxsize) for messages in turns
    ]
    # what the template writes before an answer that has no thought is given, as in training
    given = len(encode_prompt(last, tokenizer, own))
    opening = examples[0].ids[given : examples[0].loss_mask.index(1)] if examples else []
    return _Choice(encode_prompt(prompt, tokenizer, own) + opening, [e.ids[e.loss_mask.index(1) :] for e in examples])


def _logprobs(
    model: PreTrainedModel, choices: Mapping[int, _Choice], batch_tokens: int, packed: bool
) -> dict[int, list[float]]:
    """The log-likelihoods of each choice's answers, without choices that need more positions than the model has."""
    fitting = {i: choice for i, choice in choices.items() if fits(choice.tokens, model.config)}
    logprobs = {i: [0.0] * len(choice.answers) for i, choice in fitting.items()}
    model.eval()
    compute = _in_packs(model, fitting, batch_tokens) if packed and takes_rows(model) else _one_by_one(model, fitting)
    with torch.inference_mode():
        for i, j, logprob in track(compute, "compare answers", sum(map(len, logprobs.values()))):
            logprobs[i][j] = logprob
    return logprobs


def _one_by_one(model: PreTrainedModel, choices: Mapping[int, _Choice]) -> Iterator[tuple[int, int, float]]:
    """Choice, answer and log-likelihood of each answer."""
    device = next(model.parameters()).device
    for i, choice in choices.items():
        for j, answer in enumerate(choice.answers):
            ids, n = torch.tensor([[*choice.prompt, *answer[:-1]]], device=device), len(answer)
            # from the end: prompt learning puts virtual tokens first
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, logits_to_keep=n)
            target = torch.tensor(answer, device=device)
            yield i, j, -cross_entropy(out.logits[0, -n:].float(), target, reduction="sum").item()


def _in_packs(
    model: PreTrainedModel, choices: Mapping[int, _Choice], batch_tokens: int
) -> Iterator[tuple[int, int, float]]:
    """Choice, answer and log-likelihood of each answer, pack by pack."""
    order = sorted(choices, key=lambda i: choices[i].prompt)
    if not order:
        return
    device, cache = next(model.parameters()).device, DynamicCache(config=model.config)
    # sorted prompts share what the first and the last one share; a prompt's last token predicts, so it is in a pack
    first, last = choices[order[0]].prompt, choices[order[-1]].prompt
    shared = min(common_prefix(first, last), len(first) - 1)
    if shared:
        ids = torch.tensor([first[:shared]], device=device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    for start in range(0, len(order), WINDOW):
        examples: list[Example] = []
        places: dict[int, tuple[int, int]] = {}
        for i in order[start : start + WINDOW]:
            own = choices[i].prompt[shared:]
            for j, answer in enumerate(choices[i].answers):
                examples.append(Example([*own, *answer], [0] * len(own) + [1] * len(answer)))
                places[id(examples[-1])] = i, j
        for trees in plan_packs(examples, Layout(pack_tokens=batch_tokens)):
            pack = build_pack(trees)
            # a branch point predicts several targets: the head and its softmax are computed once for all of them
            source, which = torch.tensor(pack.source, device=device).unique(return_inverse=True)
            logits = pack_logits(model, pack, source, cache).float()
            cache.crop(-len(pack.input_ids))
            target = torch.tensor(pack.target, device=device)
            logprobs = iter((logits[which, target] - logits.logsumexp(-1)[which]).tolist())
            for example in chain.from_iterable(trees):  # in the order of the pack's targets
                yield *places[id(example)], sum(next(logprobs) for _ in range(sum(example.loss_mask)))
