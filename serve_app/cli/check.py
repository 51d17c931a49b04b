"""Validate a config file without starting anything, and say what it needs: memory, CPUs, GPUs, a model to fetch."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve_app.cli.access import describe_keys
from serve_app.cli.command_error import CommandError
from serve_app.cli.config_file import ConfigFile, ServedApp, load
from serve_app.cli.environment import own_cluster, server_environment
from serve_app.cli.progress import ProgressLine
from serve_app.cli.ray_address import stale_address
from serve_app.cli.ray_token import ALLOW_OPEN, cluster_token
from serve_app.config import AppConfig, ReplicasConfig
from serve_app.demo_config import DEMO_CONFIG
from serve_app.deployments.status import banner
from serve_app.memory import available_memory_bytes
from serve_app.processors import schedulable_cpus

if TYPE_CHECKING:
    from serve_app.models.sizes import MemoryPlan

REPLICA_BYTES = 350_000_000
"""Memory of a CPU replica besides weights and KV cache: libraries, and the work space of a step. Measured: 343 MB with
the demo model (1,181 MB in all, of which 538 were weights and 300 KV cache)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", nargs="?", default=DEMO_CONFIG, help=f"default: the demo's, {DEMO_CONFIG}")
    parser.add_argument(ALLOW_OPEN, action="store_true", help="accept a Ray cluster that asks for no token")


def run(arguments: argparse.Namespace) -> int:
    """Print what a valid file needs. What this machine lacks is only a warning: the file may be for another machine."""
    file = load(Path(arguments.config))
    print(f"{file.path} is valid.")
    environment = server_environment(os.environ)
    if not own_cluster(environment):
        cluster_token(environment, allow_open=arguments.allow_open_cluster)  # raises for a cluster without a token
    for name in file.foreign:
        print(f"Application {name!r} is not serve_app's; its args were not checked.")
    memory_bytes = 0
    access_warnings: list[str] = []
    for app in file.apps:
        url = banner.address(file.host, file.port, app.route_prefix, https=file.https)
        print(f"\n{app.name or 'application'} at {url}")
        lines, plan = look_up(app)
        if plan is not None:
            lines += _replica_lines(app.config, plan)
            if not _on_gpu(app.config):
                memory_bytes += _least(app.config.model_server) * (plan.total_bytes + REPLICA_BYTES)
        lines += [
            f"model server  {_replicas(app.config.model_server)}",
            f"ingress       {_replicas(app.config.ingress)}",
        ]
        keys, warning = describe_keys(app, file.host, environment)
        access_warnings += [warning] if warning else []
        for line in [*lines, keys]:
            print(f"  {line}")
    warnings = [*access_warnings, *shortages(file), *_memory_shortage(memory_bytes), *_slow_kernels(file)]
    if stale := stale_address(os.environ):
        warnings.append(stale)
    for warning in warnings:
        print(f"\nwarning: {warning}")
    return 0


def look_up(app: ServedApp) -> tuple[list[str], MemoryPlan | None]:
    """Lines about an application's model, and the memory of one replica; None when its size can't be known yet.

    For a hub model that is not on this machine, the config is fetched and the size computed from it. Raises
    CommandError for a model that can't be served.
    """
    # Seconds of imports, which a config with mistakes should not wait for.
    from serve_app.engine.kv_budget import CPU_KV_CACHE_BYTES
    from serve_app.models.cache import cache_directory
    from serve_app.models.model_error import ModelError
    from serve_app.models.planning import fetch_settings, plan_replica
    from serve_app.models.source import SourceKind, find, source_kind

    model, engine, on_gpu = app.config.model, app.config.engine, _on_gpu(app.config)
    try:
        if (files := find(model, cache_directory(app.config.cache_dir))) is not None:
            said = f"model         {files.name}, in {files.folder}"
        else:
            said = f"model         {model.source}: not on this machine"
            if source_kind(model.source) is SourceKind.HUB:
                try:
                    with ProgressLine() as line:
                        files = fetch_settings(model, line.show)
                except ModelError as error:
                    return [f"{said}, and its size is unknown: {error}"], None
        budget = engine.kv_cache_memory or (0 if on_gpu else CPU_KV_CACHE_BYTES)
        plan = plan_replica(files, model, has_gpu=on_gpu, kv_cache_bytes=budget)
    except ModelError as error:
        raise CommandError(f"application {app.name!r}: {error}", status=2) from error
    # The engine, too, allocates no more KV cache than `max_running` requests of full length can fill.
    useful = plan.context_tokens * engine.max_running * plan.kv_bytes_per_token
    return [said], replace(plan, kv_cache_bytes=min(budget, useful))


