"""Streams over HTTP, many at once, and when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(slots=True)
class StreamTimes:
    """When the tokens of one stream came, in seconds from the first request of the run."""

    started: float
    arrivals: list[float]


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
                times.arrivals.append(time.perf_counter() - epoch)
            else:
                tokens = chunk["usage"]["completion_tokens"]
    if tokens != new_tokens:
        raise RuntimeError(f"{tokens} tokens instead of {new_tokens}")
    return times


def percentile(values: list[float], share: float) -> float:
    """The nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def drive(url: str, model: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """All prompts at once; seconds, tokens, times to first token and between tokens."""
    limits = httpx.Limits(max_connections=len(prompts))
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        epoch = time.perf_counter()
        streams = await asyncio.gather(
            *(stream_completion(client, url, model, prompt, new_tokens, epoch) for prompt in prompts)
        )
        seconds = time.perf_counter() - epoch
    gaps = [b - a for s in streams for a, b in zip(s.arrivals, s.arrivals[1:], strict=False)]
    return {
        "seconds": seconds,
        "tokens": len(prompts) * new_tokens,
        "ttft_s": sorted(s.arrivals[0] - s.started for s in streams),
        "itl_p50_s": percentile(gaps, 0.5),
        "itl_p99_s": percentile(gaps, 0.99),
    }


def wait_until_ready(url: str, timeout_s: float, still_alive: Any) -> None:
    """Return once /ready answers 200. Raises RuntimeError when the server ended or took too long."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if not still_alive():
            raise RuntimeError("the server ended before it was ready")
        try:
            response = httpx.get(f"{url}/ready", timeout=2)
            if response.status_code == 200:
                return
            last = f"{response.status_code} {response.text}"
        except httpx.TransportError as error:
            last = str(error)
        time.sleep(0.5)
    raise RuntimeError(f"the server was not ready after {timeout_s:.0f} s: {last}")
