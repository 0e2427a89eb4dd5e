"""Likelihoods in packs equal those of one candidate at a time, and of log_softmax token by token."""

import math

import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, PreTrainedModel, set_seed

from data.conversation import Conversation, DataError
from data.encode.chat import encode, encode_prompt, encode_turns, end_of_turn, special_ids
from data.readers.squad import UNANSWERABLE
from eval.likelihood import _choice, answer_logprobs, classify_by_likelihood, no_answer_differences
from eval.predict import generate
from eval.prediction import Prediction
from sft.models.load import load_base
from sft.models.tune import tune_model
from sft.recipe.schema import Model, Tune
from tests.helpers.families import FAMILIES, build
from tests.helpers.places import SMOLLM

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
LABELS = ("sci.med", "sci.space", "sci", "talk.politics.misc", "a label of many more words than the others have")


def load(folder) -> PreTrainedModel:
    """The model with larger weights, so that the next token depends on the prompt."""
    model = load_base(Model(base=str(folder), dtype="float32"), CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


@pytest.fixture
def model(tiny) -> PreTrainedModel:
    return load(tiny)


def plain(model: PreTrainedModel, tokenizer, prompt, answer: str) -> float:
    """Computed alone, token by token, from the ids that training would see."""
    example = encode(Conversation((*prompt, {"role": "assistant", "content": answer}), "", ""), tokenizer, 100_000)
    start, total = len(encode_prompt(prompt, tokenizer)), 0.0
    assert example.ids[-1] == end_of_turn(tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([example.ids])).logits[0]
    for at in range(start, len(example.ids)):
        total += logits[at - 1].log_softmax(-1)[example.ids[at]].item()
    return total


def flat(nested) -> list[float]:
    return [value for values in nested for value in values]


def turns(content: str, system: str | None = None):
    first = () if system is None else ({"role": "system", "content": system},)
    return (*first, {"role": "user", "content": content})


@pytest.mark.parametrize("batch_tokens", [600, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 20_000))])
def test_packed_is_one_by_one_and_plain_for_any_batch_tokens(model, tokenizer, questions, batch_tokens):
    prompts = [q.prompt for q in questions[:14]][::-1]
    answers = [[q.answer, UNANSWERABLE, "the " + q.answer, q.answer] for q in questions[:14]][::-1]
    expected = [[plain(model, tokenizer, p, a) for a in several] for p, several in zip(prompts, answers, strict=True)]
    assert flat(answer_logprobs(model, tokenizer, prompts, answers, batch_tokens)) == pytest.approx(
        flat(expected), abs=1e-4
    )
    one_by_one = answer_logprobs(model, tokenizer, prompts, answers, batch_tokens, packed=False)
    assert flat(one_by_one) == pytest.approx(flat(expected), abs=1e-4)
    assert max(flat(expected)) - min(flat(expected)) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_answer_after_earlier_turns_has_the_ids_of_training(family):
    """For every template: those after the prompt in the last example of the whole conversation."""
    tokenizer = build(family)
    shots = (*turns("Is 1984 a number?"), {"role": "assistant", "content": "yes"})
    instruction = ({"role": "system", "content": "Answer."},) if FAMILIES[family].system else ()
    for system in ((), instruction):
        for answer in ("no", " Who wrote it?\n", "<|im_end|>[INST]</s>", "42"):
            prompt = (*system, *shots, *turns("Is x?"))
            whole = (*prompt, {"role": "assistant", "content": answer})
            example = encode_turns(Conversation(whole, "", ""), tokenizer, 1000)[-1]
            choice = _choice(prompt, (answer,), tokenizer, "")
            assert [*choice.prompt, *choice.answers[0]] == example.ids


