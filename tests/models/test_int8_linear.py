"""8-bit layers on a CPU: bitsandbytes' numbers, and rows that don't depend on their company."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from serve_app.models import int8_linear
from serve_app.models.int8_linear import Int8Linear, use_int8_linears


def _quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of int8 and what 127 stands for in each, as bitsandbytes stores them."""
    largest = weight.abs().amax(1)
    return (weight * (127 / largest[:, None])).round().to(torch.int8), largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_numbers(dtype: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, largest = _quantised(torch.randn(48, 70, generator=generator))
    offset = torch.randn(48, generator=generator) if bias else None
    x = torch.randn(2, 9, 70, generator=generator).to(dtype)
    y = Int8Linear(codes, largest, offset)(x)
    assert y.dtype == dtype
    rows = x.double()
    steps = rows.abs().amax(-1, keepdim=True) / 127
    expected = F.linear((rows / steps).round() * steps, codes.double() * largest.double()[:, None] / 127)
    expected = expected if offset is None else expected + offset
    assert torch.allclose(y.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_a_row_has_the_same_bits_in_any_company() -> None:
    generator = torch.Generator().manual_seed(1)
    layer = Int8Linear(*_quantised(torch.randn(96, 128, generator=generator)), None)
    x = torch.randn(40, 128, generator=generator)
    x[7] *= 1000  # a neighbour's outlier
    whole = layer(x)
    for rows in (1, 2, 3, 5, 8, 16, 33):
        assert torch.equal(layer(x[3 : 3 + rows]), whole[3 : 3 + rows])


def test_what_is_no_number_is_not_hidden() -> None:
    layer = Int8Linear(*_quantised(torch.randn(8, 16)), None)
    x = torch.zeros(4, 16)
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    y = layer(x)
    assert torch.equal(y[0], torch.zeros(8)), "an empty row is a row"
    assert not y[1].isfinite().any()
    assert not y[2].isfinite().any()


def test_bitsandbytes_serves_where_the_product_is_slow_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert use_int8_linears(model) == 0  # type: ignore[arg-type]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(int8_linear.torch, "_int_mm", lambda a, b: torch.zeros(len(a), b.shape[1], dtype=torch.int32))
    assert use_int8_linears(model) == 0  # type: ignore[arg-type]
