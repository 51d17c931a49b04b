"""What a chaos run reads from the logs of the ingress replicas is what the ingress writes there."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from fake_replica import FakeReplica, generation_request, says, tokens
from msgspec.structs import replace

from loadtest.chaos import moved_requests
from serve_app.core import FinishReason, GenerationStats
from serve_app.generation.attempt_history import FailoverSettings
from serve_app.generation.attempts import Generations
from serve_app.generation.replica import ReplicaLost


async def test_a_request_that_was_continued_once_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    last = replace(tokens(1, 101, finish=FinishReason.LENGTH), stats=GenerationStats(prefill_s=0.25))
    replica = FakeReplica([says(tokens(0, 100), ReplicaLost("it died")), says(last)])
    generations = Generations(replica, FailoverSettings(first_backoff_s=0.001))
    generations.add(generation_request(request_id="chaos-7-0"))
    async with generations:
        assert [reply async for _, reply in generations.replies()]
    logs = tmp_path / "serve"
    logs.mkdir()
    (logs / "replica_serve_app_Ingress_x.log").write_text("\n".join(caplog.messages))
    moves = moved_requests(tmp_path)
    assert moves.moved == {"chaos-7-0"}
    assert moves.again_s == {"chaos-7-0": 0.25}
