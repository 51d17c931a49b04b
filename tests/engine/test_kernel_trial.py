"""A kernel's trial in a process of its own: its death is the child's, and what passed is not tried again."""

from __future__ import annotations

import io
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fatal_attention import FatalAttention, Unloadable

from serve_app.engine import build
from serve_app.engine import kernel_trial as trials
from serve_app.engine.attention.base import AttentionBackend, AttentionParams
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.engine import Engine
from serve_app.engine.kernel_trial import Trial, try_apart
from serve_app.engine.kv_cache import LayerShape
from serve_app.engine.model_runner import AttentionLayer

LAYER = AttentionLayer(LayerShape(1, 16, 16, torch.float32, torch.device("cpu")), 2, AttentionParams(0.25))


def trial(backend: AttentionBackend, page_tokens: int = 16) -> Trial:
    return Trial(backend, (LAYER,), page_tokens)


def test_a_kernel_that_kills_its_process_is_named_and_this_one_lives(tmp_path: Path) -> None:
    complaint = try_apart(trial(FatalAttention("abort")), tmp_path)
    assert complaint is not None
    assert complaint.startswith("the process that tried it ended with status -6")
    assert list(tmp_path.iterdir()) == [], "only what passed is remembered"


def test_a_wrong_kernel_is_told_as_the_check_tells_it(tmp_path: Path) -> None:
    complaint = try_apart(trial(FatalAttention("wrong")), tmp_path)
    assert complaint is not None
    assert "differs from the plain path by 1" in complaint


def test_a_kernel_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trials._in_child(trial(FatalAttention("hang")), limit_s=0.5) == ("it did not end within 0.5 s", False)
    monkeypatch.setattr(trials, "_in_child", lambda *_: ("it did not end within 180 s", True))
    assert try_apart(trial(SdpaAttention()), None) == "it did not end within 180 s"


def test_a_kernel_that_hangs_ends_though_nobody_ends_it() -> None:
    """A replica that was killed meanwhile leaves no process on the GPU."""
    told = pickle.dumps(trial(FatalAttention("hang")))
    command = [sys.executable, "-m", trials.__name__, "1"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(command, input=told, env=environment, capture_output=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGALRM


def test_a_device_without_room_for_the_check_says_nothing_against_the_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*size: int, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "empty", short)
    monkeypatch.setattr(sys, "argv", ["a trial", "0"])  # without a limit
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pickle.dumps(trial(SdpaAttention())))))
    with pytest.raises(torch.OutOfMemoryError):
        trials.main()
    assert "kernels begin" not in capsys.readouterr().out


def test_what_has_passed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_apart(trial(SdpaAttention()), tmp_path) is None
    monkeypatch.setattr(trials, "_in_child", lambda *_: pytest.fail("a child was started"))
    assert try_apart(trial(SdpaAttention()), tmp_path) is None


def test_another_kernel_page_or_shape_is_tried_anew() -> None:
    other = AttentionLayer(LAYER.shape, 2, AttentionParams(0.25, 7))
    keys = [
        trial(SdpaAttention()).key(),
        trial(FatalAttention("x")).key(),
        trial(SdpaAttention(), 32).key(),
        Trial(SdpaAttention(), (LAYER, other), 16).key(),
    ]
    assert len(set(keys)) == 4
    assert trial(SdpaAttention()).key() == keys[0]


def test_a_child_that_never_got_to_the_kernel_says_nothing_against_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert try_apart(trial(Unloadable("none")), tmp_path) is None
    assert "could not be tried in a process of its own" in caplog.text
    assert "busy or unavailable" in caplog.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("complaint", [None, "the process that tried it ended with status -6: it said nothing"])
def test_the_next_kernel_serves_where_the_trial_failed(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, complaint: str | None
) -> None:
    asked: list[Any] = []

    def told(trial: Trial, passed: Path | None) -> str | None:
        asked.append((trial.backend.name, trial.page_tokens, passed))
        return complaint if trial.backend.name == "sdpa" else None

    monkeypatch.setattr(build, "_may_end_the_process", lambda runner: True)
    monkeypatch.setattr(build, "try_apart", told)
    engine = make_engine(attention="sdpa", kernel_cache=tmp_path, cpu_kernels=False)
    assert asked == [("sdpa", 16, tmp_path / "tried")]
    assert engine.capacity.attention_backend == ("sdpa" if complaint is None else "plain")
    assert (complaint or "") in "".join(engine.capacity.notes)
