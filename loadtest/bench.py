"""How fast are the engine and the service, against transformers' own `generate` and the loop this project grew from?

`python -m loadtest.bench` (or `make bench`). Contenders take turns within each round, so that a drift of the machine
meets all of them, and no prompt is asked in two rounds. A figure is the median of the rounds, and a ratio the median of
the rounds' ratios: they are what counts. *: other programs disturbed every round, no evidence.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from loadtest.compare.accounting import ProcessTree
from loadtest.compare.client import Load, drive
from loadtest.compare.contenders import FAST, MODEL, serve_app_command
from loadtest.compare.measure import REPEATS, WARM_UP_TOKENS, accounted, figures, our_version, warm_up
from loadtest.compare.report import verdict
from loadtest.compare.servers import Server
from loadtest.compare.workload import Cell, Chat, Set, chats
from loadtest.http_load import percentile
from loadtest.prompts import render
from loadtest.service import derive_config, free_port
from serve_app.config import AppConfig
from serve_app.models.cache import cache_directory
from serve_app.models.source import resolve

CONCURRENCY = (1, 8, 32)
PREFILL_TOKENS = 900
SEED_TOKENS = 16
"""The seed's loop slows with each token; this many of them flatter it."""
MORE_ALONE = 5
"""Times as many requests where they come one after the other: three have no median to speak of, and the first of them
finds the connection closed and the caches cold."""
ENGINE_ALONE, ENGINE, SERVICE = "engine alone", "engine", "service"
"""The engine before there is a service; the same beside a service that idles; the service."""
Record = dict[str, Any]
Records = dict[str, list[Record]]
"""{contender@concurrency: a record for each round}"""
Take = Callable[[int, list[Chat]], dict[str, Record]]
"""(concurrency, chats) -> what each contender of a turn did"""


