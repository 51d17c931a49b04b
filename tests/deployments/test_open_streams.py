"""What an ingress makes of the configuration of resumable streams, and of a URL of a store that can't be read."""

from __future__ import annotations

import pytest
from fake_replica import FakeReplica

from serve_app.config import AppConfig
from serve_app.deployments.journal_actor import open_streams
from serve_app.models.model_error import ModelError


@pytest.mark.parametrize("url", ["redis://:sesame#x@host:6379/0", "redis://host:sesame/0", "redis://[::1/0"])
def test_a_url_that_can_not_be_read_is_refused_without_its_password(url: str) -> None:
    config = AppConfig.model_validate({"streams": {"store": url}})
    with pytest.raises(ModelError, match=r"streams\.store.*percent-encoded") as refused:
        open_streams(FakeReplica([]), config, "app")
    assert "sesame" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_the_limits_of_the_configuration_hold_for_events_too() -> None:
    limits = {"streams": {"max_bytes": 1000}, "api": {"slow_reader_bytes": 100}}
    settings = open_streams(FakeReplica([]), AppConfig.model_validate(limits), "app")._context.settings
    assert (settings.max_event_bytes, settings.max_stream_event_bytes) == (1000, 100)
