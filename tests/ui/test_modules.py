"""The page's modules that need no browser, tested by node."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

PROGRAMS = sorted((Path(__file__).parent / "modules").glob("*.test.mjs"))
LIMIT_S = 60


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_module(program: Path) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is absent: install it to run the tests of the chat page's modules")
    done = subprocess.run([node, "--test", str(program)], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
