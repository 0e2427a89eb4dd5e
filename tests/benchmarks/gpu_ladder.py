"""What each lever of a training step gives on one GPU: the same steps, one lever more in each line.

    python tests/benchmarks/gpu_ladder.py prepare SQUAD/train.json.gz EXAMPLES.npz
    python tests/benchmarks/gpu_ladder.py run EXAMPLES.npz --shape qwen2.5-7b --out FOLDER
    python tests/benchmarks/gpu_ladder.py run --tiny

`run` builds the model on the device from its config, with random weights, which cost what real ones do; it needs no
other file, and neither TRL nor datasets. A variant is 4 warm and 12 timed steps. Its line is printed, and appended to
FOLDER/SHAPE.jsonl, as soon as it is measured. `peer` lines are what a good engineer writes without Graft: PEFT, rows
packed without padding, FlashAttention, no checkpointing.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

sys.path[0] = str(Path(__file__).resolve().parents[2])  # started as a file: the repository root, not tests/benchmarks/

import numpy as np
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.models.qwen2 import modeling_qwen2

from data.encode.chat import Example
from data.encode.pack import Layout, Pack, make_packs, step_order
from sft.kernels.fused_layers import fuse_layers
from sft.kernels.fused_lora import fuse_lora
from sft.training.compile_layers import compile_layers
from sft.training.step import train_step
from tests.benchmarks.shapes import SHAPES

ROTATE = modeling_qwen2.apply_rotary_pos_emb
WARM, TIMED, PROFILED = 4, 12, 2
KINDS = {  # of kernels, by parts of their names; the first that fits
    "attention": ("flash", "fmha", "flex", "sdpa"),
    "dequantize": ("dequant",),
    "product": ("gemm", "nvjet", "cutlass", "xmma", "mm_"),
    "copy": ("memcpy", "memset", "copy"),
}


@dataclass(frozen=True)
class Variant:
    name: str
    base: Literal["nf4", "bf16"] = "nf4"
    questions: int = 64
    pack_tokens: int = 4096
    share: bool = True
    checkpointing: bool = False
    attention: str = "forest"
    lora: Literal["peft", "fused"] = "fused"
    rest: Literal["eager", "fused", "compiled"] = "fused"  # norms, rotation, activation; "compiled": whole layers
    optimizer: Literal["paged_adamw_8bit", "adamw_torch_fused"] = "adamw_torch_fused"
    ahead: bool = True  # packs are made before the step, and no figure of it is read by the host


def variants() -> list[Variant]:
    start = Variant(
        "as it was", checkpointing=True, attention="flex_attention", lora="peft", rest="eager",
        optimizer="paged_adamw_8bit", ahead=False,
    )  # fmt: skip
    ladder = [
        start,
        start := replace(start, name="+ no checkpointing", checkpointing=False),
        start := replace(start, name="+ fused AdamW, nothing read", optimizer="adamw_torch_fused", ahead=True),
        start := replace(start, name="+ attention by runs", attention="forest"),
        start := replace(start, name="+ fused LoRA", lora="fused"),
        best := replace(start, name="+ fused norms, rotation, activation", rest="fused"),
        replace(best, name="or FlexAttention", attention="flex_attention"),
        replace(start, name="or compiled layers", rest="compiled"),
    ]
    dense = replace(best, name="dequantized once, or bf16", base="bf16")
    peer = Variant("peer: PEFT, packed rows, flash", "bf16", share=False, lora="peft", rest="eager")
    return [
        *ladder,
        long := replace(best, name="NF4, 256 questions, 16k packs", questions=256, pack_tokens=16384),
        replace(long, name="or FlexAttention, 256 questions", attention="flex_attention"),
        dense,
        replace(dense, name="bf16, compiled layers", rest="compiled"),
        replace(dense, name="bf16, 256 questions, 8k packs", questions=256, pack_tokens=8192),
        replace(dense, name="bf16, 256 questions, 16k packs", questions=256, pack_tokens=16384),
        replace(dense, name="bf16, not shared", share=False),
        peer,
        replace(peer, name="peer, compiled layers", rest="compiled"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    prepare = commands.add_parser("prepare", help="encode questions of SQuAD with the embedded model's tokenizer")
    prepare.add_argument("squad", type=Path)
    prepare.add_argument("examples", type=Path)
    prepare.add_argument("--questions", type=int, default=256 * (WARM + TIMED + PROFILED))
    running = commands.add_parser("run", help="measure")
    running.add_argument("examples", type=Path, nargs="?", help="what `prepare` wrote; default: drawn at random")
    running.add_argument("--shape", choices=["qwen2.5-1.5b", "qwen2.5-7b", "tiny"], default="qwen2.5-7b")
    running.add_argument("--tiny", action="store_true", help="a model of two layers, for a try on a CPU")
    running.add_argument("--only", default="", help="variants whose name contains one of these texts, by commas")
    running.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    if options.command == "prepare":
        save_examples(encode_squad(options.squad, options.questions), options.examples)
        return
    shape = "tiny" if options.tiny else options.shape
    examples = load_examples(options.examples) if options.examples else random_examples(16 if options.tiny else 4608)
    wanted = [v for v in variants() if any(text in v.name for text in options.only.split(","))]
    if options.tiny:
        wanted = [replace(v, questions=8, pack_tokens=512) for v in wanted]
    for line in run(shape, examples, wanted):
        print(as_text(line), flush=True)
        with (options.out / f"{shape}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run(shape: str, examples: Sequence[Example], wanted: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Measure each variant on the device; yields its figures, or why it was not measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = product_rate(device)
    yield {"device": name_of(device), "torch": torch.__version__, "product_tflops": rate / 1e12}
    bench = Bench(shape, device)
    for variant in wanted:
        if device.type == "cpu" and ("flex" in variant.attention or variant.base == "nf4"):
            yield {**asdict(variant), "left_out": "needs a GPU"}
            continue
        try:
            yield {**asdict(variant), **bench.measure(variant, examples, rate)}
        except Exception as error:  # the other variants still have their turn on a borrowed card
            yield {**asdict(variant), "left_out": f"{type(error).__name__}: {str(error)[:300]}"}
            bench.reset()


class Bench:
    """A model with random weights and LoRA on the device, and the gradients that later variants are compared with."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.device, self.accelerator = device, Accelerator(cpu=device.type == "cpu")
        self.reference: dict[int, torch.Tensor] = {}
        torch.manual_seed(0)
        sizes = SHAPES.get(shape) or {**SHAPES["qwen2.5-7b"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 49152}  # fmt: skip
        with device:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            base = AutoModelForCausalLM.from_config(Qwen2Config(**sizes), dtype=dtype)
        self.kind = "bf16"
        self.model = self._adapted(base)
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def _adapted(self, base: Any) -> Any:
        model = get_peft_model(
            base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # not zero: else half of the gradients are
                nn.init.normal_(parameter, std=0.01)
        return model

    def use(self, kind: str) -> None:
        """Turn the base into NF4, or back into bfloat16 with NF4's values."""
        if kind == self.kind:
            return
        base = self.model.unload()
        (quantize if kind == "nf4" else dequantize)(base)
        gc.collect()  # fused layers and their adapters name each other
        torch.cuda.empty_cache()
        self.model, self.kind = self._adapted(base), kind

    def reset(self) -> None:
        for module in self.model.modules():
            module.__dict__.pop("forward", None)
            module._compiled_call_impl = None
        self.model.gradient_checkpointing_disable()
        self.model.zero_grad()
        modeling_qwen2.apply_rotary_pos_emb = ROTATE
        torch._dynamo.reset()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def measure(self, variant: Variant, examples: Sequence[Example], rate: float) -> dict[str, Any]:
        """Questions and executed tokens a second, TFLOP/s and their share of `rate`, memory, kernels, gradients."""
        self.use(variant.base)
        self.reset()
        model, cuda = self.model, self.device.type == "cuda"
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(self.start[name])
        if variant.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.set_attn_implementation(variant.attention)
        if variant.lora == "fused":
            fuse_lora(model)
        if variant.rest == "fused":
            fuse_layers(model)
        if variant.rest == "compiled":
            compile_layers(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make_optimizer(variant.optimizer, trained)
        steps = plan(variant, examples)
        packs = [packs_of(variant, step) for step in steps] if variant.ahead else None
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        sync(self.device)
        losses, first_step, began = [], 0.0, time.perf_counter()
        gradients = torch.empty(0)
        for i, step in enumerate(steps):
            if i == WARM:
                sync(self.device)
                began = time.perf_counter()
            if i == WARM + TIMED:
                break
            now = packs[i] if packs else packs_of(variant, step)
            losses.append(self.step(now, optimizer, trained, variant.ahead))
            if i == 0:
                sync(self.device)
                first_step = time.perf_counter() - began
                gradients = torch.cat([p.grad.flatten() for p in trained])  # type: ignore[union-attr]
            optimizer.zero_grad(set_to_none=True)
        sync(self.device)
        seconds = (time.perf_counter() - began) / TIMED
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
        timed = [packs_of(variant, step) for step in steps[WARM : WARM + TIMED]]
        tokens = sum(len(p.input_ids) for step in timed for p in step) / TIMED
        targets = sum(len(p.target) for step in timed for p in step) / TIMED
        flops = self.flops(tokens, targets)
        reference = self.reference.setdefault(variant.questions, gradients)
        kernels = self.profile([packs_of(variant, s) for s in steps[-PROFILED:]], optimizer, trained) if cuda else {}
        return {
            "questions_per_s": variant.questions / seconds,
            "tokens_per_s": tokens / seconds,
            "ms_per_step": seconds * 1e3,
            "tokens_per_step": tokens,
            "largest": max((len(p.input_ids), len(p.target)) for step in steps for p in packs_of(variant, step)),
            "tflops": flops / seconds / 1e12,
            "share_of_products": flops / seconds / rate,
            "first_step_s": first_step,
            "peak_gib": peak,
            "loss": [float(losses[0]), float(losses[-1])],
            "gradient_cosine": float(torch.cosine_similarity(reference, gradients, dim=0)),
            **kernels,
        }

    def step(self, packs: list[Pack], optimizer: Any, trained: list[nn.Parameter], ahead: bool) -> torch.Tensor:
        """One step of Graft's own; without `ahead` the host waits for the loss and the norm."""
        targets = sum(len(p.target) for p in packs)
        half = torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()
        with half:
            loss = train_step(self.model, [(p, 1.0) for p in packs], targets, self.accelerator)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        if not ahead and not (float(loss) < float("inf") and float(norm) < float("inf")):
            raise RuntimeError(f"loss {float(loss)}, norm {float(norm)}")
        optimizer.step()
        return loss

    def flops(self, tokens: float, targets: float) -> float:
        """4 N T: forward and the gradient of the inputs, with frozen weights; the head on trained tokens only."""
        body = sum(m.in_features * m.out_features for n, m in self.model.named_modules() if n.endswith("base_layer"))
        head = self.model.get_output_embeddings()
        return 4.0 * (body * tokens + head.in_features * head.out_features * targets)

    def profile(self, steps: list[list[Pack]], optimizer: Any, trained: list[nn.Parameter]) -> dict[str, Any]:
        """Share of the wall time that the GPU computes, and milliseconds a step by kind of kernel."""
        from torch.profiler import ProfilerActivity, profile

        sync(self.device)
        with profile(activities=[ProfilerActivity.CUDA]) as record:
            began = time.perf_counter()
            for packs in steps:
                self.step(packs, optimizer, trained, ahead=True)
                optimizer.zero_grad(set_to_none=True)
            sync(self.device)
            wall = time.perf_counter() - began
        kinds = dict.fromkeys((*KINDS, "elementwise"), 0.0)
        names: dict[str, float] = {}
        launches = 0
        for event in record.key_averages():
            ms = event.self_device_time_total / 1e3 / len(steps)
            launches += event.count if ms else 0  # else a call of the host
            low = event.key.lower()
            kinds[next((k for k, parts in KINDS.items() if any(p in low for p in parts)), "elementwise")] += ms
            names[event.key[:60]] = names.get(event.key[:60], 0.0) + ms
        busy = sum(kinds.values()) * len(steps) / 1e3 / wall
        top = dict(sorted(names.items(), key=lambda pair: -pair[1])[:12])
        return {
            "busy": busy,
            "launches": launches // len(steps),
            "kernel_ms": kinds,
            "top_kernels_ms": {k: round(v, 2) for k, v in top.items()},
        }


def quantize(base: Any) -> None:
    import bitsandbytes as bnb

    dtype = base.get_input_embeddings().weight.dtype

    def four_bit(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype,
            compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
        new.weight, new.bias = weight.to(linear.weight.device), linear.bias
        return new

    swap_linear(base, nn.Linear, four_bit)
    base.is_loaded_in_4bit = True  # PEFT asks for it


def dequantize(base: Any) -> None:
    import bitsandbytes as bnb

    dtype = base.get_input_embeddings().weight.dtype

    def dense(layer: Any) -> nn.Module:
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        data = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
        new.weight, new.bias = nn.Parameter(data, requires_grad=False), layer.bias
        return new

    swap_linear(base, bnb.nn.Linear4bit, dense)
    base.is_loaded_in_4bit = False


def swap_linear(base: Any, kind: type[nn.Module], change: Any) -> None:
    """Change each linear layer of the kind but the head."""
    head = base.get_output_embeddings()
    for parent in list(base.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is kind and child is not head:
                setattr(parent, name, change(child))


def make_optimizer(name: str, trained: list[nn.Parameter]) -> Any:
    if name == "adamw_torch_fused":
        return torch.optim.AdamW(trained, lr=1e-4, fused=True)
    import bitsandbytes as bnb

    return bnb.optim.PagedAdamW8bit(trained, lr=1e-4)


def plan(variant: Variant, examples: Sequence[Example]) -> list[list[Example]]:
    order = step_order([e.context for e in examples], variant.questions, seed=0, epoch=0)
    count = WARM + TIMED + PROFILED
    return [[examples[i] for i in order[s % len(order)]] for s in range(count)]


def packs_of(variant: Variant, step: Sequence[Example]) -> list[Pack]:
    return make_packs(step, Layout(variant.share, variant.pack_tokens, "sparse"))


def encode_squad(squad: Path, questions: int) -> list[Example]:
    from sft.models.load import load_tokenizer
    from sft.recipe.schema import Model
    from tests.benchmarks.passages import MAX_LENGTH, read_passages, write_workload
    from tests.benchmarks.throughput import SMOLLM

    passages, count = [], 0
    for passage in read_passages(str(squad), seed=0):
        if count >= questions:
            break
        passages.append(passage)
        count += len(passage["qas"])
    with TemporaryDirectory() as folder:
        workload = write_workload(passages, Path(folder), load_tokenizer(Model(base=SMOLLM)))
    return [e for e in workload.examples if len(e.ids) < MAX_LENGTH]


def random_examples(contexts: int) -> list[Example]:
    """Six questions of 30 tokens, 5 of them trained, after a context of 150; as many contexts as asked for / 6."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(10, 40000, n).tolist()  # noqa: E731
    examples = []
    for c in range(-(-contexts // 6)):
        trunk = draw(150)
        examples += [Example([*trunk, *draw(30)], [0] * 175 + [1] * 5, context=str(c)) for _ in range(6)]
    return examples


def save_examples(examples: Sequence[Example], file: Path) -> None:
    contexts = {context: i for i, context in enumerate(dict.fromkeys(e.context for e in examples))}
    np.savez_compressed(
        file,
        ids=np.concatenate([np.array(e.ids, np.int32) for e in examples]),
        mask=np.concatenate([np.array(e.loss_mask, np.uint8) for e in examples]),
        lengths=np.array([len(e.ids) for e in examples], np.int32),
        contexts=np.array([contexts[e.context] for e in examples], np.int32),
    )


def load_examples(file: Path) -> list[Example]:
    with np.load(file, allow_pickle=False) as saved:
        cuts = np.cumsum(saved["lengths"])[:-1]
        rows = zip(np.split(saved["ids"], cuts), np.split(saved["mask"], cuts), saved["contexts"], strict=True)
        return [Example(ids.tolist(), mask.tolist(), context=str(context)) for ids, mask, context in rows]


def product_rate(device: torch.device) -> float:
    """Floating-point operations a second of a large product on random data."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in "ab")
    for _ in range(3):
        a @ b
    sync(device)
    began = time.perf_counter()
    for _ in range(20):
        a @ b
    sync(device)
    return 20 * 2 * size**3 / (time.perf_counter() - began)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def as_text(line: dict[str, Any]) -> str:
    if "device" in line:
        return f"{line['device']}, torch {line['torch']}, products {line['product_tflops']:.0f} TFLOP/s"
    if "left_out" in line:
        return f"{line['name']:38} left out: {line['left_out']}"
    text = (
        f"{line['name']:38} {line['questions_per_s']:7.1f} q/s {line['tokens_per_s']:8.0f} tok/s "
        f"{line['ms_per_step']:7.1f} ms {line['tflops']:6.1f} TFLOP/s {line['share_of_products']:5.1%} "
        f"{line['peak_gib']:6.1f} GiB first {line['first_step_s']:5.1f} s loss {line['loss'][0]:.4f} "
        f"{line['loss'][1]:.4f} cos {line['gradient_cosine']:.5f}"
    )
    if "busy" in line:
        text += f"\n    busy {line['busy']:.0%} {line['launches']} launches " + " ".join(
            f"{k} {v:.1f}" for k, v in line["kernel_ms"].items()
        )
    return text


if __name__ == "__main__":
    main()
