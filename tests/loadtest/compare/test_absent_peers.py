"""Peers that can't be had are named with the reason; environments are made once, and never half."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from loadtest.compare import __main__ as compare
from loadtest.compare import environments
from loadtest.compare.contenders import FAST, INVARIANT, PEERS, Start, serve_app_config
from loadtest.compare.environments import Environment, InstallationFailed, install, is_installed, reason_in
from loadtest.compare.results import OtherSettings, Results
from serve_app.config import AppConfig

SETTINGS = {"threads": 2}
PIP_SAYS = """Collecting no-such-package
ERROR: Could not find a version that satisfies the requirement no-such-package
ERROR: No matching distribution found for no-such-package

[notice] A new release of pip is available
"""


class Installer:
    """Stands in for pip: notes the commands, and fails when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[list[str]] = []
        self.fails = False
        monkeypatch.setattr(environments, "_run", self._run)

    def _run(self, command: list[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
        self.commands.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir()
        elif self.fails:
            raise InstallationFailed("no network")


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> Installer:
    return Installer(monkeypatch)


def test_an_environment_is_made_once_and_again_when_its_recipe_changes(installer: Installer, tmp_path: Path) -> None:
    wanted = Environment("peer", ("a==1",), unwanted=("b",))
    install(wanted, tmp_path, "https://index.example")
    assert [" ".join(command[2:]) for command in installer.commands][1:] == [
        "pip --disable-pip-version-check --no-input install a==1 --extra-index-url https://index.example",
        "pip --disable-pip-version-check --no-input uninstall --yes b",
    ]
    install(wanted, tmp_path, None)
    assert len(installer.commands) == 3
    install(Environment("peer", ("a==2",), unwanted=("b",)), tmp_path, None)
    assert len(installer.commands) == 6


def test_a_failed_installation_is_not_taken_for_a_complete_one(installer: Installer, tmp_path: Path) -> None:
    wanted = Environment("peer", ("a==1",))
    installer.fails = True
    with pytest.raises(InstallationFailed):
        install(wanted, tmp_path, None)
    assert not is_installed(wanted, tmp_path)
    installer.fails = False
    install(wanted, tmp_path, None)
    assert is_installed(wanted, tmp_path)


def test_the_installer_is_quoted() -> None:
    assert reason_in(PIP_SAYS) == "No matching distribution found for no-such-package"
    assert reason_in("all well\nKilled\n") == "Killed"
    assert reason_in("") == "no output"


def test_a_command_that_fails_is_quoted_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(InstallationFailed, match=r"ERROR|broken.*log"):
        environments._run(["sh", "-c", "echo 'ERROR: broken'; exit 3"], tmp_path / "log")


def test_an_absent_peer_is_in_json_and_markdown_with_its_reason(installer: Installer, tmp_path: Path) -> None:
    installer.fails = True
    out = tmp_path / "compare.json"
    arguments = compare.arguments_of(["--peers", "vllm", "--environments", str(tmp_path / "peers"), "--out", str(out)])
    results = Results(out, SETTINGS)
    assert compare.install_peers(arguments, results) == []
    assert json.loads(out.read_text())["absent"] == {"vLLM, CPU build": "no network"}
    assert "- **vLLM, CPU build is absent**: no network" in compare.markdown(results)
    assert "Nothing was measured." in compare.markdown(results)


def test_a_peer_that_was_neither_measured_nor_absent_is_named(tmp_path: Path) -> None:
    results = Results(tmp_path / "compare.json", SETTINGS)
    results.absent("ray.serve.llm", "no network")
    text = compare.markdown(results)
    assert "- **transformers serve was not run.**" in text
    assert "ray.serve.llm was not run" not in text


def test_a_llama_server_that_was_built_elsewhere_takes_the_place_of_the_package(
    installer: Installer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\necho version: 11434 >&2\necho built with a compiler >&2\n")
    server.chmod(0o755)
    converted: list[tuple[Path, ...]] = []
    monkeypatch.setattr(compare, "ensure_gguf", lambda *paths: converted.append(paths))
    peers = "llama.cpp,llama.cpp-split,llama.cpp-4bit"
    arguments = compare.arguments_of(
        ["--peers", peers, "--llama-server", str(server), "--environments", str(tmp_path / "peers")]
    )
    results = Results(tmp_path / "compare.json", SETTINGS)
    present = compare.install_peers(arguments, results)
    assert installer.commands == []
    folder = tmp_path / "peers"
    assert converted == [(folder / "demo.gguf", folder / "demo-f32.gguf", tmp_path / "llama-quantize")] * 3
    assert results.versions["llama.cpp"] == ["built elsewhere, version: 11434; built with a compiler"]
    start = Start(Path("python"), tmp_path, tmp_path, tmp_path / "peers", 23456, 2, 32, server)
    unified, split, coarse = (peer.command(start).arguments for peer in present)
    assert unified[0] == split[0] == str(server)
    assert ("--kv-unified" in unified, "--no-kv-unified" in split) == (True, True)
    assert unified[:-1] == split[:-1]
    assert [str(folder / "demo-f32.gguf") in unified, str(folder / "demo.gguf") in coarse] == [True, True]


def test_a_llama_server_that_is_not_there_is_absent(installer: Installer, tmp_path: Path) -> None:
    arguments = compare.arguments_of(["--peers", "llama.cpp", "--llama-server", str(tmp_path / "nothing")])
    results = Results(tmp_path / "compare.json", SETTINGS)
    assert compare.install_peers(arguments, results) == []
    assert "No such file" in results.absentees["llama.cpp"]


def test_slices_add_up_and_what_was_measured_is_not_absent(tmp_path: Path) -> None:
    out = tmp_path / "compare.json"
    first = Results(out, SETTINGS)
    first.absent("a", "no compiler")
    first.add({"contender": "b"})
    second = Results(out, SETTINGS)
    second.add({"contender": "a"})
    second.absent("b", "no network today")
    assert (second.absentees, [r["contender"] for r in Results(out, SETTINGS).records]) == ({}, ["b", "a"])
    with pytest.raises(OtherSettings, match="another --out"):
        Results(out, {"threads": 4})


def test_each_peer_stands_between_the_two_modes() -> None:
    first, second = PEERS["llama.cpp"], PEERS["vllm"]
    assert compare.schedule([first, second]) == [FAST, first, INVARIANT, FAST, second, INVARIANT]
    assert compare.schedule([]) == [FAST, INVARIANT]


def test_unknown_peers_and_sets_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--peers", "nobody"], ["--sets", "narrow"], ["--concurrency", "x"]):
        with pytest.raises(SystemExit):
            compare.arguments_of(wrong)
    assert "unknown peers nobody" in capsys.readouterr().err


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_our_config_is_valid_and_says_what_is_compared(tmp_path: Path, batch_invariant: bool) -> None:
    base = yaml.safe_load(Path("configs/serve.yaml").read_text())
    start = Start(Path("python"), tmp_path, tmp_path, tmp_path, 23456, 3, 48)
    config = serve_app_config(base, start, batch_invariant)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 23456}
    ours = AppConfig.model_validate(config["applications"][0]["args"])
    assert (ours.engine.batch_invariant, ours.engine.threads, ours.engine.max_running) == (batch_invariant, 3, 48)
    assert ours.model.source == str(tmp_path)
    assert base == yaml.safe_load(Path("configs/serve.yaml").read_text())
