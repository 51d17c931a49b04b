"""Which tests are run once more, and what is said of them: small sessions of pytest with the plugin."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

FLAKY = "*= 1 flaky: failed, and passed when run once more =*"


@pytest.fixture
def session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder whose conftest loads the plugin; `fails_once()` is true the first time in it."""
    support = Path(__file__).parent / "support"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(support), os.environ.get("PYTHONPATH", "")]))
    pytester.makeini("[pytest]\nmarkers = ray: needs the cluster\naddopts = --strict-markers -ra")
    pytester.makeconftest(
        """
        from pathlib import Path
        import pytest

        pytest_plugins = ["reruns"]

        @pytest.fixture(scope="session")
        def cluster():
            print("the cluster starts")
            yield
            print("the cluster ends")

        @pytest.fixture(scope="session")
        def fails_once():
            seen = set()
            def ask(name):
                return name not in seen and not seen.add(name)
            return ask

        @pytest.fixture(scope="module")
        def deployed(cluster, fails_once):
            print("deploying")
            assert not fails_once("deploy")
            yield
            print("deleted")
        """
    )
    return pytester


def test_a_ray_test_that_passes_when_run_again_is_told_as_flaky(session: pytest.Pytester) -> None:
    session.makepyfile(
        test_b_shaky="""
        import pytest

        @pytest.mark.ray
        def test_shaky(cluster, fails_once):
            assert not fails_once("shaky")
        """,
        test_a_skip="import pytest\n\ndef test_skipped():\n    pytest.skip('why')",
    )
    result = session.runpytest_subprocess("-s")
    result.assert_outcomes(passed=1, skipped=1)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["*short test summary*", "*first run of *::test_shaky*", "E *not True", FLAKY, "*::test_shaky", "*1 passed*"]
    )
    # It was the last test of the session, whose cluster has to outlive its first run.
    assert str(result.stdout).count("the cluster starts") == 1


def test_a_modules_service_that_failed_to_start_is_started_again(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest

        pytestmark = pytest.mark.ray

        def test_one(deployed):
            pass

        def test_two(deployed):
            pass
        """
    )
    result = session.runpytest_subprocess("-s")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([FLAKY, "*::test_one"])
    output, _, _ = str(result.stdout).partition("the first run of")
    assert (output.count("the cluster starts"), output.count("deploying"), output.count("deleted")) == (1, 2, 1)


def test_what_fails_twice_or_is_no_ray_test_fails(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest

        @pytest.mark.ray
        def test_broken():
            print("runs", "broken")
            assert False

        def test_not_of_the_cluster(fails_once):
            print("runs", "another")
            assert not fails_once("other")

        @pytest.mark.ray
        @pytest.mark.xfail(strict=True)
        def test_expected():
            print("runs", "expected")
            assert False
        """
    )
    result = session.runpytest_subprocess("-s")
    result.assert_outcomes(failed=2, xfailed=1)
    result.stdout.no_fnmatch_line("*flaky*")
    # Run twice, once and once.
    assert [str(result.stdout).count(name) for name in ("runs broken", "runs another", "runs expected")] == [2, 1, 1]


def test_many_that_fail_are_no_flakes(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest

        @pytest.mark.ray
        @pytest.mark.parametrize("number", range(14))
        def test_all(number, fails_once):
            assert not fails_once(number)
        """
    )
    result = session.runpytest_subprocess()
    result.assert_outcomes(passed=10, failed=4)
    result.stdout.fnmatch_lines(["*= 10 flaky: *"])
