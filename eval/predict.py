"""Prompts -> greedy answers, in-process; client.py does the same over HTTP."""

from collections.abc import Callable, Sequence

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from data.conversation import Conversation, DataError
from data.encode.calls import spoken_calls
from data.encode.chat import encode_prompt, stop_tokens
from data.encode.frame import frame_of, spoken_tokens
from data.encode.markers import decoded_answer
from data.encode.template import row_arguments
from data.progress import track
from eval.decode_batch import takes_rows
from eval.generate import generate_ids, generate_one
from eval.prediction import NOT_ASKED, Prediction


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_tokens: int,
    packed: bool = True,
    note: Callable[[int, Prediction], None] = lambda number, prediction: None,
) -> list[Prediction]:
    """Greedy answers without their thoughts, in order. What several prompts share (a passage) is computed once, and
    nothing is padded.

    `packed=False` generates one prompt at a time, for models that can't take a pack's mask. note: called with the
    number and the prediction of each question as it ends.
    """
    prompts = [encode_prompt(c.prompt, tokenizer, c.template_arguments) for c in conversations]
    asked = [i for i, prompt in enumerate(prompts) if fits(len(prompt) + max_new_tokens, model.config)]
    predictions = [NOT_ASKED] * len(prompts)
    stop = set(stop_tokens(model.generation_config.eos_token_id, tokenizer))
    model.eval()

    def add(place: int, tokens: list[int]) -> None:
        written = decoded_answer(tokens, tokenizer).strip()
        asked_one = conversations[asked[place]]
        arguments = row_arguments(tokenizer, asked_one.template_arguments)
        text = spoken_calls(str(tokenizer.decode(tokens)), asked_one.messages, tokenizer, arguments)
        if text is None:
            text = spoken_tokens(tokens, tokenizer, frame_of(tokenizer, arguments), decoded_answer)
        more = None if text == written else written
        prediction = Prediction(text, len(tokens), bool(tokens) and tokens[-1] in stop, written=more, ids=tuple(tokens))
        predictions[asked[place]] = prediction
        note(asked[place], prediction)

    if packed and takes_rows(model):
        generate_ids(model, [prompts[i] for i in asked], stop, max_new_tokens, batch_tokens, add)
    else:
        for place, i in enumerate(track(asked, "answer")):
            add(place, generate_one(model, prompts[i], stop, max_new_tokens))
    return predictions


def check_fits(name: str, prompt_tokens: int, max_new_tokens: int, config: PretrainedConfig) -> None:
    """Raise DataError if the answer could need more positions than the model has."""
    if not fits(prompt_tokens + max_new_tokens, config):
        limit = max_positions(config)
        raise DataError(
            name,
            f"{prompt_tokens} prompt tokens and up to {max_new_tokens} new ones exceed the model's {limit} positions; "
            "lower max_new_tokens or shorten the prompt",
        )


def fits(tokens: int, config: PretrainedConfig) -> bool:
    """Whether the model has a position for each token."""
    limit = max_positions(config)
    return limit is None or tokens <= limit


def max_positions(config: PretrainedConfig) -> int | None:
    """The most tokens of a sequence; None for a model without a limit: ALiBi, state-space and recurrent ones."""
    text = config.get_text_config()
    return text.max_position_embeddings if hasattr(text, "max_position_embeddings") else None
