"""Extractive question answering as BERT does it: a question beside each window of its passage, and where the answer is.

A row is [CLS] question [SEP] part of the passage [SEP]. Passages and questions are encoded once and kept once; a window
is five numbers that say which part of which passage it shows, so that SQuAD's 130,000 questions take some 60 MB.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from data.cache import build_once, cache_key
from data.conversation import Conversation, DataError
from data.encode.tokens import fast_backend, plain_backend
from data.errors import UserError
from data.progress import track

TEXTS = 1024  # that are encoded at once
NO_PASSAGE = -1  # offset of a token that is not of the passage


@dataclass(frozen=True)
class Window:
    """A row of L tokens. offsets [L, 2]: a passage token's characters in the context, others NO_PASSAGE. max_context
    [L]: whether an answer may begin here; one of a passage token's windows has it. start, end: first and last token of
    the gold answer; 0, that of [CLS], where there is none or the window does not hold all of it."""

    conversation: int
    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    max_context: np.ndarray
    start: int
    end: int


@dataclass(frozen=True)
class Windows:
    """W windows of C conversations on P passages, those of a conversation next to each other."""

    conversation: np.ndarray  # [W] which one
    passage: np.ndarray  # [W] which one
    first: np.ndarray  # [W] the first passage token that is shown
    length: np.ndarray  # [W] how many are
    core: np.ndarray  # [W, 2] passage tokens, from and to, that have their max context here
    start: np.ndarray  # [W] position in the row of the gold answer's first token
    end: np.ndarray  # [W] and of its last
    cut: np.ndarray  # [C] whether the question was longer than max_query_length
    answerable: np.ndarray  # [C]
    question_ids: np.ndarray  # of all questions; question_rows[i] is where number i begins, [C + 1]
    question_rows: np.ndarray
    passage_ids: np.ndarray  # likewise, [P + 1]
    passage_rows: np.ndarray
    passage_offsets: np.ndarray  # [len(passage_ids), 2]
    frame: np.ndarray  # [2, F] ids and types of the control tokens
    frame_rows: np.ndarray  # [2] how many stand before the question, and before the passage
    text_types: np.ndarray  # [2] type of question and passage

    def __len__(self) -> int:
        return len(self.conversation)

    @property
    def lengths(self) -> np.ndarray:
        """[W] tokens of each row."""
        return self.frame.shape[1] + np.diff(self.question_rows)[self.conversation] + self.length

    @property
    def passage_at(self) -> np.ndarray:
        """[W] position in the row of its first passage token."""
        return self.frame_rows[1] + np.diff(self.question_rows)[self.conversation]

    @property
    def cut_questions(self) -> int:
        """Questions that were cut to max_query_length."""
        return int(self.cut.sum())

    @property
    def lost_answers(self) -> int:
        """Answerable questions whose answer no window holds whole; trained as if they had none."""
        return int(self.answerable.sum()) - len(np.unique(self.conversation[np.asarray(self.end) > 0]))

    def row(self, index: int) -> Window:
        conversation, (before, between) = int(self.conversation[index]), self.frame_rows.tolist()
        question = self.question_ids[self.question_rows[conversation] : self.question_rows[conversation + 1]]
        first, length = int(self.first[index]), int(self.length[index])
        begin, at = int(self.passage_rows[self.passage[index]]) + first, between + len(question)
        low, high = self.core[index] - first + at
        ids, types = self.frame
        passage = self.passage_ids[begin : begin + length]
        asked, told = (np.full(n, t) for n, t in zip((len(question), length), self.text_types, strict=True))
        input_ids = np.concatenate((ids[:before], question, ids[before:between], passage, ids[between:]))
        offsets = np.full((len(input_ids), 2), NO_PASSAGE, np.int32)
        offsets[at : at + length] = self.passage_offsets[begin : begin + length]
        return Window(
            conversation=conversation,
            input_ids=input_ids,
            token_type_ids=np.concatenate((types[:before], asked, types[before:between], told, types[between:])),
            offsets=offsets,
            max_context=(np.arange(len(input_ids)) >= low) & (np.arange(len(input_ids)) < high),
            start=int(self.start[index]),
            end=int(self.end[index]),
        )

    def save(self, folder: Path) -> None:
        """A .npy file for each array."""
        folder.mkdir(parents=True, exist_ok=True)
        for field in dataclasses.fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> "Windows":
        """Mapped, not read."""
        files = {field.name: folder / f"{field.name}.npy" for field in dataclasses.fields(cls)}
        return cls(**{name: np.asarray(np.load(file, "r", allow_pickle=False)) for name, file in files.items()})


def make_windows(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
) -> Windows:
    """Rows of at most max_seq_length tokens; questions are cut to max_query_length, passages never.

    doc_stride: how many tokens a window moves on, as in google-research/bert's run_squad.py; that of transformers'
    `stride` is the overlap: the passage tokens of a window less this one. Raises UserError for lengths that leave a
    passage no room and for a tokenizer that tells no offsets; DataError for a row that is not SQuAD's.
    """
    if not conversations:
        raise DataError("", "no question to make windows of; name data with at least one", "no question")
    backend = plain_backend(tokenizer)
    frame = _frame(backend.encode("a", "b"), "token_type_ids" in tokenizer.model_input_names)
    control, between = frame["frame"].shape[1], int(frame["frame_rows"][1])
    _check_settings(max_seq_length, doc_stride, max_query_length, control)
    number: dict[str, int] = {}
    passage = [number.setdefault(_checked(c).context, len(number)) for c in conversations]
    passage_ids, passage_rows, offsets = _encode(backend, list(number), "encode passages, in thousands")
    whole_ids, whole_rows, _ = _encode(backend, [c.question for c in conversations], "encode questions, in thousands")
    sizes = np.diff(whole_rows)
    kept = np.arange(len(whole_ids)) - np.repeat(whole_rows[:-1], sizes) < max_query_length
    sizes, cut = np.minimum(sizes, max_query_length), sizes > max_query_length

    rows: list[tuple[int, ...]] = []
    for i, conversation in enumerate(track(conversations, "find answers in windows")):
        begin, end = passage_rows[passage[i]], passage_rows[passage[i] + 1]
        answer = _answer_tokens(conversation, offsets[begin:end])
        room, at = max_seq_length - control - int(sizes[i]), between + int(sizes[i])
        for first, length, low, high in _spans(int(end - begin), room, doc_stride):
            inside = answer is not None and first <= answer[0] and answer[1] < first + length
            gold = (answer[0] - first + at, answer[1] - first + at) if answer and inside else (0, 0)
            rows.append((i, passage[i], first, length, low, high, *gold))
    columns = np.array(rows, np.int32).T
    return Windows(
        **dict(zip(("conversation", "passage", "first", "length"), columns, strict=False)),
        core=columns[4:6].T,
        start=columns[6],
        end=columns[7],
        cut=cut,
        answerable=np.array([bool(c.answers) for c in conversations]),
        question_ids=whole_ids[kept],
        question_rows=np.concatenate(([0], np.cumsum(sizes))),
        passage_ids=passage_ids,
        passage_rows=passage_rows,
        passage_offsets=offsets,
        **frame,
    )


def load_windows(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    max_seq_length: int = 384,
    doc_stride: int = 128,
    max_query_length: int = 64,
) -> Windows:
    """Those of `make_windows`, from a folder in `cache` where they were made before; where that is damaged, made
    anew."""
    asked = (conversations, tokenizer, max_seq_length, doc_stride, max_query_length)
    folder = cache / windows_key(*asked)
    try:
        return Windows.load(build_once(folder, lambda aside: make_windows(*asked).save(aside)))
    except (FileNotFoundError, EOFError, ValueError) as error:
        if not folder.is_dir():
            raise
        print(f"{folder} is damaged ({error}): its windows are made anew", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        return Windows.load(build_once(folder, lambda aside: make_windows(*asked).save(aside)))


def windows_key(conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, *settings: int) -> str:
    """Names all that the windows depend on: texts, tokenizer, settings, code. Raises UserError for a slow tokenizer."""
    number: dict[str, int] = {}
    passages = [number.setdefault(c.context, len(number)) for c in conversations]
    digest = hashlib.sha256(repr(list(number)).encode())
    for c, passage in zip(conversations, passages, strict=True):
        digest.update(repr((c.question, passage, c.answers, c.starts)).encode())
    return cache_key(
        texts=digest.hexdigest(),
        tokenizer=fast_backend(tokenizer).to_str(),
        special=[tokenizer.special_tokens_map, tokenizer.model_input_names],
        settings=settings,
        libraries=[version("tokenizers"), version("transformers")],
    )


def _frame(pair: Any, with_types: bool) -> dict[str, np.ndarray]:
    """The last three arrays of Windows, of an encoded pair of texts: RoBERTa puts </s></s> between them."""
    part = [-1 if text is None else text for text in pair.sequence_ids]
    if set(part) != {-1, 0, 1} or part[0] != -1 or part.index(0) > part.index(1):
        problem = "the tokenizer puts no token such as [CLS] before a pair of texts, where 'no answer' is marked"
        raise UserError(f"{problem}; use BERT's or one like it")
    types, control, places = np.array(pair.type_ids) * with_types, np.array(part) == -1, [part.index(0), part.index(1)]
    return {
        "frame": np.array([np.array(pair.ids)[control], types[control]], np.int32),
        "frame_rows": np.array([control[:place].sum() for place in places], np.int32),
        "text_types": types[places].astype(np.int32),
    }


def _check_settings(max_seq_length: int, doc_stride: int, max_query_length: int, control: int) -> None:
    if min(doc_stride, max_query_length) < 1:
        values = f"doc_stride {doc_stride} and max_query_length {max_query_length}"
        raise UserError(f"{values} must be 1 or more; raise them")
    if max_query_length + control >= max_seq_length:
        problem = f"max_query_length {max_query_length} and {control} control tokens leave no room for a passage"
        raise UserError(f"{problem} in max_seq_length {max_seq_length}; raise max_seq_length or lower max_query_length")


def _checked(conversation: Conversation) -> Conversation:
    if not conversation.question or len(conversation.starts) != len(conversation.answers):
        lacks = "offsets of its answers" if conversation.question else "question"
        raise DataError(conversation.where, f"row without {lacks}; extractive answers need data in SQuAD's format")
    return conversation


def _encode(backend: Any, texts: list[str], description: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids of all texts in a row, where each text's begin (one more than texts), and offsets [ids, 2] in characters."""
    ids, offsets, sizes = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)], [0]
    for i in track(range(0, len(texts), TEXTS), description):
        for encoding in backend.encode_batch(texts[i : i + TEXTS], add_special_tokens=False):
            ids.append(np.array(encoding.ids, np.int32))
            offsets.append(np.array(encoding.offsets, np.int32).reshape(-1, 2))
            sizes.append(len(ids[-1]))
    return np.concatenate(ids), np.cumsum(sizes), np.concatenate(offsets)