class Worker:
    """A contender's process. It waits on its standard input while it isn't its turn."""

    def __init__(self, kind: str, arguments: Sequence[str], checkout: Path | None = None) -> None:
        """`checkout`: another checkout of this project, whose code it runs."""
        command = [sys.executable, "-m", "loadtest.worker", kind, *arguments]
        environment = os.environ if checkout is None else os.environ | {"PYTHONPATH": str(checkout)}
        self._process = psutil.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout, env=environment
        )
        self.tree = ProcessTree(self._process)
        self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, prompts: list[list[int]], new_tokens: int, **more: int) -> dict[str, Any]:
        """What `worker.Run` returns for it."""
        self._process.stdin.write(json.dumps({"prompts": prompts, "new_tokens": new_tokens, **more}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Bench:
    """One run with one config: the contenders, what they are asked, and what they did."""

    def __init__(self, config: dict[str, Any], new_tokens: int, work: Path) -> None:
        """`config` is a Serve config with one model replica on this machine; `work` an empty folder of this run."""
        self._config = config
        self._new_tokens = new_tokens
        self._work = work
        app = AppConfig.model_validate(config["applications"][0].get("args", {}))
        files = resolve(app.model, cache_directory(app.cache_dir), progress=lambda stage: None)
        self._tokenizer = files.tokenizer_folder
        self.results: Records = {}

    def measure(self, rounds: int, *, with_service: bool) -> None:
        """`generate`, the seed's loop and the engine in turns; then the engine and the service in turns."""
        path = self._work / "engine.yaml"
        path.write_text(yaml.safe_dump(self._config))
        arguments = ["--config", str(path)]
        with closing(Worker("engine", arguments)) as engine:
            for count in (1, max(CONCURRENCY)):
                prompts = render(self._tokenizer, chats(Cell(Set.VARIED, count), "warm-up"))
                engine.run(prompts, WARM_UP_TOKENS, concurrency=count)
            with closing(Worker("generate", arguments)) as generate, closing(Worker("seed", arguments)) as seed:
                for worker in (generate, seed):
                    worker.run(prompts[:1], 4)
                for turn in range(rounds):
                    for count in CONCURRENCY:
                        others = {"generate": generate, "seed": seed} if count == 1 else {}
                        self._undisturbed(f"alone {turn}", count, partial(self._alone, engine, others))
            if with_service:
                with self._service() as server:
                    for turn in range(rounds):
                        order = in_turn((ENGINE, SERVICE), turn)
                        for count in CONCURRENCY:
                            beside = partial(self._beside, engine, server, order)
                            self._undisturbed(f"round {turn}", count, beside, MORE_ALONE if count == 1 else 1)

    def _undisturbed(self, turn: str, count: int, take: Take, times: int = 1) -> None:
        """Keep the records, by contender, of the first try that no other program disturbed, or of the last. Each asks
        other questions, `times` as many as a comparison does."""
        for name in (turn, *(f"{turn}, again {repeat + 1}" for repeat in range(REPEATS))):
            cell, more = Cell(Set.VARIED, count), (f"{name}, more {number}" for number in range(1, times))
            records = take(count, [chat for part in (name, *more) for chat in chats(cell, part)])
            for contender, record in records.items():
                said = f"{f'{contender}@{count}':<16} {tokens_per_second(record):7.1f} tok/s"
                print(said + (", disturbed" if record["disturbed"] else ""), flush=True)
            if not any(record["disturbed"] for record in records.values()):
                break
        for contender, record in records.items():
            self.results.setdefault(f"{contender}@{count}", []).append(record | {"turn": turn})

    def _alone(self, engine: Worker, others: dict[str, Worker], count: int, asked: list[Chat]) -> dict[str, Record]:
        """The engine before there is a service, after those that take one prompt after the other."""
        prompts = render(self._tokenizer, asked)
        records: dict[str, Record] = {}
        for kind, worker in others.items():
            some, tokens = (prompts[:1], SEED_TOKENS) if kind == "seed" else (prompts, self._new_tokens)
            with accounted(worker.tree, record := {}):
                outcome = worker.run(some, tokens)
            records[kind] = record | outcome
        with accounted(engine.tree, record := {}):
            outcome = engine.run(prompts, self._new_tokens, concurrency=count)
        return records | {ENGINE_ALONE: record | outcome}

    @contextmanager
    def _service(self) -> Iterator[Server]:
        """The service with this config on a port of its own, warm. Its log lies beside the results."""
        port = free_port()
        config = derive_config(self._config, {"http_options": {"host": "127.0.0.1", "port": port}})
        application = config["applications"][0]
        application["args"] = derive_config(application.get("args", {}), {"model": {"served_model_name": MODEL}})
        log = Path("loadtest/results/service.log")
        with Server(serve_app_command(config, self._work), f"http://127.0.0.1:{port}", log) as server:
            warm_up(Load(server.url, FAST.body, WARM_UP_TOKENS), max(CONCURRENCY))
            yield server

    def _beside(
        self, engine: Worker, server: Server, order: Sequence[str], count: int, asked: list[Chat]
    ) -> dict[str, Record]:
        """Engine and service, one after the other in `order`; the other one idles."""
        prompts = render(self._tokenizer, asked)
        load = Load(server.url, FAST.body, self._new_tokens)
        records: dict[str, Record] = {}
        for name in order:
            if name == ENGINE:
                with accounted(engine.tree, record := {}, beside=server.tree):
                    outcome = engine.run(prompts, self._new_tokens, concurrency=count)
            else:
                with accounted(server.tree, record := {}, beside=engine.tree):
                    streams = asyncio.run(drive(load, asked, count))
                outcome = figures(streams, self._new_tokens)
                if [stream.prompt_tokens for stream in streams] != [len(prompt) for prompt in prompts]:
                    raise SystemExit("the service made other prompts of the chats than the engine was given")
            records[name] = record | outcome
        return records


def in_turn(names: Sequence[str], turn: int) -> Sequence[str]:
    """A B, then B A, and so on: neither always comes first."""
    return names if turn % 2 == 0 else names[::-1]


def compare(rounds: int, new_tokens: int, threads: int, checkout: Path) -> Records:
    """This engine and another checkout's, in turns; `prefill` is a long prompt and one new token."""
    model = AppConfig().model
    tokenizer = resolve(model, cache_directory(), progress=lambda stage: None).tokenizer_folder
    results: Records = {}
    arguments = ["--threads", str(threads)]
    with closing(Worker("engine", arguments, checkout)) as other, closing(Worker("engine", arguments)) as own:
        workers = {"other": other, "engine": own}
        for worker in workers.values():
            worker.run(render(tokenizer, chats(Cell(Set.VARIED, 1), "warm-up")[:1]), 4)
        for turn in range(rounds):
            work = {
                str(count): render(tokenizer, chats(Cell(Set.VARIED, count), f"round {turn}")[:count])
                for count in CONCURRENCY
            }
            (long,) = render(tokenizer, chats(Cell(Set.LONG, 1), f"round {turn}")[:1])
            work["prefill"] = [long[:PREFILL_TOKENS]]
            for name, prompts in work.items():
                for kind in in_turn(list(workers), turn):
                    with accounted(workers[kind].tree, record := {}):
                        outcome = workers[kind].run(prompts, 1 if name == "prefill" else new_tokens)
                    if name == "prefill":
                        outcome["tokens"] = len(prompts[0])
                    results.setdefault(f"{kind}@{name}", []).append(record | outcome | {"turn": turn})
    return results


def comparison(results: Records) -> str:
    """A line for each kind of work of `compare`: the other checkout's tokens per second, this one's, their ratio."""
    lines = []
    for name in (*map(str, CONCURRENCY), "prefill"):
        other, own = results[f"other@{name}"], results[f"engine@{name}"]
        times = f"x {ratio(own, other):.2f}{disturbed(own, other)}"
        lines.append(f"{name:>8}: {rate(other):7.1f} -> {rate(own):7.1f} tok/s, {times}")
    return "\n".join(lines)


def tokens_per_second(record: Record) -> float:
    """Of all streams together."""
    return float(record["tokens"] / record["seconds"])


def ttft_p50_s(record: Record) -> float:
    """Of one round."""
    return percentile(record["ttft_s"], 0.5)


def sound(records: list[Record]) -> list[Record]:
    """Those that no other program disturbed, or all where there is none such."""
    return [record for record in records if not record["disturbed"]] or records


def rate(records: list[Record]) -> float:
    """Median tokens per second."""
    return statistics.median(map(tokens_per_second, sound(records)))


def pairs(ours: list[Record], theirs: list[Record]) -> list[tuple[Record, Record]]:
    """The records of the same rounds, of which nobody was disturbed; all where there are none such."""
    by_turn = {record["turn"]: record for record in theirs}
    every = [(record, by_turn[record["turn"]]) for record in ours]
    return [pair for pair in every if not any(record["disturbed"] for record in pair)] or every


def ratio(ours: list[Record], theirs: list[Record]) -> float:
    """Median over the rounds of our tokens per second over theirs."""
    return statistics.median(tokens_per_second(our) / tokens_per_second(their) for our, their in pairs(ours, theirs))


def ttft_difference_s(ours: list[Record], theirs: list[Record]) -> float:
    """How much later than theirs our first tokens come: median over the rounds."""
    return statistics.median(ttft_p50_s(our) - ttft_p50_s(their) for our, their in pairs(ours, theirs))


def disturbed(ours: list[Record], theirs: list[Record]) -> str:
    """A star when no round tells them apart from what other programs did."""
    return r"\*" if any(record["disturbed"] for record in pairs(ours, theirs)[0]) else ""


def baseline_table(results: Records) -> str:
    """Markdown: the engine alone beside `generate` and the seed's loop."""
    lines = [
        "| contender | streams | tok/s | x generate | x seed | TTFT p50, ms | ITL p50 / p99, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, records in results.items():
        contender, count = name.split("@")
        if contender in (ENGINE, SERVICE):
            continue
        cells = [contender, count, f"{rate(records):.1f}"]
        cells += [
            f"{ratio(records, results[f'{other}@1']):.2f}{disturbed(records, results[f'{other}@1'])}"
            for other in ("generate", "seed")
        ]
        cells += [_ttft(records), _itl(records)] if "ttft_s" in records[0] else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def delivery_table(results: Records) -> str:
    """Markdown: the service beside the engine, in the same rounds. Empty when there was no service."""
    if f"{SERVICE}@{CONCURRENCY[0]}" not in results:
        return ""
    lines = [
        "| streams | engine alone, tok/s | engine, tok/s | service, tok/s | **service / engine** (rounds) "
        "| load generator, cores | idle service in the engine's turns, cores | other programs, cores "
        "| TTFT p50 engine, ms | service | **difference** | ITL p50 / p99 engine, ms | service |",
        f"|{'---|' * 13}",
    ]
    for count in CONCURRENCY:
        alone, engine, service = (results[f"{name}@{count}"] for name in (ENGINE_ALONE, ENGINE, SERVICE))
        shares = [tokens_per_second(ours) / tokens_per_second(theirs) for ours, theirs in pairs(service, engine)]
        late_ms, star = 1000 * ttft_difference_s(service, engine), disturbed(service, engine)
        cells = [str(count), *(f"{rate(records):.1f}" for records in (alone, engine, service))]
        cells += [f"**{statistics.median(shares):.1%}**{star} ({min(shares):.0%} to {max(shares):.0%})"]
        cells += [_cores("client_cpu_s", service), _cores("beside_cpu_s", engine)]
        cells += [_cores("other_cpu_s", [record for pair in pairs(service, engine) for record in pair])]
        cells += [_ttft(engine), _ttft(service), f"**{late_ms:.1f}**{star}", _itl(engine), _itl(service)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ttft(records: list[Record]) -> str:
    return f"{1000 * statistics.median(map(ttft_p50_s, sound(records))):.1f}"


def _itl(records: list[Record]) -> str:
    p50, _, p99 = (statistics.median(record["itl_s"][place] for record in sound(records)) for place in range(3))
    return f"{1000 * p50:.1f} / {1000 * p99:.0f}"


def _cores(key: str, records: list[Record]) -> str:
    return f"{statistics.median(record[key] / record['wall_s'] for record in sound(records)):.2f}"


def figures_to_reach(results: Records) -> list[str]:
    """The targets of this benchmark, and whether each was reached. One line each."""
    lines = []

    def note(text: str, ours: str, theirs: str, reached: str) -> None:
        star = disturbed(results[ours], results[theirs])
        lines.append(f"{text}: {'disturbed by other programs, no evidence' if star else reached}")

    for count, asked in ((1, 1.0), (8, 3.0)):
        ours, theirs = f"{ENGINE_ALONE}@{count}", "generate@1"
        times = ratio(results[ours], results[theirs])
        text = f"engine at {count}: {times:.2f} times generate at 1 (asked: {asked:g})"
        note(text, ours, theirs, verdict(times, at_least=asked))
    if f"{SERVICE}@1" not in results:
        return lines
    for count, asked in ((8, 0.80), (32, 0.85)):
        ours, theirs = f"{SERVICE}@{count}", f"{ENGINE}@{count}"
        share = ratio(results[ours], results[theirs])
        text = f"service at {count}: {share:.1%} of the engine (asked: {asked:.0%})"
        note(text, ours, theirs, verdict(share, at_least=asked))
    ours, theirs = f"{SERVICE}@1", f"{ENGINE}@1"
    late_ms = 1000 * ttft_difference_s(results[ours], results[theirs])
    text = f"TTFT at 1: {late_ms:.1f} ms after the engine's (asked: at most 10)"
    note(text, ours, theirs, verdict(late_ms, at_most=10.0))
    return lines


def report(results: Records, about: str) -> str:
    """Markdown: what was measured, both tables and what was to be reached."""
    parts = [about, baseline_table(results), delivery_table(results)]
    return "\n\n".join([*filter(None, parts), "\n".join(f"- {line}" for line in figures_to_reach(results))])


def config_of(path: Path, *, batch_invariant: bool) -> dict[str, Any]:
    """A Serve config; `batch_invariant` turns that on in it."""
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    if batch_invariant:
        application = config["applications"][0]
        application["args"] = derive_config(application.get("args", {}), {"engine": {"batch_invariant": True}})
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="an even number gives both orders the same weight")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--config", type=Path, default=Path("configs/serve.yaml"), help="whose engine and service are measured"
    )
    parser.add_argument("--batch-invariant", action="store_true", help="with engine.batch_invariant in it")
    parser.add_argument("--engine-only", action="store_true")
    parser.add_argument("--against", type=Path, help="only this engine and that of another checkout, in turns")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of both, with --against")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/bench.json"))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is stopped
    if arguments.against is not None:
        print(comparison(compare(arguments.rounds, arguments.new_tokens, arguments.threads, arguments.against)))
        return
    config = config_of(arguments.config, batch_invariant=arguments.batch_invariant)
    version = our_version()
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as work:
        bench = Bench(config, arguments.new_tokens, Path(work))
        bench.measure(arguments.rounds, with_service=not arguments.engine_only)
    about = f"serve_app {version}, {arguments.config}{', batch_invariant' if arguments.batch_invariant else ''}, "
    about += f"{arguments.rounds} rounds, {arguments.new_tokens} new tokens"
    if (now := our_version()) != version:
        about += f"; **the checkout changed meanwhile: it is {now} now**"
    text = report(bench.results, about)
    print(f"\n{text}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    settings = {"version": version, "config": config, "new_tokens": arguments.new_tokens}
    arguments.output.write_text(
        json.dumps({"machine": machine, "settings": settings, "results": bench.results, "table": text}, indent=1)
    )
    print(f"\nwritten to {arguments.output}")


if __name__ == "__main__":
    main()
