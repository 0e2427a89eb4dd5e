"""A stranger's folder holds plain files, and links that stay inside it."""

import os
from pathlib import Path

import pytest

from data.inside import first_stray


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "private").write_text("precious")
    folder = tmp_path / "models--a--b" / "snapshots" / "0f"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "config.json").touch()
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (tmp_path / "models--a--b" / "blobs" / "hash").touch()
    return folder


@pytest.mark.parametrize("place", ["x", "sub/x", "sub/deep/x", ".hidden"])
@pytest.mark.parametrize("target", ["/etc/hostname", "{}/private", "{}", "../../../../private", "/none/such", "/dev/zero"])  # fmt: skip
def test_link_out_of_the_folder_is_named(place, target, folder: Path, tmp_path: Path):
    (folder / place).symlink_to(target.format(tmp_path))
    assert f"{place} is a link to /" in str(first_stray(folder))


@pytest.mark.parametrize("place", ["x", "sub/x", "sub/deep/.x"])
def test_what_is_no_file_is_named(place, folder: Path):
    os.mkfifo(folder / place)
    assert f"{place} is no regular file" in str(first_stray(folder))


def test_links_inside_and_those_of_the_hub_cache_may_stay(folder: Path, tmp_path: Path):
    (folder / "a").symlink_to("config.json")
    (folder / "sub" / "b").symlink_to(folder / "config.json")
    (folder / "loop").symlink_to("loop")
    (folder / "weights").symlink_to("../../blobs/hash")
    (folder / "sub" / "weights").symlink_to("../../../blobs/hash")
    assert first_stray(folder) is None
    (tmp_path / "alias").symlink_to(folder)  # a folder of the user's own that leads to it
    assert first_stray(tmp_path / "alias") is None


def test_blob_that_leads_on_is_named(folder: Path, tmp_path: Path):
    blobs = tmp_path / "models--a--b" / "blobs"
    (blobs / "other").symlink_to(tmp_path / "private")
    (folder / "weights").symlink_to("../../blobs/other")
    assert "weights is a link" in str(first_stray(folder))
    (blobs / "other").unlink()
    (blobs / "hash").unlink()
    blobs.rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "other").touch()
    blobs.symlink_to(tmp_path / "elsewhere")
    assert "weights is a link" in str(first_stray(folder))


def test_limits_of_the_search(folder: Path, tmp_path: Path):
    (folder / "sub" / "deep" / "x").symlink_to("/etc/hostname")
    assert first_stray(folder, depth=1) is None
    assert first_stray(folder, depth=2)
    assert first_stray(folder, only="config.*") is None
    (tmp_path / "disk").mkdir()
    (folder / "sub" / "deep" / "x").unlink()
    (folder / "checkpoint-3").symlink_to(tmp_path / "disk")
    assert first_stray(folder)
    assert first_stray(folder, linked=r"checkpoint-\d+") is None
    (tmp_path / "disk" / "x").symlink_to(tmp_path / "private")
    assert "checkpoint-3/x is a link" in str(first_stray(folder, linked=r"checkpoint-\d+"))
