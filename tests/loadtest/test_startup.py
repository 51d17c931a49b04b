"""From Serve's logs to where a start's time went."""

from __future__ import annotations

import psutil
import pytest

from loadtest.startup import (
    MILESTONES,
    READY,
    TOKEN,
    durations,
    find_moments,
    log_moments,
    memory_table,
    replica_memory,
    session_moment,
    table,
)

CONTROLLER = """\
INFO 2026-11-22 23:52:35,593 controller 21275 -- Controller starting (version='2.60.0').
INFO 2026-11-22 23:52:36,549 controller 21275 -- Adding 1 replica to Deployment(name='ModelServer', app='serve_app').
INFO 2026-11-22 23:52:38,341 controller 21275 -- Replica(id='f', deployment='Ingress', app='a') started successfully on
INFO 2026-11-22 23:52:41,341 controller 21275 -- Replica(id='3', deployment='ModelServer', app='a') started successfully
"""
MODEL = """\
INFO 2026-11-22 23:52:37,801 serve_app_ModelServer 3q -- starting torch
Traceback (most recent call last):
INFO 2026-11-22 23:52:39,801 serve_app_ModelServer 3q -- loading weights (0.5 GB, float32)
INFO 2026-11-22 23:59:39,801 serve_app_ModelServer 3r -- starting torch
"""


def test_a_start_is_told_from_its_logs() -> None:
    logs = {"controller": log_moments(CONTROLLER), "model": log_moments(MODEL)}
    started = session_moment("session_2026-11-22_23-52-32_088536_21076")
    known = {"session": started + 1.0, READY: started + 10.0, TOKEN: started + 10.5}
    found = durations(find_moments(logs, known), started)
    assert [round(seconds, 2) for seconds in found.values()] == [1.0, 2.5, 0.96, 1.25, 2.0, 1.54, 0.75, 0.5]
    assert sum(found.values()) == pytest.approx(10.5), "no second is lost or counted twice"
    assert list(found) == [name for name, _, _ in MILESTONES if name in found], "in order"


def test_a_folder_that_is_no_session_is_refused() -> None:
    with pytest.raises(ValueError, match="no session"):
        session_moment("session_latest")


def test_the_table_has_medians_side_by_side() -> None:
    first, last = MILESTONES[0][0], MILESTONES[-1][0]
    runs = [{first: 1.0, last: 2.0}, {first: 3.0, last: 2.0}, {first: 2.0}]
    rows = table({"the other": runs, "this checkout": [{first: 0.5}], "not yet started": []}).splitlines()
    assert rows[2] == f"| {first} | 2.00 | 0.50 |"
    assert rows[-2] == f"| {last} | 2.00 |  |"
    assert rows[-1] == "| **the whole** | **3.00** | **0.50** |"


def test_memory_is_that_of_replicas() -> None:
    assert replica_memory([psutil.Process()]) == [], "these tests are none"
    rows = memory_table({"this checkout": [("Ingress", {"rss": 900.4, "pss": 700.0, "uss": 650.0})]}).splitlines()
    assert rows[2:] == ["| this checkout, Ingress | 900 | 700 | 650 |"]
