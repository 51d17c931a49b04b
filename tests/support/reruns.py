"""A pytest plugin: a test marked `ray` that fails is run once more, and told as flaky when it passes then.

A cluster's processes share the machine with whatever else runs on it. Nothing but these tests is run twice, and no
pass on a second try goes unsaid: the last lines of the output name each.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

MOST_RERUNS = 10
"""In one session. When more tests than that fail, something is broken, and deploys that time out twice would only
delay the list of failures."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Hand the tests marked `ray` to pytest-rerunfailures, where it is installed."""
    if not config.pluginmanager.hasplugin("rerunfailures"):
        return
    counter = _Counter()
    config.pluginmanager.register(counter)

    def some_are_left() -> bool:
        return len(counter.node_ids) < MOST_RERUNS

    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.flaky(reruns=1, condition=some_are_left))


class _Counter:
    """Node ids of the tests that this process has run again. A worker of pytest-xdist has no terminal to ask."""

    def __init__(self) -> None:
        self.node_ids: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called for each report."""
        if report.outcome == "rerun":  # type: ignore[comparison-overlap]  # pytest-rerunfailures' own
            self.node_ids.add(report.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the outermost: what it says comes after pytest's own summary
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Print the first failure of each test that was run twice, and name those that passed on the second run."""
    yield
    stats = terminalreporter.stats
    for report in stats.get("rerun", []):
        terminalreporter.section(f"the first run of {report.nodeid}", yellow=True)
        terminalreporter.line(report.longreprtext)
    failed = {report.nodeid for outcome in ("failed", "error") for report in stats.get(outcome, [])}
    flaky = sorted(_rerun(terminalreporter) - failed)
    if flaky:
        terminalreporter.section(f"{len(flaky)} flaky: failed, and passed when run once more", yellow=True)
        for nodeid in flaky:
            terminalreporter.line(nodeid)


def _rerun(terminalreporter: pytest.TerminalReporter) -> set[str]:
    """Node ids of the tests that were run twice so far."""
    return {report.nodeid for report in terminalreporter.stats.get("rerun", [])}