def test_with_an_adapter_and_with_biases_it_is_plain_too(tiny_qwen, tokenizer, questions):
    base = load_base(Model(base=str(tiny_qwen), dtype="float32"), CPU)
    tuned = tune_model(base, Tune(method="lora", r=4, target_modules="all-linear", init_lora_weights=False), seed=0)
    prompts = [q.prompt for q in questions[:6]]
    logprobs = answer_logprobs(tuned, tokenizer, prompts, [LABELS] * 6, 2000)
    assert flat(logprobs) == pytest.approx([plain(tuned, tokenizer, p, a) for p in prompts for a in LABELS], abs=1e-4)
    with tuned.disable_adapter():
        assert flat(logprobs) != pytest.approx(flat(answer_logprobs(tuned, tokenizer, prompts, [LABELS] * 6, 2000)))


def test_prompts_that_share_nothing_equal_prompts_and_none(model, tokenizer, questions):
    prompts = [turns("a"), questions[0].prompt, turns("a"), turns("b", "c")]
    answers = [["x", "y"], ["z"], ["y"], []]
    logprobs = answer_logprobs(model, tokenizer, prompts, answers, 2000)
    assert [len(values) for values in logprobs] == [2, 1, 1, 0]
    assert flat(logprobs) == pytest.approx(
        [plain(model, tokenizer, p, a) for p, several in zip(prompts, answers, strict=True) for a in several], abs=1e-4
    )
    assert answer_logprobs(model, tokenizer, [], [], 2000) == []
    assert answer_logprobs(model, tokenizer, [turns("a")], [["x"]], 2000)[0] == pytest.approx(
        [logprobs[0][0]], abs=1e-4
    )


def test_shared_instruction_and_prompts_are_computed_once(model, tokenizer):
    instruction = "Which newsgroup is this post from? " * 20
    prompts = [turns(text, instruction) for text in ("a rocket", "my back hurts", "the senate")]
    ids = [encode_prompt(p, tokenizer) for p in prompts]
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: counts.append(args[0].numel()))
    answer_logprobs(model, tokenizer, prompts, [["x", "y"]] * 3, 2000)
    hook.remove()
    assert max(counts) == counts[0] > 100
    assert sum(counts) < len(ids[0]) + 3 * 20


def test_likelihood_includes_the_end_of_the_turn(model, tokenizer):
    prompt = turns("a")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    assert all(len(tokenizer.encode(letter)) == 1 for letter in letters)
    logprobs = answer_logprobs(model, tokenizer, [prompt], [letters], 2000)[0]
    with torch.no_grad():
        first = model(torch.tensor([encode_prompt(prompt, tokenizer)])).logits[0, -1].log_softmax(-1)
    without = [first[tokenizer.encode(letter)[0]].item() for letter in letters]
    assert all(whole < letter for whole, letter in zip(logprobs, without, strict=True))


def test_probabilities_are_those_of_the_labels_and_their_order_does_not_matter(model, tokenizer, questions):
    predictions = classify_by_likelihood(model, tokenizer, questions[:8], LABELS, 2000)
    for q, prediction in zip(questions[:8], predictions, strict=True):
        by_label = {label: plain(model, tokenizer, q.prompt, label) for label in LABELS}
        assert prediction.text == max(by_label, key=by_label.__getitem__)
        total = sum(math.exp(value) for value in by_label.values())
        assert prediction.probability == pytest.approx(math.exp(by_label[prediction.text]) / total, rel=1e-3)
        assert (prediction.finished, prediction.new_tokens, prediction.asked) == (True, 0, True)
    backwards = classify_by_likelihood(model, tokenizer, questions[:8], LABELS[::-1], 2000, packed=False)
    assert [p.text for p in backwards] == [p.text for p in predictions]
    assert [p.probability for p in backwards] == pytest.approx([p.probability for p in predictions], abs=1e-4)
    one = classify_by_likelihood(model, tokenizer, questions[:1], ["sci.med"], 2000)
    assert (one[0].text, one[0].probability) == ("sci.med", pytest.approx(1))


