"""A recipe: the typed, strict YAML that defines one run. `graft schema` prints it as JSON schema.

Sections carry the libraries' names: TrainingArguments in `train`, a PEFT config in `tune`, BitsAndBytesConfig in
`model.quantization`. Unknown keys, wrong types, impossible combinations and missing files are found here, before
anything is loaded.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from data.readers.source import HUB_ID
from data.readers.source import is_hub_id as is_hub_dataset

OTHER_METHODS = ("full", "freeze", "linear_probe")
WHEEL = re.compile(r"wheel:([A-Za-z_]\w*)/(.+)")


def is_hub_id(name: str) -> bool:
    """`owner/name` of a model that is not a path here and does not look like a file."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith((".gguf", ".yaml")) and not Path(name).exists()


def as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def as_sources(value: Any) -> Any:
    return [as_source(v) for v in value] if isinstance(value, list | tuple) else [as_source(value)]


def _auto(value: Any) -> Any:
    return "auto" if value is None else value


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]
Rows = Annotated[int, BeforeValidator(_no_bool), Field(ge=0)]
MaxSteps = Annotated[int, BeforeValidator(_no_bool), Field(ge=-1)]
Seed = Annotated[int, BeforeValidator(_no_bool), Field(ge=0, lt=2**32)]
Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "squad_v1", "squad_v2", "newsgroups"]


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "swanlab"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True)


S = TypeVar("S", bound=BaseModel)


def changed(section: S, **values: Any) -> S:
    """A copy with other values; a dict changes keys inside a section: changed(recipe, train={"bf16": True})."""
    held = {name: getattr(section, name) for name in values}
    return section.model_copy(
        update={
            name: changed(held[name], **value)
            if isinstance(held[name], BaseModel) and isinstance(value, dict)
            else value
            for name, value in values.items()
        }
    )


class Quantization(Section):
    """Names of transformers' BitsAndBytesConfig."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Left out: as model.dtype."""

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
    """auto: bfloat16 on CUDA; on a CPU bfloat16 for LoRA where its products are measured to be 1.5 times as fast, else
    float32."""
    quantization: Quantization | None = None
    use_kernels: bool = False
    """On CUDA: fused kernels for norms, MLP and more, through transformers' own switch; needs `pip install kernels`."""
    chat_template: Path | None = None
    """A Jinja file, for a base whose tokenizer has no chat template."""


class Tune(BaseModel):
    """`method` is a PEFT type in lower case (the other keys are that PEFT config's), or full, freeze, linear_probe."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    method: str = "lora"
    trainable: tuple[str, ...] = ()
    """For `freeze`: regular expressions; the parameters whose name one of them matches are trained."""

    @field_validator("trainable")
    @classmethod
    def _patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns

    @property
    def peft(self) -> dict[str, Any]:
        """Arguments of the PEFT config."""
        return dict(self.model_extra or {})


class Source(Section):
    path: str
    """A file (.json, .jsonl or .csv, gzipped or not, .parquet), a glob, a folder, a Hub dataset id, or
    sklearn:20newsgroups."""
    format: Format | None = None
    """Left out: recognised by the content."""
    split: str | None = None
    """Of a Hub dataset or of sklearn:20newsgroups. Left out: train; in eval.data validation (sklearn: test)."""
    config: str | None = None
    """Of a Hub dataset that has several configurations."""
    revision: str | None = None
    """Of a Hub dataset."""
    columns: dict[str, str] = {}
    """Where the data names them otherwise: {prompt: question, completion: answer}, ours to theirs."""
    license: str | None = None
    """For the model card, which warns where it is left out."""


class TrainSource(Source):
    weight: Annotated[Number, Field(gt=0)] = 1.0
    """How often each of its rows occurs in an epoch: 2 is twice, 0.5 every second one, the others in the next."""


class Audit(Section):
    """How many rows may have a defect that leaves the model nothing right to learn; they are left out and named."""

    untrained: Rows = 0
    """No token carries loss."""
    end_not_trained: Rows = 0
    """The token that ends the assistant's turn carries no loss, so the model would not learn to stop."""
    truncated: Rows = 0
    """Longer than data.max_length, so the answer would be cut. See data.too_long."""
    prompt_not_prefix: Rows = 0
    """The prompt alone is rendered otherwise than as the beginning of the whole."""
    double_bos: Rows = 0
    """The chat template writes the token that begins a text twice."""
    leaks: Rows | None = None
    """Rows that stand in the held-out data, equal or nearly; left out: they are counted and shown, and stop nothing."""


