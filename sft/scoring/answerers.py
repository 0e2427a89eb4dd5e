"""How a system is asked: a language model by writing or by likelihood, a baseline by its head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.conversation import Conversation
from data.readers.source import read_all
from data.readers.squad import UNANSWERABLE
from eval.answer_log import Note, resume_answers
from eval.client import served_model, server_predictions
from eval.likelihood import classify_by_likelihood, no_answer_differences
from eval.metrics import squad_scores
from eval.predict import generate
from eval.prediction import Prediction
from eval.results import limit_questions
from eval.spans import tune_threshold
from eval.tasks import TASKS
from sft.errors import RecipeError
from sft.models.target import is_url, load_target
from sft.recipe.baseline_schema import AnyRecipe, BaselineRecipe
from sft.recipe.schema import Eval
from sft.training.examples import with_split

Answerer = Callable[[Sequence[Conversation]], list[Prediction]]


@dataclass(frozen=True)
class AnswerOptions:
    """How questions are put. `labels`: choose among the task's labels by likelihood instead of writing an answer.
    `shots`: solved examples of the run's training data before each question. `threshold_from`: so many
    training questions choose how likely "unanswerable" must be, against what was written, to be the answer instead."""

    max_new_tokens: int | None = None
    labels: bool = False
    shots: int = 0
    threshold_from: int = 0
    concurrency: int = 16
    served: str | None = None


def model_answerer(
    target: str,
    task: str,
    base: bool,
    settings: Eval,
    options: AnswerOptions,
    known: Sequence[Conversation] = (),
    keep: Path | None = None,
) -> Answerer:
    """The answers of a language model, loaded here or behind a server. known: training questions for the threshold;
    keep: where what is written is kept as it comes."""
    length = options.max_new_tokens or settings.max_new_tokens
    if options.threshold_from and options.shots:
        raise RecipeError("--threshold-from, --shots: training questions would be asked without shots; keep one")
    if options.threshold_from and task != "squad_v2":
        raise RecipeError(f"--threshold-from: task {task} has no questions without answer; leave it out")
    if is_url(target):
        if options.labels or options.threshold_from:
            raise RecipeError(f"{target}: a server tells no likelihoods; leave --labels and --threshold-from out")
        served = served_model(target, options.served)
        return lambda asked: server_predictions(target, served, asked, length, options.concurrency, keep)
    labels = TASKS[task].labels
    if options.labels and not labels:
        raise RecipeError(f"--labels: task {task} has no labels to choose from; leave it out")
    loaded = load_target(target, base)
    model, tokenizer, tokens = loaded.model, loaded.tokenizer, settings.batch_tokens
    if options.labels:
        return lambda asked: classify_by_likelihood(model, tokenizer, asked, labels, tokens, loaded.packed)

    def write(asked: Sequence[Conversation], note: Note = lambda number, prediction: None) -> list[Prediction]:
        return generate(model, tokenizer, asked, length, tokens, loaded.packed, note)

    if not options.threshold_from:
        system = _identity(target, base)
        # a question alone is asked for its latency
        return lambda asked: (
            resume_answers(keep, system, asked, length, write) if keep and len(asked) > 1 else write(asked)
        )

    def differences(asked: Sequence[Conversation], written: Sequence[Prediction]) -> list[float]:
        return no_answer_differences(model, tokenizer, asked, written, tokens, loaded.packed)

    questions = limit_questions(known, options.threshold_from)
    written = write(questions)
    exact = [squad_scores(c.answers, p.text)["exact"] for c, p in zip(questions, written, strict=True)]
    nulls = [squad_scores(c.answers, "")["exact"] for c in questions]
    threshold, reached = tune_threshold(differences(questions, written), exact, nulls)
    print(
        f"unanswerable where its log-likelihood exceeds the answer's by {threshold:.3f}: EM {100 * reached:.1f} on "
        f"{len(questions)} training questions, which chose it ({100 * sum(exact) / len(exact):.1f} without)",
        flush=True,
    )

    def write_or_not(asked: Sequence[Conversation]) -> list[Prediction]:
        found = write(asked)
        return [
            replace(p, text=UNANSWERABLE) if difference > threshold else p
            for p, difference in zip(found, differences(asked, found), strict=True)
        ]

    return write_or_not


def _identity(target: str, base: bool) -> str:
    """What is answering: its name, and of a folder when its recipe and weights were written."""
    folder = Path(target)
    parts = ("recipe.yaml", "*.safetensors", "adapter/*.safetensors", "model/*.safetensors")
    files = sorted(path for part in parts for path in folder.glob(part)) if folder.is_dir() else []
    return " ".join([target, str(base), *(f"{path} {path.stat().st_mtime_ns}" for path in files)])


def baseline_answerer(run: Path, recipe: BaselineRecipe, base: bool, options: AnswerOptions) -> Answerer:
    if base or options != AnswerOptions(concurrency=options.concurrency):
        raise RecipeError(
            f"{run}: a baseline answers by its head; --base, --labels, --shots, --threshold-from, --max-new-tokens and "
            "--model don't apply"
        )
    if recipe.objective == "mlm":
        raise RecipeError(f"{run}: continued pre-training answers nothing; name {run}/model as model.base of a recipe")
    if recipe.is_floor:
        from sft.baselines.floors import load_floor

        return load_floor(recipe, run / "model")
    from sft.baselines.heads import load_answerer

    return load_answerer(run, recipe)


def training_questions(recipe: AnyRecipe | None, scored: Sequence[Conversation]) -> list[Conversation]:
    """The rows of a run's data.train that share no passage or thread with a scored one. Raises RecipeError without a
    run, and where none is left."""
    if recipe is None:
        raise RecipeError("--shots, --threshold-from: take training questions; score a run, or name one with --run")
    clusters = {c.cluster for c in scored}
    every = (c for s in recipe.data.train for c in read_all(with_split(s, "train"), recipe.task, recipe.data.on_error))
    if not (found := [c for c in every if c.cluster not in clusters]):
        raise RecipeError("--shots, --threshold-from: all training questions are also scored; score other data")
    return found
