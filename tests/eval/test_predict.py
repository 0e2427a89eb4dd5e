"""Generation in packs says what one-by-one generation says."""

import pytest
import torch

from data.conversation import Conversation
from data.readers.squad import UNANSWERABLE
from eval.predict import generate
from eval.results import score, summarize
from sft.models.load import load_base
from sft.recipe.schema import Model

pytestmark = pytest.mark.heavy


@pytest.mark.slow
def test_packed_answers_equal_transformers_own_generate(smollm, tokenizer, questions):
    model = load_base(Model(base=str(smollm), dtype="float32"), torch.device("cpu"))
    chosen = questions[:10]
    packed = generate(model, tokenizer, chosen, max_new_tokens=12, batch_tokens=900)
    alone = generate(model, tokenizer, chosen, max_new_tokens=12, batch_tokens=900, packed=False)
    assert packed == alone
    assert len({p.text for p in packed}) > 3


def test_answers_come_in_order_and_say_whether_they_ended(tiny, tokenizer, questions):
    model = load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu"))
    forward = generate(model, tokenizer, questions[:20], 5, 600)
    backward = generate(model, tokenizer, questions[:20][::-1], 5, 4000)
    assert [p.text for p in forward] == [p.text for p in backward[::-1]]
    assert all(p.new_tokens == 5 or p.finished for p in forward)


@pytest.mark.parametrize("packed", [True, False])
def test_question_that_the_model_has_no_positions_for_is_not_asked_and_counts_as_wrong(
    tiny, tokenizer, questions, packed
):
    model = load_base(Model(base=str(tiny), dtype="float32"), torch.device("cpu"))
    turns = ({"role": "user", "content": "word " * 2100}, {"role": "assistant", "content": UNANSWERABLE})
    asked = [questions[0], Conversation(turns, "long", "f:1"), questions[1]]  # an empty answer would be right for it
    predictions = generate(model, tokenizer, asked, 5, 600, packed)
    assert [p.asked for p in predictions] == [True, False, True]
    assert predictions[0].text == generate(model, tokenizer, questions[:1], 5, 600, packed)[0].text
    results = summarize("squad_v2", score("squad_v2", asked, predictions))
    assert (results["questions"], results["too_long_for_model"]) == (3, 1)
    assert score("squad_v2", asked, predictions)[1].scores == {"exact": 0.0, "f1": 0.0}
