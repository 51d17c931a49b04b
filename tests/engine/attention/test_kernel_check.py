"""The check that stands between a kernel and the users: right kernels pass, wrong ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serve_app.engine.attention import kernel_check
from serve_app.engine.attention.base import AttentionBackend, AttentionParams, Span, contiguous_runs
from serve_app.engine.attention.kernel_check import check_attention
from serve_app.engine.attention.plain import PlainAttention
from serve_app.engine.attention.sdpa import SdpaAttention
from serve_app.engine.attention.varlen import VarlenAttention
from serve_app.engine.cuda.attention import TritonAttention
from serve_app.engine.kv_cache import LayerShape

LAYER = LayerShape(2, 16, 16, torch.float32, torch.device("cpu"))
PARAMS = [
    AttentionParams(0.25),
    AttentionParams(0.25, sliding_window=4096),
    AttentionParams(0.25, softcap=5.0),
    AttentionParams(0.1, 9, 3.0),
]


class Wrong(PlainAttention):
    """The plain path with one thing broken."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, params: AttentionParams, step: list[Span]
    ) -> torch.Tensor:
        match self._fault:
            case "window ignored":
                params = replace(params, sliding_window=None)
            case "window one too long":
                params = replace(params, sliding_window=params.sliding_window + 1) if params.sliding_window else params
            case "softcap ignored":
                params = replace(params, softcap=None)
            case "scaling ignored":
                params = replace(params, scaling=1.0)
            case "pages swapped":
                step = [replace(s, pages=(*s.pages[1::-1], *s.pages[2:])) for s in step]
            case "last page of another sequence":
                step = [replace(s, pages=(*s.pages[:-1], step[0].pages[0])) for s in step]
            case "sequences swapped":
                step = [replace(s, pages=o.pages) for s, o in zip(step, [*step[1:], step[0]], strict=True)]
            case "a value changed":
                values = values.clone()
                values[step[0].pages[0], 0] += 1.0
            case "steps of decodes":
                params = replace(params, scaling=1.0) if all(span.query_len == 1 for span in step) else params
            case "raises":
                raise RuntimeError("CUDA error: an illegal memory access\nand a long trace")
        output = super().attend(query, keys, values, params, step)
        match self._fault:
            case "one row is NaN":
                output[-1, 0, 0] = float("nan")
            case "one row unwritten":
                output[3] = 0.0
            case "shape":
                output = output[:, :1]
        return output


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("backend", [SdpaAttention(), PlainAttention()])
@pytest.mark.parametrize("shape", [(2, 16, 16), (4, 8, 24), (1, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass(
    params: AttentionParams, backend: AttentionBackend, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    layer = LayerShape(*shape, dtype, torch.device("cpu"))
    assert check_attention(backend, layer, 4, params) is None


@pytest.mark.parametrize(
    ("fault", "params"),
    [
        ("window ignored", AttentionParams(0.25, sliding_window=64)),
        ("window one too long", AttentionParams(0.25, sliding_window=8)),
        ("softcap ignored", AttentionParams(0.25, softcap=2.0)),
        ("scaling ignored", AttentionParams(0.25)),
        ("pages swapped", AttentionParams(0.25)),
        ("last page of another sequence", AttentionParams(0.25)),
        ("sequences swapped", AttentionParams(0.25)),
        ("a value changed", AttentionParams(0.25)),
        ("one row is NaN", AttentionParams(0.25)),
        ("one row unwritten", AttentionParams(0.25)),
        ("shape", AttentionParams(0.25)),
        ("steps of decodes", AttentionParams(0.25)),
        ("raises", AttentionParams(0.25)),
    ],
)
def test_wrong_kernels_are_found(fault: str, params: AttentionParams) -> None:
    complaint = check_attention(Wrong(fault), LAYER, 4, params)
    assert complaint is not None
    assert "\n" not in complaint


def test_pages_become_runs_cut_to_the_tokens_there_are() -> None:
    assert contiguous_runs([4, 5, 6], 10, 4) == ((16, 10),)
    assert contiguous_runs([4, 6, 7, 3], 15, 4) == ((16, 4), (24, 8), (12, 3))
    assert contiguous_runs([4, 6, 7], 4, 4) == ((16, 4),), "pages reserved ahead hold nothing yet"


def test_varlen_says_why_it_can_not_serve() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def refusal(params: AttentionParams, dtype: torch.dtype, device: torch.device) -> str:
        return VarlenAttention.refusal(LayerShape(2, 64, 64, dtype, device), params) or ""

    assert "CUDA" in refusal(PARAMS[0], torch.bfloat16, cpu)
    assert "float16" in refusal(PARAMS[0], torch.float32, cuda)
    assert "softcap" in refusal(PARAMS[2], torch.bfloat16, cuda)
    assert refusal(PARAMS[1], torch.bfloat16, cuda) == ""


def test_varlen_hands_the_kernel_a_padded_block_table() -> None:
    spans = [Span(0, 1, 300, ((0, 300),), (0, 1)), Span(1, 3, 3, ((512, 3),), (2,))]
    step = VarlenAttention().prepare(spans, torch.device("cpu"))
    assert step.block_table.tolist() == [[0, 1], [2, 0]]
    assert step.query_starts.tolist() == [0, 1, 4]
    assert step.kv_lens.tolist() == [300, 3]
    assert (step.max_query, step.max_kv) == (3, 300)


def test_it_says_what_a_kernel_that_can_not_be_compiled_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Uncompiled(TritonAttention):
        def write(self, *arguments: Any) -> None:
            raise RuntimeError("Command '['/usr/bin/gcc', '/tmp/tmpj/cuda_utils.c']' returned non-zero exit status 1.")

    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = check_attention(Uncompiled(), LAYER, 4, AttentionParams(0.25), 16)
    assert found is not None
    assert f"{tmp_path}/Python.h is missing: install them (Debian: apt install python3" in found
    assert "gcc" in found
    (tmp_path / "Python.h").touch()
    found = check_attention(Uncompiled(), LAYER, 4, AttentionParams(0.25), 16)
    assert found is not None
    assert found.startswith("it failed: Command")


@pytest.mark.parametrize("launch", [1, 2, 3])
def test_a_fault_that_only_a_wait_tells_of_is_found_by_the_check(monkeypatch: pytest.MonkeyPatch, launch: int) -> None:
    """Of the write, of the step with everything, and of that of decodes: launches on a GPU return at once."""
    waits = 0

    def wait(device: torch.device) -> None:
        nonlocal waits
        waits += 1
        if waits == launch:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nand a hint")

    monkeypatch.setattr(kernel_check, "_wait_for", wait)
    found = check_attention(SdpaAttention(), LAYER, 4, AttentionParams(0.25))
    assert found == "it failed: CUDA error: an illegal memory access was encountered"


def test_it_waits_for_the_gpu_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    kernel_check._wait_for(torch.device("cpu"))
    kernel_check._wait_for(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]
