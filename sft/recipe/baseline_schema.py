"""The schema of a baseline's recipe: a BERT with a task head, continued pre-training, or a classic floor.

It reads the same data as a language model's recipe and is scored by the same tasks, so that both can be compared. Only
a baseline's recipe has the key `objective`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from data.readers.prompts import templates_of
from sft.recipe.schema import (
    HeldOut,
    Recipe,
    Section,
    Source,
    Tune,
    as_sources,
    changed,
    check_rows,
)
from sft.recipe.values import Count, MaxSteps, Number, Schedule, ScheduleArguments, Seed, Trackers

FLOORS = {
    "sklearn:linear_svc": "newsgroups",
    "sklearn:complement_nb": "newsgroups",
    "floor:majority": "newsgroups",
    "floor:unanswerable": "squad_v2",
    "floor:overlap": "squad_v2",
}
STRATEGIES = ("full", "freeze", "linear_probe", "gradual_unfreezing")  # PEFT has no such types
MOVES_POSITIONS = ("prompt_tuning", "multitask_prompt_tuning", "p_tuning")  # of the passage's tokens
PEFT_TASKS = {"classification": "SEQ_CLS", "extractive_qa": "QUESTION_ANS", "mlm": None}
METRICS = {"classification": ("accuracy", "macro_f1"), "extractive_qa": ("exact", "f1"), "mlm": ()}
TASKS_OF = {"classification": ("newsgroups",), "extractive_qa": ("squad_v1", "squad_v2"), "mlm": ("newsgroups", "text")}


class EncoderModel(Section):
    base: str
    """Hub id, local folder or wheel:package/folder of an encoder such as google-bert/bert-base-uncased; or a floor:
    sklearn:linear_svc, sklearn:complement_nb (TF-IDF), floor:majority, floor:unanswerable, floor:overlap."""
    embedder: str | None = None
    """For sklearn:linear_svc: an encoder, not trained, whose embedding of a text is put beside TF-IDF."""
    revision: str | None = None
    """Branch, tag or commit of a Hub encoder."""
    attention_dropout: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """Dropout of attention weights. Default: the base's. On a CPU only 0 uses PyTorch's fused attention."""


class BaselineData(Section):
    train: Annotated[tuple[Source, ...], BeforeValidator(as_sources), Field(min_length=1)]
    max_seq_length: Count = 384
    """Most tokens of an input. Classification cuts longer posts and reports how many; extractive_qa reads longer
    passages in windows."""
    doc_stride: Count = 128
    """Tokens by which the next window of a passage moves on."""
    max_query_length: Count = 64
    """Most tokens of a question; the rest is cut, and counted."""
    on_error: Literal["stop", "skip"] = "stop"
    max_contexts: Count | None = None
    """Most contexts to train on (SQuAD: passages, else rows), drawn by train.seed."""
    unanswerable_share: Annotated[Number, Field(ge=0, le=1)] | None = None
    leaks: Literal["keep", "remove"] = "keep"
    """Training rows whose passage or post is also in the held-out data; they are reported in any case."""
    dev_share: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Share of data.train, by whole passages and threads, that chooses the best checkpoint and the no-answer threshold
    instead of being trained on; eval.data never does."""


class BaselineTrain(Section):
    """Names of transformers' TrainingArguments; examples_per_step is Graft's."""

    examples_per_step: Count = 32
    """Examples of one optimizer step, over all processes."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 3.0
    max_steps: MaxSteps = -1
    learning_rate: Annotated[Number, Field(gt=0)] = 5e-5
    lr_scheduler_type: Schedule = "linear"
    lr_scheduler_kwargs: ScheduleArguments = Field(default={})
    """Arguments of the schedule by transformers' names: {min_lr_rate: 0.1} for cosine_with_min_lr."""
    warmup_steps: Annotated[Number, Field(ge=0)] = 0.1
    """Steps; a value below 1 is a share of all steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    bf16: bool | None = None
    """Autocast to bfloat16. Default: on CUDA, and on a CPU if its products are measured to be 1.5 times as fast."""
    logging_steps: Count = 20
    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When data.dev_share is scored and a checkpoint saved."""
    eval_steps: Count = 200
    """Steps between scores for eval_strategy steps; a shorter run is scored at its last step."""
    metric_for_best_model: Literal["loss", "accuracy", "macro_f1", "exact", "f1"] | None = None
    """The checkpoint with its best value is restored at the end. Default: the last one stays."""
    save_total_limit: Count = 2
    report_to: Trackers = ("tensorboard",)
    """Trackers that get the metrics too, each by its own package; [] for none."""
    run_name: str | None = None
    """Name of the run in trackers. Default: that of the run folder."""
    seed: Seed = 42
    output_dir: Path | None = None
    """The run folder. Default: runs/RECIPE-NAME, numbered if it exists."""


