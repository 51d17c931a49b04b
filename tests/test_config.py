"""What a wrong configuration is told, by Serve too, which prints pydantic's own error."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.config import AppConfig

URL = "redis://:secret@cache:6379/0"


@pytest.mark.parametrize(
    "wrong",
    [
        {"streams": {"store": f"x-{URL}"}},
        {"streams": {"store": [URL]}},
        {"streams": URL},
        {"streams": {"store": URL}, "api": {"max_streams": 9999}},
        {"streams": {"store": URL, "stroe": URL}},
    ],
    ids=["scheme", "type", "section", "another field", "unknown field"],
)
def test_an_error_names_the_field_and_never_repeats_a_password(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        AppConfig.model_validate(wrong)
    assert "secret" not in str(refused.value)
    assert "streams" in str(refused.value)
