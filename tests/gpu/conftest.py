"""Bases for a GPU. GRAFT_TEST_DEVICE=cpu runs the tests on a CPU, with a small model in place of the 1.5B:
it tests the tests, and proves nothing about a GPU."""

import os
from pathlib import Path

import pytest

from tests.helpers.builders import save_tiny
from tests.helpers.families import build

DEVICE = os.environ.get("GRAFT_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session", autouse=True)
def device():
    """Skips all of these tests if there is no GPU."""
    import torch

    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is False")
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen of two layers whose heads are as wide as GPU kernels want them, with a tokenizer of its own."""
    from transformers import Qwen2Config

    tokenizer = build("chatml")
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    return save_tiny(config, tmp_path_factory.mktemp("small") / "base", tokenizer)


@pytest.fixture(scope="session")
def shape(tmp_path_factory: pytest.TempPathFactory, device) -> Path:
    """A random model of the 1.5B shape, made on the GPU and saved in bfloat16: 3 GB."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from tests.benchmarks.random_model import SHAPES

    tokenizer, sizes = build("chatml"), dict(SHAPES["qwen2.5-1.5b"])
    if device.type == "cpu":
        sizes |= {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
        sizes |= {"num_attention_heads": 4}
    config = Qwen2Config(**sizes, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("shape") / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder
