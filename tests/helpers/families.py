"""Small tokenizers with the chat templates of the model families: what their control tokens and templates do, offline."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The passage says that the answer is blue, and that nothing else is known of it.",
    "Question: Who wrote the first letter, and when was it sent?\n\nAnswer: nobody knows.",
    "A user asks and the model answers. 1984, 42 and 7 are numbers; x = y * 2.",
    "thought tool response start end of turn system user assistant model INST",
]

LLAMA_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

CHATML = """\
{%- for turn in messages -%}
{{ '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

# trims contents and writes BOS; a role is a header of its own tokens
LLAMA = """\
{{- bos_token -}}
{%- for turn in messages -%}
{{- '<|start_header_id|>' ~ turn['role'] ~ '<|end_header_id|>\\n\\n' ~ turn['content'] | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

# the system turn becomes part of the first user turn; the assistant is called model; {% generation %} marks its turn
GEMMA = """\
{{- bos_token -}}
{%- set first = '' -%}
{%- set turns = messages -%}
{%- if messages[0].role == 'system' -%}
    {%- set first = messages[0].content ~ '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('roles must alternate user and assistant') -}}
    {%- endif -%}
    {%- if turn.role == 'assistant' -%}
        {{- '<start_of_turn>model\\n' -}}
        {%- generation -%}{{- turn.content | trim ~ '<end_of_turn>' -}}{%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- '<start_of_turn>user\\n' ~ (first if loop.first else '') ~ turn.content | trim ~ '<end_of_turn>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# thoughts stand only in the turns after the last question; a tool's response is a user turn and no question
QWEN3 = """\
{%- set state = namespace(question=0) -%}
{%- for turn in messages -%}
    {%- set is_response = turn.content.startswith('<tool_response>') and turn.content.endswith('</tool_response>') -%}
    {%- if turn.role == 'user' and not is_response -%}
        {%- set state.question = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}
{%- for turn in messages -%}
    {%- if turn.role == 'assistant' -%}
        {%- set thought, text = '', turn.content -%}
        {%- if '</think>' in text -%}
            {%- set thought = text.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n' -}}
        {%- if loop.index0 > state.question and (loop.last or thought) -%}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') -}}
        {%- else -%}
            {{- text -}}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- else -%}
        {{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""

# [INST] is plain text of the template; no system turn
MISTRAL_V1 = """\
{{- bos_token -}}
{%- for turn in messages -%}
    {%- if turn.role == 'user' -%}{{- '[INST] ' + turn.content + ' [/INST]' -}}
    {%- elif turn.role == 'assistant' -%}{{- ' ' + turn.content + eos_token -}}
    {%- else -%}{{- raise_exception('only user and assistant turns') -}}
    {%- endif -%}
{%- endfor -%}
"""

MISTRAL_V7 = """\
{{- bos_token -}}
{%- for turn in messages -%}
    {%- if turn.role == 'system' -%}{{- '[SYSTEM_PROMPT]' + turn.content + '[/SYSTEM_PROMPT]' -}}
    {%- elif turn.role == 'user' -%}{{- '[INST]' + turn.content + '[/INST]' -}}
    {%- else -%}{{- turn.content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


@dataclass(frozen=True)
class Family:
    template: str
    kind: str  # of pre-tokenizer, see build
    special: tuple[str, ...]
    unflagged: tuple[str, ...]  # added, but not flagged special
    bos: str | None
    end: str
    system: bool = True  # knows a system turn

    @property
    def markers(self) -> tuple[str, ...]:
        return (*self.special, *self.unflagged)


FAMILIES = {
    "chatml": Family(CHATML, "gpt2", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), ("<tool>",), None, "<|im_end|>"),
    "llama3": Family(
        LLAMA,
        "llama3",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ("<|python_tag|>",),
        "<|begin_of_text|>",
        "<|eot_id|>",
    ),
    "gemma": Family(
        GEMMA, "spaces", ("<bos>", "<eos>", "<start_of_turn>"), ("<end_of_turn>", "<table>"), "<bos>", "<end_of_turn>"
    ),
    "qwen3": Family(
        QWEN3,
        "qwen",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        ("<think>", "</think>", "<tool_response>", "</tool_response>"),
        None,
        "<|im_end|>",
    ),
    "mistral_v1": Family(MISTRAL_V1, "prepend", ("<unk>", "<s>", "</s>"), ("<pad>",), "<s>", "</s>", system=False),
    "mistral_v7": Family(
        MISTRAL_V7,
        "llama3",
        ("<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]"),
        ("[/INST]",),
        "<s>",
        "</s>",
    ),
}


@lru_cache
def build(name: str) -> PreTrainedTokenizerFast:
    family = FAMILIES[name]
    backend = _sentencepiece(family.kind) if family.kind in ("spaces", "prepend") else _byte_level(family.kind)
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in family.special])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in family.unflagged])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.end, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = family.template
    return tokenizer


MARK = re.compile(r"<\|[^|<>\s]{1,30}\|>|<\|\w{2,20}>|<\w{2,20}\|>|<｜[^｜<>]{1,30}｜>|</?[a-z_]{2,20}>")


@lru_cache
def build_for(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer for any template: texts in it that look like control tokens are some, tags without the flag."""
    marks = sorted({*MARK.findall(template), "<|bos|>", "<|eos|>"})
    backend = _byte_level("qwen")
    for mark in marks:
        flagged = "|" in mark or "｜" in mark or "turn" in mark
        backend.add_tokens([AddedToken(mark, normalized=False, special=flagged)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", clean_up_tokenization_spaces=False,
        additional_special_tokens=[m for m in marks if "|" in m or "｜" in m or "turn" in m],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def _byte_level(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if kind == "qwen":
        backend.normalizer = normalizers.NFC()
    if kind == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        regex = LLAMA_REGEX.replace("{1,3}", "") if kind == "qwen" else LLAMA_REGEX
        split = pre_tokenizers.Split(Regex(regex), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    return backend


def _sentencepiece(kind: str) -> Tokenizer:
    """Characters and merges over spaces written as U+2581; bytes for characters that it does not know."""
    space = "\u2581"
    learner = Tokenizer(models.BPE())
    lines = [line.replace(" ", space) for line in LINES]
    learner.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    parts = json.loads(learner.to_str())["model"]
    texts = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *parts["vocab"]]
    backend = Tokenizer(
        models.BPE(
            vocab={text: i for i, text in enumerate(texts)},
            merges=[tuple(pair) for pair in parts["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", space)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), spaces]) if kind == "prepend" else spaces
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if kind == "prepend" else steps)
    return backend
