"""Weights kept in less than 32 bits: every value comes back, and so does every bit of a product."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from tiny_models import tiny_model
from torch import nn

from serve_app.engine.cpu.library import Kernels
from serve_app.engine.cpu.linear import Form, PackedLinear, pack_linears, smallest_form
from serve_app.engine.engine_error import EngineError

OUT, INNER = 70, 512
FORMS = {
    Kind.Q4_0: Form.CODES4_BY_32,
    Kind.Q4_1: Form.CODES4_BY_32,
    Kind.Q5_0: Form.CODES8_BY_32,
    Kind.Q5_1: Form.CODES8_BY_32,
    Kind.Q8_0: Form.CODES8_BY_32,
    Kind.Q2_K: Form.CODES4_BY_16,
    Kind.Q3_K: Form.CODES4_BY_16,
    Kind.Q4_K: Form.CODES4_BY_32,
    Kind.Q5_K: Form.CODES8_BY_32,
    Kind.Q6_K: Form.CODES8_BY_16,
    Kind.IQ4_NL: Form.CODES8_BY_32,
}
"""Kind of a GGUF file's tensor -> how its float32 values are kept."""
QUANTISED_HERE = (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0)
"""Kinds that the gguf package can make; of the others it reads any bytes."""
SCALES = {Kind.Q2_K: (-4, 2), Kind.Q3_K: (-2, 1), Kind.Q6_K: (-2, 1), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2)}
"""Where a block's 16 bit floats are, and how many; else one at its beginning."""


