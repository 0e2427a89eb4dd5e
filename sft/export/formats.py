"""Convert a merged model to fewer bits: to compressed-tensors with llm-compressor, or to GGUF with llama.cpp.

graft export RUN --format w4a16 | w8a8 | fp8 | gguf-f16 | gguf-q8_0 | gguf-q4_k_m | ...

Both tools are optional and run as separate processes. The result is compared with the adapter, like a merged model.
"""

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.encode.chat import end_of_turn
from data.terminal import print, quoted
from sft.child_process import run_tool
from sft.errors import ParityError, RecipeError, RunError
from sft.export.candidate import Trained
from sft.export.integrity import text_faults
from sft.models.load import default_device
from sft.models.resolve import load_gguf, readable
from sft.models.target import load_plain
from sft.training.examples import load_examples
from sft.untrusted import brings_code

SCHEMES = {"w4a16": "W4A16", "w8a8": "W8A8", "fp8": "FP8_DYNAMIC"}
CALIBRATED = ("w4a16", "w8a8")
UNROUNDED = ("gguf-f32", "gguf-f16", "gguf-bf16")  # as exact as a merged model; others have fewer bits
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # types that the converter writes itself; others need llama-quantize
GGUF, GGUF_PREFIX = "model.gguf", "gguf-"
CALIBRATION_ROWS = 128
HAS_LLMCOMPRESSOR = "import importlib.util as u; raise SystemExit(not u.find_spec('llmcompressor'))"
Rows = Sequence[Sequence[int]]  # token ids
Writer = Callable[[Path, Path, Rows, Path], None]


def find_writer(name: str) -> Writer:
    """The function that converts a merged model's folder into a new one; it takes rows to calibrate on, and the path of
    the tool's log. Raises RecipeError for an unknown name, or if the tool is not installed."""
    if name in SCHEMES:
        return _compressor(name)
    kind = name.removeprefix(GGUF_PREFIX)
    if kind == name or not kind.replace("_", "").isalnum():
        raise RecipeError(f"--format {name}: write one of {', '.join(SCHEMES)}, or gguf-TYPE such as gguf-q8_0")
    return _converter(kind)


def calibration_rows(name: str, trained: Trained) -> Rows:
    """Training examples, drawn with the recipe's seed; none for a format without calibration."""
    if name not in CALIBRATED:
        return []
    examples, _ = load_examples(trained.recipe, trained.tokenizer)
    drawn = random.Random(trained.recipe.train.seed).sample(range(len(examples)), min(CALIBRATION_ROWS, len(examples)))
    return [[int(i) for i in examples[row].ids] for row in drawn]


def convert(
    name: str, write: Writer, trained: Trained, merged: Path, folder: Path, rows: Rows, log: Path
) -> dict[str, Any]:
    """Write the converted model to `folder` and return its size and the merged model's. Raises ParityError if its
    template or stop tokens differ from those of training."""
    print(f"converting the merged model to {name}; a large model takes a while", flush=True)
    write(merged, folder, rows, log)
    if fault := next(format_faults(name, trained, folder), None):
        raise ParityError(f"{trained.run}: {name}: {fault}; nothing was written")
    return {"bytes": _weight_bytes(folder), "merged_bytes": _weight_bytes(merged), "calibration_rows": len(rows)}


def format_faults(name: str, trained: Trained, folder: Path) -> Iterator[str]:
    """Differences of an export's template, tokens and stop tokens from those of training, a line each. `name`: its
    format, empty for a merged model."""
    if name.startswith(GGUF_PREFIX):
        return _gguf_faults(folder, trained.tokenizer)
    return text_faults(trained.run, trained.tokenizer, trained.base, folder)


