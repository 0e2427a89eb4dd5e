"""How fast servers answer under load: throughput, time to first token, inter-token latency, at 1 to 64 clients.

graft bench serve URL...
"""

import asyncio
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from data.progress import Bar
from eval.client import ServerError, api_key, served_models

WORDS = (
    "river", "stone", "market", "window", "letter", "garden", "winter", "engine", "paper", "bridge", "summer", "island",
    "button", "forest", "copper", "silver",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    url: str
    model: str


@dataclass(frozen=True)
class Request:
    """Seconds from sending to the first token and to the last, the seconds between tokens, and how many came."""

    first_s: float
    total_s: float
    gaps_s: list[float]
    tokens: int


@dataclass(frozen=True)
class Load:
    """One target's requests of one round at so many clients, and the seconds from the first sent to the last done."""

    target: Target
    clients: int
    round: int
    seconds: float
    requests: list[Request]

    @property
    def tokens_per_s(self) -> float:
        return sum(r.tokens for r in self.requests) / self.seconds


def bench_serve(
    urls: Sequence[str],
    models: Sequence[str],
    clients: Sequence[int],
    requests: int,
    prompt_words: int,
    new_tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """A row for each target and number of clients. Targets take turns within a round, so that what else the machine
    does meets all of them; prompts are random words, the same for all targets, and never twice in a cache.
    Raises ServerError where a request fails."""
    targets = find_targets(urls, models)
    total = rounds * len(targets) * sum(max(requests, n) for n in clients)
    bar, loads = Bar("requests", total), []
    done = 0
    try:
        for number in range(rounds):
            for n in clients:
                for turn in range(len(targets)):
                    target = targets[(turn + number) % len(targets)]
                    prompts = make_prompts(max(requests, n), prompt_words, f"{number}-{n}")
                    if not number and n == clients[0]:  # what is made at the first request is not measured
                        asyncio.run(_load(target, make_prompts(1, prompt_words, "first"), 1, new_tokens))
                    start = time.monotonic()
                    found = asyncio.run(_load(target, prompts, n, new_tokens))
                    loads.append(Load(target, n, number, time.monotonic() - start, found))
                    done += len(prompts)
                    bar.update(done, f"{target.model}, {n} clients: {loads[-1].tokens_per_s:.0f} tokens/s")
    finally:
        bar.close()
    return [summarize(loads, target, n, targets[0]) for n in clients for target in targets]


def find_targets(urls: Sequence[str], models: Sequence[str]) -> list[Target]:
    """The named models in their order, or all that the servers serve."""
    every = [Target(url, name) for url in urls for name in served_models(url)]
    if not models:
        return every
    chosen = [target for name in models for target in every if target.model == name]
    if missing := [name for name in models if name not in {target.model for target in every}]:
        names = ", ".join(target.model for target in every)
        raise ServerError(f"--model {missing[0]}: is not among those served: {names}")
    return chosen


def make_prompts(count: int, words: int, salt: str) -> list[str]:
    """Random words behind a beginning of their own, so that no prompt finds another's prefix in the server's cache."""
    seed = [*salt.encode(), count, words]
    draws = np.random.default_rng(seed).integers(len(WORDS), size=(count, words))
    return [f"{salt}-{i} " + " ".join(WORDS[w] for w in row) for i, row in enumerate(draws)]


def summarize(loads: Sequence[Load], target: Target, clients: int, first: Target) -> dict[str, Any]:
    """Over all rounds; `relative`: tokens/s against the first target's of the same round: median, lowest, highest."""
    own = [load for load in loads if (load.target, load.clients) == (target, clients)]
    base = {load.round: load.tokens_per_s for load in loads if (load.target, load.clients) == (first, clients)}
    requests, seconds = [r for load in own for r in load.requests], sum(load.seconds for load in own)
    ratios = [load.tokens_per_s / base[load.round] for load in own]

    def percentiles(values: Sequence[float]) -> dict[str, float]:
        return {f"p{q}": round(1000 * float(np.percentile(values, q)), 1) for q in (50, 95)} if values else {}

    return {
        "url": target.url,
        "model": target.model,
        "clients": clients,
        "requests": len(requests),
        "requests_per_s": round(len(requests) / seconds, 3),
        "output_tokens_per_s": round(sum(r.tokens for r in requests) / seconds, 1),
        "first_token_ms": percentiles([r.first_s for r in requests]),
        "inter_token_ms": percentiles([gap for r in requests for gap in r.gaps_s]),
        "relative": [round(pick(ratios), 3) for pick in (statistics.median, min, max)],
    }


def print_loads(rows: Sequence[dict[str, Any]], console: Console) -> None:
    several = len({row["url"] for row in rows}) > 1
    first = f"{rows[0]['model']}'s tokens/s of the same round, median (lowest - highest)"
    table = Table(caption=f"milliseconds: p50 / p95; relative to {first}", caption_justify="left")
    table.add_column("clients")
    table.add_column("model")
    for heading in ("requests/s", "tokens/s", "first token", "between tokens", "relative"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = [" / ".join(f"{v:.0f}" for v in row[key].values()) for key in ("first_token_ms", "inter_token_ms")]
        middle, low, high = row["relative"]
        name = row["model"] + (f" at {row['url']}" if several else "")
        numbers = (f"{row['requests_per_s']:.2f}", f"{row['output_tokens_per_s']:.1f}", *times)
        table.add_row(str(row["clients"]), name, *numbers, f"{middle:.3f} ({low:.3f} - {high:.3f})")
    console.print(table)


async def _load(target: Target, prompts: Sequence[str], clients: int, new_tokens: int) -> list[Request]:
    """All prompts, `clients` at a time: each client sends its next one once it has its answer."""
    waiting = iter(prompts)
    limits = httpx.Limits(max_connections=clients)
    headers = {"Authorization": f"Bearer {api_key()}"}
    found: list[Request] = []
    async with httpx.AsyncClient(base_url=target.url, headers=headers, timeout=600, limits=limits) as http:

        async def client() -> None:
            for prompt in waiting:
                found.append(await _ask(http, target, prompt, new_tokens))

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(clients):
                    group.create_task(client())
        except* (ServerError, httpx.HTTPError) as errors:
            first = errors.exceptions[0]
            raise ServerError(f"{target.url}: {first if str(first) else repr(first)}; see the server's log") from None
    return found


async def _ask(http: httpx.AsyncClient, target: Target, prompt: str, new_tokens: int) -> Request:
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
            text = (await reply.aread()).decode(errors="replace")
            raise ServerError(f"{target.model}: status {reply.status_code}: {text[:200]}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if any(choice["delta"].get("content") for choice in event.get("choices", [])):
                times.append(time.monotonic())
    if not times:
        raise ServerError(f"{target.model}: an answer without a token")
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Request(times[0] - start, times[-1] - start, gaps, tokens or len(times))
