"""Extractive question answering as in BERT: a question with each window of its passage, and the answer's tokens.

A row is [CLS] question [SEP] part of the passage [SEP]; the tokenizer cuts the passage. Rows are in an Arrow file that
is memory-mapped, so that memory does not grow with its size.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from data.cache import build_once, cache_key
from data.conversation import Conversation, DataError
from data.encode.tokens import fast_backend, plain_backend
from data.errors import UserError
from data.progress import track

FILE = "windows.arrow"
NO_PASSAGE = -1  # offset of a token outside the passage
SCHEMA = pa.schema(
    [(name, pa.list_(pa.int32())) for name in ("input_ids", "token_type_ids", "char_starts", "char_ends")]
    + [(name, pa.int32()) for name in ("conversation", "start_positions", "end_positions", "core_start", "core_end")]
    + [(name, pa.bool_()) for name in ("cut_question", "lost_answer")]
)


def make_windows(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, *lengths: int) -> Dataset:
    """The rows of `window_rows`, in memory."""
    return Dataset(pa.Table.from_pylist(list(window_rows(conversations, tokenizer, *lengths)), SCHEMA))


def load_windows(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, cache: Path, *lengths: int
) -> Dataset:
    """The rows of `window_rows`, memory-mapped from a folder in `cache`, which is built if it is missing or damaged."""
    folder = cache / windows_key(conversations, tokenizer, *lengths)

    def build(temporary: Path) -> None:
        rows = window_rows(conversations, tokenizer, *lengths)
        with pa.ipc.new_stream(str(temporary / FILE), SCHEMA) as writer:
            while batch := list(islice(rows, 1000)):
                writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))

    return Dataset.from_file(str(build_once(folder, build) / FILE))


def windows_key(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, *lengths: int) -> str:
    """Hash of all that the rows depend on: texts, tokenizer, lengths, code. Raises UserError for a slow tokenizer."""
    texts = hashlib.sha256()
    for c in conversations:
        texts.update(repr((c.question, c.context, c.answers, c.starts)).encode())
    return cache_key(
        texts=texts.hexdigest(),
        tokenizer=fast_backend(tokenizer).to_str(),
        lengths=lengths,
        libraries=[version(name) for name in ("tokenizers", "transformers", "datasets")],
    )


def window_rows(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
) -> Iterator[dict[str, Any]]:
    """Rows of at most max_seq_length tokens. Questions are cut to max_query_length tokens; passages are windowed.

    doc_stride: tokens between the starts of two windows, as in google-research/bert's run_squad.py; the `stride` of
    tokenizers is the overlap. The rows of a conversation (its number is a column) follow each other. Columns:
    input_ids, token_type_ids, char_starts, char_ends: per token; its characters in the passage, else NO_PASSAGE.
    start_positions, end_positions: first and last token of the gold answer; 0, that of [CLS], if the row has only a
    part of it or none.
    core_start, core_end (excluded): the tokens at which an answer may begin. Each passage token is in one core.
    cut_question, lost_answer: set in the first row of a conversation if its question was cut, or if no row holds its
    whole answer, so that it is trained as unanswerable.
    Raises UserError for lengths that leave no room for a passage and for a tokenizer without offsets; DataError for a
    row that is not SQuAD's.
    """
    backend = plain_backend(tokenizer)
    parts = backend.encode("a", "b").sequence_ids  # None: a control token
    control, before = parts.count(None), parts[: parts.index(1)].count(None)
    _check(conversations, parts, max_seq_length, doc_stride, max_query_length)

    @lru_cache(maxsize=1000)
    def encode_passage(context: str) -> tuple[Encoding, np.ndarray]:
        # as the second of two texts: post_process does not set the token types of overflowing parts
        encoding = backend.encode("", context, add_special_tokens=False)
        return encoding, _covering(context, np.array(encoding.offsets, np.int32).reshape(-1, 2))

    for number, conversation in enumerate(track(conversations, "cut passages into windows")):
        backend.no_truncation()
        passage, offsets = encode_passage(conversation.context)
        question = backend.encode(conversation.question, add_special_tokens=False)
        if cut := len(question) > max_query_length:
            text = conversation.question[: question.offsets[max_query_length][0]].rstrip()
            question = backend.encode(text, add_special_tokens=False)
        at, room = before + len(question), max_seq_length - control - len(question)
        step = min(room, doc_stride)
        backend.enable_truncation(max_seq_length, stride=room - step, strategy="only_second")
        framed = backend.post_process(question, passage)
        windows = [framed, *framed.overflowing]
        firsts = np.arange(len(windows)) * step
        begin, end = _answer_tokens(conversation, offsets)
        whole = (firsts <= begin) & (end < firsts + room)
        for i, (window, core) in enumerate(zip(windows, pairwise(_cores(len(offsets), room, step)), strict=True)):
            shift = at - i * step  # index in the passage -> index in the row
            visible = offsets[i * step : i * step + room]
            characters = np.full((len(window), 2), NO_PASSAGE, np.int32)
            characters[at : at + len(visible)] = visible
            yield {
                "conversation": number,
                "input_ids": np.array(window.ids, np.int32),
                "token_type_ids": np.array(window.type_ids, np.int32),
                "char_starts": characters[:, 0],
                "char_ends": characters[:, 1],
                "start_positions": begin + shift if whole[i] else 0,
                "end_positions": end + shift if whole[i] else 0,
                "core_start": core[0] + shift,
                "core_end": core[1] + shift,
                "cut_question": cut and i == 0,
                "lost_answer": i == 0 and bool(conversation.answers) and not whole.any(),
            }


def _check(conversations: Sequence[Conversation], parts: list[int | None], *lengths: int) -> None:
    (max_seq_length, doc_stride, max_query_length), control = lengths, parts.count(None)
    if parts[0] is not None:
        problem = "the tokenizer puts no token such as [CLS] before a pair of texts to mark 'no answer' with"
        raise UserError(f"{problem}; use BERT's or one like it")
    if min(doc_stride, max_query_length) < 1:
        values = f"doc_stride {doc_stride} and max_query_length {max_query_length}"
        raise UserError(f"{values} must be 1 or more; raise them")
    if max_query_length + control >= max_seq_length:
        problem = f"max_query_length {max_query_length} and {control} control tokens leave no room for a passage"
        raise UserError(f"{problem} in max_seq_length {max_seq_length}; raise max_seq_length or lower max_query_length")
    if not conversations:
        raise DataError("", "no question to make windows of; name data with at least one question", "no question")
    for c in conversations:
        if not c.question or len(c.starts) != len(c.answers):
            lacks = "offsets of its answers" if c.question else "question"
            raise DataError(c.where, f"row without {lacks}; extractive answers need data in SQuAD's format")


def _covering(text: str, offsets: np.ndarray) -> np.ndarray:
    """The offsets, with each token begun where its word begins: a tokenizer that cuts white space off, and adds a space
    of its own (RobBERT's), counts that space as the first letter. Characters that tokenizers drop stay uncovered."""
    before = np.maximum.accumulate(np.concatenate(([0], offsets[:, 1])))[:-1]
    for token in np.flatnonzero(offsets[:, 0] > before):
        start, end = int(offsets[token, 0]), int(before[token])
        while start > end and (c := text[start - 1]).isprintable() and not c.isspace() and c != "\ufffd":
            start -= 1
        offsets[token, 0] = start
    return offsets


def _answer_tokens(conversation: Conversation, offsets: np.ndarray) -> tuple[int, int]:
    """First and last passage token of the shortest gold span, which the language model learns too; -1 and -1 without
    an answer, or if the tokenizer drops all of its characters."""
    if not conversation.answers:
        return -1, -1
    answer, start = min(zip(conversation.answers, conversation.starts, strict=True), key=lambda span: len(span[0]))
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], start + len(answer))) - 1
    return (first, last) if first <= last else (-1, -1)


@lru_cache(maxsize=4096)
def _cores(tokens: int, room: int, step: int) -> list[int]:
    """The first passage token of each window's core, and the end of the last core.

    A core is the range of tokens that have more context in this window than in others. A token's context is the smaller
    of its left and right context plus, to decide between equal ones, 0.01 of the window's length: the rule of
    _check_is_max_context in google-research/bert's run_squad.py.
    """
    best, owner = np.full(tokens, -1.0), np.zeros(tokens, int)
    firsts = range(0, max(tokens - room, 0) + step, step)
    for i, first in enumerate(firsts):
        place = np.arange(min(room, tokens - first))
        context = np.minimum(place, place[::-1]) + 0.01 * len(place)
        better = context > best[first : first + room]
        best[first : first + room][better], owner[first : first + room][better] = context[better], i
    return np.searchsorted(owner, np.arange(len(firsts) + 1)).tolist()
