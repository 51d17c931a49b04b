"""What is said of tests that are skipped for want of a program: a small session of pytest with the plugin."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest
from redis_server import redis_server

@pytest.fixture(scope="module")
def redis():
    with redis_server() as url:
        yield url

@pytest.mark.parametrize("number", range(3))
def test_store(redis, number):
    pass

def test_browser():
    pytest.skip("node and npm are not installed (Debian: apt install nodejs npm)")

def test_device():
    pytest.skip("needs a GPU")
"""


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder whose conftest loads the plugin, on a machine whose PATH is empty."""
    support = Path(__file__).parent / "support"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PATH", str(pytester.path))
    pytester.makeconftest('pytest_plugins = ["missing_programs"]')
    return pytester


def test_the_end_says_what_to_install(session: pytest.Pytester) -> None:
    session.makepyfile(TESTS)
    result = session.runpytest_subprocess("-ra")
    result.assert_outcomes(skipped=5)
    result.stdout.fnmatch_lines(
        [
            "*short test summary*",
            "*= 4 skipped for want of a program =*",
            "   3 redis-server is not installed (Debian: apt install redis-server)",
            "   1 node and npm are not installed (Debian: apt install nodejs npm)",
            "To run them too: apt install redis-server nodejs npm",
            "*5 skipped*",
        ],
        consecutive=False,
    )


def test_nothing_is_said_where_no_program_is_missing(session: pytest.Pytester) -> None:
    session.makepyfile("import pytest\n\ndef test_device():\n    pytest.skip('needs a GPU')")
    result = session.runpytest_subprocess()
    result.assert_outcomes(skipped=1)
    result.stdout.no_fnmatch_line("*want of a program*")
