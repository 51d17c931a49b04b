"""The program of the peer ray.serve.llm, run by the interpreter of its own environment: `ray_llm.py JSON`.

Imports nothing of this project.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def application(wanted: dict[str, Any]) -> serve.Application:
    """One replica of the model on this machine's CPU."""
    config = LLMConfig(
        model_loading_config={"model_id": wanted["model_id"], "model_source": wanted["model"]},
        engine_kwargs={
            "dtype": "float32",
            "max_model_len": wanted["context_tokens"],
            "max_num_seqs": wanted["streams"],
        },
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1}]},
        # Serve would start a vLLM that can't start twenty times before it says so.
        deployment_config={"num_replicas": 1, "max_constructor_retry_count": 1},
        runtime_env={"env_vars": wanted["environment"]},
    )
    return build_openai_app({"llm_configs": [config]})


def main() -> None:
    wanted = json.loads(sys.argv[1])
    # Ray counts CPUs only to place actors; with the machine's own number its many actors would not find room.
    ray.init(num_cpus=8)
    serve.start(http_options={"host": "127.0.0.1", "port": wanted["port"]})
    serve.run(application(wanted), blocking=False)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
