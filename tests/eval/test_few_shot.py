"""Few-shot prompts: the same examples for all, balanced, and none that is scored."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from data.conversation import Conversation, DataError
from data.encode.chat import encode_prompt
from data.encode.pack import common_prefix
from data.readers.newsgroups import NEWSGROUPS
from data.readers.squad import UNANSWERABLE
from eval.few_shot import with_shots
from eval.likelihood import answer_logprobs
from eval.predict import generate
from sft.models.load import load_base
from sft.recipe.schema import Model
from tests.helpers.builders import read_squad
from tests.helpers.places import SAMPLES


@pytest.fixture(scope="module")
def training() -> list[Conversation]:
    return read_squad(SAMPLES / "squad_train.json")


def post(label: str, number: int, words: int = 5, group: str = "", text: str | None = None) -> Conversation:
    text = f"post {number} " * words if text is None else text
    turns = (
        {"role": "system", "content": "Which?"},
        {"role": "user", "content": text},
        {"role": "assistant", "content": label},
    )
    return Conversation(turns, f"{label}/{number}", "", (label,), text, group, label)


def shots_of(conversation: Conversation) -> list[tuple[str, str]]:
    turns = conversation.prompt[1:-1]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    return [(turns[i]["content"], turns[i + 1]["content"]) for i in range(0, len(turns), 2)]


def test_all_get_the_same_shots_after_their_system_turn_and_keep_the_rest(questions, training):
    prompted = with_shots(questions, training, 4, seed=0)
    assert len({tuple(shots_of(c)) for c in prompted}) == 1
    assert len(set(shots_of(prompted[0]))) == 4
    solved = {(e.prompt[-1]["content"], e.answer) for e in training}
    assert set(shots_of(prompted[0])) <= solved
    for before, after in zip(questions, prompted, strict=True):
        assert (after.messages[0], after.messages[-2:]) == (before.messages[0], before.messages[-2:])
        assert replace(after, messages=before.messages) == before
    assert with_shots(questions, training, 0, seed=0) == questions


def test_seed_alone_decides(questions, training):
    assert with_shots(questions, training, 3, seed=5) == with_shots(questions, training, 3, seed=5)
    drawn = {tuple(shots_of(with_shots(questions[:1], training, 3, seed)[0])) for seed in range(6)}
    assert len(drawn) > 3


def test_prompt_without_a_system_turn_begins_with_the_shots(training):
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    (prompted,) = with_shots([Conversation(turns, "", "")], training, 2, seed=0)
    assert [turn["role"] for turn in prompted.messages] == ["user", "assistant"] * 3
    assert prompted.messages[-2:] == turns


@pytest.mark.parametrize("seed", range(4))
def test_unanswerable_question_is_among_two_or_more_and_never_the_only_one(questions, training, seed):
    for n, expected in ((1, 0), (2, 1), (3, 1), (4, 2)):
        answers = [answer for _, answer in shots_of(with_shots(questions[:1], training, n, seed)[0])]
        assert answers.count(UNANSWERABLE) == expected


def test_labels_are_balanced_as_far_as_the_examples_allow():
    examples = [post(label, i) for label in NEWSGROUPS for i in range(10 if label != "sci.med" else 1)]
    scored = [post("sci.med", 99)]
    counts = Counter(answer for _, answer in shots_of(with_shots(scored, examples, 45, seed=1)[0]))
    assert counts["sci.med"] == 1
    assert len(counts) == 20
    assert set(counts.values()) == {1, 2, 3}
    few = [shots_of(with_shots(scored, examples, 5, seed)[0]) for seed in range(5)]
    assert all(len({answer for _, answer in shots}) == 5 for shots in few)
    assert len({answer for shots in few for _, answer in shots}) > 8


def test_short_examples_are_drawn_and_longer_ones_only_if_needed():
    examples = [post(label, i, words=1 + i) for label in ("a", "b") for i in range(10)]
    scored = [post("a", 99)]
    for seed in range(5):
        lengths = [len(text.split()) // 2 for text, _ in shots_of(with_shots(scored, examples, 10, seed)[0])]
        assert max(lengths) <= 5
    assert len(shots_of(with_shots(scored, examples, 20, seed=0)[0])) == 20


def test_no_shot_shares_context_or_thread_with_any_scored_question():
    examples = [
        post("a", 1, group="engine"), post("a", 2, text="Same   POST"), post("a", 3, text=" "), post("a", 4, group="wings"),
    ]  # fmt: skip
    scored = [post("b", 5, group="engine"), post("b", 6, text="same post"), post("b", 7, text="")]
    for seed in range(5):
        assert shots_of(with_shots(scored, examples, 1, seed)[0]) == [(examples[3].context, "a")]
    with pytest.raises(DataError, match=r"2 shots: only 1 of 4 examples .* fewer shots"):
        with_shots(scored, examples, 2, seed=0)


def test_scored_data_itself_gives_no_shot(questions):
    with pytest.raises(DataError, match="1 shots: only 0 of 96 examples"):
        with_shots(questions, questions, 1, seed=0)
    half = with_shots(questions[:48], questions, 2, seed=0)
    assert not any(q.context in text for q in questions[:48] for text, _ in shots_of(half[0]))


def test_few_shot_prompts_are_answered_and_compared_with_the_shots_computed_once(tiny, tokenizer, questions, training):
    model = load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu"))
    prompted = with_shots(questions[:6], training, 3, seed=0)
    prompts = [encode_prompt(c.prompt, tokenizer) for c in prompted]
    shared = common_prefix(min(prompts), max(prompts))
    assert shared > sum(len(text) for shot in shots_of(prompted[0]) for text in shot) / 10
    answers = generate(model, tokenizer, prompted, 4, 4000)
    assert answers == generate(model, tokenizer, prompted, 4, 4000, packed=False)
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: counts.append(args[0].numel()))
    packed = answer_logprobs(model, tokenizer, [c.prompt for c in prompted], [["a", UNANSWERABLE]] * 6, 4000)
    hook.remove()
    assert sum(counts) <= shared + sum(len(prompt) - shared + 20 for prompt in prompts)
    alone = answer_logprobs(
        model, tokenizer, [c.prompt for c in prompted], [["a", UNANSWERABLE]] * 6, 4000, packed=False
    )
    assert [v for vs in packed for v in vs] == pytest.approx([v for vs in alone for v in vs], abs=1e-4)
