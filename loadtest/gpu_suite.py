"""All that needs a GPU, in one command of at most eight minutes: `python -m loadtest.gpu_suite`.

Each part runs in a process of its own, within its share of the time that is left: one that crashes or hangs loses
itself alone, and what it does not use the others get. Needs nothing but Python to run; a part whose packages are
missing is skipped and says so. `--device cpu` tries the suite itself, with tiny models.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULT = "result: "
"""What a part's line of JSON begins with."""
ROOT = Path(__file__).parents[1]
STREAMS = (1, 8, 32, 128)
MODES = ("graphs", "no graphs", "exact")
_ENGINE = ("torch", "triton", "transformers", "pydantic")


@dataclass(frozen=True)
class Part:
    """Something to run: a command whose output may hold a line of JSON."""

    name: str
    command: tuple[str, ...]
    weight: float = 1.0
    """Of its share of the time that is left."""
    needs: tuple[str, ...] = ()
    """Packages."""
    skip: str | None = None
    """Why it is not run, where that is known before."""


@dataclass
class Outcome:
    """What became of a part."""

    name: str
    status: str
    """ok, failed, timed out or skipped."""
    seconds: float = 0.0
    said: str = ""
    """Why, or the last line of its output."""
    result: dict[str, Any] = field(default_factory=dict)


def missing(packages: Sequence[str]) -> list[str]:
    """Those that can't be imported here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def run_part(part: Part, limit_s: float, log: Path, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run it for at most so long, its output in `log`; what it started ends with it."""
    if part.skip is not None:
        return Outcome(part.name, "skipped", said=part.skip)
    if lacking := missing(part.needs):
        return Outcome(part.name, "skipped", said=f"not installed: {', '.join(lacking)}")
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            part.command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
            env=os.environ | dict(environment or {}), start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit_s)
            word = "ok" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            word, status = "timed out", None
        finally:
            _end(process)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    results = [json.loads(line.removeprefix(RESULT)) for line in lines if line.startswith(RESULT)]
    last = next((line.strip() for line in reversed(lines) if not line.startswith(RESULT)), "")
    said = {"failed": f"status {status}: {last}", "timed out": f"after {limit_s:.0f} s: {last}"}.get(word, last)
    merged: dict[str, Any] = {}
    for result in results:
        merged |= result
    return Outcome(part.name, word, time.monotonic() - started, said, merged)


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # it and all that it started are gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    parts: Sequence[Part], budget_s: float, folder: Path, tell: Callable[[Outcome], None], **options: Any
) -> list[Outcome]:
    """All parts in order. Each may take its share, by weight, of what is left of the budget."""
    end = time.monotonic() + budget_s
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        left = max(0.0, end - time.monotonic())
        limit_s = left * part.weight / sum(each.weight for each in parts[number:])
        log = folder / f"{part.name.replace(' ', '-')}.log"
        outcomes.append(run_part(part, limit_s, log, **options))
        tell(outcomes[-1])
    return outcomes


def parts_of(device: str, source: str | None, python: str = sys.executable) -> list[Part]:
    """What there is to do on a device, the surest things first."""

    def own(name: str, *arguments: str, **settings: Any) -> Part:
        command = (python, "-m", "loadtest.gpu_parts", *arguments, "--device", device)
        return Part(name, command, **settings)

    tests = ["tests/engine/test_kernels.py", "tests/engine/test_cuda.py", "tests/models/test_load_cuda.py"]
    if device == "cpu":
        tests = ["tests/engine/cuda/test_attention.py"]
    kinds = ("bnb-int8", "bnb-nf4")
    quality = (python, "-m", "loadtest.quality", "--source", source or "", "--device", device, "--kinds", *kinds)
    quality += ("--rounds", "1")
    return [
        own("kernels", "kernels", needs=("torch", "triton")),
        Part(
            "tests",
            (python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", *tests),
            weight=3.0,
            # The last four are imported when the tests are collected, whatever is run of them.
            needs=(*_ENGINE, "pytest", "pytest_asyncio", "hypothesis", "psutil", "gguf", "accelerate", "sentencepiece"),
        ),
        *(own(f"speed {mode}", "speed", "--mode", mode, needs=_ENGINE) for mode in MODES),
        own("exactness", "exactness", weight=1.5, needs=_ENGINE),
        Part(
            "quality",
            quality,
            weight=2.0,
            needs=(*_ENGINE, "bitsandbytes", "safetensors"),
            skip=None if source else "no model: give --source, a folder or what model.source takes",
        ),
    ]


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: a row a part, then a row for each mode and number of streams that was measured."""
    lines = ["| part | outcome | s | |", "|---|---|---|---|"]
    for outcome in outcomes:
        said = outcome.said.replace("|", "/")[:160]
        lines.append(f"| {outcome.name} | {outcome.status} | {outcome.seconds:.0f} | {said} |")
    measured = [(outcome.name.removeprefix("speed "), row) for outcome in outcomes for row in _rows(outcome)]
    if measured:
        lines += [
            "",
            "| mode | streams | ms a step | tok/s | first token, ms | kernel | batch-invariant |",
            "|" + "---|" * 7,
        ]
    for mode, row in measured:
        lines.append(
            f"| {mode} | {row['streams']} | {row['step_ms']:.2f} | {row['tok_s']:.0f} | {row['ttft_ms']:.1f} "
            f"| {row['kernel']} | {row['batch_invariant']} |"
        )
    return "\n".join(lines)


def _rows(outcome: Outcome) -> list[dict[str, Any]]:
    return [outcome.result[key] for key in sorted(outcome.result) if key.startswith("streams ")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--source", help="a model, as model.source in a config, for the quality of fewer bits")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--only", nargs="+", metavar="PART", help="parts whose names begin so")
    parser.add_argument("--output", type=Path, default=Path("loadtest/results/gpu_suite.json"))
    arguments = parser.parse_args()
    folder = arguments.output.with_suffix("").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    machine_part = Part(
        "machine",
        (sys.executable, "-m", "loadtest.gpu_parts", "machine", "--device", arguments.device),
        needs=("torch",),
    )
    # A GPU's driver may hang as well.
    machine = run_part(machine_part, min(90.0, 30 * arguments.minutes), folder / "machine.log")
    outcomes = [machine]

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.status} ({outcome.seconds:.0f} s) {outcome.said[:200]}", flush=True)
        document = {"machine": machine.result, "parts": [asdict(each) for each in outcomes], "table": table(outcomes)}
        arguments.output.write_text(json.dumps(document, indent=1))

    print(f"machine: {machine.status} {json.dumps(machine.result)} {machine.said}", flush=True)
    if machine.status != "ok":
        raise SystemExit("torch can't use the device: nothing was measured (--device cpu tries the suite itself)")
    parts = [
        part
        for part in parts_of(arguments.device, arguments.source)
        if arguments.only is None or part.name.startswith(tuple(arguments.only))
    ]
    run_all(parts, 60 * arguments.minutes - (time.monotonic() - started) - 5, folder, tell)
    print(f"\n{table(outcomes)}\n\nwritten to {arguments.output}, the parts' output to {folder}")
    if any(outcome.status in ("failed", "timed out") for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
