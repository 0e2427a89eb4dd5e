"""What throughput.py makes of its measurements: rates, ratios, FLOP utilisation; a table, a file and a chart."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from sft.models.load import load_config
from sft.models.speed import matmul_flops_per_s
from sft.models.tune import tune_model
from sft.recipe.schema import Model, Tune
from sft.training.flops import attention_flops, training_flops
from tests.benchmarks.passages import Workload, tree_tokens
from tests.benchmarks.systems import SYSTEMS, Measurement, Settings


@dataclass(frozen=True)
class Summary:
    """Medians over the repeats of one system; `times`: how often its seconds a question hold Graft's."""

    system: str
    dtype: str
    repeats: int
    questions_per_s: float
    lowest: float
    highest: float
    times: float | None
    logical_tokens_per_s: float
    executed_tokens_per_s: float
    trained_tokens_per_s: float
    peak_memory_gib: float
    utilisation: float
    loss: float
    seconds: float
    wall_seconds: float


def gemm_rates(gpu: bool = False) -> dict[str, float]:
    """FLOP/s of large matrix products by dtype: what training could reach at most."""
    names, device = ("float32", "bfloat16"), torch.device("cuda" if gpu else "cpu")
    return {name: matmul_flops_per_s(device, getattr(torch, name), seconds=1.0) for name in names}


class Flops:
    """Useful FLOPs of a training, from the base's shape.

    4 a body weight and executed token (forward, and the gradient of its input), 6 an adapter weight, 4 a head weight
    and scored position, 12 x hidden size a layer and pair of query and key. What gradient checkpointing computes a
    second time does not count. Graft scores the positions that carry loss, the others all that they execute.
    """

    def __init__(self, settings: Settings, workload: Workload) -> None:
        model = Model(base=settings.base)
        config = load_config(model)
        lora = {"method": "lora", "r": settings.r, "lora_alpha": settings.lora_alpha, "target_modules": "all-linear"}
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config)
            self.model = tune_model(base, Tune.model_validate(lora), settings.seed)
        trees = {"tree": workload.trees(settings.batch), "flat": ([example] for example in workload.examples)}
        counts = {layout: [tree_tokens(tree) for tree in every] for layout, every in trees.items()}
        self.pairs_per_token = {k: sum(pairs for _, pairs in v) / sum(n for n, _ in v) for k, v in counts.items()}

    def of(self, m: Measurement) -> float:
        scored = m.trained_tokens if m.system.startswith("graft") else m.executed_tokens
        padded = (m.executed_tokens / m.questions + 1) / 2  # on average, as if each question were padded alike
        pairs_per_token = self.pairs_per_token | {"padded": padded}
        pairs = round(pairs_per_token[SYSTEMS[m.system].layout] * m.executed_tokens)
        return training_flops(self.model, m.executed_tokens, scored, False) + attention_flops(self.model, pairs)


def summarize(
    measurements: Sequence[Measurement], workload: Workload, flops: Flops, gemm: dict[str, float]
) -> list[Summary]:
    """In the order of SYSTEMS. gemm: FLOP/s by dtype; a system's utilisation is of the dtype that it computes in."""
    by_system = {name: [m for m in measurements if m.system == name] for name in SYSTEMS}
    rate = {name: statistics.median(m.questions / m.seconds for m in ms) for name, ms in by_system.items() if ms}
    summaries = []
    for name in rate:
        ms = by_system[name]
        rates = [m.questions / m.seconds for m in ms]
        median = ms[0].questions / rate[name]  # seconds
        steady = statistics.median(m.steady_questions_per_s or m.questions / m.seconds for m in ms)
        summaries.append(Summary(
            system=name,
            dtype=ms[0].dtype,
            repeats=len(ms),
            questions_per_s=rate[name],
            lowest=min(rates),
            highest=max(rates),
            times=rate["graft"] / rate[name] if "graft" in rate else None,
            logical_tokens_per_s=workload.logical_tokens / median,
            executed_tokens_per_s=ms[0].executed_tokens / median,
            trained_tokens_per_s=ms[0].trained_tokens / median,
            peak_memory_gib=max(m.peak_memory_gib for m in ms),
            utilisation=flops.of(ms[0]) / ms[0].questions * steady / gemm[ms[0].dtype],
            loss=statistics.median(last_third(m.losses) for m in ms),
            seconds=median,
            wall_seconds=statistics.median(m.wall_seconds for m in ms),
        ))  # fmt: skip
    return summaries


