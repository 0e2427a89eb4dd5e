"""One render of a chat template, in the process and within the limits of the product."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from data.conversation import DataError, Message
from data.encode.template import Render, Result, render_all


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    generation: bool,
    where: str = "",
    **limits: Any,
) -> str:
    results: list[Result] = []
    render_all([Render(messages, [(len(messages), generation)], where)], tokenizer, results.append, **limits)
    if isinstance(results[0], DataError):
        raise results[0]
    return results[0][0]
