"""A pytest plugin: the last lines of the output say which tests this machine lacks a program for, and how to get it.

A test asks for a program by skipping with a reason that ends in `(Debian: apt install PACKAGE)`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator

import pytest

_PACKAGES = re.compile(r"apt install ([\w.+-]+(?: [\w.+-]+)*)\)")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # the outermost: what it says comes after pytest's own summary
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """Count the skipped tests by the program that they want."""
    yield
    reasons = Counter(_reason(report) for report in terminalreporter.stats.get("skipped", []))
    wanting = {reason: found[1] for reason in reasons if (found := _PACKAGES.search(reason))}
    if wanting:
        count = sum(reasons[reason] for reason in wanting)
        terminalreporter.section(f"{count} skipped for want of a program", yellow=True)
        for reason in wanting:
            terminalreporter.line(f"{reasons[reason]:4} {reason}")
        packages = dict.fromkeys(package for found in wanting.values() for package in found.split())
        terminalreporter.line(f"To run them too: apt install {' '.join(packages)}")


def _reason(report: pytest.TestReport) -> str:
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
