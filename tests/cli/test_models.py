"""serve-app models."""

import json

import pytest
from fake_api import FakeApi

from serve_app.cli.main import main


def test_names(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--url", api.url]) == 0
    assert capsys.readouterr().out == "fake-1\n"


def test_json(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--url", api.url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["max_model_len"] == 2048


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--url", "http://127.0.0.1:1"]) == 1
    assert "no server answers at http://127.0.0.1:1" in capsys.readouterr().err


def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--url", "8000"]) == 2
    assert "is not an address" in capsys.readouterr().err
