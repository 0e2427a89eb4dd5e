"""The schema of a recipe, the YAML file that defines a run; `graft schema` prints it as JSON schema.

Sections use the libraries' names: TrainingArguments in `train`, a PEFT config in `tune`, BitsAndBytesConfig in
`model.quantization`. Unknown keys, wrong types and impossible combinations are errors before anything is loaded.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from data.readers.prompts import FORMAT as PROMPT_FORMAT
from data.readers.prompts import templates_of
from data.readers.source import HUB_ID
from data.readers.source import is_hub_id as is_hub_dataset
from eval.metrics import MetricName
from sft.recipe.values import (
    Count,
    Format,
    MaxSteps,
    Number,
    Prompt,
    Rows,
    Schedule,
    ScheduleArguments,
    Seed,
    Trackers,
    none_is_auto,
    regular_expression,
)

OTHER_METHODS = ("full", "freeze", "linear_probe")
WHEEL = re.compile(r"wheel:([A-Za-z_]\w*)/(.+)")


def is_hub_id(name: str) -> bool:
    """Whether it is `owner/name` of the Hub: no existing path and not named like a file."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith((".gguf", ".yaml")) and not Path(name).exists()


def as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def as_sources(value: Any) -> Any:
    return [as_source(v) for v in value] if isinstance(value, list | tuple) else [as_source(value)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=BaseModel)


def changed(section: S, **values: Any) -> S:
    """A copy with other values; a dict changes keys inside a section: changed(recipe, train={"bf16": True})."""
    for name, value in values.items():
        held = getattr(section, name)
        if isinstance(held, BaseModel) and isinstance(value, dict):
            values[name] = changed(held, **value)
    return section.model_copy(update=values)


class Quantization(Section):
    """Names of transformers' BitsAndBytesConfig."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Default: that of model.dtype."""

    @model_validator(mode="after")
    def _one_width(self) -> "Quantization":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; keep one")
        if not self.load_in_4bit and not self.load_in_8bit:
            raise ValueError("neither load_in_4bit nor load_in_8bit is true; set one, or remove model.quantization")
        return self


class Model(Section):
    base: str
    """Hub id, local folder, .gguf file, or wheel:package/file.gguf for a model inside an installed package."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: bfloat16 on CUDA; on a CPU bfloat16 for LoRA if its matrix products are measured to be 1.5 times as fast as
    float32, else float32."""
    quantization: Quantization | None = None
    dequantize: bool | Literal["auto"] = "auto"
    """On CUDA: unpack 4-bit weights once, when they are loaded for training; the values are the same, products are
    faster. auto: if the training then fits in 85 % of the free memory. A CPU always unpacks them."""
    use_kernels: bool = False
    """On CUDA: fused kernels for norms, MLP and more, by transformers' own switch; needs `pip install kernels`."""
    chat_template: Path | None = None
    """A Jinja file, for a base whose tokenizer has no chat template or a wrong one."""
    tool_call_parser: str | None = "auto"
    """vLLM's parser of tool calls (--tool-call-parser) for `graft serve`. auto: by the form of the template's calls, if
    training rows have tools; null: none."""
    template_arguments: dict[str, Any] | Literal["auto"] = "auto"
    """What the chat template is given, in training, evaluation and serving: {enable_thinking: false}. auto: the switch
    that leaves thoughts out, if the template has one and no training row holds a thought. A row's own
    chat_template_kwargs come first."""
    template_date: date | Literal["auto"] = "auto"
    """The day, YYYY-MM-DD, that a chat template which writes today's date writes. auto: the day on which training
    starts; the run's recipe then names it, so that a resumed or scored run sees the same prompts."""