@pytest.mark.parametrize("packed", [True, False])
def test_prompt_that_the_model_has_no_positions_for_is_not_asked(model, tokenizer, questions, packed):
    long = Conversation((*turns("word " * 2100), {"role": "assistant", "content": "x"}), "long", "f:1")
    asked = [questions[0], long, questions[1]]
    predictions = classify_by_likelihood(model, tokenizer, asked, LABELS, 2000, packed)
    assert [p.asked for p in predictions] == [True, False, True]
    assert (predictions[1].text, predictions[1].probability) == ("", None)
    assert predictions[0].text == classify_by_likelihood(model, tokenizer, asked[:1], LABELS, 2000, packed)[0].text
    with pytest.raises(DataError, match="prompt 1: 2[0-9]+ tokens .* 2048 positions"):
        answer_logprobs(model, tokenizer, [questions[0].prompt, long.prompt], [["a"], ["b"]], 2000, packed)


def test_empty_candidate_is_an_error(model, tokenizer):
    with pytest.raises(DataError, match="prompt 0: .* empty"):
        answer_logprobs(model, tokenizer, [turns("a")], [[" "]], 2000)


def test_control_tokens_in_prompts_and_labels_stay_text(model, tokenizer, monkeypatch):
    """<|im_end|> in a label would end the turn early, and make a label of many tokens as likely as its first."""
    computed: list[list[int]] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: computed.append(args[0][0].tolist()))
    prompt, label = turns("is <|im_end|> a\n<|im_start|>system\ntoken?"), "yes<|im_end|>\n<|im_start|>user"
    for packed in (True, False):
        computed.clear()
        logprobs = answer_logprobs(model, tokenizer, [prompt], [[label]], 2000, packed)
        ids = [i for pack in computed for i in pack]
        template = [i for i in encode_prompt(turns("is a token?"), tokenizer) if i in special_ids(tokenizer)]
        ends = [end_of_turn(tokenizer)] if packed else []  # the last token predicts nothing
        assert [i for i in ids if i in special_ids(tokenizer)] == template + ends
        assert tokenizer.decode(ids).count("<|im_end|>") == template.count(end_of_turn(tokenizer)) + len(ends) + 2
        assert logprobs[0] == pytest.approx([plain(model, tokenizer, prompt, label)], abs=1e-4)
    hook.remove()


def test_model_whose_attention_can_not_be_replaced_computes_one_candidate_at_a_time(tokenizer, questions):
    set_seed(0)
    config = FalconConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True
    )
    falcon = FalconForCausalLM(config).eval()
    prompts = [q.prompt for q in questions[:2]]
    logprobs = answer_logprobs(falcon, tokenizer, prompts, [LABELS] * 2, 2000, packed=True)
    assert flat(logprobs) == pytest.approx([plain(falcon, tokenizer, p, a) for p in prompts for a in LABELS], abs=1e-4)


def test_difference_to_no_answer_is_infinite_if_no_answer_is_predicted_already(model, tokenizer, questions):
    texts = ["axolotls", "Unanswerable.", "", "", "the end"]
    predictions = [Prediction(text, 3, True, asked=i != 3) for i, text in enumerate(texts)]
    differences = no_answer_differences(model, tokenizer, questions[:5], predictions, 2000)
    assert differences[1:4] == [math.inf] * 3
    for i in (0, 4):
        null, answer = (plain(model, tokenizer, questions[i].prompt, a) for a in (UNANSWERABLE, texts[i]))
        assert differences[i] == pytest.approx(null - answer, abs=1e-4)


def test_real_model_finds_its_own_answer_likelier_than_another(smollm, tokenizer):
    model = load_base(Model(base=SMOLLM, dtype="float32"), CPU)
    asked = [
        Conversation((*turns(text), {"role": "assistant", "content": "?"}), text, "")
        for text in ("Answer in one word: is fire hot?", "Answer in one word: is ice hot?")
    ]
    own = [p.text for p in generate(model, tokenizer, asked, 40, 2000)]
    predictions = classify_by_likelihood(model, tokenizer, asked, [*own, "Xylophone quarrel bridge."], 2000)
    assert [p.text for p in predictions] == own
    assert flat(answer_logprobs(model, tokenizer, [c.prompt for c in asked], [own, own], 2000)) == pytest.approx(
        [plain(model, tokenizer, c.prompt, answer) for c in asked for answer in own], abs=1e-3
    )
