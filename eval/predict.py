"""Prompts -> greedy answers, in-process; over HTTP see client.py."""

from collections.abc import Callable, Sequence

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.conversation import Conversation, DataError
from data.encode.chat import encode_prompt, stop_tokens
from data.progress import track
from eval.decode_batch import takes_rows
from eval.generate import generate_ids, generate_one
from eval.prediction import Prediction


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_tokens: int,
    packed: bool = True,
    note: Callable[[int, Prediction], None] = lambda number, prediction: None,
) -> list[Prediction]:
    """Greedy answers, in order; `note` hears of each with its number as it ends. What several prompts share (a passage)
    is computed once, and nothing is padded. `packed=False` generates one prompt at a time, for models that can't take a
    pack's mask."""
    prompts = [encode_prompt(c.prompt, tokenizer) for c in conversations]
    limit = max_positions(model.config)
    asked = [i for i, prompt in enumerate(prompts) if limit is None or len(prompt) + max_new_tokens <= limit]
    found = [Prediction("", 0, finished=False, asked=False)] * len(prompts)
    stop = set(stop_tokens(model.generation_config.eos_token_id, tokenizer))
    model.eval()

    def take(place: int, tokens: list[int]) -> None:
        text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        found[asked[place]] = prediction = Prediction(
            text, len(tokens), bool(tokens) and tokens[-1] in stop, ids=tuple(tokens)
        )
        note(asked[place], prediction)

    if packed and takes_rows(model):
        generate_ids(model, [prompts[i] for i in asked], stop, max_new_tokens, batch_tokens, take)
    else:
        for place, i in enumerate(track(asked, "answer")):
            take(place, generate_one(model, prompts[i], stop, max_new_tokens))
    return found


def check_fits(name: str, prompt_tokens: int, max_new_tokens: int, config: PretrainedConfig) -> None:
    """Raise DataError where the answer could run over the last position that the model was made for."""
    limit = max_positions(config)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise DataError(
            name,
            f"{prompt_tokens} prompt tokens and up to {max_new_tokens} new ones exceed the model's {limit} positions; "
            "lower max_new_tokens or shorten the prompt",
        )


def max_positions(config: PretrainedConfig) -> int | None:
    """None for a model without such a limit: ALiBi, state-space and recurrent ones."""
    text = config.get_text_config()
    return text.max_position_embeddings if hasattr(text, "max_position_embeddings") else None