class Tune(BaseModel):
    """`method` is a PEFT type in lower case, with that PEFT config's keys beside it, or full, freeze, linear_probe."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    method: str = "lora"
    trainable: tuple[str, ...] = ()
    """For freeze: regular expressions; parameters whose name matches one of them are trained."""
    loraplus_lr_ratio: Annotated[Number, Field(ge=1)] | None = None
    """For lora: LoRA+, the learning rate of the matrices B divided by that of the matrices A, train.learning_rate; 16
    is usual."""
    loraplus_lr_embedding: Annotated[Number, Field(gt=0)] | None = None
    """With loraplus_lr_ratio: learning rate of LoRA on an embedding. Default: 1e-6."""

    @field_validator("trainable")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(regular_expression, patterns))

    @model_validator(mode="after")
    def _trainable_is_for_freeze(self) -> "Tune":
        if self.method == "freeze" and not self.trainable:
            raise ValueError("method freeze needs trainable: which parameters are trained")
        if self.method != "freeze" and self.trainable:
            raise ValueError(f"trainable works only with method freeze, not {self.method}; leave it out")
        return self

    @model_validator(mode="after")
    def _loraplus_is_for_lora(self) -> "Tune":
        if self.loraplus_lr_ratio is not None and self.method != "lora":
            raise ValueError(f"loraplus_lr_ratio works only with method lora, not {self.method}; leave it out")
        if self.loraplus_lr_embedding is not None and self.loraplus_lr_ratio is None:
            raise ValueError("loraplus_lr_embedding needs loraplus_lr_ratio; set it, or leave both out")
        return self

    @property
    def peft(self) -> dict[str, Any]:
        """Arguments of the PEFT config."""
        return dict(self.model_extra or {})


class Source(Section):
    path: str
    """A file (.json, .jsonl or .csv, gzipped or not, .parquet), a glob, a folder, a Hub dataset id, or
    sklearn:20newsgroups."""
    format: Format | None = None
    """Default: recognised by the keys of the rows."""
    split: str | None = None
    """Split of a Hub dataset or of sklearn:20newsgroups. Default: train; in eval.data validation (sklearn: test)."""
    config: str | None = None
    """Configuration of a Hub dataset that has several."""
    revision: str | None = None
    """Branch, tag or commit of a Hub dataset."""
    columns: dict[str, str] = {}
    """Graft's names and the data's, if they differ: {prompt: question, completion: answer}."""
    system: Prompt | None = None
    """System turn of the rows that have none; {name} is a column of the row."""
    prompt: Prompt | None = None
    """The user's turn, written from columns: "{schema}\\n{question}". Put first what several rows share; it is
    computed once."""
    completion: Prompt | None = None
    """The answer, written from columns: "{sql}". In eval.data these three are by default those of data.train."""
    license: str | None = None
    """For the model card, which warns if it is missing."""

    @model_validator(mode="after")
    def _prompts_are_said_once(self) -> "Source":
        written = [key for key in ("prompt", "completion") if getattr(self, key) is not None]
        if written and self.format not in (None, PROMPT_FORMAT):
            raise ValueError(f"{written[0]} is for format {PROMPT_FORMAT}, not {self.format}; leave one of them out")
        if twice := [key for key in (*written, *(["system"] if self.system else [])) if key in self.columns]:
            raise ValueError(f"{twice[0]} and columns.{twice[0]} say the same; keep one")
        return self


class TrainSource(Source):
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """How often each row occurs in an epoch: 2 is twice; 0.5 is half of the rows, the others in the next epoch."""


class Audit(Section):
    """How many rows may have a defect that makes them useless for training; they are left out and reported."""

    untrained: Rows = 0
    """Rows of which no token is trained."""
    end_not_trained: Rows = 0
    """Rows whose end-of-turn token is not trained, so the model would not learn to stop."""
    truncated: Rows = 0
    """Rows longer than data.max_length, whose answer would be cut; see data.too_long."""
    prompt_not_prefix: Rows = 0
    """Rows whose prompt is rendered differently alone than as the beginning of the whole text."""
    double_bos: Rows = 0
    """Rows that begin with two BOS tokens."""
    leaks: Rows | None = None
    """Rows that are also in the held-out data, equal or nearly. Default: they are reported and stop nothing."""


class Data(Section):
    train: Annotated[tuple[TrainSource, ...], BeforeValidator(as_sources), Field(min_length=1)]
    max_length: Count = 1024
    """Most tokens of an example; a longer one stops the run, see too_long."""
    on_error: Literal["stop", "skip"] = "stop"
    """Rows with defects: stop the run, or leave them out and count them."""
    too_long: Literal["stop", "skip"] = "stop"
    """Rows longer than max_length: stop the run, or leave them out and count them."""
    duplicates: Literal["keep", "remove"] = "keep"
    """Rows that equal an earlier one up to case and white space."""
    near_duplicates: Literal["keep", "remove"] = "keep"
    """Rows whose passage (or post, or prompt) is nearly that of an earlier row."""
    leaks: Literal["keep", "remove"] = "keep"
    """Training rows that are also in the held-out data: the same row, the same passage, or nearly."""
    audit: Audit = Audit()
    max_contexts: Count | None = None
    """Most contexts to train on (SQuAD: passages, else rows), drawn by train.seed."""
    unanswerable_share: Annotated[Number, Field(ge=0, le=1)] | None = None
    """With max_contexts and squad_v2: share of unanswerable questions among those drawn. Default: as in the data."""
    share_prefixes: bool | Literal["auto"] = "auto"
    """Compute a prefix that several examples of a step share once; auto: if that saves 3 % of the time or more."""
    pack_tokens: Annotated[Count | Literal["auto"], BeforeValidator(none_is_auto)] = "auto"
    """Most tokens of a micro-batch, which bounds memory; only a longer example makes a larger one. auto: 1024 on a CPU,
    2048 to 8192 on CUDA by its memory, 512 if attention computes all pairs of tokens."""
    train_turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are learnt; one whose weight, train or loss is 0 never is."""
    answer_tokens: tuple[str, ...] | Literal["auto"] = "auto"
    """Control tokens of the tokenizer that answers may hold: they are real tokens in the assistant's turns, and text
    elsewhere. auto: <tool_call> and </tool_call>, if the tokenizer has them."""
    max_branches: Count | None = None
    """Most examples of one context in a step, which may then be smaller. Default: examples_per_step."""


