"""What the `graft` command does with servers: serve, verify, chat, bench; cli.py has the rest."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from sft.recipe import RecipeError
from sft.session import user_errors

app = typer.Typer()
bench = typer.Typer(no_args_is_help=True, help="Measure speed.")
app.add_typer(bench, name="bench")

Target = Annotated[str, typer.Argument(help="A run folder, an exported model, a base, or a server's /v1 address.")]
ServedModel = Annotated[str | None, typer.Option("--model", help="The served model's name; default: its only one.")]


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
    from sft.serve import ServerDied, read_key

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
    from sft.serve import check_completion, curl_line, server

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

    from sft.verify import print_record, verify

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
    from sft.chat import chat as talk

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

    from sft.bench_serve import bench_serve, print_loads
    from sft.run import write_json

    numbers = clients.split(",")
    if not all(n.strip().isdigit() and int(n) for n in numbers):
        raise RecipeError(f"--clients {clients}: write numbers from 1 on, for example 1,4,16")
    counts = [int(n) for n in numbers]
    rows = bench_serve(urls, model or [], counts, requests, prompt_words, max_new_tokens, rounds)
    print_loads(rows, Console())
    if out:
        write_json(out, rows)
