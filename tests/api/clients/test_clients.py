"""Clients of others, unchanged but for their address: text whole and streamed, tools, structured output.

Each program of `programs` prints what its client made of the answers. `make contracts` installs the clients and runs
these tests; without the clients they are skipped.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fake_replica import FakeReplica, Script, Step, card
from small_tokenizers import byte_level_backend
from starlette.applications import Starlette
from transformers import PreTrainedTokenizerFast

from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.core import GenerationRequest

HERE = Path(__file__).parent
PROGRAMS = sorted((HERE / "programs").iterdir(), key=lambda program: program.name)
PYTHON = HERE.parents[2] / ".venv-clients" / "bin" / "python"
LIMIT_S = 120

ANSWER = "The quick brown fox says 🙂 and naïve."
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PERSON = '{"name": "Ann", "age": 30}'
PERSON_CALL = '<tool_call>\n{"name": "Person", "arguments": {"name": "Ann", "age": 30}}\n</tool_call>'
EXPECTED = {
    "text": ANSWER,
    "streamed": ANSWER,
    "tool": ["get_weather", {"city": "Paris"}],
    "after": ANSWER,
    "parsed": {"name": "Ann", "age": 30},
    "parsed_by_tools": {"name": "Ann", "age": 30},
    "response": ANSWER,
    "by_anthropic": ANSWER,
    "streamed_by_anthropic": ANSWER,
    "tool_by_anthropic": ["get_weather", {"city": "Paris"}],
}
"""What a program may print."""
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ ' <tool_call>{name, arguments}</tool_call><|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>\n' }}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{ '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML with Hermes' tool calls."""


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A tokenizer whose template knows tools."""
    folder = tmp_path_factory.mktemp("caller")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return ChatTokenizer.load(folder)


def obliging(caller: ChatTokenizer, writes: Callable[..., Script]) -> Script:
    """A model that calls the tool when it is asked for the weather, and names a person when it is asked to."""

    def script(request: GenerationRequest) -> list[Step]:
        prompt = caller.decode(request.prompt_token_ids)
        answer = ANSWER
        if "Name a person." in prompt:
            answer = PERSON_CALL if "<tool_call>" in prompt else PERSON
        elif "What is the weather?" in prompt and "sunny" not in prompt:
            answer = CALL
        return list(writes(answer)(request))

    return script


def command(program: Path) -> list[str]:
    """How the program is run. Skips where its clients are not installed."""
    if program.suffix == ".py":
        if not PYTHON.exists():
            pytest.skip("make contracts installs the clients")
        return [str(PYTHON), "-P", str(program)]  # a program may have the name of the package that it uses
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed (Debian: apt install nodejs npm)")
    if not (HERE / "node_modules").exists():
        pytest.skip("make contracts installs the clients")
    return [node, str(program)]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
async def test_a_client_works_unchanged(
    program: Path,
    caller: ChatTokenizer,
    writes: Callable[..., Script],
    make_app: Callable[..., Starlette],
    serve: Callable[[Starlette], Awaitable[str]],
) -> None:
    replica = FakeReplica([obliging(caller, writes)], state=card(vocab_size=caller.vocab_size, context_tokens=4096))
    url = await serve(make_app(replica, text=caller))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    running = await asyncio.create_subprocess_exec(
        *command(program),
        url,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            out, err = await running.communicate()
    finally:
        if running.returncode is None:
            running.kill()
    assert running.returncode == 0, err.decode()[-3000:]
    printed: dict[str, Any] = json.loads(out.splitlines()[-1])
    assert printed == {name: EXPECTED[name] for name in printed}
