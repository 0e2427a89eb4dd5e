"""Conversation -> token ids and loss mask: the chat template and the mask are applied in this file only.

Training, evaluation and the server check all use it, so they see the same ids.
Control tokens come from the template only, see data/encode/markers.py.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from data.conversation import CALLS, THOUGHT, TOOLS, Conversation, DataError, Ledger, Message
from data.encode.calls import CALL_TURN, check_thought, tool_use_of, with_tools
from data.encode.frame import Frame, frame_of, quiet_arguments, thinking_arguments, with_thought, without_system
from data.encode.markers import TAGGED_THOUGHT, protect
from data.encode.steps import Steps, finished, finished_all
from data.encode.template import Render, arguments_of, row_arguments
from data.encode.tokens import Encoder, encoder_of

R = TypeVar("R")
BATCH_ROWS, BATCH_CHARACTERS = 32, 100_000  # the most that is rendered by one request

# defects of an example: key in the recipe -> kind of the DataError
AUDITS = {
    "untrained": "no trained token",
    "end_not_trained": "end of turn not trained",
    "truncated": "answer cut by max_length",
    "prompt_not_prefix": "prompt not a prefix of the full text",
    "double_bos": "two BOS tokens",
}


class TooLong(DataError):
    """An example has more than max_length tokens, so that its answer would be cut."""

    def __init__(self, where: str, tokens: int, max_length: int) -> None:
        super().__init__(
            where,
            f"{tokens} tokens, and data.max_length {max_length} would cut the answer away; "
            "raise data.max_length, or set data.too_long: skip to leave such rows out and count them",
            AUDITS["truncated"],
        )
        self.tokens = tokens


@dataclass(frozen=True)
class Example:
    """Token ids and a 0/1 mask of equal length; 1 marks the tokens that are trained."""

    ids: list[int]
    loss_mask: list[int]
    context: str = ""
    where: str = field(default="", compare=False)


def encode_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None
) -> list[int]:
    """Ids of the rendered messages, up to the beginning of the assistant's answer. arguments: of the row, for the
    template, besides the tokenizer's."""
    return finished(_prompt(messages, tokenizer, row_arguments(tokenizer, arguments)), tokenizer)


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Example:
    """The single example of a conversation (see encode_turns). Raises DataError if it makes several."""
    examples = encode_turns(conversation, tokenizer, max_length)
    if len(examples) > 1:
        raise DataError(
            conversation.where,
            "the chat template renders earlier turns differently once later ones follow, so the conversation makes "
            f"{len(examples)} examples instead of one; use single-turn rows or another model.chat_template",
            "several examples",
        )
    return examples[0]


def encode_turns(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Example]:
    """Ids and mask; every assistant turn is trained, including the token that ends it, unless the row says that it is
    not to be learnt. What the template writes before an answer without a thought is not trained either: a thought that
    the data does not hold must not be learnt.

    The result is one example if the template renders a turn independently of later turns. If it does not (Qwen3 drops
    the thoughts of earlier turns), a new example begins, so that each answer is trained after the prompt that a server
    sees. Prompt and answer are tokenized separately, so the ids before an answer equal encode_prompt's.
    Raises DataError with the row's place; its kind is one of AUDITS if an example would be trained wrongly.
    """
    return finished(_turns(conversation, tokenizer, max_length), tokenizer)


def encode_ahead(
    rows: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, max_length: int, ledger: Ledger
) -> Iterator[tuple[Conversation, list[Example] | DataError]]:
    """Each row with what `encode_turns` returns or raises for it, at half the time. Rows are read ahead; what the
    ledger gets while they are read is recorded when their turn comes."""
    for batch in _batches(ledger.ahead(rows)):
        results = finished_all([_turns(row, tokenizer, max_length) for row, _ in batch if row], tokenizer)
        for row, findings in batch:
            for finding in findings:
                ledger.record(*finding)
            if row:
                yield row, next(results)


