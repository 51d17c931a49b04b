"""What a greedy tenant does to a modest one: `python -m loadtest.fairness` starts a service of its own on loopback.

Two tenants ask for the same streamed chats, each at random moments: the modest one for `--share` of what the service
can do, first alone, then beside one that asks `--times` as much. Prints when the modest one got its first tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from typing import Any

import yaml

from loadtest.overload import PLACES, RESULTS, Crowd, summary
from loadtest.service import ChaosService, derive_config, free_port
from loadtest.stalls import Stalls

ALLOWED = 1.5
"""Target: p99 of the modest tenant's first tokens beside the greedy one, over that alone."""


async def measure(service: ChaosService, seconds: float, share: float, times: float, seed: int) -> dict[str, Any]:
    """All phases. `share`: what the modest tenant asks for, of the capacity."""
    await service.until_ready()
    modest = Crowd(service.url, seed, headers=service.headers)
    greedy = Crowd(service.url, seed + 1, headers=service.other_headers)
    try:
        await greedy.steady(10.0)  # the service learns how fast it is
        began = time.perf_counter()
        full = summary(await greedy.steady(30.0), time.perf_counter() - began)
        per_s = share * full["finished"] / (time.perf_counter() - began)
        print(
            f"capacity: {full['goodput_tokens_per_s']:.0f} tokens/s with {PLACES} clients; the modest tenant asks "
            f"{per_s:.2f} chats a second, the greedy one {times * per_s:.1f}",
            flush=True,
        )
        async with Stalls() as stalls:
            quiet = await modest.at_random(seconds, per_s)
            beside, others = await asyncio.gather(
                modest.at_random(seconds, per_s), greedy.at_random(seconds, times * per_s)
            )
    finally:
        await modest.aclose()
        await greedy.aclose()
    outcomes = {"alone": quiet, "beside": beside, "greedy": others}
    phases = {name: summary(of, seconds, stalls) for name, of in outcomes.items()}
    for name, told in phases.items():
        print(
            f"{name}: {told['asked']} asked, {told['statuses']}, {told['lost']} lost, first token "
            f"{_ms(told['first_token_s'])} ms; less the time in which the clients' own process stood still "
            f"{_ms(told['first_token_less_stalls_s'])} ms"
        )
    ratios = {kind: ratio(phases, kind) for kind in ("first_token_s", "first_token_less_stalls_s")}
    print(f"p99 beside the greedy tenant, over that alone: {[*ratios.values()]} (target: {ALLOWED})")
    return {"capacity": full, "per_s": per_s, "times": times, "ratios": ratios, **phases}


def ratio(phases: dict[str, Any], kind: str) -> float | None:
    """Of the modest tenant's p99 beside the greedy one, to that alone; None where one of them got no first token."""
    beside, alone = (phases[name][kind].get("p99") for name in ("beside", "alone"))
    return round(beside / alone, 2) if beside and alone else None


def _ms(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value * 1000:.0f}" for name, value in values.items()) or "-"


def main() -> None:
    """Run all phases and write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/serve.yaml"))
    parser.add_argument("--seconds", type=float, default=150.0, help="of each phase")
    parser.add_argument("--share", type=float, default=0.1, help="of the capacity, for the modest tenant")
    parser.add_argument("--times", type=float, default=20.0, help="how many times as much the greedy one asks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS.with_name("fairness.json"))
    options = parser.parse_args()
    port = free_port()
    http = {"host": "127.0.0.1", "port": port}
    config = derive_config(yaml.safe_load(options.config.read_text()), {"http_options": http})
    config.pop("grpc_options", None)
    with ChaosService(config, port, options.output.with_suffix(".log"), asks_for_key=True) as service:
        figures = asyncio.run(measure(service, options.seconds, options.share, options.times, options.seed))
    options.output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