def last_third(losses: Sequence[float]) -> float:
    """Mean over the last third of the steps, at least one."""
    return statistics.fmean(losses[-max(1, len(losses) // 3) :])


COLUMNS: list[tuple[str, Callable[[Summary], str]]] = [
    ("system", lambda s: s.system),
    ("questions/s", lambda s: f"{s.questions_per_s:.2f}"),
    ("range", lambda s: f"{s.lowest:.2f} - {s.highest:.2f}" if s.repeats > 1 else "-"),
    ("Graft is", lambda s: "-" if s.times is None else f"{s.times:.2f} x"),
    ("logical", lambda s: f"{s.logical_tokens_per_s:,.0f}"),
    ("executed", lambda s: f"{s.executed_tokens_per_s:,.0f}"),
    ("trained", lambda s: f"{s.trained_tokens_per_s:,.1f}"),
    ("FLOP use", lambda s: f"{100 * s.utilisation:.0f} %"),
    ("peak GiB", lambda s: f"{s.peak_memory_gib:.2f}"),
    ("loss", lambda s: f"{s.loss:.3f}"),
    ("training s", lambda s: f"{s.seconds:.1f}"),
    ("process s", lambda s: f"{s.wall_seconds:.1f}"),
]
LEGEND = """\
logical, executed, trained: tokens/s of the examples one by one, of what was computed for them (with padding), and of
those that carry loss. FLOP use: useful FLOPs (see Flops in results.py) over the GEMM rate in the system's own dtype;
of Graft without the first step, in which layers are compiled.
loss: mean over the last third of the steps. training s: without loading and saving; process s: with them.
"""


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table()
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 160).print(table)


def report(out: Path, facts: dict[str, Any], measurements: Sequence[Measurement], summaries: Sequence[Summary]) -> None:
    """The table on the screen; results.json, table.md and throughput.png in `out`."""
    headers, rows = [name for name, _ in COLUMNS], [[cell(s) for _, cell in COLUMNS] for s in summaries]
    print_table(headers, rows)
    print(LEGEND)
    notes = [f"- {s.system}: {SYSTEMS[s.system].what}; {s.repeats} x, products in {s.dtype}" for s in summaries]
    notes += [f"- {key}: {value}" for key, value in facts.items() if isinstance(value, str)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n".join([markdown(headers, rows), LEGEND, *notes, ""]), encoding="utf-8")
    found = facts | {"summaries": [asdict(s) for s in summaries], "measurements": [asdict(m) for m in measurements]}
    (out / "results.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot(summaries, out / "throughput.png")
    print("\n".join([*notes, f"written: {out}/results.json, table.md, throughput.png"]), flush=True)


def plot(summaries: Sequence[Summary], path: Path) -> None:
    """A bar for each system, the fastest on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = sorted(summaries, key=lambda s: s.questions_per_s)
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.5 * len(order)), layout="constrained")
    colours = ["#2a7f62" if s.system.startswith("graft") else "#9aa5b1" for s in order]
    bars = axes.barh([s.system for s in order], [s.questions_per_s for s in order], color=colours)
    labels = [f"{s.questions_per_s:.2f}   {s.peak_memory_gib:.1f} GiB" for s in order]
    axes.bar_label(bars, labels, padding=4)
    axes.set_xlabel("questions trained per second; behind each bar also the peak memory")
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
