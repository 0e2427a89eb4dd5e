"""Links, FIFOs, hard links and hidden files in the folders of a stranger: nothing outside is changed or read.

A command may refuse or go on; what lies in the user's home stays as it is and is in nothing that Graft writes.
"""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sft.scoring.ladder
import sft.serving.serve
from sft.cli import app
from tests.helpers.builders import write_recipe
from tests.helpers.exports import chatml_base
from tests.helpers.graft import run

pytestmark = pytest.mark.heavy

CANARY = "canary-of-a-private-file"
SECONDS = 60  # of a command; a FIFO that is opened never ends
HEX = "0123abcd"
# names that Graft reads or writes, by the folder that is planted in
WRITTEN = {
    "run": ["recipe.yaml", "manifest.json", "metrics.jsonl", "loss.png", "cost.json", "verify.json", "adapter", "export",
            "data_report.json", "data_report.html", "tensorboard", "eval", "eval/results.json", "eval/samples.jsonl",
            "eval/answers.partial.jsonl", "eval/confusion.png", "checkpoint-1", "checkpoint-2", "checkpoint-9"],
    "export": ["config.json", "model.safetensors", "parity.json", "README.md", "export"],
    "base": ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"],
    "cache": [],
    "out": ["results.json", "samples.jsonl", "confusion.png", "answers.partial.jsonl", "compare.json", "report.md",
            "report.html", "data_report.json", "data_report.html", "ladder.json", "ladder.md", "ladder.png", "out",
            "lora.yaml", "recipe.yaml", "manifest.json", "adapter", "checkpoint-1", "lora"],
}  # fmt: skip
OTHERS = {
    "run": [".lock", "serve-18399.log", "export-q8_0.log", "damaged-checkpoint-1", "checkpoint-1/trainer_state.json",
            "adapter/README.md", "adapter/chat_template.jinja", "adapter/tokenizer.json", "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors", "adapter/additional_chat_templates/x.jinja"],
    "export": [".lock", "serve-18399.log", "chat_template.jinja", "tokenizer.json", "generation_config.json",
               "additional_chat_templates/x.jinja"],
    "base": ["chat_template.jinja", "README.md", "special_tokens_map.json", "added_tokens.json", "model.safetensors",
             "additional_chat_templates/x.jinja", "model.safetensors.index.json"],
    "cache": [],
    "out": [".lock", "lora.log", "eval"],
}  # fmt: skip
HIDDEN = (".vimrc.old", ".x.new", ".config.old/app.conf", ".bashrc", ".notes.12345678.old")
KINDS = ("link", "link to a folder", "link to nothing", "device", "FIFO", "hard link", "hidden file")


class Hangs(BaseException):
    """A command waits for what it opened."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Where the commands run, and a copy of it: a base, a trained and scored run with its export, and a recipe."""
    place = tmp_path_factory.mktemp("plants") / "place"
    place.mkdir()
    base = chatml_base(place / "base")
    for file in ("train", "held_out"):
        rows = [{"prompt": f"What is {n} of {file}?", "completion": f"It is {n}."} for n in ("blue", "red", "7")]
        (place / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        place / "r.yaml",
        base,
        task="instruct",
        tune="{method: lora, r: 2, target_modules: [q_proj]}",
        data=f"{{train: '{place / 'train.jsonl'}'}}",
        train="{examples_per_step: 1, max_steps: 2, save_strategy: steps, save_steps: 1, learning_rate: 1e-3, report_to: []}",
        eval=f"{{data: '{place / 'held_out.jsonl'}', max_new_tokens: 2}}",
        export="{min_agreement: 0.5}",
    )
    run("train", recipe, "--set", f"train.output_dir={place / 'run'}")
    run("eval", place / "run")
    run("eval", place / "run", "--base", "--out", place / "other")
    run("export", place / "run", "--out", place / "export", "--allow-mismatch")
    (place / "out").mkdir()
    shutil.copytree(place, place.with_name("whole"))
    return place, place.with_name("whole")


@pytest.fixture
def commands(places, monkeypatch) -> dict[str, list[Callable[[], list[object]]]]:
    """Command lines by the folder that is planted in. vLLM, the rungs of a ladder and the Hub are not there."""
    place, _ = places
    base, trained, export, out = (place / name for name in ("base", "run", "export", "out"))
    data = ["--data", place / "held_out.jsonl", "--max-new-tokens", "2"]
    monkeypatch.setattr(sft.serving.serve.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(sft.serving.serve, "serve_command", lambda *args: ["true"])
    monkeypatch.setattr(sft.scoring.ladder, "graft_command", lambda *words: ["false"])
    # as huggingface_hub does, with what links lead to
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda self, folder_path, **kwargs: shutil.copytree(folder_path, place / "sent"),
    )
    train = ["train", place / "r.yaml", "--set", f"train.output_dir={out}"]
    return {
        "run": [
            ["train", "--resume", trained], ["eval", trained], ["export", trained], ["serve", trained, "--port", 18399],
            ["compare", trained, place / "other", "--out", place / "report"], ["verify", export, "--run", trained],
        ],
        "export": [
            ["verify", export, "--run", trained], ["push", export, "a/b"], ["serve", export, "--port", 18399],
            ["eval", export, "--task", "instruct", *data, "--out", place / "scores"],
        ],
        "base": [train, ["eval", base, "--task", "instruct", *data, "--out", place / "scores"], ["export", trained]],
        "cache": [["check", place / "r.yaml", "--out", place / "report"], train],
        "out": [
            train, ["eval", trained, "--out", out], ["export", trained, "--out", out], ["check", place / "r.yaml", "--out", out],
            ["compare", trained, place / "other", "--out", out], ["ladder", place / "r.yaml", "--methods", "lora", "--out", out],
        ],
    }  # fmt: skip


