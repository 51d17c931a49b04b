"""What `make audit` says, with the real pip-audit and a service of known vulnerabilities on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from scripts import audit

JINJA2 = f"jinja2==3.0.0 \\\n    --hash=sha256:{64 * '0'}\n"


class Service(BaseHTTPRequestHandler):
    """Knows of one vulnerability, in OSV's form."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        known = asked == {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "version": "3.0.0"}
        fixed = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "3.0.1"}]}
        affected = [{"package": {"name": "jinja2", "ecosystem": "PyPI"}, "ranges": [fixed]}]
        vulnerability = {
            "id": "GHSA-1",
            "aliases": ["CVE-1"],
            "published": "2026-01-01T00:00:00Z",
            "affected": affected,
        }
        answer = json.dumps({"vulns": [vulnerability]} if known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("until", ["2020-01-01", "2999-01-01"], ids=["over", "accepted"])
def test_a_vulnerable_version_fails_unless_it_is_accepted(
    service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], until: str
) -> None:
    pytest.importorskip("pip_audit")
    lock, accepted, done = tmp_path / "lock.txt", tmp_path / "accepted.toml", tmp_path / "done"
    lock.write_text(JINJA2)
    accepted.write_text(f'["GHSA-1"]\npackage = "jinja2"\nreason = "a reason"\nuntil = {until}\n')
    status = audit.main(["--osv", service, "--lock", str(lock), "--accepted", str(accepted), "--done", str(done)])
    said = capsys.readouterr().out
    if until == "2999-01-01":
        assert status == 0
        assert said == "pip-audit: no known vulnerability in 1 versions, but 1 accepted\n"
        assert done.exists()
        return
    assert status == 1
    assert said.startswith("jinja2 3.0.0: CVE-1, GHSA-1, fixed in 3.0.1\n")
    assert "GHSA-1 was accepted until 2020-01-01: a reason\n" in said
    assert not done.exists()


def test_without_an_answer_it_is_skipped_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pip_audit")
    (tmp_path / "lock.txt").write_text(JINJA2)
    done = tmp_path / "done"
    assert audit.main(["--osv", "http://127.0.0.1:9/", "--lock", str(tmp_path / "lock.txt"), "--done", str(done)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("pip-audit skipped: no answer about known vulnerabilities (")
    assert said.count("\n") == 1
    assert not done.exists()


def test_no_network_is_seen_without_pip_audit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "KNOWN_VERSION", "http://127.0.0.1:9/")
    assert audit.main([]) == 0
    assert "http://127.0.0.1:9/ can't be fetched" in capsys.readouterr().out


def test_the_list_of_the_project_is_read() -> None:
    accepted, over = audit.accepted(audit.ACCEPTED, audit.datetime.date.today())
    assert isinstance(accepted, list)
    assert over == []
