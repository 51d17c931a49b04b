"""The load generator of all protocols against the real application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fake_replica import FakeReplica, card
from grpc_server import grpc_server
from starlette.applications import Starlette

from loadtest.protocol_load import PROTOCOLS, drive
from serve_app.api.grpc.servicer import Servicer
from serve_app.chat.tokenizer import ChatTokenizer

TEXT = "The quick brown fox says 🙂 and naïve. " * 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_every_piece_of_every_protocol_is_timed(
    protocol: str,
    make_app: Callable[..., Starlette],
    serve: Callable[[Starlette], Awaitable[str]],
    writes: Callable[..., Any],
    tokenizer: ChatTokenizer,
) -> None:
    replica = FakeReplica([writes(TEXT)], state=card(name="paced", vocab_size=tokenizer.vocab_size))
    app = make_app(replica)
    url = await serve(app)
    async with grpc_server(Servicer(app, replica.model)) as target:
        times = await drive(url, target, protocol, 2, 20)
        assert len(times["ttft_s"]) == 2
        assert 0 < times["itl_p50_s"] <= times["itl_p99_s"] < 1
        with pytest.raises(RuntimeError, match="tokens instead of 200"):
            await drive(url, target, protocol, 1, 200)