class Train(Section):
    """Names of transformers' TrainingArguments; Graft's are examples_per_step, attn_implementation, compile_layers."""

    examples_per_step: Count = 16
    """Examples of one optimizer step, over all processes, with or without shared prefixes."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 1.0
    max_steps: MaxSteps = -1
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-4
    lr_scheduler_type: Schedule = "linear"
    lr_scheduler_kwargs: ScheduleArguments = {}
    """Arguments of the schedule by transformers' names: {min_lr_rate: 0.1} for cosine_with_min_lr."""
    warmup_steps: Annotated[Number, Field(ge=0)] = 0.0
    """Steps; a value below 1 is a share of all steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    label_smoothing_factor: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Share of each target that is spread evenly over the vocabulary; the held-out loss is without it."""
    neftune_noise_alpha: Annotated[Number, Field(gt=0)] | None = None
    """NEFTune: uniform noise on the embeddings of a training example of L tokens and width d, at most
    alpha / sqrt(L * d); a prefix that examples share gets one draw for all of them."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = (
        "adamw_torch_fused"
    )
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations again in the backward pass: less memory, more time. auto: unless the training fits in 85 % of
    the free memory without it, by a count of its bytes."""
    attn_implementation: Literal["auto", "forest", "sdpa", "eager", "flex_attention"] = "auto"
    """auto: forest (each tree by itself) on a CPU, and in half precision on CUDA; else flex_attention or sdpa there."""
    compile_layers: bool | Literal["auto"] = "auto"
    """Compile each decoder layer; auto: on a CPU, if the run is estimated to be long enough to gain by it."""
    bf16: bool | None = None
    """Autocast to bfloat16. Default: yes on CUDA, no on a CPU."""
    logging_steps: Count = 1
    save_strategy: Literal["no", "epoch", "steps"] = "epoch"
    save_steps: Count = 100
    save_total_limit: Count | None = 2
    eval_strategy: Literal["no", "epoch", "steps"] = "no"
    """Held-out loss on eval.data during training."""
    eval_steps: Count = 100
    report_to: Trackers = ("tensorboard",)
    """Trackers that get the metrics too, each by its own package; [] for none."""
    run_name: str | None = None
    """Name of the run in trackers. Default: that of the run folder."""
    seed: Seed = 42
    output_dir: Path | None = None
    """The run folder. Default: runs/RECIPE-NAME, numbered if it exists."""


