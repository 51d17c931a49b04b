"""Picking a command, and how the program ends."""

import subprocess
import sys

import pytest
from fake_api import FakeApi

from serve_app import __version__
from serve_app.cli.main import COMMANDS, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in COMMANDS)


def test_no_command_is_an_error_that_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "hint"), [("chta", "did you mean `chat`?"), ("zzz", "the commands are: serve")])
def test_a_mistyped_command(typed: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([typed]) == 2
    assert hint in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"serve-app {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: serve-app {name}" in capsys.readouterr().out


def test_client_commands_import_neither_ray_nor_torch(api: FakeApi) -> None:
    program = (
        "import sys; from serve_app.cli.main import main\n"
        f"assert main(['models', '--url', {api.url!r}]) == 0\n"
        f"assert main(['chat', '--url', {api.url!r}, '--once', 'Hi']) == 0\n"
        "print([name for name in ('ray', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["fake-1", "Hello there.", "[]"]


def test_output_that_nobody_reads(api: FakeApi) -> None:
    entry = {"id": "x" * 100_000}
    api.routes["/v1/models"] = lambda exchange: exchange.answer(200, {"data": [entry] * 20})
    program = f"import sys; from serve_app.cli.main import main; sys.exit(main(['models', '--url', {api.url!r}]))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 1