def _replica_lines(config: AppConfig, plan: MemoryPlan) -> list[str]:
    weights = f"a replica     {size(plan.weights_bytes)} of weights"
    if plan.kv_cache_bytes:
        return [
            f"{weights} + {size(plan.kv_cache_bytes)} of KV cache, and some for the computation",
            f"holds         {streams(plan.kv_capacity_tokens, plan.context_tokens, config.engine.max_running)}",
        ]
    return [
        f"{weights}, and KV cache in what is left of {config.gpu_memory_fraction:.0%} of the GPU",
        f"holds         {2**30 // plan.kv_bytes_per_token:,} tokens in each GiB of KV cache; "
        f"a stream has up to {plan.context_tokens:,}",
    ]


def size(bytes_: int) -> str:
    """1073741824 -> '1.07 GB'."""
    if bytes_ >= 10**9:
        return f"{bytes_ / 10**9:.2f} GB"
    return f"{bytes_ / 10**6:.0f} MB"


def streams(kv_tokens: int, context_tokens: int, max_running: int) -> str:
    """How many streams a replica holds: at the full context length, and how long `max_running` streams can be."""
    longest = min(context_tokens, kv_tokens)
    alone = min(kv_tokens // longest, max_running) if longest else 0
    shared = min(kv_tokens // max_running, context_tokens)
    text = f"{alone} {'stream' if alone == 1 else 'streams'} of {longest:,} tokens"
    if alone < max_running:
        text += f", or {max_running} of {shared:,}"
    return text


def _on_gpu(config: AppConfig) -> bool:
    return config.model_server.num_gpus > 0 and config.model.device != "cpu"


def _replicas(replicas: ReplicasConfig) -> str:
    scaling = replicas.autoscaling
    count = f"{scaling.min_replicas} to {scaling.max_replicas}" if scaling else str(replicas.num_replicas or 1)
    each = [f"{replicas.num_cpus:g} CPU"] + ([f"{replicas.num_gpus:g} GPU"] if replicas.num_gpus else [])
    each += [f"{amount:g} {name}" for name, amount in replicas.resources.items()]
    return f"{count} x ({', '.join(each)})"


def shortages(file: ConfigFile) -> list[str]:
    """CPUs and GPUs that the smallest number of replicas needs and this machine lacks: Ray would wait forever."""
    deployments = [part for app in file.apps for part in (app.config.model_server, app.config.ingress)]
    needed_cpus = sum(_least(part) * part.num_cpus for part in deployments)
    needed_gpus = sum(_least(part) * part.num_gpus for part in deployments)
    cpus, gpus = schedulable_cpus(), _gpus()
    found = []
    if needed_cpus > cpus:
        whole = os.cpu_count() or 1
        has = f"this machine has {cpus}" if cpus == whole else f"of this machine's {whole} {cpus} may be used here"
        found.append(f"CPUs needed: {needed_cpus:g}; {has}; lower num_cpus or the number of replicas")
    if math.ceil(needed_gpus) > gpus:
        found.append(
            f"GPUs needed: {needed_gpus:g}; this machine has {gpus}; set num_gpus: 0, or serve on a cluster with GPUs"
        )
    return found


def _memory_shortage(needed_bytes: int) -> list[str]:
    """A warning when the smallest number of CPU replicas needs more memory than is free: the system would kill them."""
    free = available_memory_bytes()
    if free is None or needed_bytes <= free:
        return []
    return [
        f"memory needed: {size(needed_bytes)}, and some for Ray and the ingress; this machine has {size(free)} free; "
        "lower engine.kv_cache_memory or the number of replicas, or use a smaller model"
    ]


def _slow_kernels(file: ConfigFile) -> list[str]:
    """A warning when our CPU kernels can't be compiled here, so that models on a CPU would use torch's."""
    if all(_on_gpu(app.config) or not app.config.engine.cpu_kernels for app in file.apps):
        return []
    from serve_app.engine.cpu.compiler import compiler_command
    from serve_app.engine.engine_error import EngineError

    try:
        compiler_command()
    except EngineError as error:
        return [f"{error}; without them torch's kernels are used, about half as fast with several streams"]
    return []


def _least(replicas: ReplicasConfig) -> int:
    scaling = replicas.autoscaling
    return max(1, scaling.min_replicas) if scaling else replicas.num_replicas or 1


def _gpus() -> int:
    """The number of GPUs that nvidia-smi lists; 0 where it is not installed or fails."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