class Data(Section):
    train: Annotated[tuple[TrainSource, ...], BeforeValidator(as_sources), Field(min_length=1)]
    max_length: Count = 1024
    """Tokens of the longest example; a longer one stops the run, see too_long."""
    on_error: Literal["stop", "skip"] = "stop"
    """What rows with defects do; skip leaves them out and counts them."""
    too_long: Literal["stop", "skip"] = "stop"
    duplicates: Literal["keep", "remove"] = "keep"
    """Rows that equal an earlier one but for case and white space."""
    near_duplicates: Literal["keep", "remove"] = "keep"
    """Rows whose passage (or post, or prompt) is nearly that of an earlier one."""
    leaks: Literal["keep", "remove"] = "keep"
    """Training rows that stand in the held-out data: the same row, or the same passage, or nearly."""
    audit: Audit = Audit()
    max_contexts: Count | None = None
    """Train on this many contexts (SQuAD: passages; else: rows), drawn by train.seed."""
    unanswerable_share: Annotated[Number, Field(ge=0, le=1)] | None = None
    """With max_contexts and squad_v2: share of unanswerable questions among those drawn; left out: as it comes."""
    share_prefixes: bool | Literal["auto"] = "auto"
    """Compute a prefix that several examples of a step share once; auto: where that saves 3 % of the time or more."""
    pack_tokens: Annotated[Count | Literal["auto"], BeforeValidator(_auto)] = "auto"
    """Most tokens of a micro-batch, so that memory is bounded; only an example that is longer makes a larger one. auto:
    1024 on a CPU, 4096 on CUDA; 512 where attention computes all pairs of tokens."""
    max_branches: Count | None = None
    """Most examples of one context in a step, which may then be smaller; left out: up to examples_per_step."""


class Train(Section):
    """Names of transformers' TrainingArguments, but for examples_per_step, attn_implementation, compile_layers."""

    examples_per_step: Count = 16
    """Examples of one optimizer step, over all processes, whether they share prefixes or not."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 1.0
    max_steps: MaxSteps = -1
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "linear"
    warmup_steps: Annotated[Number, Field(ge=0)] = 0.0
    """Steps; below 1 a share of all steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = (
        "adamw_torch_fused"
    )
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    gradient_checkpointing: bool = False
    attn_implementation: Literal["auto", "forest", "sdpa", "eager", "flex_attention"] = "auto"
    """auto: flex_attention on CUDA where the base has it, forest (each tree by itself) on a CPU, else sdpa."""
    compile_layers: bool | Literal["auto"] = "auto"
    """Compile each decoder layer; auto: on a CPU, where an estimate says that the run is long enough to gain by it."""
    bf16: bool | None = None
    """Autocast to bfloat16; left out: on CUDA yes, on CPU no."""
    logging_steps: Count = 1
    save_strategy: Literal["no", "epoch", "steps"] = "epoch"
    save_steps: Count = 100
    save_total_limit: Count | None = 2
    eval_strategy: Literal["no", "epoch", "steps"] = "no"
    """Held-out loss on eval.data during training."""
    eval_steps: Count = 100
    report_to: tuple[Tracker, ...] = ("tensorboard",)
    """Trackers that get the metrics too, each by its installed package; [] for none."""
    seed: Seed = 42
    output_dir: Path | None = None
    """The run folder; left out: runs/NAME-OF-RECIPE, numbered if it exists."""


