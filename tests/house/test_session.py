import os
import subprocess
import sys

import pytest
import torch

from data.conversation import DataError
from sft.session import user_errors

SCRIPT = """
import os, sys
from pathlib import Path
from sft.session import tune_allocator
tune_allocator()
print(Path("/proc/self/environ").read_text().count("GLIBC_TUNABLES"), "GLIBC_TUNABLES" in os.environ, sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(("own", "seen"), [(None, "1 False"), ("glibc.malloc.arena_max=1", "1 True")])
def test_the_allocator_is_tuned_once_and_a_users_own_settings_stay(own, seen, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    env |= {"PYTHONPATH": os.getcwd()} | ({"GLIBC_TUNABLES": own} if own else {})
    done = subprocess.run(
        [sys.executable, str(script), "a b", "c"], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{seen} ['a b', 'c']"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:49327."), True),
        (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_loss_of_another_process_of_the_training_is_one_line(error, lost, monkeypatch, capsys):
    @user_errors
    def train() -> None:
        raise error

    monkeypatch.setattr(sys, "argv", ["graft"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit if lost else RuntimeError) as ended:
        train()
    if lost:
        assert ended.value.code == 1
        assert "process 1: another process of this training has ended" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError):
        train()


def test_messages_write_control_characters_out():
    assert str(DataError("a\x1b[2J.jsonl:3", "\u202etext\x9b\tx\nsecond line")) == (
        "a\\x1b[2J.jsonl:3: \\u202etext\\x9b\\tx\nsecond line"
    )
