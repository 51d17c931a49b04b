"""Looks for known vulnerabilities of the pinned versions: `make audit`; `make check` does so once a day.

pip-audit asks PyPI for each version of constraints/locks. Without an answer nothing is said of any version, and that is
no failure. constraints/accepted-vulnerabilities.toml lists what may pass, until when and why.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from constraints.install import ANSWERS_WITHIN_S, answers

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "constraints"
LOCKS = [FOLDER / "locks" / "development.txt", FOLDER / "locks" / "torch.txt"]
ACCEPTED = FOLDER / "accepted-vulnerabilities.toml"
KNOWN_VERSION = "https://pypi.org/pypi/pip/24.0/json"
"""A mirror may have the files of PyPI without its knowledge of versions."""
ENDS_WITHIN_S = 120.0


class NoAnswer(Exception):
    """The service can't be asked."""


def main(words: Sequence[str] | None = None) -> int:
    """Print what is known, or why nothing is. 1 if a version is vulnerable, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lock", type=Path, action="append", help="versions (default: all that is pinned)")
    parser.add_argument("--accepted", type=Path, default=ACCEPTED, help="what may pass")
    parser.add_argument("--osv", default="", metavar="URL", help="ask OSV's interface at this address in place of PyPI")
    parser.add_argument("--done", type=Path, help="a file to make if no version is vulnerable")
    arguments = parser.parse_args(words)
    try:
        if not arguments.osv and not answers(KNOWN_VERSION):
            raise NoAnswer(f"{KNOWN_VERSION} can't be fetched")
        allowed, over = accepted(arguments.accepted, datetime.date.today())
        count, found = audit(arguments.lock or LOCKS, arguments.osv, allowed)
    except NoAnswer as error:
        print(f"pip-audit skipped: no answer about known vulnerabilities ({error})")
        return 0
    if found:
        print("\n".join([*found, *over]))
        print(f"Raise the pin and run `make lock`, or accept it in {ACCEPTED.relative_to(ROOT)}, with a reason.")
        return 1
    print(
        f"pip-audit: no known vulnerability in {count} versions" + (f", but {len(allowed)} accepted" if allowed else "")
    )
    if arguments.done:
        arguments.done.touch()
    return 0


def accepted(file: Path, today: datetime.date) -> tuple[list[str], list[str]]:
    """Ids that may pass today, and sentences about those whose time is over."""
    with file.open("rb") as opened:
        listed = tomllib.load(opened)
    over = [
        f"{id} was accepted until {entry['until']}: {entry['reason']}"
        for id, entry in listed.items()
        if entry["until"] <= today
    ]
    return [id for id, entry in listed.items() if entry["until"] > today], over


def audit(locks: Sequence[Path], osv: str, allowed: Sequence[str]) -> tuple[int, list[str]]:
    """How many versions are known to the service, and the vulnerabilities of them. Raises `NoAnswer`."""
    command = [sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", str(int(ANSWERS_WITHIN_S)), "--desc", "off"]
    command += ["--vulnerability-service", "osv", "--osv-url", osv] if osv else []
    command += [word for lock in locks for word in ("--requirement", str(lock))]
    command += [word for id in allowed for word in ("--ignore-vuln", id)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ENDS_WITHIN_S)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"not all versions within {ENDS_WITHIN_S:.0f} s") from None
    if not done.stdout.startswith("{"):
        error = (done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1]
        if "Connection" in done.stderr or "ServiceError" in done.stderr or "Timeout" in done.stderr:
            raise NoAnswer(error)
        raise SystemExit(f"pip-audit failed: {error}")
    versions = [version for version in json.loads(done.stdout)["dependencies"] if "version" in version]
    if not versions:
        raise NoAnswer("the service knows none of the versions")
    return len(versions), [_told(version, known) for version in versions for known in version["vulns"]]


def _told(version: dict[str, str], known: dict[str, list[str]]) -> str:
    names = ", ".join([str(known["id"]), *known.get("aliases", [])])
    return (
        f"{version['name']} {version['version']}: {names}, fixed in {', '.join(known['fix_versions']) or 'no version'}"
    )


if __name__ == "__main__":
    sys.exit(main())
