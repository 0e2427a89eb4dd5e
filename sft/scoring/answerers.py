"""How a system is asked: a language model by generation or by likelihood, a baseline by its head."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.cache import file_digests
from data.conversation import Conversation
from data.encode.frame import SERVED, frame_of, without_markers
from data.readers.source import read_all
from data.readers.squad import UNANSWERABLE
from data.terminal import print
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
from sft.models.resolve import model_files
from sft.models.target import adapter_tokenizer, is_run, is_url, load_target, run_recipe
from sft.recipe.baseline_schema import AnyRecipe, BaselineRecipe
from sft.recipe.schema import Eval, Model
from sft.runs.manifest import identity
from sft.training.examples import with_split

RECHECK = 3  # answers of a server that an interrupted evaluation compares before it goes on
Answerer = Callable[[Sequence[Conversation]], list[Prediction]]
Differences = Callable[[Sequence[Conversation], Sequence[Prediction]], list[float]]  # see no_answer_differences


@dataclass(frozen=True)
class AnswerOptions:
    """How questions are asked. `labels`: choose among the task's labels by likelihood instead of generating an answer.
    `shots`: number of solved training questions before each question. `threshold_from`: number of training questions
    that tune the threshold; if "unanswerable" is likelier than the generated answer by more than that, it is the
    answer. `served`: name of the model that a server is asked for."""

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
    log: Path | None = None,
    run: Path | None = None,
) -> Answerer:
    """A function from questions to the answers of a language model in this process or on a server. known: training
    questions for the threshold; log: file of the answers so far, from which an interrupted evaluation resumes; run: the
    one that a server is asked for."""
    length = options.max_new_tokens or settings.max_new_tokens
    if options.threshold_from and options.shots:
        raise RecipeError("--threshold-from, --shots: training questions would be asked without shots; keep one")
    if options.threshold_from and task != "squad_v2":
        raise RecipeError(f"--threshold-from: task {task} has no questions without answer; leave it out")
    if is_url(target):
        if options.labels or options.threshold_from:
            raise RecipeError(f"{target}: a server returns no likelihoods; leave --labels and --threshold-from out")
        served = served_model(target, options.served)
        frame = SERVED
        if run and (run / "adapter").is_dir():
            tokenizer = adapter_tokenizer(run / "adapter")
            frame = without_markers(frame_of(tokenizer), tokenizer)
        return lambda questions: server_predictions(
            target, served, questions, length, options.concurrency, log, RECHECK, frame
        )
    labels = TASKS[task].labels
    if options.labels and not labels:
        raise RecipeError(f"--labels: task {task} has no labels to choose from; leave it out")
    loaded = load_target(target, base)
    model, tokenizer, tokens = loaded.model, loaded.tokenizer, settings.batch_tokens
    if options.labels:
        return lambda questions: classify_by_likelihood(model, tokenizer, questions, labels, tokens, loaded.packed)

    def write(questions: Sequence[Conversation], note: Note = lambda number, prediction: None) -> list[Prediction]:
        return generate(model, tokenizer, questions, length, tokens, loaded.packed, note)

    if options.threshold_from:

        def differences(questions: Sequence[Conversation], written: Sequence[Prediction]) -> list[float]:
            return no_answer_differences(model, tokenizer, questions, written, tokens, loaded.packed)

        return _with_threshold(write, differences, limit_questions(known, options.threshold_from))
    system = _identity(target, base) if log else ""
    # a single question is asked to measure its latency
    return lambda questions: (
        resume_answers(log, system, questions, length, write) if log and len(questions) > 1 else write(questions)
    )


def _with_threshold(write: Answerer, differences: Differences, training: Sequence[Conversation]) -> Answerer:
    """`write`, but with the answer UNANSWERABLE if its difference exceeds the threshold tuned on training questions."""
    written = write(training)
    exact = [squad_scores(c.answers, p.text, c.context)["exact"] for c, p in zip(training, written, strict=True)]
    nulls = [squad_scores(c.answers, "", c.context)["exact"] for c in training]
    threshold, tuned = tune_threshold(differences(training, written), exact, nulls)
    print(
        f"unanswerable if its log-likelihood exceeds the answer's by {threshold:.3f}, tuned on {len(training)} "
        f"training questions: EM {100 * tuned:.1f} with it, {100 * sum(exact) / len(exact):.1f} without",
        flush=True,
    )

    def answer(questions: Sequence[Conversation]) -> list[Prediction]:
        written = write(questions)
        return [
            replace(p, text=UNANSWERABLE) if difference > threshold else p
            for p, difference in zip(written, differences(questions, written), strict=True)
        ]

    return answer


def _identity(target: str, base: bool) -> str:
    """Name of the system, and digests of everything that it is loaded from."""
    own = {}
    model = Model(base=target)
    if is_run(target):
        run, model = Path(target), run_recipe(Path(target)).model
        files = [run / "recipe.yaml", *model_files(run / "adapter"), *model_files(run / "model")]
        files += [model.chat_template] if model.chat_template and model.chat_template.is_file() else []
        own = file_digests(files)
    return json.dumps([target, base, own, identity(model.base, model.revision)])


def baseline_answerer(
    run: Path, recipe: BaselineRecipe, base: bool = False, options: AnswerOptions | None = None
) -> Answerer:
    """A function from questions to a baseline's answers. Raises RecipeError for options of language models."""
    options = options or AnswerOptions()
    if base or options != AnswerOptions(concurrency=options.concurrency):
        raise RecipeError(
            f"{run}: a baseline answers by its head; --base, --labels, --shots, --threshold-from, --max-new-tokens and "
            "--model don't apply"
        )
    if recipe.objective == "mlm":
        remedy = f"name {run}/model as model.base of a recipe"
        raise RecipeError(f"{run}: a run of continued pre-training answers no questions; {remedy}")
    if recipe.is_floor:
        from sft.baselines.floors import load_floor

        return load_floor(recipe, run / "model")
    from sft.baselines.heads import load_answerer

    return load_answerer(run, recipe)


def training_questions(recipe: AnyRecipe | None, scored: Sequence[Conversation]) -> list[Conversation]:
    """The rows of data.train that share no passage or thread with a scored row. Raises RecipeError if there is no
    recipe or no such row."""
    if recipe is None:
        raise RecipeError("--shots, --threshold-from: take training questions; score a run, or name one with --run")
    clusters = {c.cluster for c in scored}
    sources = (with_split(source, "train") for source in recipe.data.train)
    rows = (c for source in sources for c in read_all(source, recipe.task, recipe.data.on_error))
    questions = [c for c in rows if c.cluster not in clusters]
    if not questions:
        raise RecipeError("--shots, --threshold-from: all training questions are also scored; score other data")
    return questions