def _batches(rows: Iterable[tuple[Conversation | None, R]]) -> Iterator[list[tuple[Conversation | None, R]]]:
    """The rows in lists of at most BATCH_ROWS rows and BATCH_CHARACTERS characters; a longer row is alone."""
    batch: list[tuple[Conversation | None, R]] = []
    characters = 0
    for row, rest in rows:
        length = sum(len(m["content"]) for m in row.messages) if row else 0
        if batch and (len(batch) == BATCH_ROWS or characters + length > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append((row, rest))
        characters += length
    yield batch


def _prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]
) -> Steps[list[int]]:
    """The steps of `encode_prompt`."""
    frame = frame_of(tokenizer, arguments)
    messages = [with_thought(m, frame) for m in (messages if frame.system else without_system(messages))]
    messages = with_tools(messages, arguments, tokenizer, "")
    safe, arguments, separator = yield from protect(messages, tokenizer, "", True, arguments)
    (text,) = yield Render(safe, [(len(safe), True)], "", arguments)
    return _ids(text, separator, encoder_of(tokenizer), "")


def _turns(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Steps[list[Example]]:
    """The steps of `encode_turns`."""
    where, encoder = conversation.where, encoder_of(tokenizer)
    arguments = training_arguments(conversation, tokenizer)
    frame = frame_of(tokenizer, arguments)
    turns = conversation.messages if frame.system else without_system(conversation.messages)
    joined = len(conversation.messages) - len(turns)  # 1 if the system turn became a part of the user's
    messages = with_tools([_thinking(m, frame, where) for m in turns], arguments, tokenizer, where)
    safe, arguments, separator = yield from protect(messages, tokenizer, where, False, arguments)
    examples: list[Example] = []
    ids: list[int] = []
    mask: list[int] = []
    encoded, end = "", 0  # the text of `ids`, and the index in it of the marker that ends the last turn
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i + joined in conversation.not_learnt:
            continue
        if not message["content"].strip() and CALLS not in message:
            problem = "the answer is empty, so there is nothing to learn; remove the row or answer it"
            raise DataError(where, problem, "empty answer")
        prompt, full = yield Render(safe[: i + 1], [(i, True), (i + 1, False)], where, arguments)
        if not full.startswith(prompt):
            problem = (
                f"the chat template renders the turns before answer {i} differently with the answer, so no prefix of "
                "the text is the prompt; use single-turn rows or another model.chat_template"
            )
            raise DataError(where, problem, AUDITS["prompt_not_prefix"])
        if ids and not prompt.startswith(encoded):
            examples.append(_example(ids, mask, conversation, tokenizer, max_length))
            ids, mask, encoded, end = [], [], "", 0
        # a control token separates the texts around it, so continuing from the last one in `ids` is exact
        prompt_ids = _ids(prompt[end:], separator, encoder, where)[1 if ids else 0 :]
        answer, length = _answer(full[len(prompt) :], where, encoder)
        check_thought(safe[i], answer, where)
        opening = frame.opening or ""
        if not has_thought(message) and opening and answer.startswith(opening):
            opening_ids = _continued(prompt[end:], opening, separator, encoder, where)
            given = prompt[end:] + opening
        else:
            opening, opening_ids, given = "", [], prompt[end:]
        answer_ids = _continued(given, answer[len(opening) :], separator, encoder, where)
        ids += prompt_ids + opening_ids + answer_ids
        mask += [0] * (len(prompt_ids) + len(opening_ids)) + [1] * len(answer_ids)
        encoded = prompt + answer
        end = len(prompt) + length
    if not ids:
        problem = "no assistant turn is learnt" if conversation.not_learnt else "no assistant turn"
        raise DataError(where, f"{problem}, so there is nothing to learn", AUDITS["untrained"])
    return [*examples, _example(ids, mask, conversation, tokenizer, max_length)]


def learning_last_turn(conversation: Conversation) -> Conversation:
    """The conversation, of whose assistant's turns only the last is learnt."""
    earlier = (i for i, m in enumerate(conversation.messages[:-1]) if m["role"] == "assistant")
    return replace(conversation, not_learnt=tuple({*conversation.not_learnt, *earlier}))


def training_arguments(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the template is given for a row: its own arguments and the tokenizer's; if neither has any, the switch that
    lets thoughts in or leaves them out, as the row needs it."""
    if arguments_of(tokenizer) is not None or conversation.template_arguments.keys() - {TOOLS}:
        return row_arguments(tokenizer, conversation.template_arguments)
    thinks = any(map(has_thought, conversation.messages))
    switch = thinking_arguments(tokenizer) if thinks else quiet_arguments(tokenizer)
    return {**switch, **conversation.template_arguments}


def has_thought(message: Message) -> bool:
    return message["role"] == "assistant" and bool(message.get(THOUGHT) or TAGGED_THOUGHT.match(message["content"]))


def _thinking(message: Message, frame: Frame, where: str) -> Message:
    """The turn with its thought where the template looks for it. Raises DataError if the template renders none."""
    if message.get(THOUGHT) and not frame.thoughts:
        problem = (
            "the chat template leaves thoughts out; remove reasoning_content from the row, or set model.chat_template "
            "to one that renders it"
        )
        raise DataError(where, problem, "thought that the chat template leaves out")
    if frame.thoughts == "tags" and "</think>" in message.get(THOUGHT, ""):
        problem = "a thought holds </think>, by which the chat template ends thoughts; remove it"
        raise DataError(where, problem, "</think> in a thought")
    return with_thought(message, frame)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends the assistant's turn in training; it must also stop generation."""
    return _last_token({"role": "assistant", "content": "b"}, tokenizer)


def _last_token(answer: Message, tokenizer: PreTrainedTokenizerBase) -> int:
    turns = ({"role": "user", "content": "a"}, answer)
    return encode(Conversation(turns, "", "chat template"), tokenizer, 1_000_000).ids[-1]


def stop_tokens(base: int | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: `base` (eos_token_id of the base's generation config), the tokenizer's EOS and the end of
    turn that is trained, also that of a turn that calls a tool."""
    base_ids = [base] if isinstance(base, int) else base or ()
    ends = {*base_ids, tokenizer.eos_token_id, end_of_turn(tokenizer)}
    if tool_use_of(tokenizer).calls:
        with suppress(DataError):  # a template may end such a turn without a token; rows with one are then refused
            ends.add(_last_token(CALL_TURN, tokenizer))
    return sorted(i for i in ends if i is not None)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the control tokens; text from data is never encoded to them."""
    return encoder_of(tokenizer).control_ids


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise DataError if the tokenizer has no template, or has several and no default."""
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(tokenizer.chat_template)
        raise DataError("", f"{name}: has chat templates {names} but no default; set model.chat_template")
    if not tokenizer.chat_template:
        raise DataError(
            "", f"{name}: its tokenizer has no chat template; use an instruct model or set model.chat_template"
        )


def _example(
    ids: list[int], mask: list[int], conversation: Conversation, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Example:
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        problem = f"the chat template writes {tokenizer.bos_token!r} twice; correct model.chat_template"
        raise DataError(conversation.where, problem, AUDITS["double_bos"])
    if len(ids) > max_length:
        raise TooLong(conversation.where, len(ids), max_length)
    return Example(ids, mask, conversation.context, conversation.where)


def _answer(text: str, where: str, encoder: Encoder) -> tuple[str, int]:
    """The text through the marker that ends the turn, and the marker's index; only white space may follow."""
    markers = list(encoder.markers.finditer(text)) if encoder.markers else []
    if not text.strip() or (markers and not text[: markers[-1].start()].strip()):
        problem = "the chat template leaves out the answer, so nothing is trained; set another model.chat_template"
        raise DataError(where, problem, AUDITS["untrained"])
    if not markers or text[markers[-1].end() :].strip():
        problem = (
            "the chat template ends the assistant's turn without a control token, so the model would never learn to "
            "stop; set model.chat_template to one that does"
        )
        raise DataError(where, problem, AUDITS["end_not_trained"])
    return text[: markers[-1].end()], markers[-1].start()


def _continued(before: str, text: str, separator: str, encoder: Encoder, where: str) -> list[int]:
    """Ids of `text` when it follows `before`."""
    if encoder.prepends:  # the ids of both together, if a token begins where `text` does
        first, both = _ids(before, separator, encoder, where), _ids(before + text, separator, encoder, where)
        if both[: len(first)] == first:
            return both[len(first) :]
    return _ids(text, separator, encoder, where, begins=False)


def _ids(text: str, separator: str, encoder: Encoder, where: str, begins: bool = True) -> list[int]:
    """Ids of rendered text, in which `separator` splits markers from data. `begins`: no text precedes it."""
    ids: list[int] = []
    for piece in text.split(separator) if separator else [text]:
        ids += encoder.ids(piece) if begins else encoder.ids_after_text(piece, where)
        begins = False
    if encoder.normalizes and encoder.markers:
        encoded, written = sum(i in encoder.control_ids for i in ids), len(encoder.markers.findall(text))
        if encoded > written:
            problem = "the tokenizer's normalizer turns a part of the text into a control token; remove look-alikes"
            raise DataError(where, problem, "look-alike of a control token")
    return ids