def names_in(where: str, cache: Path, draw: random.Random) -> str:
    """A name that Graft uses in this folder: of a file, or of one on the way to it, as it is and as it was."""
    if where == "cache":
        name = draw.choice([path.name for path in (cache / "examples").glob("*")] or [HEX])
        return f"examples/{draw.choice([name, f'.{name}.{HEX}', f'.{name}.new'])}"
    if draw.random() < 0.5:
        return draw.choice(OTHERS[where] + WRITTEN[where])
    folder, _, name = draw.choice(WRITTEN[where]).rpartition("/")
    hidden = draw.choice([f".{name}.new", f".{name}.old", f".{name}.{HEX}.new", f".{name}.{HEX}.old", f"{name}.new"])
    return f"{folder}/{hidden}" if folder else hidden


def plant(kind: str, at: Path, home: Path) -> None:
    """Put it in place of what is there. The private file is what was there and the canary, so that it is readable."""
    before = at.read_bytes() if at.is_file() else b"x"
    private = home / "private"
    private.write_bytes(before.replace(b"{", f'{{"{CANARY}": 1, '.encode(), 1) if before[:1] == b"{" else before + CANARY.encode())  # fmt: skip
    shutil.rmtree(at) if at.is_dir() else at.unlink(missing_ok=True)
    for parent in at.parents:
        if parent.exists() and not parent.is_dir():
            return
    at.parent.mkdir(parents=True, exist_ok=True)
    {
        "link": lambda: at.symlink_to(private),
        "link to a folder": lambda: at.symlink_to(home),
        "link to nothing": lambda: at.symlink_to(home / "new"),
        "device": lambda: at.symlink_to("/dev/zero"),
        "FIFO": lambda: os.mkfifo(at),
        "hard link": lambda: at.hardlink_to(private),
        "hidden file": lambda: at.write_text("precious"),
    }[kind]()


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def leaks(folder: Path, private: Path) -> list[Path]:
    """Files with the private content, except the private file itself under another name."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in files if not path.samefile(private) and CANARY.encode() in path.read_bytes()]


def ends(command: list[object]) -> str:
    """What a command printed. It must end by itself, without an error of our own."""

    def hang(*args: object) -> None:
        raise Hangs(command)

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        done = CliRunner().invoke(app, [str(word) for word in command])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert done.exception is None or isinstance(done.exception, SystemExit), (command, done.exception)
    return done.output


def attack(seed: int, places: tuple[Path, Path], commands: dict[str, list], tmp_path: Path, cache: Path) -> None:
    place, whole = places
    draw = random.Random(seed)
    home = tmp_path / f"home-{seed}"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id").write_text("precious")
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place)
    where, kind = draw.choice(list(commands)), draw.choice(KINDS)
    folder = cache if where == "cache" else place / where
    command = draw.choice(commands[where])
    if command[0] == "train" and "--resume" in command:
        shutil.rmtree(folder / "adapter")
        shutil.rmtree(folder / "checkpoint-2")
    if command[0] == "export" and where != "run":
        shutil.rmtree(place / "export")
    at = folder / (draw.choice(HIDDEN) if kind == "hidden file" else names_in(where, cache, draw))
    plant(kind, at, home)
    before = contents(home)
    output = ends(command)
    story = (seed, command, kind, at, output)
    assert contents(home) == before, story
    if kind == "hidden file":
        assert at.read_text() == "precious", story
    elif kind != "hard link":  # by nature it is the private file, and a reader can't tell
        assert CANARY not in output, story
        assert not leaks(place, home / "private"), story
        assert not leaks(cache, home / "private"), story
    if where == "cache":  # its plant is none of the next attack
        shutil.rmtree(cache)
        cache.mkdir()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_plants_neither_change_nor_show_anything_outside(places, commands, tmp_path, cache):
    for seed in range(10):
        attack(seed, places, commands, tmp_path, cache)


@pytest.mark.slow
def test_five_hundred_plants_neither_change_nor_show_anything_outside(places, commands, tmp_path, cache):
    for seed in range(1000, 1500):
        attack(seed, places, commands, tmp_path, cache)


@pytest.mark.slow
def test_commands_end_well_without_plants(places, commands, tmp_path, cache):
    """So a refusal above is one of the plant."""
    place, whole = places
    for where, lines in commands.items():
        for command in lines:
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(whole, place)
            output = ends(command)
            assert not re.search("is a link|no regular file|is not empty", output), (where, command, output)
