"""How the cost of Graft's training grows: with examples, questions on a context, length of a context, LoRA rank.

    python tests/benchmarks/throughput.py SQUAD_FILE --growth [--out FOLDER]

Each point is a training of its own, with shared prefixes and, as "flat", without. It is cut to about RUN_TOKENS
executed tokens, and its rate leaves out the first step, so it says what a longer run would do, but for compiled layers:
runs this short don't compile.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sft.models.load import load_tokenizer
from sft.recipe.schema import Model
from tests.benchmarks.passages import (
    Passage,
    Workload,
    first_questions,
    tree_tokens,
    with_length,
    with_questions,
    write_workload,
)
from tests.benchmarks.results import markdown, print_table
from tests.benchmarks.systems import Measurement, Settings, measure

RUN_TOKENS = 4_000  # some six seconds on 2 cores in bfloat16
STEPS = 3  # at least
MOST_TOKENS = 20_000  # of the steps that a point needs at least; a longer one is left out
COLUMNS = ("series", "value", "system", "questions/s", "executed tokens/s", "peak GiB", "start-up s", "steps")


@dataclass(frozen=True)
class Point:
    series: str
    value: int
    workload: Workload
    settings: Settings


def run_growth(passages: Sequence[Passage], settings: Settings, out: Path) -> None:
    """Measure all points; growth.json, growth.md and growth.png in `out`. After Ctrl-C what there is until then."""
    tokenizer = load_tokenizer(Model(base=settings.base))
    done: list[tuple[Point, Measurement]] = []
    with tempfile.TemporaryDirectory(prefix="graft-growth-") as scratch:
        every = list(points(passages, settings, Path(scratch) / "data", tokenizer))
        try:
            for i, point in enumerate(every):
                for system in ("graft", "graft-flat"):
                    name = f"{i + 1}/{len(every)} {point.series} {point.value} {system}"
                    steps = bounded_steps(point, system == "graft")
                    if steps is None:
                        print(f"{name}: left out, its steps are too long", flush=True)
                        continue
                    bounded = replace(point.settings, max_steps=steps)
                    m = measure(system, point.workload, Path(scratch) / f"{i}-{system}", bounded)
                    done.append((point, m))
                    print(f"{name}: {m.steady_questions_per_s:.2f} questions/s", flush=True)
        except KeyboardInterrupt:
            print("\nstopped; this is what was measured until then", flush=True)
    if done:
        report_growth(done, out)


def points(
    passages: Sequence[Passage], settings: Settings, folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Point]:
    def workload(chosen: Sequence[Passage], name: str) -> Workload:
        return write_workload(chosen, folder / name, tokenizer)

    for count in (20, 200, 2000):
        chosen = first_questions(passages, count)
        yield Point("examples", count, workload(chosen, f"examples-{count}"), settings)
    for count in (1, 2, 4, 8, 16):
        chosen = [with_questions(p, count) for p in passages[:64]]
        # a step must have room for all questions of a context
        yield Point(
            "questions on a context", count, workload(chosen, f"questions-{count}"), replace(settings, batch=16)
        )
    for tokens in (128, 256, 512, 1024, 2048):
        starts = range(0, len(passages), 20)  # 20 passages are longer than the longest context
        cut = (with_length(passages[i : i + 20], tokens, tokenizer) for i in starts)
        chosen = [with_questions(p, 4) for p, _ in zip(filter(None, cut), range(16), strict=False)]
        yield Point("tokens of a context", tokens, workload(chosen, f"tokens-{tokens}"), settings)
    chosen = first_questions(passages, 80)
    for rank in (4, 16, 64):
        yield Point("LoRA rank", rank, workload(chosen, f"rank-{rank}"), replace(settings, r=rank, lora_alpha=2 * rank))


def bounded_steps(point: Point, share: bool) -> int | None:
    """Steps of about RUN_TOKENS executed tokens, at least STEPS, else at most an epoch; None above MOST_TOKENS."""
    workload, batch = point.workload, point.settings.batch
    trees = workload.trees(batch) if share else ([example] for example in workload.examples)
    step_tokens = sum(tree_tokens(tree)[0] for tree in trees) / workload.questions * batch
    if STEPS * step_tokens > MOST_TOKENS:
        return None
    return max(STEPS, min(round(RUN_TOKENS / step_tokens), workload.questions // batch))


def report_growth(done: Sequence[tuple[Point, Measurement]], out: Path) -> None:
    rows = [
        [
            point.series, f"{point.value:,}", m.system, f"{m.steady_questions_per_s:.2f}",
            f"{m.executed_tokens / m.seconds:,.0f}", f"{m.peak_memory_gib:.2f}", f"{m.start_seconds:.1f}",
            str(len(m.losses)),
        ]
        for point, m in done
    ]  # fmt: skip
    print_table(COLUMNS, rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / "growth.md").write_text(markdown(COLUMNS, rows), encoding="utf-8")
    found = [{"series": point.series, "value": point.value} | asdict(m) for point, m in done]
    (out / "growth.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    plot_growth(done, out / "growth.png")
    print(f"written: {out}/growth.json, growth.md, growth.png", flush=True)


def plot_growth(done: Sequence[tuple[Point, Measurement]], path: Path) -> None:
    """A panel for each series: questions a second (lines) and peak memory (dashes, the right axis)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for axes, series in zip(panels.flat, dict.fromkeys(point.series for point, _ in done), strict=False):
        memory = axes.twinx()
        for system, colour in (("graft", "#2a7f62"), ("graft-flat", "#9aa5b1")):
            found = [(p.value, m) for p, m in done if p.series == series and m.system == system]
            values = [value for value, _ in found]
            axes.plot(values, [m.steady_questions_per_s for _, m in found], "o-", color=colour, label=system)
            memory.plot(values, [m.peak_memory_gib for _, m in found], "s--", color=colour, alpha=0.6)
        axes.set_xscale("log", base=2)
        ticks = sorted({p.value for p, _ in done if p.series == series})
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
        axes.minorticks_off()
        axes.set(xlabel=series, ylabel="questions/s (solid)")
        memory.set_ylabel("peak memory, GiB (dashed)")
        axes.set_ylim(bottom=0)
        memory.set_ylim(0, 1.2 * max(m.peak_memory_gib for p, m in done if p.series == series))
        axes.legend(loc="best")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
