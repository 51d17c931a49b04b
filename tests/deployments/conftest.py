"""What the tests of the deployments share."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from small_tokenizers import CHATML, byte_level_backend


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with everything that an ingress needs, and no weights."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    folder.mkdir()
    byte_level_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "bos_token": "<|endoftext|>",
                "chat_template": CHATML,
            }
        )
    )
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "eos_token_id": 2})
    )
    return folder


@pytest.fixture(scope="session")
def until() -> Callable[..., httpx.Response]:
    """`until(url, condition)` asks until the answer satisfies the condition, and gives that answer.

    `times`: so often in a row, where several processes answer in turn.
    """

    def ask(
        url: str, condition: Callable[[httpx.Response], bool], timeout_s: float = 180, times: int = 1
    ) -> httpx.Response:
        deadline = time.monotonic() + timeout_s
        met = 0
        while True:
            try:
                response = httpx.get(url, timeout=30)
                met = met + 1 if condition(response) else 0
                if met == times:
                    return response
                if met:
                    continue
                found = f"{response.status_code} {response.text}"
            except httpx.TimeoutException as error:  # a busy machine: Serve starts what was killed
                found = repr(error)
            assert time.monotonic() < deadline, f"still {found}"
            time.sleep(0.1)

    return ask
