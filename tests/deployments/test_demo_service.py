"""The whole service with the demo model, as a user meets it: `serve run`'s application, HTTP, the official client."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import torch
from opened import ALL, LOOPBACK, listening, ray_processes, told, written
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from serve_app.app import build
from serve_app.config import AppConfig, ModelConfig
from serve_app.models.cache import cache_directory
from serve_app.models.source import resolve
from serve_app.observability.panels import PANELS

pytestmark = [pytest.mark.ray, pytest.mark.demo]

APP = "demo"
PORTS = Path(__file__).parents[2] / "docs" / "operations.md"
MESSAGES = [{"role": "user", "content": "What is a prime number?"}]
TOKENS = 24
ASKED = 6000
"""Nearly all that its KV cache holds."""


@pytest.fixture(scope="module")
def folder() -> Path:
    """The demo model on disk; fetched when it is not there."""
    return resolve(ModelConfig(), cache_directory(), progress=lambda stage: None).folder


@pytest.fixture(scope="module")
def url(deployed: Callable[..., str], until: Callable[..., httpx.Response], folder: Path) -> str:
    config = {"engine": {"kv_cache_memory": "300MB", "max_running": 4}, "ingress": {"num_cpus": 0.5}}
    url = deployed(build(AppConfig.model_validate(config)), APP)
    until(f"{url}/ready", lambda response: response.status_code == 200)
    return url


@pytest.fixture(scope="module")
def reference(folder: Path) -> str:
    """What transformers' own `generate` answers, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    with torch.inference_mode():
        output = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def test_a_greedy_stream_is_what_generate_says(url: str, reference: str) -> None:
    body = {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    text = ""
    with httpx.stream("POST", f"{url}/stream", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                text += json.loads(line[6:]).get("generated_text", "")
    assert text == reference


def test_the_official_client(url: str, reference: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
    name = client.models.list().data[0].id
    whole = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=TOKENS, temperature=0)  # type: ignore[arg-type]
    assert whole.choices[0].message.content == reference
    assert whole.usage is not None
    assert whole.usage.completion_tokens == TOKENS
    chunks = client.chat.completions.create(
        model=name,
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == reference


async def test_a_disconnect_stops_the_engine(url: str) -> None:
    """The engine stops with the step in which it hears of it (its own tests); until then Serve passes it on."""
    handle = serve.get_deployment_handle("ModelServer", APP)
    assert (await handle.stats.remote()).running == 0
    body = {"prompt": "Once upon a time", "max_tokens": ASKED, "temperature": 0}
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", f"{url}/stream", json=body) as response:
        pieces = response.aiter_bytes()  # held: a collected generator would close the connection
        await anext(pieces)
        before = await handle.stats.remote()
        assert before.running == 1
        assert before.used_pages > 0
    async with asyncio.timeout(60):
        while (after := await handle.stats.remote()).running:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert after.counters.output_tokens - before.counters.output_tokens < ASKED / 2
    assert after.used_pages == 0


def test_every_panel_of_the_dashboard_has_data(url: str, until: Callable[..., httpx.Response]) -> None:
    for _ in range(2):
        httpx.post(f"{url}/stream", json={"messages": MESSAGES, "max_tokens": TOKENS}, timeout=60).raise_for_status()
    asked = [query.expression for panel in PANELS for query in panel.queries]
    wanted = {name for text in asked if "or vector(0)" not in text for name in re.findall(r"serve_app_\w+", text)}
    assert len(wanted) > 10

    def missing(response: httpx.Response) -> set[str]:
        families = text_string_to_metric_families(response.text)
        return wanted - {sample.name for family in families for sample in family.samples}

    answer = until(f"{url}/metrics", lambda response: not missing(response))
    told = {
        (s.name, s.labels.get("phase")): s.value for f in text_string_to_metric_families(answer.text) for s in f.samples
    }
    assert told["serve_app_steps_total", "decode"] > 0
    assert told["serve_app_step_time_seconds_total", "prefill"] > 0


def test_every_port_and_file_is_in_the_tables(url: str, ray_folder: Path) -> None:
    """docs/operations.md: no port is open to more than it says, and nothing is written elsewhere."""
    assert httpx.get(f"{url}/stream?prompt=Once&max_tokens=1&resume=1", timeout=60).status_code == 200
    processes = ray_processes(APP)
    found = listening(processes)
    assert found - told(PORTS) == set()
    assert {("ModelServer", LOOPBACK), ("Ingress", ALL), ("ProxyActor", LOOPBACK), ("gcs_server", ALL)} <= found
    places = (str(ray_folder), str(cache_directory()), "/dev/shm", str(Path(tempfile.gettempdir(), "pymp-")))
    ours = {file.path for file in psutil.Process().open_files()}
    paths = written(processes)
    assert any(path.endswith("/sockets/raylet") for path in paths)
    assert {path for path in paths if not path.startswith(places)} - ours == set()
