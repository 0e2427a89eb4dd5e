"""The memory of a training, counted before it starts.

A step at the largest micro-batch runs forward and backward on tensors that have shapes and no data, and every storage
that it holds is added up. So the count follows any base, any method and every function that training replaces. Frozen
weights count as their quantizer stores them, optimizers by their states.

Not counted: fragmentation of the allocator, workspaces inside of kernels, what compiled layers save. Autocast is that
of a CPU, which leaves layer norms in bfloat16: a base with nn.LayerNorm takes more on CUDA.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from data.errors import UserError
from sft.kernels.forest_attention import PLAIN_GIB, pieces_of
from sft.kernels.fused_layers import fuse_layers
from sft.kernels.fused_lora import fuse_lora
from sft.models.load import compute_dtype, dequantizes, is_quantized
from sft.models.resolve import readable
from sft.models.tune import tune_model
from sft.recipe.schema import Quantization, Recipe
from sft.runs.state import random_state, set_random_state
from sft.training.plan import StepPlan
from sft.training.step import SumOfNll

GIB = 2**30
SHARE = 0.85  # of the memory that is free; the rest is for what is not counted
LIBRARIES = 0.8 * GIB  # Python, PyTorch and CUDA's context with its kernels; as seen, not counted
SAMPLED = 100
# bytes of the states of a trained weight; bitsandbytes quantizes them in blocks of 256 with an fp32 scale
STATES = {"adamw_torch": 8.0, "adamw_torch_fused": 8.0, "sgd": 0.0} | dict.fromkeys(
    ("adamw_8bit", "paged_adamw_8bit"), 2 * (1 + 4 / 256)
)


@dataclass(frozen=True)
class Load:
    """The largest micro-batch: tokens in all rows (None: a forest), trained ones, and pairs that attention computes."""

    tokens: int
    answers: int
    rows: int | None = None
    pairs: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes of a training at its largest micro-batch."""

    weights: float
    """Frozen ones."""
    trained: float
    """Trained weights in float32, their gradients and the optimizer's states."""
    kept: float
    """What the forward keeps for the backward."""
    logits: float
    working: float
    """What a step holds beyond all that at its peak: a layer's temporaries, with checkpointing its activations."""
    libraries: float = LIBRARIES

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def parts(self) -> list[tuple[str, float]]:
        """What each part is, for the user, and its bytes."""
        return [
            ("frozen weights", self.weights),
            ("trained weights, gradients, optimizer states", self.trained),
            ("activations kept for the backward", self.kept),
            ("logits", self.logits),
            ("temporary tensors of a layer", self.working),
            ("Python, PyTorch and its libraries: as seen, not counted", self.libraries),
        ]


class NotCounted(Exception):
    """A base or a method whose code asks for the values of tensors."""


