"""The GPU suite loses only the part that crashes, hangs or lacks something, and keeps its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from loadtest.gpu_suite import RESULT, Outcome, Part, missing, parts_of, run_all, run_part, table


def part(name: str, code: str, **settings: object) -> Part:
    return Part(name, (sys.executable, "-c", code), **settings)  # type: ignore[arg-type]


def test_one_that_crashes_hangs_or_is_skipped_leaves_the_others(tmp_path: Path) -> None:
    parts = [
        part("crash", "import os; print('so far', flush=True); os.abort()"),
        part("hang", f"import time; print('{RESULT}' + '{{\"a\": 1}}', flush=True); time.sleep(600)", weight=0.2),
        part("lacking", "raise AssertionError", needs=("json", "a_package_that_nobody_has")),
        part("unasked", "raise AssertionError", skip="no model"),
        part("fine", f"print('{RESULT}' + '{{\"b\": 2}}'); print('all well')"),
    ]
    told: list[str] = []
    found = {o.name: o for o in run_all(parts, 40, tmp_path, lambda outcome: told.append(outcome.name))}
    assert told == [each.name for each in parts]
    assert [found[name].status for name in told] == ["failed", "timed out", "skipped", "skipped", "ok"]
    assert found["crash"].said == "status -6: so far"
    assert found["hang"].result == {"a": 1}, "what it had told by then is kept"
    assert found["lacking"].said == "not installed: a_package_that_nobody_has"
    assert found["unasked"].said == "no model"
    assert (found["fine"].said, found["fine"].result) == ("all well", {"b": 2})


def test_shares_are_of_what_is_left(tmp_path: Path) -> None:
    """Two that hang take no more than the budget; one without time left has none."""
    code = "import time; time.sleep(600)"
    found = run_all([part("one", code), part("two", code)], 2.0, tmp_path, lambda outcome: None)
    assert [outcome.status for outcome in found] == ["timed out"] * 2
    assert found[0].said.startswith("after 1 s")


def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"print('{RESULT}' + '{{\"child\": %d}}' % child.pid, flush=True)\n"
    )
    outcome = run_part(part("parent", code), 60, tmp_path / "log")
    assert outcome.status == "ok"
    child = outcome.result["child"]
    until = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "it is still there"
        time.sleep(0.01)


def test_it_needs_nothing_but_python(tmp_path: Path) -> None:
    """And says what each part lacks: here all packages, as in an environment that has none."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[2])}
    code = "import loadtest.gpu_suite as s; print([s.missing(p.needs) for p in s.parts_of('cuda', None)])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "'triton'" in done.stdout
    assert missing(("json",)) == []


def test_a_model_is_asked_for_where_one_is_needed() -> None:
    skipped = {each.name: each.skip for each in parts_of("cuda", None)}
    assert [name for name, why in skipped.items() if why] == ["quality"]
    assert not any(each.skip for each in parts_of("cuda", "some/model"))


def test_the_table_has_all_parts_and_what_was_measured() -> None:
    row = {
        "streams": 8,
        "step_ms": 3.456,
        "tok_s": 2315.2,
        "ttft_ms": 9.87,
        "kernel": "triton",
        "batch_invariant": False,
    }
    outcomes = [
        Outcome("kernels", "failed", 3.2, "status -6: a | b"),
        Outcome("speed graphs", "ok", 20, "done", json.loads(json.dumps({"streams    8": row, "up_s": 3}))),
    ]
    lines = table(outcomes).splitlines()
    assert "| kernels | failed | 3 | status -6: a / b |" in lines
    assert lines[-1] == "| graphs | 8 | 3.46 | 2315 | 9.9 | triton | False |"
