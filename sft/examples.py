"""The recipe's data as examples, for training and for held-out checks."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from data.chat import Conversation, Example, check_template
from data.check import data_report, draw_contexts, encode_all
from eval.run import limit_questions
from eval.tasks import read_conversations
from sft.recipe import Recipe


def load_examples(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], dict[str, Any]]:
    """Training examples and the account of them. Raises DataError with file and place."""
    check_template(tokenizer, recipe.model.base)
    data, train = recipe.data, recipe.train
    rows = [c for s in data.train for c in read_conversations(recipe.task, s.path, s.split, s.revision)]
    chosen = draw_contexts(rows, data.max_contexts, train.seed, data.unanswerable_share)
    examples, left_out = encode_all(chosen, tokenizer, data.max_length, data.too_long)
    report = data_report(len(rows), examples, left_out, train.examples_per_step, train.seed)
    return examples, report


def held_out_conversations(recipe: Recipe) -> list[Conversation]:
    """eval.data, cut to eval.limit; nothing where the recipe has none."""
    source = recipe.eval.data
    if source is None:
        return []
    return limit_questions(
        read_conversations(recipe.task, source.path, source.split, source.revision), recipe.eval.limit
    )


def load_held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Held-out examples for the loss during training; nothing where the recipe does not ask for it."""
    if recipe.train.eval_strategy == "no":
        return []
    examples, _ = encode_all(held_out_conversations(recipe), tokenizer, recipe.data.max_length, recipe.data.too_long)
    return examples
