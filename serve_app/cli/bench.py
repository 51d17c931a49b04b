"""Measure a running server that speaks OpenAI's API: this one, or vLLM, llama.cpp, TGI, Ollama and others.

Each level of load takes `--seconds`. `--clients 1 8 32` is a closed loop, in which each client asks again when it has
its answer; `--rates 0.5 2` is an open loop, in which chats come at random moments whatever the server does. The program
runs on one core: near a thousand tokens a second its own times say more of it than of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import httpx

from serve_app.cli.bench_load import Level, Load, Summary
from serve_app.cli.command_error import CommandError
from serve_app.client.protocol import DEFAULT_URL, KEY_VARIABLE

_PATIENCE_S = 300.0
_COLUMNS = "load", "asked", "answered", "tokens/s", "first token, ms", "between pieces, ms", "whole answer, s"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("url", nargs="?", default=DEFAULT_URL, help=f"the server, with or without /v1 ({DEFAULT_URL})")
    parser.add_argument("--model", default="", help="its name (default: the first one that the server lists)")
    parser.add_argument(
        "--clients", type=_positive, nargs="+", help="numbers of clients (default: 1 8, without --rates)"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[], help="chats a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each level (default: 20)")
    parser.add_argument("--words", type=_positive, default=40, help="of each question (default: 40)")
    parser.add_argument("--max-tokens", type=_positive, default=64, help="of each answer (default: 64)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write each chat's times to this file")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each level. Status 1 where a level had no answer."""
    if any(rate <= 0 for rate in arguments.rates) or arguments.seconds <= 0:
        raise CommandError("--rates and --seconds must be above 0", status=2)
    try:
        target = None if arguments.json is None else arguments.json.open("w")
    except OSError as error:
        raise CommandError(f"--json {arguments.json} can't be written: {error.strerror}", status=2) from error
    levels = asyncio.run(_measure(arguments))
    if target is not None:
        with target:
            json.dump([asdict(level) for level in levels], target)
    return 0 if all(Summary.of(level).answered for level in levels) else 1


async def _measure(arguments: argparse.Namespace) -> list[Level]:
    base = arguments.url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    key = os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(headers=headers, timeout=_PATIENCE_S, limits=limits) as http:
        model = arguments.model or await _first_model(http, base)
        load = Load(
            http,
            f"{base}/chat/completions",
            model,
            words=arguments.words,
            max_tokens=arguments.max_tokens,
            seed=arguments.seed,
        )
        print(
            f"{base}, model {model}: {arguments.max_tokens} tokens an answer at most, {arguments.seconds:g} s a level"
        )
        print(_row(_COLUMNS))
        levels: list[Level] = []
        clients = arguments.clients or ([] if arguments.rates else [1, 8])
        work = [
            *((load.closed, number) for number in clients),
            *((load.open, rate) for rate in arguments.rates),
        ]
        for measure, amount in work:
            level = await measure(amount, arguments.seconds)
            _say(Summary.of(level))
            levels.append(level)
    return levels


async def _first_model(http: httpx.AsyncClient, base: str) -> str:
    try:
        answer = await http.get(f"{base}/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        hint = f" Put the key into the environment variable {KEY_VARIABLE}." if answer.status_code in (401, 403) else ""
        raise CommandError(f"{base}/models answers {answer.status_code}.{hint} --model names one") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CommandError(f"no server answers at {base} ({error}); is it running?") from error
    except (ValueError, LookupError, TypeError) as error:
        raise CommandError(f"{base}/models lists no model; --model names one") from error


def _say(told: Summary) -> None:
    print(
        _row(
            (
                told.name,
                str(told.asked),
                str(told.answered),
                f"{told.tokens_per_s:.1f}",
                _times(told.first_s, 1000),
                _times(told.between_s, 1000),
                _times(told.whole_s, 1),
            )
        ),
        flush=True,
    )
    for error, number in told.errors.most_common(3):
        print(f"    {number} times: {error}", flush=True)


def _times(both: tuple[float | None, float | None], times: int) -> str:
    """Median and 99th percentile."""
    return " / ".join("-" if value is None else f"{value * times:.{0 if times > 1 else 2}f}" for value in both)


def _row(cells: Sequence[str]) -> str:
    return "  ".join(f"{cell:>{max(9, len(title))}}" for cell, title in zip(cells, _COLUMNS, strict=True))


def _positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value