class Eval(Section):
    data: Annotated[Source, BeforeValidator(as_source)] | None = None
    """Held-out data: of held-out loss, `graft eval RUN` and the export's parity check."""
    share: Annotated[Number, Field(gt=0, lt=1)] | None = None
    """Instead of data: hold out this share of data.train, by whole passages and threads, and don't train on it."""
    seed: Seed = 42
    """Draws eval.share: runs of other train.seed hold out the same."""
    limit: Count | None = None
    """At most this many questions, drawn by a fixed seed."""
    max_new_tokens: Count = 48
    batch_tokens: Count = 8192
    """Most tokens that are kept at once, in-process: those of prompts, and room for whole answers."""


class Export(Section):
    base: Literal["auto", "dequantized", "original"] = "auto"
    """What an adapter of a quantized run is merged into: the dequantized weights it was trained on, or the original;
    auto: the one whose answers differ less from the adapter's on the base of training, as measured."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    prompts: Count = 64
    """Held-out conversations of the parity check."""
    min_agreement: Annotated[Number, Field(ge=0, le=1)] = 0.99
    """Least share of answer tokens on which adapter and merged model agree (argmax)."""
    min_format_agreement: Annotated[Number, Field(ge=0, le=1)] = 0.95
    """The same for a merged model in fewer bits (graft export --format); gguf-f32, -f16 and -bf16 are held to
    min_agreement."""


class Recipe(Section):
    task: Literal["squad_v2", "squad_v1", "newsgroups", "instruct"]
    """How answers are scored, and how rows become prompts where their format does not say."""
    model: Model
    tune: Tune = Tune()
    data: Data
    train: Train = Train()
    eval: Eval = Eval()
    export: Export = Export()

    @model_validator(mode="after")
    def _combinations(self) -> "Recipe":
        quantized = self.model.quantization and (
            self.model.quantization.load_in_4bit or self.model.quantization.load_in_8bit
        )
        if quantized and self.tune.method in OTHER_METHODS:
            raise ValueError(
                f"tune.method {self.tune.method} trains weights of the base, which model.quantization freezes; "
                "use lora, or remove model.quantization"
            )
        check_rows(self.task, self.data, self.eval)
        if self.train.eval_strategy != "no" and self.eval.data is None and self.eval.share is None:
            raise ValueError(f"train.eval_strategy {self.train.eval_strategy} needs eval.data or eval.share")
        if self.tune.method == "freeze" and not self.tune.trainable:
            raise ValueError("tune.method freeze needs tune.trainable: which parameters are trained")
        if self.tune.method != "freeze" and self.tune.trainable:
            raise ValueError("tune.trainable is read by tune.method freeze only")
        return self


def check_rows(task: str, data: Any, evaluation: Any) -> None:
    """Raise ValueError where the sections `data` and `eval` of a recipe, a baseline's too, contradict each other."""
    if data.unanswerable_share is not None and (data.max_contexts is None or task != "squad_v2"):
        raise ValueError("data.unanswerable_share needs data.max_contexts and task squad_v2")
    held_out = evaluation.data
    if held_out and evaluation.share:
        raise ValueError("eval.data and eval.share exclude each other; keep one")
    if held_out and any(_same_rows(source, held_out) for source in data.train):
        raise ValueError(f"eval.data {held_out.path} is also in data.train; name other data, or set eval.share")


def _same_rows(train: Source, held_out: Source) -> bool:
    """Splits of a dataset are read from one path; a file has none."""
    if is_hub_dataset(train.path) or train.path.startswith("sklearn:"):
        splits = (train.split or "train", held_out.split or ("validation" if is_hub_dataset(train.path) else "test"))
        return (train.path, train.config, splits[0]) == (held_out.path, held_out.config, splits[1])
    return Path(train.path).resolve() == Path(held_out.path).resolve()