def load_format(name: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model as transformers unpacks it, in eval mode; a kernel that multiplies packed weights may round otherwise.
    `name`: its format, empty for a merged model."""
    if not name.startswith(GGUF_PREFIX):
        return load_plain(folder, dtype)
    with readable(str(folder / GGUF)):
        return load_gguf(folder / GGUF, dtype=dtype, device_map={"": default_device()}).eval()


def next_step(folder: Path) -> str:
    """The command that serves an export."""
    gguf = folder / GGUF
    return f"llama-server --jinja -m {quoted(gguf)}" if gguf.is_file() else f"graft serve {quoted(folder)}"


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))


def _gguf_faults(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Differences of the file's template, tokens and end token from those of training, a line each. How llama.cpp
    splits text into tokens is not checked."""
    from gguf import GGUFReader

    with readable(str(folder / GGUF)):
        fields = GGUFReader(folder / GGUF).fields
        values = {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}
    tokens = values.get("tokenizer.ggml.tokens", [])
    differing = [  # the converter writes added tokens with spaces
        t for t, i in tokenizer.get_vocab().items() if i >= len(tokens) or tokens[i] not in (t, t.replace("▁", " "))
    ]
    if differing:
        yield f"{len(differing)} tokens have other ids than in training, first {min(differing)!r}"
    if values.get("tokenizer.chat_template") != tokenizer.chat_template:
        yield "the chat template is not that of training; prompts would be rendered differently"
    ends = [values.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    if (taught := end_of_turn(tokenizer)) not in ends:
        yield f"it stops at tokens {ends}, training taught to stop at {taught}"


def _compressor(name: str) -> Writer:
    own = sys.executable if importlib.util.find_spec("llmcompressor") else ""
    python = os.environ.get("GRAFT_LLMCOMPRESSOR") or own
    if not python:
        raise RecipeError(
            f"--format {name} needs llm-compressor in a separate environment, as it pins a different transformers: "
            "python3 -m venv lc && lc/bin/pip install llmcompressor, then export GRAFT_LLMCOMPRESSOR=lc/bin/python"
        )
    if not shutil.which(python) or subprocess.run([python, "-I", "-c", HAS_LLMCOMPRESSOR], check=False).returncode:
        raise RecipeError(
            f"GRAFT_LLMCOMPRESSOR={python} is no Python with llm-compressor; run: {python} -m pip install llmcompressor"
        )
    if not importlib.util.find_spec("compressed_tensors"):
        raise RecipeError(
            f"--format {name} can't be measured without compressed-tensors; run: pip install compressed-tensors"
        )

    def write(merged: Path, out: Path, rows: Rows, log: Path) -> None:
        calibration = out.with_suffix(".json")
        calibration.write_text(json.dumps(rows))
        script = Path(__file__).with_name("compress.py")
        # -I: the script's folder, whose modules have common names, stays out of the import path
        run_tool("llm-compressor", [python, "-I", script, merged, out, SCHEMES[name], calibration], log)
        (out / "recipe.yaml").unlink(missing_ok=True)  # the tool's; with it a folder counts as a run
        for file in merged.iterdir():  # tokenizer, template, stop tokens
            weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
            if file.is_file() and not weights and file.name != "config.json":
                shutil.copy2(file, out)

    return write


def _converter(kind: str) -> Writer:
    script = _llama_cpp("convert_hf_to_gguf.py", ".")
    quantize = _llama_cpp("llama-quantize", "build/bin") if kind not in CONVERTED else None
    if not importlib.util.find_spec("sentencepiece"):
        raise RecipeError(f"llama.cpp's {script.name} needs sentencepiece; run: pip install sentencepiece")

    def write(merged: Path, out: Path, rows: Rows, log: Path) -> None:
        # the converter lets transformers run a repository's code
        for file in ("config.json", "tokenizer_config.json"):
            if (merged / file).is_file() and brings_code(json.loads((merged / file).read_text())):
                raise RunError(
                    f"{file} of the base names code of its own (auto_map), which llama.cpp's converter would run"
                )
        out.mkdir()
        first = out / ("unquantized.gguf" if quantize else GGUF)
        outtype = "f32" if quantize else kind
        run_tool(script.name, [sys.executable, script, merged, "--outfile", first, "--outtype", outtype], log)
        if quantize:
            run_tool(quantize.name, [quantize, first, out / GGUF, kind.upper()], log)
            first.unlink()

    return write


def _llama_cpp(program: str, folder: str) -> Path:
    root = os.environ.get("LLAMA_CPP", "")
    path = Path(root) / folder / program if root else Path(shutil.which(program) or "")
    if not path.is_file():
        raise RecipeError(
            f"GGUF needs llama.cpp's {program}, which is not {f'at {path}' if root else 'on PATH'}; "
            "run: git clone https://github.com/ggml-org/llama.cpp (and build it for types other than "
            f"{', '.join(CONVERTED)}), then export LLAMA_CPP=llama.cpp"
        )
    return path.resolve()
