"""Combine several runs' adapters of one base into one, with PEFT's add_weighted_adapter.

graft combine RUN RUN2 --method ties --density 0.5 --weights 0.5,0.5
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import set_seed

from sft.errors import RunError
from sft.export.skeleton import adapter_config, build, free_parameters
from sft.models.patterns import check_adapter_patterns
from sft.models.resolve import readable

METHODS = (
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
)  # fmt: skip
# settings of LoRA that add_weighted_adapter drops or scales differently (PEFT 0.21)
UNCOMBINED = ("use_dora", "use_rslora", "lora_bias", "trainable_token_indices", "rank_pattern", "alpha_pattern")
SPARSE = ("ties", "dare", "magnitude_prune")  # methods that keep a share of each adapter's values


@dataclass(frozen=True)
class Combination:
    """Runs to combine (the first one gives recipe and tokenizer), PEFT's combination_type, a weight for each run, and
    the share of values that sparse methods keep."""

    runs: Sequence[Path]
    method: str
    weights: Sequence[float]
    density: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RunError(f"--method {self.method} is none of {', '.join(METHODS)}")
        if len(self.weights) != len(self.runs):
            raise RunError(f"--weights holds {len(self.weights)} numbers for {len(self.runs)} runs; give each run one")
        sparse = self.method.startswith(SPARSE)
        if sparse != (self.density is not None):
            raise RunError(
                f"--method {self.method} needs --density, the share of values that it keeps, such as 0.5"
                if sparse
                else f"--method {self.method} keeps all values; leave --density out"
            )

    def names(self) -> list[str]:
        """The runs' folder names, or their paths if two names are equal."""
        names = [run.name for run in self.runs]
        return names if len({*names}) == len(names) else [str(run) for run in self.runs]

    def record(self) -> dict[str, Any]:
        return {"runs": self.names(), "method": self.method, "weights": list(self.weights), "density": self.density}


def combination_of(runs: Sequence[Path], method: str, weights: str, density: float | None) -> Combination:
    """Parse the command's options. `weights`: comma-separated numbers; empty means equal weights that sum to 1."""
    try:
        numbers = [float(w) for w in weights.split(",")] if weights else [1 / len(runs)] * len(runs)
    except ValueError as error:
        raise RunError(f"--weights {weights}: write comma-separated numbers, such as 0.5,0.5") from error
    return Combination(runs, method, numbers, density)


def combine(combination: Combination, base: Path, adapters: Sequence[Path], folder: Path, seed: int) -> None:
    """Write the combined adapter to `folder`. Raises RunError if PEFT can't combine the adapters: `linear` needs equal
    ranks, and every method plain LoRA."""
    from peft import PeftModel

    for run, adapter in zip(combination.runs, adapters, strict=True):
        _check_plain(run, adapter)
    model = build(base)
    free_parameters(model)
    set_seed(seed)  # DARE drops values at random
    names = [f"adapter_{i}" for i in range(len(adapters))]
    placement: dict[str, Any] = {"low_cpu_mem_usage": True, "torch_device": "cpu"}
    with readable(" and ".join(map(str, adapters))):
        for adapter in adapters:
            check_adapter_patterns(model, adapter)
        tuned = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=names[0], **placement)
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            tuned.load_adapter(str(adapter), adapter_name=name, **placement)
    options = {} if combination.density is None else {"density": combination.density}
    try:
        cast(Any, tuned.base_model).add_weighted_adapter(
            names, list(combination.weights), "default", combination_type=combination.method, **options
        )
    except ValueError as error:
        raise RunError(f"--method {combination.method}: {str(error).splitlines()[0]}") from error
    tuned.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)


def _check_plain(run: Path, adapter: Path) -> None:
    config = adapter_config(adapter)
    if config.peft_type != "LORA":
        raise RunError(f"{run}: only LoRA adapters can be combined, not {config.peft_type.value}")
    if used := [key for key in UNCOMBINED if getattr(config, key, None)]:
        raise RunError(
            f"{run}: an adapter with {', '.join(used)} can't be combined; export each run, or train them as plain LoRA"
        )
