"""The adapter on the base of its training, asked held-out rows; what was made of it is asked the same and compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from data.conversation import Conversation
from eval.results import limit_questions
from eval.tasks import read_conversations
from sft.errors import ParityError, RunError
from sft.export.candidate import Trained
from sft.export.formats import UNROUNDED
from sft.export.parity import HeldOut, ask, compare
from sft.models.capabilities import takes_packs
from sft.models.load import compute_dtype, default_device
from sft.models.target import load_plain, load_run
from sft.recipe.schema import Recipe, Source
from sft.training.examples import encode_held_out, held_out_conversations, with_split


class Judge:
    def __init__(self, trained: Trained, held_out: HeldOut, name: str = "adapter on base") -> None:
        self.trained, self.held_out = trained, held_out
        self.dtype = compute_dtype(trained.recipe.model, default_device())
        loaded = load_run(trained.run, trained.recipe.model.dtype, trained.adapter)
        self.before = ask(loaded.model, loaded.tokenizer, held_out, name, loaded.packed)

    def folder(self, folder: Path) -> dict[str, Any]:
        """How far a merged model's answers are from the adapter's, in the same compute dtype, so that only the weights'
        rounding differs."""
        return self.model(load_plain(folder, self.dtype), "merged model")

    def model(self, model: PreTrainedModel, name: str) -> dict[str, Any]:
        after = ask(model, self.trained.tokenizer, self.held_out, name, takes_packs(model))
        return compare(self.before, after, self.held_out)


def read_held_out(run: Path, trained: Trained, data: str | None) -> HeldOut:
    """`data`, or what the recipe holds out; at most export.prompts conversations. Raises RunError without any."""
    recipe = trained.recipe
    conversations: Sequence[Conversation]
    if data:
        conversations = read_conversations(recipe.task, data, with_split(Source(path=data), "validation").split)
    else:
        conversations = held_out_conversations(recipe)
    if not conversations:
        raise RunError(f"{run}: no held-out data to check the merge on; name some with --data FILE")
    chosen = limit_questions(conversations, recipe.export.prompts)
    examples, too_long = encode_held_out(chosen, trained.tokenizer, recipe.data.max_length)
    return HeldOut(recipe.task, chosen, examples, too_long, recipe.eval)


def least_agreement(recipe: Recipe, form: str) -> tuple[str, float]:
    """The recipe's key, below export, that says how much of the answers must agree, and its value."""
    if form and form not in UNROUNDED:
        return "min_format_agreement", recipe.export.min_format_agreement
    return "min_agreement", recipe.export.min_agreement


def check_agreement(found: dict[str, Any], recipe: Recipe, form: str = "") -> None:
    """Raise ParityError where a merged model, or one made of it in another format, answers otherwise than the recipe
    allows."""
    agreement = found["answer_argmax_agreement"]
    key, least = least_agreement(recipe, form)
    if agreement < least:
        remedy = "Take a format of more bits" if form else "Set export.base to the other base, export.dtype: float32"
        raise ParityError(
            f"{form or 'merged'} and adapter agree on {agreement:.2%} of the answer tokens, less than export.{key} "
            f"{least:.2%}; nothing was written. {remedy}, or pass --allow-mismatch"
        )
