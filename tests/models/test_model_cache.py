import errno
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from model_builders import ignore_progress

from serve_app.core import LoadStage
from serve_app.models.cache import build_once, cache_directory, find_built, require_space
from serve_app.models.model_error import ModelError


def _write_weights(folder: Path) -> tuple[str, ...]:
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(b"x" * 1000)
    return ("a note",)


def test_cache_directory_prefers_config_then_own_variable_then_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_APP_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_directory("/configured") == Path("/configured")
    assert cache_directory() == Path("/own")
    monkeypatch.delenv("SERVE_APP_CACHE")
    assert cache_directory() == Path("/xdg/serve_app")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "serve_app"


def test_builds_once_and_then_only_looks(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m"
    first = build_once(folder, "1", _write_weights, ignore_progress)

    def never(_: Path) -> tuple[str, ...]:
        raise AssertionError("built twice")

    assert build_once(folder, "1", never, ignore_progress) == first
    assert first == ("a note",)
    assert (folder / "sub" / "weights").stat().st_size == 1000


@pytest.mark.parametrize("damage", ["truncated", "missing", "other version", "no manifest", "broken manifest"])
def test_a_folder_that_is_not_whole_is_built_again(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "m"
    build_once(folder, "0" if damage == "other version" else "1", _write_weights, ignore_progress)
    weights, manifest = folder / "sub" / "weights", folder / "serve_app.json"
    if damage == "truncated":
        weights.write_bytes(b"x")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text(json.dumps(["rubbish"]))
    assert find_built(folder, "1") is None
    build_once(folder, "1", _write_weights, ignore_progress)
    assert find_built(folder, "1") is not None
    assert weights.stat().st_size == 1000


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> tuple[str, ...]:
        (folder / "half").write_text("half")
        raise ModelError("no")

    with pytest.raises(ModelError, match=r"^no$"):
        build_once(tmp_path / "m", "1", fail, ignore_progress)
    assert [path.name for path in tmp_path.iterdir()] == [".m.lock"]


def test_a_killed_build_is_not_trusted_and_does_not_block(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    script = f"""
import os
from pathlib import Path
from serve_app.models.cache import build_once
def die(folder):
    (folder / "half").write_text("half")
    os._exit(9)
build_once(Path({str(folder)!r}), "1", die, print)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 9
    assert (tmp_path / ".m.partial" / "half").exists()
    build_once(folder, "1", _write_weights, ignore_progress)
    assert not (folder / "half").exists()
    assert not (tmp_path / ".m.partial").exists()


def test_two_at_once_build_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    waiting = threading.Event()
    building = threading.Event()
    stages: list[str] = []

    def slow(folder: Path) -> tuple[str, ...]:
        building.set()
        assert waiting.wait(20)
        return _write_weights(folder)

    def see(stage: LoadStage) -> None:
        stages.append(stage.stage)
        waiting.set()

    def never(_: Path) -> tuple[str, ...]:
        raise AssertionError("built twice")

    first = threading.Thread(target=build_once, args=(tmp_path / "m", "1", slow, ignore_progress))
    first.start()
    assert building.wait(20)
    built = build_once(tmp_path / "m", "1", never, see)
    first.join(20)
    assert built == ("a note",)
    assert stages[0] == "waiting for another process to prepare m"


def test_disk_that_fills_up_while_building(tmp_path: Path) -> None:
    def fill(_: Path) -> tuple[str, ...]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ModelError, match=r"disk .* is full; free some space, or set cache_dir"):
        build_once(tmp_path / "m", "1", fill, ignore_progress)


def test_cache_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="can't be used"):
        build_once(tmp_path / "file" / "m", "1", _write_weights, ignore_progress)


def test_space_is_asked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    require_space(tmp_path, 5)
    with pytest.raises(ModelError, match=r"2\.0 GB are needed .* 0\.0 GB are free"):
        require_space(tmp_path, 2 * 10**9)
