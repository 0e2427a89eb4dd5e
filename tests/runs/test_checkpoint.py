"""Checkpoint folders: written whole or not at all, verified before use, rotated without loss."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import sft.runs.checkpoint
from data.atomic import hidden_name, new_folder
from data.errors import DiskFull
from sft.errors import RunError
from sft.runs.checkpoint import (
    checkpoints,
    commit_checkpoint,
    damage,
    last_checkpoint,
    remove_leftovers,
    rotate,
    set_aside,
)
from sft.runs.metrics import read_metrics, rewind_metrics
from sft.runs.state import load_state, random_state, save_state, set_random_state
from sft.untrusted import check_run
from tests.helpers.runs import HARM, flip


def write(run: Path, step: int) -> Path:
    temporary = new_folder(run / f"checkpoint-{step}")
    (temporary / "nested").mkdir()
    (temporary / "weights.safetensors").write_bytes(os.urandom(2000))
    (temporary / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (temporary / "nested" / "part").write_text("x" * 50)
    commit_checkpoint(temporary, run / f"checkpoint-{step}", {"step": step})
    return run / f"checkpoint-{step}"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    return tmp_path


def test_newest_whole_checkpoint_is_taken(run):
    assert last_checkpoint(run) == (None, {})  # it was stopped before its first one
    for step in (5, 10):
        write(run, step)
    assert last_checkpoint(run) == (run / "checkpoint-10", {})
    assert sorted(p.name for p in run.iterdir()) == ["checkpoint-10", "checkpoint-5", "recipe.yaml"]


@pytest.mark.parametrize("harm", HARM)
def test_each_damaged_file_is_named_and_the_checkpoint_before_it_taken(harm, run):
    """R5: every file of a checkpoint in turn, its manifest too."""
    good, newer = write(run, 5), write(run, 10)
    shutil.copytree(newer, run / "copy")
    for name in ("weights.safetensors", "trainer_state.json", "nested/part", "manifest.json"):
        shutil.rmtree(newer)
        shutil.copytree(run / "copy", newer)
        HARM[harm](newer / name)
        taken, broken = last_checkpoint(run)
        assert taken == good
        assert [*broken] == [newer]
        assert name in broken[newer]
    HARM[harm](good / "nested" / "part")
    with pytest.raises(RunError, match=r"no checkpoint .*\n  checkpoint-10: .*\n  checkpoint-5: nested/part "):
        last_checkpoint(run)


def test_renamed_checkpoint_is_none(run):
    write(run, 5).rename(run / "checkpoint-6")
    assert str(damage(run / "checkpoint-6")).endswith("holds step 5")


def test_a_flipped_bit_anywhere_in_a_manifest_is_noticed_or_harmless(run):
    folder = write(run, 5)
    path = folder / "manifest.json"
    content = path.read_bytes()
    before = json.loads(content)
    for at in range(0, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert damage(folder) or json.loads(path.read_bytes()) == before


def test_file_that_does_not_belong_and_pickle_are_refused_unopened(run):
    """S2: PyTorch would unpickle a planted optimizer.pt."""
    folder = write(run, 5)
    (folder / "optimizer.pt").write_bytes(b"\x80\x04")
    assert str(damage(folder)).startswith("optimizer.pt does not belong")
    temporary = run / ".temporary"
    folder.rename(temporary)
    commit_checkpoint(temporary, run / "checkpoint-6", {"step": 6})
    assert str(damage(run / "checkpoint-6")).startswith("optimizer.pt is a pickle")
    assert damage(run / "checkpoint-6", pickles=True) is None


def test_unreadable_files_are_named(run):
    folder = write(run, 5)
    (folder / "link.json").symlink_to("nowhere")
    assert "can't be read" in str(damage(folder)) or "does not belong" in str(damage(folder))
    (folder / "manifest.json").write_text("[" * 100_000)
    assert "can't be read" in str(damage(folder)) or "is damaged" in str(damage(folder))
    (run / "metrics.jsonl").write_text('{"step": 1}\n\0\n')
    with pytest.raises(RunError, match="metrics.jsonl:2: is damaged.*remove this line"):
        read_metrics(run)


def test_metrics_that_a_power_cut_damaged_do_not_stop_a_resume(run, capsys):
    damaged = b'{"step": 1}\n{"step": 2}\n\0\0\0\n\0\0{"step": 3}\n\xff\n7\n{"step": 4}\n{"step": 5}\n{"st\0\0\0'
    (run / "metrics.jsonl").write_bytes(damaged)
    rewind_metrics(run, 4)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 4]
    assert "metrics.jsonl: 4 damaged lines" in capsys.readouterr().out


def test_a_checkpoint_that_the_disk_does_not_return_is_not_published(run, monkeypatch):
    write(run, 5)
    flush, hashed = sft.runs.checkpoint.flush, sft.runs.checkpoint.file_sha256
    hashed_once = set()

    def lose(path: Path) -> str:
        if path in hashed_once:  # read again
            flip(path)
        hashed_once.add(path)
        return hashed(path)

    monkeypatch.setattr(sft.runs.checkpoint, "file_sha256", lose)
    with pytest.raises(OSError, match="checkpoint-10 .*; the disk does not"):
        write(run, 10)
    monkeypatch.undo()
    assert flush is sft.runs.checkpoint.flush
    remove_leftovers(run)
    assert last_checkpoint(run) == (run / "checkpoint-5", {})
    assert not list(run.glob(".*"))


def test_rotation_goes_by_number_and_keeps_the_newest_and_the_best(run):
    """R11: the only good checkpoint is never removed."""
    for step in (2, 10, 9, 30):
        write(run, step)
    os.utime(run / "checkpoint-2")  # the youngest by date
    rotate(run, 3, [run / "checkpoint-30"])
    assert [p.name for p in checkpoints(run)] == ["checkpoint-9", "checkpoint-10", "checkpoint-30"]
    rotate(run, 1, [run / "checkpoint-9"])  # written after a resume from an earlier one
    assert [p.name for p in checkpoints(run)] == ["checkpoint-9"]
    for step in (40, 50):
        write(run, step)
    rotate(run, 1, [run / "checkpoint-50", run / "checkpoint-9"])
    assert [p.name for p in checkpoints(run)] == ["checkpoint-9", "checkpoint-50"]
    rotate(run, None, [run / "checkpoint-50"])
    assert len(checkpoints(run)) == 2


def test_only_leftovers_under_names_of_a_run_are_removed(run):
    """A crash leaves them; a home folder has hidden names of its own, and an export may be writing."""
    for name in (".vimrc.old", ".x.new", ".recipe.yaml.old"):
        (run / name).touch()
    for name in ("export", "config"):
        new_folder(run / name)
    before = sorted(os.listdir(run))
    new_folder(run / "checkpoint-7")
    new_folder(run / "adapter")
    hidden_name(run / "metrics.jsonl").touch()
    hidden_name(run / "checkpoint-3", "old").symlink_to(run.parent)
    remove_leftovers(run)
    assert sorted(os.listdir(run)) == before


def test_old_checkpoint_on_another_disk_is_unlinked_only(run, tmp_path_factory):
    """A user moved it and left a link."""
    disk = tmp_path_factory.mktemp("disk")
    for step in (2, 4):
        write(run, step)
    (run / "checkpoint-2").rename(disk / "checkpoint-2")
    (run / "checkpoint-2").symlink_to(disk / "checkpoint-2")
    check_run(run)
    assert damage(run / "checkpoint-2") is None
    rotate(run, 1, [run / "checkpoint-4"])
    assert sorted(os.listdir(run)) == ["checkpoint-4", "recipe.yaml"]
    assert damage(disk / "checkpoint-2") is None


def test_old_checkpoint_that_cannot_be_removed_is_a_warning(run, monkeypatch, capsys):
    """Immutable, or a file that NFS keeps open; later starts warn again and go on."""
    for step in (2, 4):
        write(run, step)

    def refuse(path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    rotate(run, 1, [run / "checkpoint-4"])
    assert last_checkpoint(run) == (run / "checkpoint-4", {})
    remove_leftovers(run)
    assert "Directory not empty" in capsys.readouterr().err
    monkeypatch.undo()
    remove_leftovers(run)
    assert sorted(os.listdir(run)) == ["checkpoint-4", "recipe.yaml"]


def test_damaged_checkpoint_is_set_aside_and_written_again(run):
    write(run, 5)
    (write(run, 10) / "manifest.json").unlink()
    set_aside(last_checkpoint(run)[1])
    assert sorted(p.name for p in run.glob("*checkpoint*")) == ["checkpoint-5", "damaged-checkpoint-10"]
    write(run, 10)
    assert last_checkpoint(run) == (run / "checkpoint-10", {})


def test_finished_run_without_checkpoints_and_folder_that_is_no_run_are_refused(run, tmp_path_factory):
    (run / "adapter").mkdir()
    with pytest.raises(RunError, match=f"{run}: is finished .*--set train.output_dir"):
        last_checkpoint(run)
    with pytest.raises(RunError, match="no run folder: recipe.yaml"):
        last_checkpoint(tmp_path_factory.mktemp("empty"))


def test_too_small_a_disk_is_an_error_before_training(run, monkeypatch):
    model = torch.nn.Linear(1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 20_000_000))
    with pytest.raises(DiskFull, match="0.02 GiB, .* checkpoints .* 0.02 GiB; .* train.output_dir"):
        sft.runs.checkpoint.check_space(run, model, "adamw_torch_fused")
    sft.runs.checkpoint.check_space(run, model, "sgd")


def test_state_comes_back_bit_for_bit(tmp_path):
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    shared = torch.arange(6.0)
    state = {"optimizer": optimizer.state_dict(), "views": [shared, shared[:3], shared], "pair": (1, None), 7: "seven"}
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state")
    assert loaded["pair"] == (1, None)
    assert loaded[7] == "seven"
    assert torch.equal(loaded["views"][1], shared[:3])
    assert loaded["views"][0] is loaded["views"][2]
    assert loaded["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            assert torch.equal(loaded["optimizer"]["state"][index][name], value)


def test_a_value_that_a_state_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match="hold a set"):
        save_state(tmp_path / "state", {"a": {1, 2}})


def test_random_generators_continue_from_their_saved_state(tmp_path):
    random.gauss(0, 1)  # stores its second number
    save_state(tmp_path / "state", random_state())
    draws = [(random.gauss(0, 1), random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())]
    set_random_state(load_state(tmp_path / "state"))
    draws.append((random.gauss(0, 1), random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()))
    assert draws[0] == draws[1]
