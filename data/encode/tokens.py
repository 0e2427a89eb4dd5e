"""Text -> token ids, equal to the tokenizer's; a text that recurs (a passage, an instruction) is encoded once."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from data.conversation import DataError
from data.errors import UserError
from data.progress import track

CACHED_PIECES = 256  # of at most LONGEST_CACHED characters each: about 50 MB at worst
SHORTEST_CACHED, LONGEST_CACHED = (
    100,
    20_000,
)  # shorter texts cost no more than the look-up, longer ones too much memory

LEFT, RIGHT = "A-Za-z0-9" + re.escape(".,;:!?\"')]}%"), "A-Z"
PARAGRAPH = re.compile(rf"(?<=[{LEFT}])\n\n(?=[{RIGHT}])")

# an added token that is one of many: <loc_1>, <extra_id_0>, [ENT12]
NUMBERED = re.compile(r"<[A-Za-z]\w*\d>|\[[A-Za-z]\w*\d\]")

# parts of a tokenizer that encode each piece independently of the other pieces
LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
LOCAL_PRE_TOKENIZERS = {"ByteLevel", "Split", "Digits", "Punctuation", "Sequence"}

# texts that most tokenizers do not join with the text after them
ANCHORS = ("\n", "|", "0", "x")


class Encoder:
    """Ids of texts without BOS and EOS, equal to `tokenizer.encode(text, add_special_tokens=False)`.

    `control`: text of each control token -> id. `markers`: a pattern of these texts, longest first; None without any.
    `prepends`: the tokenizer puts a space before a text, so its ids depend on whether other text precedes it.
    `normalizes`: control tokens are matched in normalized text, so that other texts may become control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.control = control_tokens(tokenizer)
        self.control_ids = frozenset(self.control.values())
        self.markers = any_of(self.control)
        self.marker_starts, self.marker_ends = {text[0] for text in self.control}, {text[-1] for text in self.control}
        self.longest_marker = max(map(len, self.control), default=0)
        added = tokenizer.added_tokens_decoder
        self.normalizes = (
            tokenizer.is_fast
            and tokenizer.backend_tokenizer.normalizer is not None
            and any(added[i].normalized for i in self.control_ids if i in added)
        )
        self._cached = lru_cache(maxsize=CACHED_PIECES)(self._encode)
        self.cut = paragraph_cut(tokenizer)
        self.prepends = str(tokenizer.decode(self.ids("x") * 2)).strip() != "xx"

    def ids(self, text: str) -> list[int]:
        if self.cut is None:
            return list(self._encode(text))
        ids: list[int] = []
        for piece in _pieces(text, self.cut):
            cached = SHORTEST_CACHED <= len(piece) <= LONGEST_CACHED
            ids += self._cached(piece) if cached else self._encode(piece)
        return ids

    def ids_after_text(self, text: str, where: str) -> list[int]:
        """Ids of a text that follows other text: without the space that the tokenizer puts before a first text."""
        if not self.prepends or not text:
            return self.ids(text)
        for anchor in ANCHORS:
            alone, both = self.ids(anchor), self.ids(anchor + text)
            if both[: len(alone)] == alone:
                return both[len(alone) :]
        problem = f"the tokenizer joins {text[:20]!r} with any text before it; change the text"
        raise DataError(where, problem, "text without tokens of its own")

    def _encode(self, text: str) -> tuple[int, ...]:
        if not self.tokenizer.is_fast:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        backend = self.tokenizer.backend_tokenizer
        if backend.truncation or backend.padding:  # set by another call on the same tokenizer, or saved with it
            backend.no_truncation()
            backend.no_padding()
        # no offsets and no wrapper: 30 % faster
        return tuple(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def encoder_of(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The tokenizer's encoder; a new one if tokens were added."""
    template = tokenizer.chat_template
    return _encoder(tokenizer, len(tokenizer), template if isinstance(template, str) else None)


@lru_cache(maxsize=4)
def _encoder(tokenizer: PreTrainedTokenizerBase, size: int, template: str | None) -> Encoder:
    return Encoder(tokenizer)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Text -> id of the tokens that text from data must never become: all tokens flagged special, and added tokens
    without the flag (Qwen's <think>, Mistral's [INST]), except new_vocabulary."""
    special = set(tokenizer.all_special_ids)
    tokens = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special or i in special}
    vocabulary = new_vocabulary(tokenizer)
    tokens |= {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if i not in vocabulary}
    return {text: i for text, i in tokens.items() if text.strip()}


def new_vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Id -> text of the added tokens that stand for text in data: single characters, runs of spaces, words, and
    numbered ones of a task (<loc_1>) that the chat template does not write. All others stay control."""
    template = str(tokenizer.chat_template or "")
    tokens = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    flagged = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}

    def is_text(i: int, text: str) -> bool:
        bare = text.strip("\u2581 \t\r\n")
        if len(text) == 1 or not bare or text.strip("\u2581 ").isalnum():
            return True
        return bool(template and NUMBERED.fullmatch(bare)) and bare not in template

    return {i: text for i, text in tokens.items() if i not in flagged and is_text(i, text)}


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's tokenizers.Tokenizer. Raises UserError for a slow tokenizer, which has none."""
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise UserError(f"{name} does not give the offsets of its tokens; use a model with a fast tokenizer")
    return tokenizer.backend_tokenizer


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the fast tokenizer that encodes control markers as text, such as `[SEP]` in a passage."""
    parts = json.loads(fast_backend(tokenizer).to_str())
    parts["truncation"] = parts["padding"] = None  # saved with some tokenizers: all-MiniLM truncates at 128
    control = set(control_tokens(tokenizer).values())
    for token in parts["added_tokens"]:
        token["special"] = token["special"] or token["id"] in control
    plain = Tokenizer.from_str(json.dumps(parts))
    plain.encode_special_tokens = True  # in the library's words: encode them as ordinary text
    return plain


def encode_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[dict[str, list[int]]], int]:
    """Rows [CLS] text [SEP] for an encoder, with input_ids and, if it has them, token_type_ids; and the number of texts
    cut to max_length tokens. Text never becomes a control token."""
    backend = plain_backend(tokenizer)
    control = backend.num_special_tokens_to_add(False)
    if max_length <= control:
        raise UserError(
            f"max_seq_length {max_length} leaves no room for text beside {control} control tokens; raise it"
        )
    backend.enable_truncation(max_length)
    with_types = "token_type_ids" in tokenizer.model_input_names
    rows = []
    cut = 0
    for i in track(range(0, len(texts), 1000), "encode texts, in thousands"):
        for encoding in backend.encode_batch(list(texts[i : i + 1000])):
            cut += bool(encoding.overflowing)
            rows.append({"input_ids": encoding.ids} | ({"token_type_ids": encoding.type_ids} if with_types else {}))
    return rows, cut


def any_of(texts: Any) -> re.Pattern[str] | None:
    """A pattern that matches any of the texts, and the longest of several at the same place; None without texts."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True)))) if texts else None


def paragraph_cut(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many of the two newlines at a paragraph's end (see PARAGRAPH) belong to the text before, so that both texts
    have the same ids separately as together; None if no cut is known to be safe.

    A cut is safe if the tokenizer is byte-level BPE or similar, with parts that encode each piece independently; if no
    added token touches a newline; and if its pre-tokenizer, a regex that looks at most one character ahead and never
    back, ends a piece at the cut for each pair of characters that PARAGRAPH allows around it. Then neither text affects
    the other's ids. GPT-2's regex takes the newlines one by one (1), Llama 3's and Qwen's in one piece (2);
    SentencePiece has no pieces smaller than a text (None: texts are encoded whole, at half the speed).
    """
    if not tokenizer.is_fast:
        return None
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model, tokens = parts["model"], parts["added_tokens"]
    if model["type"] != "BPE" or model["dropout"]:
        return None
    if any("\n" in t["content"] or t["lstrip"] or t["rstrip"] for t in tokens):
        return None
    if any(part["type"] not in LOCAL_NORMALIZERS | {"Sequence"} for part in _flat(parts["normalizer"], "normalizers")):
        return None
    splitters = list(_flat(parts["pre_tokenizer"], "pretokenizers"))
    if not splitters or not all(_is_local(part) for part in splitters):
        return None
    return next((cut for cut in (1, 2) if _is_safe(tokenizer.backend_tokenizer, cut)), None)


def _flat(part: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    if part is not None:
        yield part
        for each in part.get(inner, ()):
            yield from _flat(each, inner)


def _is_local(splitter: dict[str, Any]) -> bool:
    if splitter["type"] not in LOCAL_PRE_TOKENIZERS or splitter.get("add_prefix_space"):
        return False
    pattern = splitter.get("pattern", {}).get("Regex", "")
    return not re.search(r"\(\?<|[$^]|\\[AGbBzZ]", pattern.replace("[^", ""))  # looks back, or matches at a text's ends


def _is_safe(backend: Any, cut: int) -> bool:
    """True if the pre-tokenizer gives the same pieces for sample texts in one part and cut into two."""
    left = [chr(c) for c in range(128) if re.match(f"[{LEFT}]", chr(c))]
    for before in left:
        for prefix in ("", "a", "7", ".", " ", "\n", "é"):
            for after in ("A", "Z", "Qu", "I'm", "A\n\n", "X1"):
                text = f"{prefix}{before}\n\n{after}"
                at = len(prefix) + 1 + cut
                together = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
                before_cut = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text[:at])]
                after_cut = [(a + at, b + at) for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text[at:])]
                if together != before_cut + after_cut:
                    return False
    return True


def _pieces(text: str, cut: int) -> Iterator[str]:
    start = 0
    for match in PARAGRAPH.finditer(text):
        yield text[start : match.start() + cut]
        start = match.start() + cut
    yield text[start:]
