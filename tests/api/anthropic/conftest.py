"""The application with a tokenizer whose template knows reasoning, and a stand-in for the parser of tool calls."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_replica import FakeReplica, Script, card
from small_tokenizers import CHATML, byte_level_backend
from starlette.applications import Starlette
from transformers import PreTrainedTokenizerFast

from serve_app.chat.parts import ArgumentsPart, CallPart, Part, ReasoningPart, TextPart
from serve_app.chat.tokenizer import ChatTokenizer
from serve_app.generation import completion

SWITCH = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
Make = Callable[..., httpx.AsyncClient]


STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "{% if 'refuse' in m['content'] %}{{ raise_exception('no thanks') }}{% endif %}{% endfor %}"
)
"""As Qwen3.5's and Mistral's."""


@pytest.fixture(scope="session")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A tokenizer whose template knows `<think>`, and a switch for it."""
    return _tokenizer(tmp_path_factory.mktemp("thinker"), CHATML + SWITCH)


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    """A tokenizer whose template takes a system message only at the front."""
    return _tokenizer(tmp_path_factory.mktemp("strict"), STRICT + CHATML)


def _tokenizer(folder: Path, template: str) -> ChatTokenizer:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return ChatTokenizer.load(folder)


@pytest.fixture
def thinking(
    writes: Callable[..., Script],
    thinker: ChatTokenizer,
    make_app: Callable[..., Starlette],
    http: Callable[[Starlette], httpx.AsyncClient],
) -> Callable[..., tuple[httpx.AsyncClient, FakeReplica]]:
    """thinking("the model's text", batch=..., end=...) -> a client of a model that says it, and the model."""

    def make(text: str, **options: Any) -> tuple[httpx.AsyncClient, FakeReplica]:
        replica = FakeReplica([writes(text, **options)], state=card(vocab_size=thinker.vocab_size))
        return http(make_app(replica, text=thinker)), replica

    return make


class CallParser:
    """Reads `[think:...]` as reasoning and `[name(arguments)]` as a call. It tells each part at the end of the text,
    pieces of the arguments apart."""

    in_reasoning = ended = False

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> list[Part]:
        """Nothing yet."""
        self._text += text
        return []

    def flush(self) -> list[Part]:
        """All parts."""
        parts: list[Part] = []
        number = 0
        for said, thought, name, arguments in re.findall(
            r"([^\[\]]+)|\[think:(.*?)\]|\[(\w+)\((.*?)(?:\)\]|$)", self._text
        ):
            if said:
                parts.append(TextPart(said))
            elif thought:
                parts.append(ReasoningPart(thought))
            else:
                half = len(arguments) // 2
                parts.append(CallPart(number, name))
                parts += [ArgumentsPart(number, piece) for piece in (arguments[:half], arguments[half:]) if piece]
                number += 1
        return parts


@pytest.fixture
def calling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that may have reasoning are read by `CallParser`."""
    monkeypatch.setattr(completion, "new_parser", lambda answer: CallParser())
