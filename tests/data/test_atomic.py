"""Files and folders are written whole, under names that nothing had, and never through a link."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.atomic import (
    atomic_path,
    discard,
    hidden_name,
    is_hidden_name,
    new_folder,
    open_new,
    open_to_append,
    remove,
    replace_folder,
    write_text,
)
from data.errors import UserError
from tests.helpers.places import ROOT


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """A file of the user, elsewhere."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "private").write_text("precious")
    return folder / "private"


PLANTS = {
    "link": lambda path, private: path.symlink_to(private),
    "link to nothing": lambda path, private: path.symlink_to(private.with_name("new")),
    "hard link": lambda path, private: path.hardlink_to(private),
    "FIFO": lambda path, private: os.mkfifo(path),
}


@pytest.fixture(params=PLANTS)
def planted(request, tmp_path: Path, private: Path) -> Path:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "x.json"
    PLANTS[request.param](path, private)
    return path


def untouched(private: Path) -> bool:
    return private.read_text() == "precious" and os.listdir(private.parent) == ["private"]


def test_what_stands_at_a_files_name_is_replaced_and_not_written_through(planted: Path, private: Path):
    write_text(planted, "new")
    assert planted.read_text() == "new"
    assert not planted.is_symlink()
    assert untouched(private)
    assert os.listdir(planted.parent) == ["x.json"]


def test_a_log_replaces_what_stands_at_its_name(planted: Path, private: Path):
    with open_new(planted) as file:
        file.write("log")
    assert planted.read_text() == "log"
    assert untouched(private)


def test_a_lock_or_log_to_append_to_is_refused_through_a_link_and_opened_without(planted: Path, private: Path):
    with pytest.raises(UserError, match="x.json: is a link"):
        open_to_append(planted)
    assert untouched(private)
    planted.unlink()
    for text in "ab":
        with open_to_append(planted) as file:
            file.write(text)
    assert planted.read_text() == "ab"
    planted.unlink()
    planted.mkdir()
    with pytest.raises(UserError, match="no regular file"):
        open_to_append(planted)


def test_a_temporary_name_is_new_each_time_and_made_not_found(tmp_path: Path, private: Path, monkeypatch):
    path = tmp_path / "x"
    names = {hidden_name(path) for _ in range(100)}
    assert len(names) == 100
    assert all(is_hidden_name(name, "x") for name in names)
    monkeypatch.setattr("data.atomic.secrets.token_hex", lambda size: "00000000")
    hidden_name(path).symlink_to(private)  # as if it had been guessed
    with pytest.raises(FileExistsError), atomic_path(path):
        pass
    with pytest.raises(FileExistsError):
        new_folder(path)
    assert hidden_name(path).is_symlink()  # it is not this process's to remove
    assert untouched(private)


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_running_one_stays(tmp_path: Path, private: Path):
    path, others = tmp_path / "x.json", [".y.json.12345678.new", ".x.json.1234567.new", "x.json.12345678.new"]
    for name in others:
        (tmp_path / name).touch()
    hidden_name(path).symlink_to(private)
    os.mkfifo(hidden_name(path))
    new_folder(path)
    stay = set(os.listdir(tmp_path))
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom data.atomic import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])): print(flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout.readline()
        running = set(os.listdir(tmp_path)) - stay
        write_text(path, "new")
        assert set(os.listdir(tmp_path)) == stay | running | {"x.json"}
        writer.kill()
    write_text(path, "newer")
    assert set(os.listdir(tmp_path)) == stay | {"x.json"}
    assert len(running) == 1
    assert untouched(private)


@pytest.mark.parametrize("name", [".vimrc.old", ".x.old", ".x.new", ".config.12345678.old", ".x.1234567.new", "x.12345678.new"])  # fmt: skip
def test_only_names_of_the_scheme_are_leftovers(name):
    assert not is_hidden_name(Path(name), "x")


def test_a_folder_is_replaced_and_a_link_in_its_place_not_followed(tmp_path: Path, private: Path):
    for _ in range(2):
        new = new_folder(tmp_path / "model")
        (new / "weights").touch()
        replace_folder(new, tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").symlink_to(private.parent)
    replace_folder(new_folder(tmp_path / "model"), tmp_path / "model")
    assert not (tmp_path / "model").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["home", "model"]
    assert untouched(private)


@pytest.mark.parametrize("how", [remove, discard])
def test_removing_a_link_leaves_its_target_and_what_cannot_be_removed_is_one_warning(
    how, tmp_path: Path, private: Path, monkeypatch, capsys
):
    (tmp_path / "old").symlink_to(private.parent)
    how(tmp_path / "old")
    assert os.listdir(tmp_path) == ["home"]
    assert untouched(private)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "inner").symlink_to(private.parent)
    how(tmp_path / "old")
    assert os.listdir(tmp_path) == ["home"]
    assert untouched(private)

    def immutable(path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", immutable)
    (tmp_path / "old").mkdir()
    how(tmp_path / "old")
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "can't be removed (Operation not permitted)" in warnings[0]
