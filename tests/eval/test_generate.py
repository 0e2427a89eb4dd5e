"""Answers in rows are those of one prompt at a time, and nothing is computed twice."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, PreTrainedModel, set_seed

import eval.generate
from data.encode.chat import Example, encode_prompt
from data.encode.pack import build_pack
from eval.decode_batch import Batch, takes_rows
from eval.generate import generate_ids, generate_one
from eval.predict import generate
from sft.models.load import load_base
from sft.models.tune import tune_model
from sft.recipe.schema import Model, Tune

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
NEW = 12
STOP = set(range(0, 49_152, 9))  # so that a random model ends some answers early and others not at all


def lively(model: PreTrainedModel) -> PreTrainedModel:
    """The model with larger weights, so that the next token depends on the prompt."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


@pytest.fixture
def model(tiny) -> PreTrainedModel:
    return lively(load_base(Model(base=str(tiny), dtype="float32"), CPU))


@pytest.fixture(scope="module")
def prompts(questions, tokenizer) -> list[list[int]]:
    """30 on 5 passages."""
    return [encode_prompt(q.prompt, tokenizer) for q in questions[:30]]


def alone(model: PreTrainedModel, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    return [generate_one(model, prompt, STOP, new) for prompt in prompts]


@contextmanager
def computed(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of each forward."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: counts.append(args[0].numel()))
    yield counts
    hook.remove()


def tree_tokens(prompts: list[list[int]]) -> int:
    return len(build_pack([[Example(ids, [0] * len(ids)) for ids in prompts]]).input_ids)


@pytest.mark.parametrize("batch_tokens", [1, 600, 1500, 20_000])
def test_answers_are_those_of_one_prompt_at_a_time_for_any_batch_tokens(model, prompts, batch_tokens):
    expected = alone(model, prompts)
    assert generate_ids(model, prompts, STOP, NEW, batch_tokens) == expected
    assert len({len(answer) for answer in expected}) > 3
    assert len(set(map(tuple, expected))) > 20


def test_answers_with_biases_and_with_an_adapter_are_those_of_one_prompt_at_a_time(tiny_qwen, prompts):
    base = load_base(Model(base=str(tiny_qwen), dtype="float32"), CPU)
    tuned = tune_model(base, Tune(method="lora", r=4, target_modules="all-linear", init_lora_weights=False), seed=0)
    lively(tuned)
    answers = generate_ids(tuned, prompts, STOP, NEW, 2000)
    assert answers == alone(tuned, prompts)
    with tuned.disable_adapter():
        assert answers != alone(tuned, prompts)


@pytest.mark.parametrize("new", [1, 2])
def test_equal_prompts_prefixes_of_others_and_single_tokens_are_answered(model, prompts, new):
    odd = [*prompts[:3], *prompts[:3], [*prompts[0], 5], prompts[0][:-1], [5], [5], [6]]
    assert generate_ids(model, odd, STOP, new, 2000) == alone(model, odd, new)


def test_no_prompt_is_no_answer(model):
    assert generate_ids(model, [], STOP, NEW, 2000) == []


@pytest.mark.parametrize("batch_tokens", [600, 20_000])
def test_shared_context_is_computed_once_and_ended_answers_not_at_all(model, prompts, batch_tokens):
    passage = prompts[0]
    many = [[*passage, *range(5 + i, 15 + i)] for i in range(50)]  # too many for one row
    with computed(model) as counts:
        answers = generate_ids(model, many, STOP, NEW, batch_tokens)
    # the first new token of each comes with its prompt
    assert sum(counts) == tree_tokens(many) + sum(len(answer) - 1 for answer in answers)
    assert any(len(answer) < NEW for answer in answers)


def test_batch_never_holds_more_than_batch_tokens(model, prompts, monkeypatch):
    sizes: list[int] = []

    class Watched(Batch):
        def __init__(self, rows):
            super().__init__(rows)
            sizes.append(self.layers[0].whole[0].shape[0] * self.layers[0].whole[0].shape[2])

    monkeypatch.setattr(eval.generate, "Batch", Watched)
    generate_ids(model, [[*prompts[0], 5 + i] for i in range(200)], STOP, NEW, 1000)
    assert 500 < max(sizes) <= 1000


def test_model_has_its_own_attention_again_even_if_interrupted(model, prompts):
    implementations: list[str] = []

    def interrupt(*args):
        implementations.append(model.config._attn_implementation)
        if len(implementations) == 2:
            raise KeyboardInterrupt

    generate_ids(model, prompts[:2], STOP, NEW, 2000)
    assert model.config._attn_implementation == "sdpa"
    hook = model.get_output_embeddings().register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_ids(model, prompts[:2], STOP, NEW, 2000)
    hook.remove()
    assert implementations == ["sdpa", "rows"]
    assert model.config._attn_implementation == "sdpa"


def test_model_whose_attention_can_not_be_replaced_answers_one_prompt_at_a_time(tokenizer, questions):
    set_seed(0)
    config = FalconConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=False
    )
    falcon = FalconForCausalLM(config).eval()
    assert not takes_rows(falcon)
    packed, single = (generate(falcon, tokenizer, questions[:3], 3, 2000, packed) for packed in (True, False))
    assert packed == single


def test_batch_frees_its_memory_when_it_is_done(model, prompts):
    import weakref

    storages: list[weakref.ref] = []

    class Watched(Batch):
        def __init__(self, rows):
            super().__init__(rows)
            storages.append(weakref.ref(self.layers[0].whole[0].untyped_storage()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval.generate, "Batch", Watched)
        generate_ids(model, prompts, STOP, NEW, 2000)
    assert storages
    assert not any(storage() for storage in storages)
