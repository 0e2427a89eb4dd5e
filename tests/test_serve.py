"""Serving: the command that is started, what stops it early, and (with vLLM) a real server."""

import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from eval.client import ServerError
from sft.recipe import RecipeError
from sft.serve import _stop, free_port, precision_note, serve_command, server
from tests.conftest import ROOT, SMOLLM

has_vllm = importlib.util.find_spec("vllm") is not None


def test_export_is_served_on_loopback_by_the_module(tiny):
    command = serve_command(Path(tiny), "127.0.0.1", 8000)
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--model") + 1] == str(tiny)


def test_run_is_served_as_an_adapter_on_its_base(tmp_path, tiny):
    run = tmp_path / "myrun"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text('{"r": 12, "peft_type": "LORA"}')
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    recipe = "task: squad_v2\nmodel: {{base: '{}'{}}}\ndata: {{train: gone.json}}\n"
    (run / "recipe.yaml").write_text(recipe.format(tiny, ""))
    command = serve_command(run, "127.0.0.1", 8000)
    assert command[command.index("--lora-modules") + 1] == f"myrun={run}/adapter"
    assert command[command.index("--max-lora-rank") + 1] == "16"
    assert precision_note(run) == ""
    (run / "recipe.yaml").write_text(recipe.format(tiny, ", quantization: {load_in_4bit: true}"))
    assert f"graft export {run}" in precision_note(run)
    (run / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(RecipeError, match="adapter can't be loaded"):
        serve_command(run, "127.0.0.1", 8000)


@pytest.fixture
def pretend_vllm(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def test_other_addresses_need_a_key(pretend_vllm, tmp_path, tiny, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    with pytest.raises(ServerError, match="set VLLM_API_KEY"), server(tiny, "0.0.0.0", 8000, tmp_path / "log"):  # noqa: S104
        pass


def test_port_in_use_is_a_clear_error(pretend_vllm, tmp_path, tiny):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ServerError, match=rf"port {port} .* in use"),
            server(tiny, "127.0.0.1", port, tmp_path / "l"),
        ):
            pass


def test_ipv6_loopback_needs_no_key(pretend_vllm, tmp_path, tiny, monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr("sft.serve.serve_command", lambda *a: [sys.executable, "-c", "pass"])
    with pytest.raises(ServerError, match="stopped with code 0"), server(tiny, "::1", free_port(), tmp_path / "log"):
        pass


def test_address_that_is_none_is_a_clear_error(pretend_vllm, tmp_path, tiny, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(ServerError, match="--host no.such.host"), server(tiny, "no.such.host", 8000, tmp_path / "l"):
        pass


def test_server_that_ignores_ctrl_c_is_stopped_at_once():
    """As one does that was started from a background job of a shell."""
    ignores = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", ignores], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    start = time.monotonic()
    _stop(process)
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - start < 5


def test_server_that_dies_is_reported_with_its_log(pretend_vllm, tmp_path, tiny, monkeypatch):
    dies = [sys.executable, "-c", "raise SystemError('no memory')"]
    monkeypatch.setattr("sft.serve.serve_command", lambda *a: dies)
    with (
        pytest.raises(ServerError, match="stopped with code 1.*\n.*no memory"),
        server(tiny, "127.0.0.1", free_port(), tmp_path / "log"),
    ):
        pass


def test_without_vllm_the_remedy_is_named(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match="make serve-cpu"), server(tiny, "127.0.0.1", 8000, tmp_path / "log"):
        pass


@pytest.mark.serve
@pytest.mark.skipif(not has_vllm, reason="vLLM is not installed; `make serve-cpu` installs it")
def test_graft_serve_answers_and_stops_cleanly(tmp_path):
    from sft.base import resolve_base

    target, port = Path(resolve_base(SMOLLM)), free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "sft.cli", "serve", str(target), "--port", str(port)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first.startswith(f"ready: http://127.0.0.1:{port}/v1")
        assert "Paris" in process.stdout.readline()
        models = httpx.get(f"http://127.0.0.1:{port}/v1/models").json()
        assert json.dumps(models).count(target.name)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    time.sleep(1)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
