"""Conversation -> token ids and loss mask: the one place where the chat template and the mask are applied.

Training, evaluation and the server check all come through here, so they see the same ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from data.errors import UserError

Message = dict[str, str]


class DataError(UserError):
    """A defect in the user's data; the text names the file, the place and the remedy."""


class TooLong(DataError):
    """An example longer than max_length: its answer would be cut."""


@dataclass(frozen=True)
class Conversation:
    """Role/content turns that end with the assistant's answer, and where they came from."""

    messages: tuple[Message, ...]
    id: str
    where: str  # "file:line" or "file: id", for messages to the user
    answers: tuple[str, ...] = ()  # gold answers; empty: the right answer is that there is none
    context: str = ""  # equal for conversations that share a passage: kept together, and one cluster in statistics

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Example:
    """Token ids and a 0/1 mask of equal length; 1 marks what the model is asked to learn."""

    ids: list[int]
    loss_mask: list[int]
    context: str = ""
    where: str = field(default="", compare=False)


def encode_prompt(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the rendered messages up to where the assistant begins to speak."""
    return _tokenize(_render(messages, tokenizer, generation=True), tokenizer)


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """Ids and mask of a whole conversation; every assistant turn is trained, up to its end-of-turn token.

    Prompt and answer are tokenized apart: the ids before an answer are then exactly those that a server computes
    for the prompt alone. Raises DataError, naming file and place, where nothing would be trained, the end of the
    turn would not be, or the conversation does not fit into max_length tokens.
    """
    messages, where = conversation.messages, conversation.where
    special = _special_ids(tokenizer)
    ids: list[int] = []
    mask: list[int] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:i], tokenizer, generation=True)
        full = _render(messages[: i + 1], tokenizer, generation=False)
        if not prompt.startswith(done) or not full.startswith(prompt):
            raise DataError(
                f"{where}: the chat template renders the turns before answer {i} differently once it is there, "
                "so no prefix of the text is the prompt; use single-turn rows or another template"
            )
        prompt_ids = _tokenize(prompt[len(done) :], tokenizer)
        answer_ids = _tokenize(full[len(prompt) :], tokenizer)
        ends = [j for j, token in enumerate(answer_ids) if token in special]
        if not message["content"].strip():
            raise DataError(f"{where}: the answer is empty, so there is nothing to learn; remove the row or answer it")
        if not ends:
            raise DataError(
                f"{where}: the chat template ends the assistant's turn without a special token, so the model would "
                "never learn to stop; set model.chat_template to one that does"
            )
        ids += prompt_ids + answer_ids
        mask += [0] * len(prompt_ids) + [1] * (ends[-1] + 1) + [0] * (len(answer_ids) - ends[-1] - 1)
        done = full
    if not any(mask):
        raise DataError(f"{where}: no assistant turn, so there is nothing to learn")
    last = len(mask) - mask[::-1].index(1)  # what follows the last trained token is computed for nothing
    if last > max_length:
        raise TooLong(
            f"{where}: {last} tokens, and data.max_length {max_length} would cut the answer away; "
            "raise data.max_length, or set data.too_long: skip to leave such rows out and count them"
        )
    return Example(ids[:last], mask[:last], conversation.context, where)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends the assistant's turn in training, and must stop generation."""
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    return encode(Conversation(turns, "", "chat template"), tokenizer, 1_000_000).ids[-1]


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    if not tokenizer.chat_template:
        raise DataError(f"{name}: its tokenizer has no chat template; use an instruct model or set model.chat_template")


def _render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, generation: bool) -> str:
    """Text of the messages; a separator splits every control marker that the contents hold, see _tokenize."""
    markers = _added_tokens(tokenizer)
    safe = [{**m, "content": _split_markers(m["content"], markers)} for m in messages]
    try:
        return str(tokenizer.apply_chat_template(safe, tokenize=False, add_generation_prompt=generation))
    except TemplateError as error:
        roles = ", ".join(m["role"] for m in messages)
        raise DataError(f"the chat template refuses the turns {roles}: {error}; set model.chat_template") from error


SPLIT = "\ufdd0"  # a Unicode noncharacter: never part of a text that is meant to be exchanged


def _split_markers(content: str, markers: list[str]) -> str:
    content = content.replace(SPLIT, "")
    for marker in markers:
        content = content.replace(marker, marker[0] + SPLIT + marker[1:])
    return content


def _tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of rendered text. Markers written by the template become control tokens, those from data plain text.

    A marker from data was split after its first character; tokenizing the halves apart leaves nothing to match.
    """
    pieces = text.split(SPLIT)
    return [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]


@lru_cache(maxsize=4)
def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer turns into one added token, longest first; runs of spaces are not control tokens."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return sorted((t for t in texts if len(t) > 1 and not t.isspace()), key=len, reverse=True)


@lru_cache(maxsize=4)
def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    flagged = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(flagged | set(tokenizer.all_special_ids))