def from_gguf(kind: Kind, out: int = OUT, inner: int = INNER) -> torch.Tensor:
    """Float32 weights, as a GGUF file of this kind gives them."""
    numbers = np.random.default_rng(int(kind))
    if kind in QUANTISED_HERE:
        weight = numbers.standard_normal((out, inner)).astype(np.float32)
        return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = numbers.integers(0, 256, (out * inner // block, size), dtype=np.uint8)
    at, count = SCALES.get(kind, (0, 1))
    scales = np.abs(numbers.standard_normal((len(raw), count)) * 0.01).astype(np.float16)
    raw[:, at % size : at % size + 2 * count] = scales.view(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(gguf.quants.dequantize(raw.reshape(out, -1), kind)))


def example(form: Form, out: int, inner: int) -> torch.Tensor:
    """Weights that this form holds without a loss."""
    numbers = torch.Generator().manual_seed(out * inner)
    weight = torch.randn(out, inner, generator=numbers)
    if form is Form.FLOAT32:
        return weight
    if form in (Form.BFLOAT16, Form.FLOAT16):
        return weight.to(torch.bfloat16 if form is Form.BFLOAT16 else torch.float16).float()
    block = 16 if form in (Form.CODES8_BY_16, Form.CODES4_BY_16) else 32
    largest = 15 if form in (Form.CODES4_BY_16, Form.CODES4_BY_32) else 31
    codes = torch.randint(0, largest + 1, (out, inner), generator=numbers)
    codes[:, ::block], codes[:, 1::block] = 0, largest
    scales = torch.rand(out, -(-inner // block), generator=numbers).half().float() + 0.125
    offsets = torch.randn(out, -(-inner // block), generator=numbers).half().float()
    scales, offsets = (each.repeat_interleave(block, 1)[:, :inner] for each in (scales.half().float(), offsets))
    return scales * codes + offsets


def assert_same_bits(kernels: Kernels, weight: torch.Tensor, form: Form) -> None:
    """As with weights kept in float32, alone and beside others."""
    x = torch.randn(130, weight.shape[1], generator=torch.Generator().manual_seed(5))
    kept, plain = (PackedLinear(kernels, weight, None, form=each) for each in (form, Form.FLOAT32))
    for rows in (1, 2, 7, 12, 13, 30, 97, 130):
        assert torch.equal(kept(x[:rows]), plain(x[:rows])), rows


@pytest.mark.parametrize("kind", FORMS)
def test_weights_of_a_gguf_file_are_kept_as_they_are_there(kernels: Kernels, kind: Kind) -> None:
    weight = from_gguf(kind)
    assert smallest_form(kernels, weight) is FORMS[kind]
    assert_same_bits(kernels, weight, FORMS[kind])


@pytest.mark.parametrize("form", Form)
@pytest.mark.parametrize(("out", "inner"), [(1, 5), (33, 40), (64, 1500), (40, 2081)])
def test_every_form_gives_the_same_products(kernels: Kernels, form: Form, out: int, inner: int) -> None:
    """Of every shape: a last block that is not full, more rows than one block, a panel in several stretches."""
    weight = example(form, out, inner)
    if form is Form.FLOAT16 and smallest_form(kernels, example(form, 33, 40)) is not form:
        pytest.skip("this processor has no 16 bit floats")
    if inner > 32:
        assert smallest_form(kernels, weight) is form
        bits = 8 * kernels.packed_bytes(form, 32, 1024) / (32 * 1024)
        assert bits <= {Form.FLOAT32: 32, Form.BFLOAT16: 16, Form.FLOAT16: 16, Form.CODES8_BY_16: 12}.get(form, 10)
    assert_same_bits(kernels, weight, form)
    assert_same_bits(kernels, weight.t().contiguous().t(), form)


@pytest.mark.parametrize("form", [form for form in Form if form is not Form.FLOAT32])
def test_one_value_that_would_be_lost_keeps_the_whole_in_a_larger_form(kernels: Kernels, form: Form) -> None:
    weight = example(form, 50, 96)
    weight[49, 95] = torch.nextafter(weight[49, 95], torch.tensor(torch.inf))
    assert smallest_form(kernels, weight) < form
    assert_same_bits(kernels, weight, smallest_form(kernels, weight))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e-42, 3.4e38])
def test_unusual_values_come_back(kernels: Kernels, value: float) -> None:
    weight = torch.full((40, 64), 0.5)
    weight[3, 7] = value
    form = smallest_form(kernels, weight)
    values = PackedLinear(kernels, weight, None, form=form)(torch.eye(64)[7:8])[0]
    expected = PackedLinear(kernels, weight, None, form=Form.FLOAT32)(torch.eye(64)[7:8])[0]
    assert torch.equal(values.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_zeros_are_zeros(kernels: Kernels) -> None:
    packed = PackedLinear(kernels, torch.zeros(40, 64), None)
    assert packed.form is Form.CODES4_BY_32
    assert not packed(torch.randn(3, 64)).any()


def test_a_model_from_16_bits_answers_as_one_kept_in_32(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(40)[None] % 100
    logits = []
    for kept in (True, False):
        model = tiny_model("llama").to(torch.bfloat16).float()
        if not kept:
            monkeypatch.setattr(kernels, "form", lambda *_: Form.FLOAT32)
        pack_linears(model, kernels)
        assert not any(isinstance(module, nn.Linear) for module in model.modules())
        forms = {module.form for module in model.modules() if isinstance(module, PackedLinear)}
        assert forms == {Form.BFLOAT16 if kept else Form.FLOAT32}
        logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_a_form_that_is_read_wrongly_is_not_used(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.pack

    def wrong(weight: int, ld: int, step: int, out: int, inner: int, form: int, packed: int) -> None:
        right(weight, ld, step, out, inner, form, packed)
        if form != Form.FLOAT32:
            size = int(kernels.packed_bytes(form, 1, inner))
            memory = (ctypes.c_uint8 * size).from_address(packed)
            memory[1] ^= 1  # a bit of a weight's upper half

    monkeypatch.setattr(kernels, "pack", wrong)
    with pytest.raises(EngineError, match="wrong on this machine"):
        pack_linears(tiny_model("llama").to(torch.bfloat16).float(), kernels)