def count_memory(
    recipe: Recipe, config: PretrainedConfig, load: Load, device: torch.device, checkpointing: bool, shards: int = 1
) -> Memory:
    """The memory of the recipe's training on a kind of device, whether or not it is here.

    shards: processes that parameters are divided over. Raises NotCounted.
    """
    dtype = compute_dtype(recipe.model, device)
    quantization = None if dequantizes(recipe.model, device) else recipe.model.quantization
    autocast = device.type == "cuda" if recipe.train.bf16 is None else recipe.train.bf16
    try:
        model = model_without_weights(recipe, config, dtype)
        weights = frozen_bytes(model, quantization, dtype)
        trained = sum(8 * p.numel() + _states(p, recipe.train.optim) for p in model.parameters() if p.requires_grad)
        unpacked = _largest_packed(model) * dtype.itemsize if quantization else 0
        if shards == 1:  # as apply_auto does
            fuse_lora(model)
            if device.type == "cuda" and not recipe.model.use_kernels:
                fuse_layers(model)
        if autocast:
            from sft.training.trainer import leave_casts_to_autocast  # it needs TRL

            leave_casts_to_autocast(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        kept, peak = _run_step(model, load, recipe.train.attn_implementation, device, autocast)
    except UserError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise NotCounted(f"memory can't be counted ({type(error).__name__}: {first})") from error
    logits = 4.0 * load.answers * config.get_text_config().vocab_size
    return Memory(weights / shards, trained / shards, kept - logits, logits, peak - kept + unpacked)


def model_without_weights(recipe: Recipe, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The tuned model on the meta device, dense; the state of random numbers stays."""
    before = random_state()
    try:
        with torch.device("meta"), readable(f"model.base: {recipe.model.base}"):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.device("meta"):
            return tune_model(base, recipe.tune, recipe.train.seed)
    finally:
        set_random_state(before)


def frozen_bytes(model: PreTrainedModel, quantization: Quantization | None, dtype: torch.dtype) -> float:
    """Bytes of frozen weights and buffers: weights of linear layers except the head as bitsandbytes stores them."""
    packed = {id(weight) for weight in _packed(model)} if is_quantized(quantization) else set()
    total = float(sum(buffer.numel() * buffer.itemsize for buffer in model.buffers()))
    for p in model.parameters():
        if not p.requires_grad:
            total += (
                _packed_bytes(p, cast(Quantization, quantization)) if id(p) in packed else p.numel() * dtype.itemsize
            )
    return total


def _packed(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The weights that bitsandbytes packs: of all linear layers except the head."""
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and not module.weight.requires_grad and id(module.weight) not in ends:
            yield cast(nn.Parameter, module.weight)


def _packed_bytes(weight: nn.Parameter, quantization: Quantization) -> float:
    numbers = weight.numel()
    if quantization.load_in_8bit:
        return numbers + 4 * weight.shape[0]  # a scale for each row
    blocks = numbers / 64
    if not quantization.bnb_4bit_use_double_quant:
        return numbers / 2 + 4 * blocks + 64  # a scale for each block; the 16 values of the code
    # scales in 8 bits with an fp32 scale for each 256 of them; their mean, and both codes
    return numbers / 2 + blocks + 4 * -(-blocks // 256) + 4 + 64 + 1024


def _largest_packed(model: PreTrainedModel) -> int:
    """Numbers in the largest packed weight, which a product unpacks."""
    return max((weight.numel() for weight in _packed(model)), default=0)


def _states(p: nn.Parameter, optim: str) -> float:
    if optim == "adafactor":  # means of rows and of columns
        return 4.0 * (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel())
    return STATES[optim] * p.numel()


def _run_step(
    model: PreTrainedModel, load: Load, attention: str, device: torch.device, autocast: bool
) -> tuple[float, float]:
    """Bytes that a step holds after the forward, and most that it ever holds; without parameters and gradients."""
    live = _LiveBytes()
    if model._supports_attention_backend:
        _count_attention(model, load, attention, device)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_data(model)
        parameters = list(model.parameters())
        for p in parameters:
            if p.requires_grad:
                p.grad = torch.zeros_like(p)  # a second micro-batch finds the gradients of the first
        live.leave_out(t for p in parameters for t in (p, p.grad) if t is not None)
        model.train()
        ids = torch.zeros(load.rows or 1, load.tokens // (load.rows or 1), dtype=torch.long)
        source = torch.zeros(load.answers, dtype=torch.long)
        inputs: dict[str, Any] = {"input_ids": ids}
        if load.rows is None:  # a mask of four dimensions is taken as it is
            inputs |= {"position_ids": ids, "attention_mask": torch.ones(1, 1, 1, 1), "logits_to_keep": source}
        else:
            head = cast(nn.Module, model.get_output_embeddings())
            head.register_forward_pre_hook(lambda _, states: (states[0].flatten(0, 1)[source][None],))
            if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
                inputs["attention_mask"] = torch.ones_like(ids)
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = model(**inputs, use_cache=False).logits[0]
            loss = SumOfNll.apply(logits.float(), source)
            del logits
            kept = live.now
            loss.backward()
    return kept, live.most


def _without_data(model: nn.Module) -> None:
    """Put tensors without data, which act like a CPU's, in the place of a meta model's; trained ones in float32."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) not in known:
                dtype = torch.float32 if p.requires_grad else p.dtype  # as PackTrainer has it
                known[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad)
            module._parameters[name] = known[id(p)] if p is not None else None
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still in use."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def leave_out(self, tensors: Iterator[torch.Tensor]) -> None:
        self.known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class _Attention(torch.autograd.Function):
    """Keeps what fused kernels keep: query, key, value, output and log-sum-exp; and scores that others keep."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: int) -> torch.Tensor:
        batch, heads, tokens, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[3])
        sums = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, query.new_empty(scores, dtype=torch.uint8))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return (*(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None)


def _count_attention(model: PreTrainedModel, load: Load, attention: str, device: torch.device) -> None:
    """Replace the attention by one that computes nothing and keeps what `attention` keeps."""
    layers = model.config.get_text_config().num_hidden_layers

    def scores(query: torch.Tensor, key: torch.Tensor) -> int:
        """Bytes of the scores, or of a mask like them, that a layer keeps."""
        heads, tokens, size = query.shape[1], query.shape[2], query.dtype.itemsize
        if attention == "eager":
            return (
                query.shape[0] * heads * tokens * key.shape[2] * (4 + size % 4)
            )  # in float32, and in the model's dtype
        if attention == "sdpa" and load.rows is None:
            return tokens**2 * size
        every = 6 * heads * load.pairs if attention == "forest" and size == 2 and device.type == "cpu" else 0
        return every if every * layers <= PLAIN_GIB * GIB else 0

    def counted(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        return cast(torch.Tensor, _Attention.apply(query, key, value, scores(query, key))), None

    AttentionInterface.register("counted", counted)
    AttentionMaskInterface.register("counted", lambda *_, **__: None)
    model.set_attn_implementation("counted")


def load_of(plan: StepPlan, attention: str, processes: int = 1) -> Load:
    """The largest micro-batch among at most SAMPLED steps, and of pack_tokens if a step takes several."""
    chosen = range(0, len(plan.steps), -(-len(plan.steps) // SAMPLED))
    steps = [plan.packs(step, processes) for step in chosen]
    largest = max((pack for packs in steps for pack in packs), key=lambda pack: len(pack.input_ids))
    tokens = len(largest.input_ids)
    pairs = sum(piece.pairs for piece in pieces_of(tuple(largest.end))) if attention == "forest" else tokens**2
    load = Load(tokens, len(largest.target), largest.rows, pairs)
    filled = processes == 1 and plan.layout.attention != "alone" and any(len(packs) > 1 for packs in steps)
    return grown(load, plan.layout.pack_tokens) if filled else load


def grown(load: Load, tokens: int) -> Load:
    """The load with at least this number of tokens, and the rest in proportion."""
    factor = max(1, tokens / load.tokens)
    rows = load.rows and round(load.rows * factor)
    return Load(round(load.tokens * factor), round(load.answers * factor), rows, round(load.pairs * factor))


def memory_of(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process may have in all, those that it has included: of its GPU; on a CPU its part of what the
    machine and the control group leave to all `processes`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limits = [psutil.virtual_memory().available + processes * psutil.Process().memory_info().rss]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, version 2 and 1
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits) // processes