class BaselineTune(Tune):
    method: str = "full"
    """full, freeze, linear_probe (the head alone), gradual_unfreezing, or a PEFT type with its config's keys."""
    unfreeze_share: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """gradual_unfreezing: share of the steps after which the embeddings, unfrozen last, are trained too."""
    layer_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """full, gradual_unfreezing: learning rate of a layer divided by that of the layer above it."""


class Pretraining(Section):
    """Continued pre-training: objective mlm."""

    mlm_probability: Annotated[Number, Field(gt=0, lt=1)] = 0.15
    next_sentence: bool = False
    """Also predict whether the second half follows the first."""


class BaselineEval(HeldOut):
    share_of: Literal["clusters", "rows"] = "clusters"
    """clusters: whole passages and threads. rows: single rows at random, as tutorials split; both sides may then share
    a thread."""
    unanswerable_share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """squad_v2: expected share of unanswerable questions in use; the no-answer threshold is chosen for it, the best
    checkpoint is not. Default: that of data.dev_share."""
    n_best: Count = 20
    max_answer_length: Count = 30
    """Most tokens of an answer."""


class BaselineRecipe(Section):
    objective: Literal["classification", "extractive_qa", "mlm"]
    task: Literal["squad_v2", "squad_v1", "newsgroups", "text"]
    """text (objective mlm only): rows with a text, or the paragraphs of .txt files."""
    model: EncoderModel
    tune: BaselineTune = BaselineTune()
    data: BaselineData
    pretraining: Pretraining = Pretraining()
    train: BaselineTrain = BaselineTrain()
    eval: BaselineEval = BaselineEval()

    @property
    def is_floor(self) -> bool:
        return self.model.base in FLOORS

    @property
    def encoder(self) -> EncoderModel | None:
        """The encoder that is loaded, trained or not; None for a floor without one."""
        if not self.is_floor:
            return self.model
        embedder = self.model.embedder
        return changed(self.model, base=embedder, embedder=None) if embedder else None

    @model_validator(mode="after")
    def _combinations(self) -> "BaselineRecipe":
        if self.task not in TASKS_OF[self.objective]:
            raise ValueError(f"objective {self.objective} is for task {' or '.join(TASKS_OF[self.objective])}")
        base = self.model.base
        if base.startswith(("sklearn:", "floor:")) and FLOORS.get(base, "")[:5] != self.task[:5]:
            fitting = [name for name, task in FLOORS.items() if task[:5] == self.task[:5]]
            raise ValueError(f"model.base {base} is no floor of task {self.task}; there are {', '.join(fitting)}")
        if self.model.embedder and base != "sklearn:linear_svc":
            raise ValueError(f"model.embedder works only with model.base sklearn:linear_svc, not {base}; leave it out")
        if any(map(templates_of, (*self.data.train, *([self.eval.data] if self.eval.data else [])))):
            raise ValueError("system, prompt and completion of a source are a language model's; leave them out")
        check_rows(self.task, self.data, self.eval)
        if self.eval.unanswerable_share and (self.task != "squad_v2" or self.is_floor or not self.data.dev_share):
            raise ValueError("eval.unanswerable_share needs an encoder, task squad_v2 and data.dev_share; leave it out")
        best = self.train.metric_for_best_model
        if best and best != "loss" and best not in METRICS[self.objective]:
            raise ValueError(
                f"train.metric_for_best_model {best}: for objective {self.objective} it must be one of "
                f"{', '.join(('loss', *METRICS[self.objective]))}"
            )
        if best and (self.data.dev_share == 0 or self.train.eval_strategy == "no"):
            raise ValueError("train.metric_for_best_model needs data.dev_share above 0 and train.eval_strategy")
        if self.tune.layer_decay != 1 and self.tune.method not in ("full", "gradual_unfreezing"):
            raise ValueError(f"tune.layer_decay: tune.method {self.tune.method} does not read it; leave it out")
        if self.objective == "extractive_qa" and self.tune.method in MOVES_POSITIONS:
            raise ValueError(
                f"tune.method {self.tune.method} puts virtual tokens before the input, which shifts the "
                "positions of answers; use prefix_tuning, lora or another method"
            )
        if self.objective == "mlm" and self.tune.method not in STRATEGIES:
            raise ValueError(f"tune.method {self.tune.method}: objective mlm trains whole weights; use full")
        if self.objective == "extractive_qa" and self.data.max_query_length + 4 > self.data.max_seq_length:
            raise ValueError(
                f"data.max_query_length {self.data.max_query_length} leaves no room for the passage in "
                f"data.max_seq_length {self.data.max_seq_length}; lower it"
            )
        return self


AnyRecipe = Recipe | BaselineRecipe
