"""Validate a config file without starting anything, and say what it needs: memory, CPUs, GPUs, a model to fetch."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
from pathlib import Path

from serve_app.cli.announce import address
from serve_app.cli.capacity import size, streams
from serve_app.cli.config_file import ConfigFile, ServedApp, load
from serve_app.cli.errors import CommandError
from serve_app.config import ReplicasConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG")


def run(arguments: argparse.Namespace) -> int:
    """Print what is wrong, or what it needs. What this machine lacks is a warning: the file may be for another."""
    file = load(Path(arguments.config))
    print(f"{file.path} is valid.")
    for name in file.foreign:
        print(f"Application {name!r} is not serve_app's; its args were not checked.")
    for app in file.apps:
        print(f"\n{app.name or 'application'} at {address(file, file.host, file.port)}")
        for line in describe(app):
            print(f"  {line}")
    for warning in shortages(file):
        print(f"\nwarning: {warning}")
    return 0


def describe(app: ServedApp) -> list[str]:
    """What one application needs. Raises CommandError for a model that can't be served."""
    config = app.config
    on_gpu = config.model_server.num_gpus > 0
    return [
        *_model_lines(app, on_gpu),
        f"model server  {_replicas(config.model_server)}",
        f"ingress       {_replicas(config.ingress)}",
    ]


def _model_lines(app: ServedApp, on_gpu: bool) -> list[str]:
    # Seconds of imports, which a config with mistakes should not wait for.
    from serve_app.engine.build import CPU_KV_CACHE_BYTES
    from serve_app.models.cache import cache_directory
    from serve_app.models.errors import ModelError
    from serve_app.models.planning import plan_replica
    from serve_app.models.source import find

    model, engine = app.config.model, app.config.engine
    try:
        files = find(model, cache_directory(app.config.cache_dir))
        if files is None:
            return [f"model         {model.source}: not on this machine; once it is fetched, its size is told here"]
        kv_bytes = engine.kv_cache_memory or (0 if on_gpu else CPU_KV_CACHE_BYTES)
        plan = plan_replica(files, model, has_gpu=on_gpu, kv_cache_bytes=kv_bytes)
    except ModelError as error:
        raise CommandError(f"application {app.name!r}: {error}", status=2) from error
    lines = [f"model         {files.name}, in {files.folder}"]
    if kv_bytes:
        memory = f"{size(plan.weights_bytes)} of weights + {size(kv_bytes)} of KV cache, and some for the computation"
        lines += [
            f"a replica     {memory}",
            f"holds         {streams(plan.kv_capacity_tokens, plan.context_tokens, engine.max_running)}",
        ]
    else:
        lines += [
            f"a replica     {size(plan.weights_bytes)} of weights, and KV cache in what is left of "
            f"{engine.gpu_memory_fraction:.0%} of the GPU",
            f"holds         {2**30 // plan.kv_bytes_per_token:,} tokens in each GiB of KV cache; "
            f"a stream has up to {plan.context_tokens:,}",
        ]
    return lines


def _replicas(replicas: ReplicasConfig) -> str:
    scaling = replicas.autoscaling
    count = f"{scaling.min_replicas} to {scaling.max_replicas}" if scaling else str(replicas.num_replicas or 1)
    each = [f"{replicas.num_cpus:g} CPU"] + ([f"{replicas.num_gpus:g} GPU"] if replicas.num_gpus else [])
    each += [f"{amount:g} {name}" for name, amount in replicas.resources.items()]
    return f"{count} x ({', '.join(each)})"


def shortages(file: ConfigFile) -> list[str]:
    """What the smallest number of replicas needs and this machine has not: Ray would wait for it for ever."""
    deployments = [part for app in file.apps for part in (app.config.model_server, app.config.ingress)]
    needed_cpus = sum(_least(part) * part.num_cpus for part in deployments)
    needed_gpus = sum(_least(part) * part.num_gpus for part in deployments)
    cpus, gpus = os.cpu_count() or 1, _gpus()
    found = []
    if needed_cpus > cpus:
        found.append(f"CPUs needed: {needed_cpus:g}; this machine has {cpus}; lower num_cpus or the number of replicas")
    if math.ceil(needed_gpus) > gpus:
        found.append(
            f"GPUs needed: {needed_gpus:g}; this machine has {gpus}; set num_gpus: 0, or serve on a cluster with GPUs"
        )
    return found


def _least(replicas: ReplicasConfig) -> int:
    scaling = replicas.autoscaling
    return max(1, scaling.min_replicas) if scaling else replicas.num_replicas or 1


def _gpus() -> int:
    """NVIDIA's own count; 0 where its driver is not installed."""
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else 0