class HeldOut(Section):
    data: Annotated[Source, BeforeValidator(as_source)] | None = None
    """Held-out data, on which the trained model is scored and checked."""
    share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Instead of data: share of data.train that is held out, by whole passages and threads."""
    seed: Seed = 42
    """Draws eval.share; runs with another train.seed hold out the same rows."""
    limit: Count | None = None
    """Most questions, drawn by a fixed seed."""


class Eval(HeldOut):
    max_new_tokens: Count = 48
    batch_tokens: Count = 8192
    """Most tokens in memory at once when answering in-process: prompts, and room for whole answers."""
    metrics: tuple[MetricName, ...] = ()
    """Task instruct: scores beside EM and F1, which every answer gets: ROUGE-L, chrF, the last number, whether the
    answer is JSON, whether it equals the reference as JSON, and `pattern`. With call or call_arguments, each turn that
    calls a tool is a question too: whether names and arguments are exact, and F1 of the arguments."""
    pattern: str | None = None
    """Regular expression of the metric regex: it must be in the answer; if it has a group, the first group must also be
    that of the reference answer."""

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str | None) -> str | None:
        return regular_expression(pattern) if pattern is not None else None

    @model_validator(mode="after")
    def _pattern_is_for_regex(self) -> "Eval":
        if ("regex" in self.metrics) != (self.pattern is not None):
            raise ValueError("eval.pattern and the metric regex of eval.metrics need each other; set both or neither")
        return self


class Export(Section):
    base: Literal["auto", "dequantized", "original"] = "auto"
    """Weights that the adapter of a quantized run is merged into: the dequantized ones of training, or the original
    ones. auto: those whose answers are measured to differ less from the adapter's."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    prompts: Count = 64
    """Most held-out conversations of the parity check."""
    min_agreement: Annotated[Number, Field(ge=0, le=1)] = 0.99
    """Least share of answer tokens on which adapter and merged model agree (argmax)."""
    min_format_agreement: Annotated[Number, Field(ge=0, le=1)] = 0.95
    """The same for a model in fewer bits (graft export --format); gguf-f32, -f16 and -bf16 must reach min_agreement."""


class Recipe(Section):
    task: Literal["squad_v2", "squad_v1", "newsgroups", "instruct"]
    """How answers are scored, and how rows become prompts if their format does not say."""
    model: Model
    tune: Tune = Tune()
    data: Data
    train: Train = Train()
    eval: Eval = Eval()
    export: Export = Export()

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        if self.model.quantization and self.tune.method in OTHER_METHODS:
            raise ValueError(
                f"tune.method {self.tune.method} trains weights of the base, which model.quantization freezes; "
                "use lora, or remove model.quantization"
            )
        check_rows(self.task, self.data, self.eval)
        if self.eval.metrics and self.task != "instruct":
            raise ValueError(f"eval.metrics is for task instruct; task {self.task} has scores of its own, leave it out")
        if self.train.eval_strategy != "no" and self.eval.data is None and self.eval.share is None:
            raise ValueError(f"train.eval_strategy {self.train.eval_strategy} needs eval.data or eval.share")
        return self


def common_prompts(sources: Sequence[Source]) -> dict[str, str]:
    """`system`, `prompt` and `completion` of the sources, if all have the same; else none."""
    first, *others = map(templates_of, sources)
    return first if all(other == first for other in others) else {}


def with_prompts(held_out: Source, prompts: Mapping[str, str]) -> Source:
    """The source with those of the prompts that it does not set itself, null included."""
    written = held_out.format in (None, PROMPT_FORMAT)
    new = {key: text for key, text in prompts.items() if key == "system" or written}
    return changed(held_out, **{key: text for key, text in new.items() if key not in held_out.model_fields_set})


def check_rows(task: str, data: Any, evaluation: HeldOut) -> None:
    """Raise ValueError if the sections `data` and `eval` of any recipe contradict each other."""
    if data.unanswerable_share is not None and (data.max_contexts is None or task != "squad_v2"):
        raise ValueError("data.unanswerable_share needs data.max_contexts and task squad_v2")
    held_out = evaluation.data
    if held_out and evaluation.share:
        raise ValueError("eval.data and eval.share exclude each other; keep one")
    if held_out and any(_same_rows(source, held_out) for source in data.train):
        raise ValueError(f"eval.data {held_out.path} is also in data.train; name other data, or set eval.share")


def _same_rows(train: Source, held_out: Source) -> bool:
    """Whether two sources name the same rows: one file, or one split of a dataset."""
    if is_hub_dataset(train.path) or train.path.startswith("sklearn:"):
        splits = (train.split or "train", held_out.split or ("validation" if is_hub_dataset(train.path) else "test"))
        return (train.path, train.config, splits[0]) == (held_out.path, held_out.config, splits[1])
    return Path(train.path).resolve() == Path(held_out.path).resolve()