def _answer_tokens(conversation: Conversation, offsets: np.ndarray) -> tuple[int, int] | None:
    """First and last passage token of the shortest gold span, which is also what the language model learns."""
    if not conversation.answers:
        return None
    chosen = min(range(len(conversation.answers)), key=lambda i: len(conversation.answers[i]))
    start = conversation.starts[chosen]
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    last = int(np.searchsorted(offsets[:, 0], start + len(conversation.answers[chosen]))) - 1
    return (first, last) if first <= last else None  # none: the tokenizer drops all of its characters


@lru_cache(maxsize=4096)
def _spans(tokens: int, room: int, doc_stride: int) -> list[tuple[int, int, int, int]]:
    """Windows on a passage: first token, tokens, and the tokens, from and to, that have more context than elsewhere.

    A token's context is the smaller of those to its sides, and 0.01 of the window's length decides between equal ones:
    _check_is_max_context of google-research/bert's run_squad.py. Such tokens of a window are neighbours.
    """
    firsts = [0]
    while firsts[-1] + room < tokens:
        firsts.append(firsts[-1] + min(room, doc_stride))
    best, owner = np.full(tokens, -1.0), np.zeros(tokens, np.int32)
    spans = []
    for i, first in enumerate(firsts):
        place = np.arange(length := min(room, tokens - first))
        context = np.minimum(place, place[::-1]) + 0.01 * length
        better = context > best[first : first + length]
        best[first : first + length][better], owner[first : first + length][better] = context[better], i
        spans.append((first, length))
    cores = np.searchsorted(owner, np.arange(len(firsts) + 1)).tolist()
    return [(*span, cores[i], cores[i + 1]) for i, span in enumerate(spans)]
