"""Streams over HTTP, many at once, and when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import psutil

PERCENTILES = (0.5, 0.95, 0.99)


class Timed(Protocol):
    """When one stream was asked for and when its pieces came, in seconds from the first request of the run."""

    started_s: float
    arrivals_s: list[float]


@dataclass(slots=True)
class StreamTimes:
    """Of a stream of which nothing else is kept."""

    started_s: float
    arrivals_s: list[float]


async def stream_completion(
    client: httpx.AsyncClient, url: str, model: str, prompt: list[int], new_tokens: int, epoch: float
) -> StreamTimes:
    """One streamed completion of exactly `new_tokens` greedy tokens. Raises RuntimeError on anything less."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times = StreamTimes(time.perf_counter() - epoch, [])
    tokens = 0
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if chunk["choices"]:
                times.arrivals_s.append(time.perf_counter() - epoch)
            else:
                tokens = chunk["usage"]["completion_tokens"]
    if tokens != new_tokens:
        raise RuntimeError(f"{tokens} tokens instead of {new_tokens}")
    return times


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def timings(streams: Iterable[Timed]) -> dict[str, Any]:
    """Seconds until the last piece, each stream's time to its first piece, and `PERCENTILES` of the time between two
    pieces of one stream. A piece is what came at once: a token, or several that one step made."""
    streams = list(streams)
    gaps = [late - early for s in streams for early, late in zip(s.arrivals_s, s.arrivals_s[1:], strict=False)]
    return {
        "seconds": max(stream.arrivals_s[-1] for stream in streams),
        "ttft_s": sorted(stream.arrivals_s[0] - stream.started_s for stream in streams),
        "itl_s": [percentile(gaps or [0.0], share) for share in PERCENTILES],
    }


async def drive(url: str, model: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """All prompts at once; seconds, tokens, times to first token and between tokens."""
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        epoch = time.perf_counter()
        streams = await asyncio.gather(
            *(stream_completion(client, url, model, prompt, new_tokens, epoch) for prompt in prompts)
        )
    times = timings(streams)
    itl_p50_s, _, itl_p99_s = times["itl_s"]
    return times | {"tokens": len(prompts) * new_tokens, "itl_p50_s": itl_p50_s, "itl_p99_s": itl_p99_s}


def wait_until_ready(url: str, timeout_s: float, server: psutil.Popen) -> None:
    """Return once /ready answers 200. Raises RuntimeError when the server ends before, or takes too long."""
    end = time.monotonic() + timeout_s
    last = "not asked"
    while time.monotonic() < end:
        try:
            response = httpx.get(f"{url}/ready", timeout=2)
            if response.status_code == 200:
                return
            last = f"{response.status_code} {response.text}"
        except httpx.TransportError as error:
            last = str(error)
        with suppress(psutil.TimeoutExpired):
            server.wait(0.2)
            raise RuntimeError(f"the server ended before it was ready: {last}")
    raise RuntimeError(f"the server was not ready after {timeout_s:.0f} s: {last}")
