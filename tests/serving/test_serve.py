"""Serving: what starts, what is refused before the start, how a server ends; the last tests need vLLM."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import AutoTokenizer

from data.encode import template
from eval.client import ServerError
from sft.cli import serve as serve_command_line
from sft.errors import RecipeError, RunError
from sft.models.load import load_base
from sft.models.target import load_plain, run_recipe
from sft.serving import serve
from sft.serving.serve import check_extra, free_port, precision_note, read_key, serve_command, server
from sft.serving.server_log import why_it_stopped
from sft.serving.targets import resolve_targets
from tests.helpers.places import ROOT, SMOLLM
from tests.helpers.processes import alive, gone

pytestmark = pytest.mark.heavy

has_vllm = importlib.util.find_spec("vllm") is not None
RECIPE = "task: squad_v2\nmodel: {{base: '{}'{}}}\ndata: {{train: gone.json}}\n"

# in place of vLLM's module: a server with a child process; the variable FAKE says what it does
FAKE_VLLM = """
import http.server, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open(os.environ["PIDS"], "w").write(f"{os.getpid()} {child.pid}")
if os.environ["FAKE"] == "slow":
    time.sleep(300)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if os.environ["FAKE"] == "dies":
            print("torch.OutOfMemoryError: CUDA out of memory", flush=True)
            os._exit(3)
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))  # a socket closed with unread bytes resets the connection
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"choices": [{"message": {"content": "Paris"}}]}')
        self.wfile.flush()
        print("torch.OutOfMemoryError: CUDA out of memory", flush=True)
        os._exit(3)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch) -> Path:
    """A fake vLLM that a child process imports first. Returns the file that it writes its and its child's ids to."""
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setenv("PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("FAKE", "serves")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    return tmp_path / "pids"


def processes(pids: Path, within_s: float = 30) -> list[int]:
    deadline = time.monotonic() + within_s
    while not (pids.is_file() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < deadline, "the server was not started"
        time.sleep(0.05)
    return [int(pid) for pid in pids.read_text().split()]


def make_run(folder: Path, base: Path, tokenizer_of: Path | None = None, **config) -> Path:
    """A run folder with the files that are read before vLLM starts."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    settings = {"r": 12, "peft_type": "LORA"} | config
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    AutoTokenizer.from_pretrained(tokenizer_of or base).save_pretrained(adapter)
    (folder / "recipe.yaml").write_text(RECIPE.format(base, ""))
    return folder


def command_of(*targets: Path, **loras: str) -> list[str]:
    return serve_command(resolve_targets([str(t) for t in targets], loras), "127.0.0.1", 8000)


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def test_export_is_served_on_loopback_by_the_module_behind_the_gatekeeper(tiny):
    command = command_of(tiny)
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert after(command, "--host") == "127.0.0.1"
    assert (after(command, "--model"), after(command, "--served-model-name")) == (str(tiny), tiny.name)
    module, name = after(command, "--middleware").rsplit(".", 1)
    assert hasattr(importlib.import_module(module), name)


def test_run_is_served_as_an_adapter_on_its_base(tmp_path, tiny, tokenizer):
    run = make_run(tmp_path / "myrun", tiny)
    command = command_of(run)
    assert after(command, "--lora-modules") == f"myrun={run}/adapter"
    assert after(command, "--max-lora-rank") == "16"
    ends = json.loads(after(command, "--override-generation-config"))["eos_token_id"]
    assert tokenizer.eos_token_id in ends, "the base's generation config may not know what training ended turns with"
    (run / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(RecipeError, match="adapter can't be loaded"):
        command_of(run)


@pytest.mark.slow
def test_adapter_of_a_quantized_run_is_served_on_the_base_that_training_saw(tmp_path, tiny):
    run, recipe = make_run(tmp_path / "run", tiny), RECIPE.format(tiny, ", quantization: {load_in_4bit: true}")
    (run / "recipe.yaml").write_text(recipe)
    served = resolve_targets([str(run)])
    weights, original = (load_plain(Path(folder), torch.float32).state_dict() for folder in (served.model, tiny))
    trained = load_base(run_recipe(run).model, torch.device("cpu")).state_dict()
    assert weights.keys() == trained.keys()
    for name in weights:
        assert torch.equal(weights[name], trained[name].to(torch.bfloat16).float())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(weights[name], original[name], rtol=0.01)
    assert resolve_targets([str(run)]).model == served.model, "written once"
    beside = resolve_targets([str(tiny)], {"squad": str(run)})
    assert beside.model == str(tiny)
    assert f"`graft serve {run}`" in precision_note(beside, run)
    (run / "recipe.yaml").write_text(RECIPE.format(tiny, ""))
    assert precision_note(beside, run) == ""


def test_runs_of_one_base_are_served_together_each_under_its_name(tmp_path, tiny):
    one, two = make_run(tmp_path / "one", tiny), make_run(tmp_path / "two", tiny, r=8, rank_pattern={"q": 40})
    command = command_of(one, two, again=str(one))
    at = command.index("--lora-modules")
    modules = [f"one={one}/adapter", f"two={two}/adapter", f"again={one}/adapter"]
    assert command[at + 1 : at + 4] == modules
    assert (after(command, "--max-lora-rank"), after(command, "--max-loras")) == ("64", "3")
    beside_base = command_of(tiny, squad=str(one))
    assert (after(beside_base, "--served-model-name"), after(beside_base, "--max-loras")) == (tiny.name, "1")


def test_adapters_of_different_bases_are_refused(tmp_path, tiny, tiny_qwen):
    one, other = make_run(tmp_path / "one", tiny), make_run(tmp_path / "other", tiny_qwen)
    for targets, loras in (([one, other], {}), ([tiny_qwen], {"squad": str(one)})):
        with pytest.raises(ServerError, match="trained on .*, .* server's model .* --port"):
            command_of(*targets, **loras)


def test_adapters_of_different_templates_are_refused(tmp_path, tiny):
    one, other = make_run(tmp_path / "one", tiny), make_run(tmp_path / "other", tiny)
    template = other / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text().replace("helpful", "hateful"))
    with pytest.raises(ServerError, match="its chat_template differs .* --port"):
        command_of(one, other)


def test_names_of_two_targets_are_refused(tmp_path, tiny):
    runs = [make_run(tmp_path / part / "same", tiny) for part in ("a", "b")]
    with pytest.raises(ServerError, match="same: two of them .* --lora NAME=RUN"):
        command_of(*runs)
    with pytest.raises(ServerError, match="several models"):
        command_of(tiny, ROOT / "data")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"r": 1024}, "rank 1024 exceeds vLLM's 512; `graft export`"),
        ({"use_dora": True}, "no adapter with use_dora; merge it first: graft export"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "with bias"),
        ({"peft_type": "IA3"}, "with peft_type IA3"),
    ],
)
def test_adapter_that_vllm_does_not_serve_is_refused_before_it_starts(tmp_path, tiny, config, problem):
    with pytest.raises(ServerError, match=problem):
        command_of(make_run(tmp_path / "run", tiny, **config))


def test_adapter_with_pickled_weights_is_refused_and_never_opened(tmp_path, tiny):
    """S1: a pickle that would write a file when it is loaded."""

    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")

    import pickle

    run = make_run(tmp_path / "run", tiny)
    (run / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ServerError, match=r"adapter_model.bin: is a pickle"):
        command_of(run)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(RecipeError, match="no adapter_model.safetensors"):
        command_of(run)
    assert not (tmp_path / "owned").exists()


def test_wrong_path_is_named(tmp_path):
    with pytest.raises(RunError, match="nowhere: no run folder, "):
        command_of(tmp_path / "nowhere")


def test_other_addresses_need_a_key(fake_vllm, tmp_path, tiny, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with (
        pytest.raises(ServerError, match="set VLLM_API_KEY or --api-key-file"),
        server([str(tiny)], "0.0.0.0", 8000, tmp_path / "log"),  # noqa: S104
    ):
        pass


def test_key_is_in_a_file_and_never_on_the_command_line(tmp_path, tiny, monkeypatch):
    """S14: what other users can see of a process."""
    file = tmp_path / "key"
    file.write_text("s3cret\n")
    monkeypatch.setenv("VLLM_API_KEY", read_key(file))
    assert "s3cret" not in " ".join(command_of(tiny))
    file.write_text("two words\n")
    with pytest.raises(ServerError, match="one line"):
        read_key(file)


def test_readiness_is_asked_past_a_proxy_of_the_environment(fake_vllm, tmp_path, tiny, monkeypatch):
    """A proxy would get the key, and could not reach this machine: the start would wait 900 s."""
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setattr(serve, "READY_WITHIN_S", 30)
    with server([str(tiny)], "127.0.0.1", free_port(), tmp_path / "log") as running:
        assert serve.check_completion(running.url, "m") == "Paris"


@pytest.mark.parametrize(
    "option",
    [
        "--api-key=x",
        "--host=0.0.0.0",
        "--hos=0.0.0.0",
        "--config=f.yaml",
        "--allowed-origins=['*']",
        "--trust_remote_code",
        "--trust-request-chat-template",
    ],
)
def test_options_of_vllm_that_would_open_the_server_are_refused(option):
    with pytest.raises(ServerError, match=r"--vllm=--"):
        check_extra(["--max-model-len=9", option])


def test_settings_that_let_clients_change_the_server_are_refused(monkeypatch):
    check_extra([])
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    with pytest.raises(ServerError, match="VLLM_SERVER_DEV_MODE is set"):
        check_extra([])


def test_port_in_use_is_a_clear_error(fake_vllm, tmp_path, tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServerError, match=rf"port {port} .* in use"),
            server([str(tiny)], "127.0.0.1", port, tmp_path / "l"),
        ):
            pass


@pytest.mark.parametrize("file", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_template_without_end_is_refused_before_vllm_gets_it(fake_vllm, tmp_path, tiny, file, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / file).parent.mkdir(exist_ok=True)
    (model / file).write_text("{% if messages | length > 2 %}{{ 1 | round(99999999, 'ceil') }}{% endif %}")
    monkeypatch.setattr(template, "SECONDS", 0.3)
    with (
        pytest.raises(ServerError, match="takes more than 0.3 s"),
        server([str(model)], "::1", free_port(), tmp_path / "l"),
    ):
        pytest.fail("it started")
    assert not (tmp_path / "l").exists()


def test_ipv6_loopback_needs_no_key(fake_vllm, tmp_path, tiny, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(serve, "serve_command", lambda *a: [sys.executable, "-c", "pass"])
    with (
        pytest.raises(ServerError, match="stopped with code 0"),
        server([str(tiny)], "::1", free_port(), tmp_path / "l"),
    ):
        pass


def test_unknown_address_is_a_clear_error(fake_vllm, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with (
        pytest.raises(ServerError, match="--host no.such.host"),
        server([str(tiny)], "no.such.host", 8000, tmp_path / "l"),
    ):
        pass


def test_without_vllm_the_remedy_is_named(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match="make serve-cpu"), server([str(tiny)], "127.0.0.1", 8000, tmp_path / "log"):
        pass


def test_server_and_what_it_started_are_stopped_at_the_end(fake_vllm, tmp_path, tiny):
    with server([str(tiny)], "127.0.0.1", free_port(), tmp_path / "log") as running:
        pids = processes(fake_vllm)
        assert alive(pids) == pids
        assert running.names == [tiny.name]
    assert gone(pids, 0)


def test_ctrl_c_during_the_start_leaves_no_process(fake_vllm, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("FAKE", "slow")

    def interrupt(*args: object, **kwargs: object) -> None:
        processes(fake_vllm)
        raise KeyboardInterrupt

    monkeypatch.setattr(serve.httpx, "get", interrupt)
    with pytest.raises(KeyboardInterrupt), server([str(tiny)], "127.0.0.1", free_port(), tmp_path / "log"):
        pass
    assert gone(processes(fake_vllm), 0)


def test_server_that_crashes_after_its_start_ends_with_the_reason(fake_vllm, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("FAKE", "dies")
    with (
        pytest.raises(ServerError, match="out of memory; .*VLLM_CPU_KVCACHE_SPACE"),
        server([str(tiny)], "127.0.0.1", free_port(), tmp_path / "log") as running,
    ):
        running.wait()
    assert gone(processes(fake_vllm), 0)


@pytest.mark.slow
def test_server_that_crashes_is_restarted_up_to_retries_times(fake_vllm, tmp_path, tiny, capfd):
    """It crashes with each first answer, before or after the answer has arrived."""
    with pytest.raises(SystemExit) as ended:
        serve_command_line([str(tiny)], port=free_port(), retries=2)
    shown = capfd.readouterr().err
    assert ended.value.code == 2
    logs = sorted(tiny.glob("serve-*.[12].log"))
    assert len(logs) == 2  # of each that crashed
    for log in logs:
        log.unlink()
    assert "restarting it, 2 of 2" in shown
    assert shown.count("out of memory;") == 3
    assert gone(processes(fake_vllm), 0)


@pytest.mark.slow
def test_kill_9_of_the_parent_leaves_no_process(fake_vllm, tmp_path, tiny):
    script = (
        "import importlib.util, sys; from pathlib import Path; from sft.serving.serve import server, free_port\n"
        "importlib.util.find_spec = lambda name: object()\n"
        "with server([sys.argv[1]], '127.0.0.1', free_port(), Path(sys.argv[2])) as running:\n"
        "    running.wait()"
    )
    paths = os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny), str(tmp_path / "log")], env=os.environ | {"PYTHONPATH": paths}
    )
    try:
        pids = processes(fake_vllm, 60)
        assert alive(pids) == pids
    finally:
        parent.kill()
        parent.wait()
    assert gone(pids)


def test_kill_9_of_the_supervisor_leaves_no_process(fake_vllm, tmp_path, tiny):
    with server([str(tiny)], "127.0.0.1", free_port(), tmp_path / "log") as running:
        pids = processes(fake_vllm)
        assert alive(pids) == pids
        running.process.kill()
        with pytest.raises(ServerError, match="stopped with code -9"):
            running.wait()
    assert gone(pids)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "ValueError: To serve at least one request with the model's max seq len (8192), (0.70 GiB KV cache is needed, "
            "which is larger than the available KV cache memory (0.50 GiB). Based on the available memory, the estimated "
            "maximum model length is 5824. Try increasing `gpu_memory_utilization`",
            r"8192 tokens, .* 0.70 GiB, .* 0.50 GiB; .*--vllm=--max-model-len=5824",
        ),
        (
            "ValueError: Available memory on node 0 (14.22/23.5 GiB) on kv cache allocation is less than requested memory "
            "for kv (100.0 GiB). Decrease",
            r"100.0 GiB .* 14.22 GiB are free; .*VLLM_CPU_KVCACHE_SPACE",
        ),
        ("ValueError: LoRA rank 64 is greater than max_lora_rank 16.", "rank 64 exceeds --max-lora-rank 16"),
        ("OSError: [Errno 98] Address already in use", "name another with --port"),
        ("TypeError: what nobody foresaw", r"stopped with code 7; see .*\n.*TypeError: what nobody foresaw"),
    ],
)
def test_reason_in_the_log_is_named_with_its_remedy(tmp_path, log, message):
    (tmp_path / "log").write_text(f"INFO loading\n(EngineCore pid=1) ERROR {log}\n")
    with pytest.raises(ServerError, match=message):
        raise ServerError(why_it_stopped(tmp_path / "log", 7))


needs_vllm = pytest.mark.skipif(not has_vllm, reason="vLLM is not installed; `make serve-cpu` installs it")


def started(*args: str, **options) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "sft.cli", "serve", *args], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        **options,
    )  # fmt: skip


@pytest.mark.serve
@needs_vllm
def test_graft_serve_answers_behind_its_gatekeeper_and_stops_cleanly():
    """S15, S16 with the real server: foreign Host and Origin, 10 MB, n of a billion, a template of the request."""
    from sft.models.resolve import resolve_base

    target, port = Path(resolve_base(SMOLLM)), free_port()
    process = started(str(target), "--port", str(port))
    root = f"http://127.0.0.1:{port}"
    ask = {"model": target.name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"ready: {root}/v1")
        assert "Paris" in process.stdout.readline()
        assert target.name in httpx.get(f"{root}/v1/models").text
        assert httpx.get(f"{root}/v1/models", headers={"Host": "evil.example"}).status_code == 403
        url = f"{root}/v1/chat/completions"
        assert httpx.post(url, json=ask, headers={"Origin": "http://evil.example"}).status_code == 403
        assert httpx.post(url, json=ask | {"n": 10**9}).status_code == 400
        assert httpx.post(url, json=ask | {"chat_template": "{{ 1 }}"}).status_code == 400
        assert httpx.post(url, json=ask | {"model": "unknown"}).status_code == 404
        long = [{"role": "user", "content": "word " * 2_000_000}]
        assert httpx.post(url, json=ask | {"messages": long}).status_code == 413
        assert httpx.post(f"{root}/tokenize", content=b"x" * 10_000_000).status_code == 413
        assert httpx.post(url, json=ask).status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    time.sleep(1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{root}/health")


@pytest.mark.serve
@needs_vllm
def test_every_route_of_the_real_server_asks_for_the_key():
    """S15 with the real server."""
    from sft.models.resolve import resolve_base

    target, port, key = Path(resolve_base(SMOLLM)), free_port(), "s3cret"
    process = started(str(target), "--port", str(port), env=os.environ | {"VLLM_API_KEY": key})
    root = f"http://127.0.0.1:{port}"
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        own = {"Authorization": f"Bearer {key}"}
        paths = httpx.get(f"{root}/openapi.json", headers=own).json()["paths"]
        assert {"/tokenize", "/invocations", "/v1/chat/completions"} <= set(paths)
        for path in [*paths, "/docs", "/metrics", "/openapi.json", "/nothing"]:
            for method in ("GET", "POST"):
                assert httpx.request(method, root + path).status_code == 401, f"{method} {path}"
        arguments = [a for p in psutil.process_iter() if p.is_running() for a in _arguments(p)]
        assert key not in " ".join(arguments)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
