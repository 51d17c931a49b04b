"""The folder of the tests' own Ray: gone afterwards, also what a session left that was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ray_folder import private_ray_folder

PROGRAM = """
import sys, time
from pathlib import Path
from ray_folder import private_ray_folder
with private_ray_folder(Path(sys.argv[1])) as folder:
    (folder / "ray").mkdir()
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("before", [None, "/the/users/own"])
def test_rays_folder_is_another_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    if before is not None:
        monkeypatch.setenv("RAY_TMPDIR", before)
    with private_ray_folder(tmp_path) as folder:
        (folder / "ray").mkdir()
        assert os.environ["RAY_TMPDIR"] == str(folder)
    assert os.environ.get("RAY_TMPDIR") == before
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_session_left_is_taken_away_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    support = str(Path(__file__).parent / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([support, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as session:
        assert session.stdout is not None
        folder = Path(session.stdout.readline().strip())
        with private_ray_folder(tmp_path):
            assert (folder / "ray").exists()
        session.kill()
    assert (folder / "ray").exists()
    with private_ray_folder(tmp_path):
        assert not folder.exists()
