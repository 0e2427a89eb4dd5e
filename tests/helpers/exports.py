"""Bases, adapters and runs for the tests of merges and exports."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, set_seed
from typer.testing import CliRunner

from data.cache import file_sha256, text_sha256
from sft.cli import app
from tests.helpers.builders import save_tiny, write_recipe
from tests.helpers.families import build

SMALL = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
ALL = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
ADAPTERS: dict[str, Callable] = {
    "lora": lambda: LoraConfig(**ALL),
    "rslora": lambda: LoraConfig(**ALL, use_rslora=True),
    "dora": lambda: LoraConfig(**ALL, use_dora=True),
    "bias": lambda: LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM"),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "embedding": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "modules_to_save": lambda: LoraConfig(**ALL, modules_to_save=["lm_head", "norm"]),
    "trainable_tokens": lambda: LoraConfig(**ALL, trainable_token_indices={"embed_tokens": [3, 7]}),
}


def save_base(folder: Path, config, dtype=torch.bfloat16, **options) -> Path:
    set_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder, **options)
    return folder


def tune(base: Path, config, folder: Path, rows: int | None = None, **saving) -> PeftModel:
    """A model with an adapter that is saved as by training: all of its values are moved."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on tied weights
        tuned = get_peft_model(model, config)
    set_seed(1)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    tuned.save_pretrained(folder, **saving)
    return tuned.eval()


def command(*arguments: object, code: int = 0, name: str = "export"):
    done = CliRunner().invoke(app, [name, *(str(a) for a in arguments)])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def make_run(folder: Path, base: Path, seed: int = 1, quantized: bool = True) -> Path:
    """A run folder as training leaves it, with an adapter that nobody trained."""
    folder.mkdir()
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n} and no more."} for n in ("blue", "the sea", "7")]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    nf4 = ", quantization: {load_in_4bit: true}" if quantized else ""
    write_recipe(
        folder / "recipe.yaml",
        base,
        task="instruct",
        model=f"{{base: '{base}', dtype: float32{nf4}}}",
        eval=f"{{data: '{folder / 'held_out.jsonl'}'}}",
        export="{min_agreement: 0.9}",
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**ALL))
    set_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) * 0.05
    tuned.save_pretrained(folder / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder / "adapter")
    facts = {
        "base": {"sha256": {f.name: file_sha256(f) for f in sorted(base.glob("*.safetensors"))}},
        "data_sha256": {"rows.jsonl": "0" * 64},
        "chat_template_sha256": text_sha256(tokenizer.chat_template),
    }
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


def chatml_base(folder: Path) -> Path:
    """A random model of two layers with a chat template and a licence."""
    tokenizer = build("chatml")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_tiny(config, folder, tokenizer)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    return folder
