"""Continued pre-training: an encoder reads raw text of its future task before it learns the task.

graft train recipes/minilm_mlm.yaml

Devlin et al. 2019 (BERT), section 3.1. Masks are drawn each time a row is read (Liu et al. 2019, section 4.1).
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, PreTrainedTokenizerBase

from data.conversation import Conversation
from data.encode.tokens import plain_backend
from data.progress import track
from sft.baselines.data import Split
from sft.baselines.encoder import Row, load_encoder
from sft.baselines.heads import Head
from sft.errors import RecipeError
from sft.models.load import default_device, load_config
from sft.recipe.baseline_schema import BaselineRecipe, EncoderModel

SCORED_ROWS = 8  # held-out rows in a batch: with 512 tokens and 30,522 words, their float32 logits take 0.5 GB
TARGETS = ("labels", "next_sentence_label")
Block = list[int]  # token ids of consecutive text, without control tokens


class MaskedLM(Head):
    """Predicts masked tokens; with pretraining.next_sentence also whether the second part of a row follows the first.
    The held-out rows are masked once, by the seed, so that their perplexities are comparable.
    """

    def __init__(self, recipe: BaselineRecipe, split: Split) -> None:
        super().__init__(recipe)
        self.pairs = recipe.pretraining.next_sentence
        self.perplexity_before: float | None = None  # None: no data.dev_share to measure it on
        if None in (self.tokenizer.mask_token, self.tokenizer.cls_token, self.tokenizer.sep_token):
            raise RecipeError(
                f"model.base: {recipe.model.base}: its tokenizer lacks a mask, cls or sep token; "
                "name an encoder such as google-bert/bert-base-uncased"
            )
        if self.pairs:
            check_next_sentence(recipe.model)
        self.rows = self._read(split.train, "trained on")
        self.dev_rows = self._read(split.dev, "held out") if split.dev else []
        probability = recipe.pretraining.mlm_probability
        self.masking = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=probability)
        once = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=probability, seed=recipe.train.seed)
        in_order = sorted(self.dev_rows, key=lambda row: len(row["input_ids"]))  # similar lengths: little padding
        self.dev = [mask(in_order[i : i + SCORED_ROWS], once) for i in range(0, len(in_order), SCORED_ROWS)]

    def load(self) -> PreTrainedModel:
        base = self.recipe.model
        model = load_encoder(base, "nsp" if self.pairs else "mlm", self.recipe.train.seed)
        if is_drawn(model):
            self.notes.append(
                f"{base.base} has no head for masked tokens: a new one is drawn at random over the input embeddings, "
                "so the perplexity before training is that of a random head, not of the encoder"
            )
        if self.dev:
            scores = self.score_dev(cast(torch.nn.Module, model).to(default_device()))
            self.perplexity_before = scores["perplexity"]
            masked = sum(int((batch["labels"] != -100).sum()) for batch in self.dev)
            self.notes.append(f"perplexity before training {scores['perplexity']:.1f}, on {masked} held-out tokens")
        return model

    def collate(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return mask(rows, self.masking)  # no seed: PyTorch's generator draws, and checkpoints save its state

    @torch.inference_mode()
    def score_dev(self, model: torch.nn.Module) -> dict[str, float]:
        """`loss`: mean negative log-likelihood of the masked tokens, in nats; `perplexity`: its exponential; with
        next_sentence also `next_sentence_accuracy`, from 0 to 100."""
        model.eval()
        device = next(model.parameters()).device
        nll, masked, correct = 0.0, 0, 0
        for batch in track(self.dev, "predict masked tokens"):
            with torch.autocast(device.type, torch.bfloat16, enabled=bool(self.recipe.train.bf16)):
                output = model(**{name: t.to(device) for name, t in batch.items() if name not in TARGETS})
            labels = batch["labels"].to(device)
            chosen = labels != -100
            logits = output["prediction_logits" if self.pairs else "logits"][chosen].float()
            nll += float(cross_entropy(logits, labels[chosen], reduction="sum"))
            masked += int(chosen.sum())
            if self.pairs:
                predicted = output["seq_relationship_logits"].argmax(dim=1).cpu()
                correct += int((predicted == batch["next_sentence_label"]).sum())
        scores = {"loss": nll / masked, "perplexity": float(np.exp(nll / masked))}
        return scores | ({"next_sentence_accuracy": 100 * correct / len(self.dev_rows)} if self.pairs else {})

    def choose(self, model: torch.nn.Module) -> dict[str, Any]:
        after = self.score_dev(model)["perplexity"] if self.dev else None
        return {"perplexity_before": self.perplexity_before, "perplexity_after": after}

    def _read(self, conversations: Sequence[Conversation], name: str) -> list[Row]:
        """Rows of all posts; a note says their number and kind. Raises RecipeError if there are none."""
        length, seed = self.recipe.data.max_seq_length, self.recipe.train.seed
        room = length - (3 if self.pairs else 2)
        posts = [p for p in cut_posts([c.context for c in conversations], self.tokenizer, room) if p]
        if self.pairs:
            rows = [make_row(self.tokenizer, a, b) | {TARGETS[1]: label} for a, b, label in pair_up(posts, seed)]
        else:
            rows = [make_row(self.tokenizer, block) for post in posts for block in post]
        if not rows:
            raise RecipeError(
                f"the {len(conversations)} posts {name} have too little text for a row (two posts for "
                "pretraining.next_sentence); name more data in data.train, or change data.dev_share"
            )
        kind = "pairs of text" if self.pairs else "blocks"
        empty = len(conversations) - len(posts)
        left_out = f"; without text and left out: {empty}" if empty else ""
        self.notes.append(f"{name}: {len(rows)} {kind} of at most {length} tokens from {len(posts)} posts{left_out}")
        return rows


def check_next_sentence(model: EncoderModel) -> None:
    kind = load_config(model).model_type
    if kind != "bert":
        raise RecipeError(
            f"pretraining.next_sentence: {model.base} is of type {kind}, and only BERT has a head for it; "
            "set it to false, or name a BERT"
        )


def keep_pooler(base: EncoderModel, folder: Path) -> None:
    """Add the base's pooler to the saved weights, for a classifier; a head for masked tokens has none."""
    features: Any = load_encoder(base, "features", 0)
    with safe_open(folder / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    inside = f"{features.base_model_prefix}."
    own = {inside + name: w for name, w in features.state_dict().items() if "pooler." in name and not features.drawn}
    if missing := {name: weight.contiguous() for name, weight in own.items() if name not in weights}:
        save_file(weights | missing, folder / "model.safetensors", {"format": "pt"})


def is_drawn(model: PreTrainedModel) -> bool:
    """Whether the head is new: transformers sets its bias to zero, which training never does. (config.architectures
    names what the author says, not what the files hold.)"""
    head: Any = model.get_output_embeddings()
    return head.bias is not None and not head.bias.any()


def cut_posts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, room: int) -> list[list[Block]]:
    """Each text as blocks of at most `room` tokens, in order and without loss; an empty text has none. Text never
    becomes a control token."""
    backend = plain_backend(tokenizer)
    posts = []
    for i in track(range(0, len(texts), 1000), "encode posts, in thousands"):
        for encoding in backend.encode_batch_fast(list(texts[i : i + 1000]), add_special_tokens=False):
            ids = encoding.ids
            posts.append([ids[at : at + room] for at in range(0, len(ids), room)])
    return posts


def pair_up(posts: Sequence[Sequence[Block]], seed: int) -> Iterator[tuple[Block, Block, int]]:
    """Each block as (first half, second half, 0), or with probability 0.5 as (first half, second half of another post,
    1). Blocks of one token are skipped. No pairs if fewer than two posts have any. Drawn once, as in Devlin et al."""
    rng = random.Random(seed)
    halves = [[(b[: len(b) // 2], b[len(b) // 2 :]) for b in post if len(b) > 1] for post in posts]
    halves = [post for post in halves if post]
    for i, post in enumerate(halves if len(halves) > 1 else ()):
        for first, second in post:
            foreign = rng.random() < 0.5
            if foreign:
                other = rng.randrange(len(halves) - 1)
                second = rng.choice(halves[other + (other >= i)])[1]  # any post except the i-th
            yield first, second, int(foreign)


def make_row(tokenizer: PreTrainedTokenizerBase, *parts: Block) -> Row:
    """[CLS] part [SEP], or [CLS] part [SEP] part [SEP] with token types 0 and 1."""
    ids, types, control = [tokenizer.cls_token_id], [0], [1]
    for number, part in enumerate(parts):
        ids += [*part, tokenizer.sep_token_id]
        types += [number] * (len(part) + 1)
        control += [*[0] * len(part), 1]
    row = {"input_ids": ids, "special_tokens_mask": control}
    with_types = len(parts) > 1 or "token_type_ids" in tokenizer.model_input_names
    return row | ({"token_type_ids": types} if with_types else {})


def mask(rows: Sequence[Row], masking: DataCollatorForLanguageModeling) -> dict[str, torch.Tensor]:
    """Tensors (rows, longest) with masks, and `labels`: the masked tokens' ids, -100 elsewhere. At least one token of
    each row is masked, as in the code of Devlin et al.: otherwise the loss of few short posts could be 0 / 0."""
    batch: dict[str, torch.Tensor] = dict(masking(list(rows)))
    tokenizer = masking.tokenizer
    control = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id])
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        if bool((labels == -100).all()):
            places = (~torch.isin(ids, control)).nonzero().flatten()
            i = places[torch.randint(len(places), (), generator=masking.generator)]
            labels[i] = ids[i]
            ids[i] = tokenizer.mask_token_id
    return batch
