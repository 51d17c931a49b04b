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


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [
        ("2GiB", 2 * 2**30),
        ("500 MB", 500_000_000),
        (" 1.5 kib ", 1536),
        (".5TiB", 2**39),
        ("12345", 12345),
        (12345, 12345),
        ("8TB", 8 * 10**12),
    ],
)
def test_a_size_is_a_number_of_bytes_or_has_a_unit(written: str | int, size_bytes: int) -> None:
    config = AppConfig.model_validate({"engine": {"kv_cache_memory": written}})
    assert config.engine.kv_cache_memory == size_bytes
    assert AppConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "written", ["1,5GiB", "2GiB of it", "1.5.3MB", "1e3MB", "2 bananas", "-5", "GiB", "", 1.5, [1]]
)
def test_what_is_no_size_is_told_how_to_write_one(written: object) -> None:
    with pytest.raises(ValidationError, match="is not a size; write a number of bytes or"):
        AppConfig.model_validate({"engine": {"kv_cache_memory": written}})


@pytest.mark.parametrize("written", [0, "0", "0.4B"])
def test_a_size_is_more_than_nothing(written: str | int) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        AppConfig.model_validate({"api": {"max_body_bytes": written}})
