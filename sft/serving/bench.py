"""How fast servers answer under load: throughput, time to first token, inter-token latency, at 1 to 64 clients.

graft bench serve URL...

Not vLLM's own `bench serve`: it needs vLLM on the client's machine and 10 s to start, counts the empty first event of
an answer as a token, and reports a refused request by its status alone.
"""

import asyncio
import itertools
import json
import random
import secrets
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from rich.table import Column, Table

from data.progress import track
from data.terminal import Console
from eval.client import ServerError, api_key, on_this_machine, served_models

WORDS = (
    "river", "stone", "market", "window", "letter", "garden", "winter", "engine", "paper", "bridge", "summer", "island",
    "button", "forest", "copper", "silver",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    url: str
    model: str


Answer = tuple[list[float], int]  # seconds from sending to each event with text, and tokens: an event may hold several


@dataclass(frozen=True)
class Load:
    """A round of requests by several clients at once: its answers, and how long it took."""

    seconds: float
    answers: list[Answer]

    @property
    def tokens_per_s(self) -> float:
        return sum(tokens for _, tokens in self.answers) / self.seconds


def bench_serve(
    urls: Sequence[str],
    models: Sequence[str],
    clients: Sequence[int],
    requests: int,
    prompt_words: int,
    new_tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each target and number of clients. Targets take turns within a round, so that other work on the machine
    slows all of them; they get the same prompts, each only once. Raises ServerError if a request fails."""
    targets, run = find_targets(urls, models), secrets.token_hex(3)  # the server's prefix cache outlives a run
    loads: dict[tuple[Target, int], list[Load]] = {(target, n): [] for n in clients for target in targets}
    turns = range(len(targets))
    plan = [(i, n, targets[(turn + i) % len(targets)]) for i in range(rounds) for n in clients for turn in turns]
    for i, n, target in track(plan, "loads"):
        if i == 0 and n == clients[0]:  # a target's first request is a warm-up
            asyncio.run(_load(target, 1, make_prompts(1, prompt_words, f"{run}-first"), new_tokens))
        prompts = make_prompts(max(requests, n), prompt_words, f"{run}-{i}-{n}")
        loads[target, n].append(asyncio.run(_load(target, n, prompts, new_tokens)))
    return [
        {"url": target.url, "model": target.model, "clients": n, **summarize(own, loads[targets[0], n])}
        for (target, n), own in loads.items()
    ]


def find_targets(urls: Sequence[str], models: Sequence[str]) -> list[Target]:
    """The named models in that order, or all that the servers offer."""
    served = [Target(url, name) for url in urls for name in served_models(url)]
    names = [target.model for target in served]
    if missing := [name for name in models if name not in names]:
        raise ServerError(f"--model {missing[0]}: is not among those served: {', '.join(names)}")
    return [target for name in models for target in served if target.model == name] if models else served


def make_prompts(count: int, words: int, salt: str) -> list[str]:
    """Random words after a unique beginning, so that the server's prefix cache never helps."""
    draw = random.Random(f"{salt} {count} {words}")
    return [" ".join([f"{salt}-{i}", *draw.choices(WORDS, k=words)]) for i in range(count)]


async def _load(target: Target, clients: int, prompts: Sequence[str], new_tokens: int) -> Load:
    """All prompts, `clients` at a time: each client sends its next one once it has its answer."""
    waiting, answers = iter(prompts), list[Answer]()
    # httpx, since openai's client takes 100 us of processor time for each token
    headers, limits = {"Authorization": f"Bearer {api_key(target.url)}"}, httpx.Limits(max_connections=clients)
    proxied = not on_this_machine(target.url)
    async with httpx.AsyncClient(
        base_url=target.url, headers=headers, timeout=600, limits=limits, trust_env=proxied
    ) as http:

        async def client() -> None:
            for prompt in waiting:
                answers.append(await _ask(http, target, prompt, new_tokens))

        start = time.monotonic()
        try:
            await asyncio.gather(*(client() for _ in range(clients)))
        except httpx.HTTPError as error:
            raise ServerError(f"{target.url}: {str(error) or repr(error)}; see the server's log") from error
        return Load(time.monotonic() - start, answers)


async def _ask(http: httpx.AsyncClient, target: Target, prompt: str, new_tokens: int) -> Answer:
    body = {
        "model": target.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": new_tokens,
        "ignore_eos": True,  # vLLM's: every answer has the same length, whatever a model would say
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start, times, tokens = time.monotonic(), list[float](), 0
    async with http.stream("POST", "/chat/completions", json=body) as reply:
        if reply.status_code != 200:
            text = (await reply.aread()).decode(errors="replace")[:200]
            raise ServerError(f"{target.url}: {target.model}: status {reply.status_code}: {text}; see the server's log")
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                    times.append(time.monotonic() - start)
    if not times:
        raise ServerError(f"{target.url}: {target.model}: an answer has no token; see the server's log")
    return times, tokens or len(times)


def summarize(loads: Sequence[Load], base: Sequence[Load]) -> dict[str, Any]:
    """Figures over all rounds. `relative`: tokens/s over `base`'s in the same round: median, lowest, highest."""
    answers, seconds = [answer for load in loads for answer in load.answers], sum(load.seconds for load in loads)
    gaps = [later - earlier for times, _ in answers for earlier, later in itertools.pairwise(times)]
    ratios = [load.tokens_per_s / other.tokens_per_s for load, other in zip(loads, base, strict=True)]

    def milliseconds(values: Sequence[float]) -> dict[str, float]:
        return {f"p{q}": round(1000 * float(np.percentile(values, q)), 1) for q in (50, 95)} if values else {}

    return {
        "requests": len(answers),
        "requests_per_s": round(len(answers) / seconds, 3),
        "output_tokens_per_s": round(sum(tokens for _, tokens in answers) / seconds, 1),
        "first_token_ms": milliseconds([times[0] for times, _ in answers]),
        "inter_token_ms": milliseconds(gaps),
        "relative": [round(pick(ratios), 3) for pick in (statistics.median, min, max)],
    }


def print_loads(rows: Sequence[dict[str, Any]], console: Console) -> None:
    first = f"{rows[0]['model']}'s tokens/s of the same round, median (lowest - highest)"
    numbers = ("requests/s", "tokens/s", "first token", "between tokens", "relative")
    table = Table(
        "clients", "model", *(Column(name, justify="right") for name in numbers),
        caption=f"milliseconds: p50 / p95; relative to {first}", caption_justify="left",
    )  # fmt: skip
    several = len({row["url"] for row in rows}) > 1
    for row in rows:
        name = f"{row['model']} at {row['url']}" if several else row["model"]
        rates = f"{row['requests_per_s']:.2f}", f"{row['output_tokens_per_s']:.1f}"
        times = [" / ".join(f"{v:.0f}" for v in row[key].values()) for key in ("first_token_ms", "inter_token_ms")]
        table.add_row(str(row["clients"]), name, *rates, *times, "{:.3f} ({:.3f} - {:.3f})".format(*row["relative"]))
    console.print(table)
