"""A cached folder is the one that was written, or it is built again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data.cache
from data.cache import SUMS, build_once


def build(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a").write_bytes(bytes(1000))
    (folder / "sub" / "b").write_text("b")


def flip(path: Path) -> None:
    """Another byte, and the same size and date."""
    state, content = path.stat(), bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def linked_out(path: Path) -> None:
    """The file elsewhere, with a link in its place."""
    elsewhere = path.parents[2] / f"of-{path.parents[1].name}"
    path.symlink_to(path.rename(elsewhere))


DAMAGE = {
    "flipped": lambda folder: flip(folder / "a"),
    "flipped in a subfolder": lambda folder: flip(folder / "sub" / "b"),
    "removed": lambda folder: (folder / "a").unlink(),
    "digest flipped": lambda folder: flip(folder / SUMS),
    "digests removed": lambda folder: (folder / SUMS).unlink(),
    "digests lost": lambda folder: (folder / SUMS).write_bytes(b""),
    "digests zeroed": lambda folder: (folder / SUMS).write_bytes(bytes(200)),
    "a FIFO": lambda folder: ((folder / "a").unlink(), os.mkfifo(folder / "a")),
    "digests in a FIFO": lambda folder: ((folder / SUMS).unlink(), os.mkfifo(folder / SUMS)),
    "a device": lambda folder: ((folder / "a").unlink(), (folder / "a").symlink_to("/dev/zero")),
    "a link to the same bytes elsewhere": lambda folder: linked_out(folder / "a"),
    "all lost": lambda folder: [path.write_bytes(b"") for path in (folder / "a", folder / SUMS)],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_built_again_with_a_line_that_names_it(damage, tmp_path, capsys):
    folder = build_once(tmp_path / "key", build)
    assert build_once(folder, lambda other: pytest.fail("it is whole")) == folder
    assert capsys.readouterr() == ("", "")
    DAMAGE[damage](folder)
    build_once(folder, build)
    assert (folder / "a").read_bytes() == bytes(1000)
    assert f"{folder}: " in (message := capsys.readouterr().err)
    assert "built again" in message
    assert build_once(folder, lambda other: pytest.fail("it is whole again")) == folder
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_damaged_folder_stays_if_it_can_not_be_built_again(tmp_path):
    folder = build_once(tmp_path / "key", build)
    flip(folder / "a")
    with pytest.raises(KeyboardInterrupt):
        build_once(folder, lambda other: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_digests_are_those_that_sha256sum_checks(tmp_path):
    folder = build_once(tmp_path / "key", build)
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, check=True, capture_output=True)


def test_files_are_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    flushed, flush = [], data.cache.flush
    monkeypatch.setattr(data.cache, "flush", lambda path: flushed.append(path.name) or flush(path))
    folder = build_once(tmp_path / "key", build)
    temporary = flushed[-2]
    assert flushed == ["a", "sub", "b", SUMS, temporary, tmp_path.name]
    assert temporary.endswith(data.cache.BUILDING)
    assert {path.name for path in folder.rglob("*")} == {"a", "sub", "b", SUMS}


@pytest.mark.heavy
def test_what_a_killed_build_left_is_removed_and_a_running_one_stays(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from data.cache import build_once\n"
        "build_once(Path(sys.argv[1]), lambda f: [(f / 'half').write_text('x'), time.sleep(60)])"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, tmp_path / name]) for name in ("killed", "running")]
    try:
        deadline = time.monotonic() + 30
        while len(list(tmp_path.glob(f".*{data.cache.BUILDING}/half"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        build_once(tmp_path / "key", build)
        left = {path.parent.name.split(".")[1] for path in tmp_path.glob(f".*{data.cache.BUILDING}/half")}
        assert left == {"running"}
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_only_folders_of_graft_are_removed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (tmp_path / f".link{data.cache.BUILDING}").symlink_to(tmp_path / "elsewhere")
    (tmp_path / f".file{data.cache.BUILDING}").write_text("x")
    os.mkfifo(tmp_path / f".fifo{data.cache.BUILDING}")
    (tmp_path / ".hidden").mkdir()
    before = {path.name for path in tmp_path.iterdir()}
    build_once(tmp_path / "key", build)
    assert {path.name for path in tmp_path.iterdir()} == before | {"key"}
    assert (tmp_path / "elsewhere" / "file").read_text() == "x"


@pytest.mark.parametrize("parent", ["/dev/null", "/proc/graft", "file/deeper"])
def test_folder_that_can_not_be_written_is_named_with_the_variable(parent, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(data.cache.CacheUnwritable, match="GRAFT_CACHE"):
        build_once(tmp_path / parent / "cache", build)
