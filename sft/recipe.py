"""A recipe: the typed, strict YAML that defines one run. `graft schema` prints it as JSON schema.

Sections carry the libraries' names: TrainingArguments in `train`, a PEFT config in `tune`, BitsAndBytesConfig in
`model.quantization`. Unknown keys, wrong types, impossible combinations and missing files are found here, before
anything is loaded.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data.errors import UserError

OTHER_METHODS = ("full", "freeze", "linear_probe")
WHEEL = re.compile(r"wheel:([A-Za-z_]\w*)/(.+)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class RecipeError(UserError):
    """A recipe that can't run; the text names key, value, what is allowed and the nearest valid key."""


def is_hub_id(name: str) -> bool:
    """`owner/name` that is not a path here and does not look like a data or model file."""
    looks_like_file = name.endswith((".json", ".jsonl", ".gz", ".gguf", ".yaml", ".csv", ".txt"))
    return bool(HUB_ID.fullmatch(name)) and not looks_like_file and not Path(name).exists()


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _sources(value: Any) -> Any:
    return [_source(v) for v in value] if isinstance(value, list | tuple) else [_source(value)]


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


Number = Annotated[float, BeforeValidator(_no_bool)]
Count = Annotated[int, BeforeValidator(_no_bool), Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True)


class Quantization(Section):
    """Names of transformers' BitsAndBytesConfig."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Left out: float32 on CPU (where bfloat16 is the slower one), bfloat16 on CUDA."""

    @model_validator(mode="after")
    def _one_width(self) -> "Quantization":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; keep one")
        return self


class Model(Section):
    base: str
    """Hub id, local folder, .gguf file, or wheel:package/file.gguf for a model inside an installed package."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on CPU, bfloat16 on CUDA."""
    quantization: Quantization | None = None
    chat_template: Path | None = None
    """A Jinja file, for a base whose tokenizer has no chat template."""


class Tune(BaseModel):
    """`method` is a PEFT type in lower case (the other keys are that PEFT config's), or full, freeze, linear_probe."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    method: str = "lora"
    trainable: tuple[str, ...] = ()
    """For `freeze`: regular expressions; the parameters whose name one of them matches are trained."""

    @property
    def peft(self) -> dict[str, Any]:
        """Arguments of the PEFT config."""
        return dict(self.model_extra or {})


class Source(Section):
    path: str
    """A file (.json, .jsonl, either with .gz), or a Hub dataset id."""
    split: str = "train"
    """For a Hub dataset."""
    revision: str | None = None
    """For a Hub dataset."""


class Data(Section):
    train: Annotated[tuple[Source, ...], BeforeValidator(_sources), Field(min_length=1)]
    max_length: Count = 1024
    """Tokens of the longest example; a longer one stops the run, see too_long."""
    too_long: Literal["stop", "skip"] = "stop"
    max_contexts: Count | None = None
    """Train on this many contexts (SQuAD: passages; jsonl: rows), drawn by train.seed."""
    unanswerable_share: Annotated[Number, Field(ge=0, le=1)] | None = None
    """With max_contexts and squad_v2: share of unanswerable questions among those drawn; left out: as it comes."""
    share_prefixes: bool = True
    """Compute a prefix that several examples of a step share once."""
    pack_tokens: Count | None = None
    """Most tokens of a micro-batch; left out: one tree of shared prefixes each, the fastest on CPU."""


class Train(Section):
    """Names of transformers' TrainingArguments, but for examples_per_step."""

    examples_per_step: Count = 16
    """Examples of one optimizer step, over all processes, whether they share prefixes or not."""
    num_train_epochs: Annotated[Number, Field(gt=0)] = 1.0
    max_steps: Annotated[int, BeforeValidator(_no_bool), Field(ge=-1)] = -1
    learning_rate: Annotated[Number, Field(gt=0)] = 2e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"] = "linear"
    warmup_steps: Annotated[Number, Field(ge=0)] = 0.0
    """Steps; below 1 a share of all steps."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Number, Field(ge=0)] = 1.0
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = (
        "adamw_torch"
    )
    adam_beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    adam_epsilon: Annotated[Number, Field(gt=0)] = 1e-8
    gradient_checkpointing: bool = False
    bf16: bool | None = None
    """Autocast to bfloat16; left out: on CUDA yes, on CPU no."""
    logging_steps: Count = 1
    save_strategy: Literal["no", "epoch", "steps"] = "epoch"
    save_steps: Count = 100
    save_total_limit: Count | None = 2
    eval_strategy: Literal["no", "epoch", "steps"] = "no"
    """Held-out loss on eval.data during training."""
    eval_steps: Count = 100
    seed: Annotated[int, BeforeValidator(_no_bool), Field(ge=0)] = 42
    output_dir: Path | None = None
    """The run folder; left out: runs/NAME-OF-RECIPE, numbered if it exists."""


class Eval(Section):
    data: Annotated[Source, BeforeValidator(_source)] | None = None
    """Held-out data: of held-out loss, `graft eval RUN` and the export's parity check."""
    limit: Count | None = None
    """At most this many questions, drawn by a fixed seed."""
    max_new_tokens: Count = 48
    batch_tokens: Count = 1024
    """Prompt tokens that are computed at once, in-process; small suits a CPU, where attention over T^2 costs most."""


class Export(Section):
    base: Literal["dequantized", "original"] = "dequantized"
    """What an adapter of a quantized run is merged into: the dequantized weights it was trained on, or the original."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    prompts: Count = 64
    """Held-out conversations of the parity check."""
    min_agreement: Annotated[Number, Field(ge=0, le=1)] = 0.99
    """Least share of answer tokens on which adapter and merged model agree (argmax)."""


class Recipe(Section):
    task: Literal["squad_v2", "squad_v1", "instruct"]
    """How rows become prompts and how answers are scored."""
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
        if self.data.unanswerable_share is not None and (self.data.max_contexts is None or self.task != "squad_v2"):
            raise ValueError("data.unanswerable_share needs data.max_contexts and task squad_v2")
        if self.train.eval_strategy != "no" and self.eval.data is None:
            raise ValueError(f"train.eval_strategy {self.train.eval_strategy} needs eval.data")
        if self.tune.method == "freeze" and not self.tune.trainable:
            raise ValueError("tune.method freeze needs tune.trainable: which parameters are trained")
        if self.tune.method != "freeze" and self.tune.trainable:
            raise ValueError("tune.trainable is read by tune.method freeze only")
        return self
