"""Answer one question or classify one text: `graft ask`, `graft classify`."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import softmax

from data.conversation import Conversation
from data.encode.tokens import encode_texts
from data.readers.newsgroups import HEADERS, INSTRUCTION, NEWSGROUPS, strip_post
from data.readers.squad import INSTRUCTION_V1, squad_conversation
from eval.likelihood import answer_logprobs
from eval.predict import generate
from sft.baselines.heads import class_logits, load_run, read_spans
from sft.errors import RecipeError
from sft.models.target import load_target, run_any_recipe
from sft.recipe.baseline_schema import AnyRecipe, BaselineRecipe
from sft.recipe.schema import Recipe
from sft.scoring.answerers import baseline_answerer

SQUAD = ("squad_v1", "squad_v2")
BEFORE_AND_AFTER = (("before", True), ("after", False))  # (training, whether the untrained base answers)


def ask_run(run: Path, question: str, context: str, n_best: int) -> Iterator[str]:
    """Lines with the answers of the untrained base and of the run; for an extractive run also its n best quotes."""
    recipe = run_any_recipe(run)
    if recipe.task not in SQUAD:
        raise RecipeError(f"{run}: its task is {recipe.task}; name a run that answers questions on a passage")
    row = {"id": "question", "context": context, "question": question, "answers": []}
    conversation = squad_conversation(row, 2, "question")
    if isinstance(recipe, Recipe):
        if recipe.task == "squad_v1":
            instruction = {"role": "system", "content": INSTRUCTION_V1}
            conversation = replace(conversation, messages=(instruction, *conversation.messages[1:]))
        length, tokens = recipe.eval.max_new_tokens, recipe.eval.batch_tokens
        for name, base in BEFORE_AND_AFTER:
            loaded = load_target(str(run), base)
            (written,) = generate(loaded.model, loaded.tokenizer, [conversation], length, tokens, loaded.packed)
            yield f"{name} training: {written.text}"
    elif recipe.is_floor:
        yield baseline_answerer(run, recipe)([conversation])[0].text
    else:
        yield from _quotes(run, recipe, conversation, n_best)


def classify_text(run: Path, text: str, top: int) -> Iterator[str]:
    """Lines "label  probability", the most probable first."""
    recipe = run_any_recipe(run)
    if recipe.task != "newsgroups":
        raise RecipeError(f"{run}: its task is {recipe.task}; name a run that classifies texts")
    if not text.strip():
        raise RecipeError("--text: is empty; give a post")
    if HEADERS.match(text):  # a whole post is stripped as in training
        text = strip_post(text)
    if isinstance(recipe, BaselineRecipe) and (recipe.is_floor or recipe.objective == "mlm"):
        post = Conversation((), "text", "text", context=text)
        yield baseline_answerer(run, recipe)([post])[0].text
        return
    labels, probabilities = _label_probabilities(run, recipe, text)
    for i in np.argsort(-probabilities)[:top]:
        yield f"{labels[i]:26} {probabilities[i]:.3f}"


def _quotes(run: Path, recipe: BaselineRecipe, conversation: Conversation, n_best: int) -> Iterator[str]:
    for name, base in BEFORE_AND_AFTER:
        model, tokenizer, chosen = load_run(run, recipe, base)
        (answer,), _ = read_spans(model, recipe, [conversation], tokenizer)
        yield f"{name} training: {answer.text}"
    threshold = chosen["null_threshold"]
    if threshold is not None and recipe.task == "squad_v2" and answer.null_difference > threshold:
        yield "by the threshold chosen in training: unanswerable"
    for text, probability in answer.n_best[:n_best]:
        yield f"  {probability:.3f}  {text or '(no answer)'}"


def _label_probabilities(run: Path, recipe: AnyRecipe, text: str) -> tuple[list[str], np.ndarray]:
    if isinstance(recipe, BaselineRecipe):
        model, tokenizer, chosen = load_run(run, recipe)
        rows, _ = encode_texts([text], tokenizer, recipe.data.max_seq_length)
        return chosen["labels"], softmax(class_logits(model, recipe, rows, tokenizer)[0])
    loaded = load_target(str(run))
    prompt = ({"role": "system", "content": INSTRUCTION}, {"role": "user", "content": text})
    tokens = recipe.eval.batch_tokens
    scores = answer_logprobs(loaded.model, loaded.tokenizer, [prompt], [NEWSGROUPS], tokens, loaded.packed)
    return list(NEWSGROUPS), softmax(np.array(scores[0]))
