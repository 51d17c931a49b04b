"""The built wheel, in an environment that has nothing else of this project: it serves the demo from anywhere."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import fake_serve_run
import pytest
import yaml

from serve_app.app import demo
from serve_app.config import AppConfig
from serve_app.demo_config import DEMO_CONFIG

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
SERVE = f"""
import sys
from serve_app.cli import serve
serve.SERVE_RUN = (sys.executable, {fake_serve_run.__file__!r}, "run")
serve._fetch_models = lambda file: print("fetching", [app.config.model.source for app in file.apps])
from serve_app.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
DEMO = """
import serve_app
from serve_app.app import demo
application = demo({"cache_dir": "/elsewhere"})
print(serve_app.__file__)
print(application._bound_deployment.init_args[0].model_dump_json())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what a checkout holds, in a folder of its own."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("serve_app", "configs"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-c", BUILD, str(built)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: the wheel, and beside it what it depends on, lent by the tests' own."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    interpreter = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib"))  # .pth files in there are not read
    command = [sys.executable, "-m", "pip", "--python", str(interpreter), "install", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, timeout=120)
    return interpreter


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    state = {"SERVE_APP_STATE": str(tmp_path / "state"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ray = {"RAY_AUTH_TOKEN": "of the tests", "RAY_TMPDIR": "/tmp"}  # no file of Ray's in the home of who runs them
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | state | ray


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty one, to start from."""
    (tmp_path / "anywhere").mkdir()
    return tmp_path / "anywhere"


def test_serve_without_a_config_serves_the_demo(
    python: Path, folder: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    environment["HOME"] = str(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serving = subprocess.Popen(
        [python, "-c", SERVE, "serve", "--port", str(port)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = ""
    try:
        assert serving.stdout is not None
        while f"serve_app is ready at http://127.0.0.1:{port}" not in output:
            line = serving.stdout.readline()
            assert line, output
            output += line
    finally:
        serving.send_signal(signal.SIGINT)
        assert serving.wait(60) == 0
    assert "fetching ['demo']" in output
    assert not (tmp_path / ".ray").exists()
    derived = yaml.safe_load((Path(environment["SERVE_APP_STATE"]) / "servers" / f"{port}.yaml").read_text())
    assert derived["applications"] == yaml.safe_load((ROOT / "configs/serve.yaml").read_text())["applications"]


def test_the_command_checks_the_demo(python: Path, folder: Path, environment: dict[str, str]) -> None:
    command = [str(python.with_name("serve-app")), "check"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=True)
    (packages,) = python.parents[1].glob("lib/python*/site-packages")
    assert f"{packages / 'serve_app' / 'demo.yaml'} is valid." in done.stdout
    assert "model         demo" in done.stdout


def test_serve_run_builds_the_demo(python: Path, folder: Path, environment: dict[str, str]) -> None:
    command = [str(python), "-c", DEMO]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=True)
    place, config = done.stdout.splitlines()[-2:]
    assert Path(place).is_relative_to(python.parents[1])
    args = yaml.safe_load((ROOT / "configs/serve.yaml").read_text())["applications"][0]["args"]
    assert AppConfig.model_validate_json(config) == AppConfig.model_validate({**args, "cache_dir": "/elsewhere"})


def test_the_demos_config_is_that_of_the_checkout() -> None:
    assert DEMO_CONFIG.read_bytes() == (ROOT / "configs/serve.yaml").read_bytes()


def test_a_section_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="engin"):
        demo({"engin": {}})
