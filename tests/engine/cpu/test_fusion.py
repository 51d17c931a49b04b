"""Fused forwards: given to the modules that they are right for, equal to the modules' own, and the same row by row."""

from __future__ import annotations

import copy
import ctypes
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from serve_app.engine.attention.base import STEP_KEYWORD, AttentionParams, PagedStep, Span
from serve_app.engine.cpu.attention import CpuAttention
from serve_app.engine.cpu.forwards import FusedAttention, FusedGatedMLP, FusedNorm, paged_step
from serve_app.engine.cpu.fusion import fuse_modules
from serve_app.engine.cpu.layer import FusedLayer
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.cpu.linear import PackedLinear, Products, pack_linears
from serve_app.engine.cpu.stack import FusedStack
from serve_app.engine.kv_cache import KVCache

IDS = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 100, 3]])
WHOLE_LAYERS = {"llama", "mistral", "qwen2", "qwen3"}


def fused_model(model: PreTrainedModel, kernels: Kernels) -> tuple[PreTrainedModel, dict[str, int]]:
    model = copy.deepcopy(model)
    pack_linears(model, kernels)
    return model, fuse_modules(model, kernels)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_fused_and_that_the_own_path_still_answers(kind: str, kernels: Kernels) -> None:
    model, fused = fused_model(tiny_model(kind), kernels)
    if kind == "gpt2":
        assert set(fused.values()) == {0}, "layer norms, and another MLP and attention"
    else:
        assert fused["norms"] >= 7
        # OLMo's norms of queries and keys are of all heads together.
        assert (fused["MLPs"], fused["attention modules"]) == (3, 0 if kind == "olmo2" else 3)
        assert fused["layers"] == (3 if kind in WHOLE_LAYERS else 0)
        assert fused["stacks"] == (kind in WHOLE_LAYERS)
    original = tiny_model(kind)
    for one in (model, original):
        one.set_attn_implementation("eager")
    with torch.inference_mode():
        assert torch.allclose(model(IDS).logits, original(IDS).logits, atol=1e-3, rtol=1e-4)


@pytest.fixture
def checked_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a kernel is about to write past the memory that it was given, instead of ending the process."""
    norm, products = FusedNorm.into, Products.__call__

    def into(self: FusedNorm, x: torch.Tensor, *others: Any) -> None:
        assert isinstance(x, torch.Tensor)
        assert x.shape[-1] == self.scale.numel()
        norm(self, x, *others)

    def call(self: Products, x: torch.Tensor) -> list[torch.Tensor]:
        assert x.shape[-1] == self.inner
        return products(self, x)

    monkeypatch.setattr(FusedNorm, "into", into)
    monkeypatch.setattr(Products, "__call__", call)


@pytest.mark.usefixtures("checked_widths")
def test_a_norm_of_all_heads_together_is_not_taken_for_one_of_each(kernels: Kernels) -> None:
    _, fused = fused_model(tiny_model("olmo2"), kernels)
    assert fused == {"norms": 13, "MLPs": 3, "attention modules": 0, "layers": 0, "stacks": 0}


class GatedHeads(nn.Module):
    """Attention whose query projection makes the gates of its heads as well."""

    head_dim, layer_idx = 16, 0

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(64, 128), nn.Linear(64, 64)
        self.k_proj, self.v_proj = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, hidden_states: torch.Tensor, **keywords: Any) -> tuple[torch.Tensor, None]:
        query, gate = self.q_proj(hidden_states).chunk(2, dim=-1)
        heads = (
            x.unflatten(-1, (-1, 16)).transpose(1, 2)
            for x in (query, self.k_proj(hidden_states), self.v_proj(hidden_states))
        )
        attended = keywords[STEP_KEYWORD].attend(0, *heads, AttentionParams(0.25))
        return self.o_proj(attended.flatten(2) * gate.sigmoid()), None


class NarrowMLP(nn.Module):
    """A gated MLP of which one half sees a half of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 96), nn.Linear(32, 96), nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x[..., :32].contiguous()))


@pytest.mark.usefixtures("checked_widths")
@pytest.mark.parametrize(
    ("part", "other", "said"),
    [
        ("self_attn", GatedHeads, "what its heads answer is of several widths (128, 64)"),
        ("mlp", NarrowMLP, "its input is of several widths (64, 32)"),
    ],
)
def test_a_module_whose_parts_are_of_other_widths_is_not_tried(
    part: str, other: type[nn.Module], said: str, kernels: Kernels, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes())).eval()
    setattr(model.model.layers[0], part, other())
    pack_linears(model, kernels)
    with caplog.at_level("INFO"):
        fused = fuse_modules(model, kernels)
    assert fused["attention modules"] + fused["MLPs"] == 1
    assert f"model.layers.0.{part} is not fused: {said}" in caplog.text


def test_no_kernel_is_run_over_rows_of_another_width(kernels: Kernels) -> None:
    none: Any = SimpleNamespace(rms_norm=pytest.fail, gated=pytest.fail)
    norm = FusedNorm(none, torch.ones(64), 1e-6)
    gate, up, down = (PackedLinear(kernels, torch.ones(*shape), None) for shape in ((96, 64), (96, 64), (64, 96)))
    for forward in (norm, lambda x: norm.into(x, x), FusedGatedMLP(none, gate, up, down, 0)):
        with pytest.raises(ValueError, match="rows of 16 numbers where 64 are computed"):
            forward(torch.zeros(1, 7, 4, 16))


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_norm_is_its_modules_own_row_by_row(kind: str, kernels: Kernels) -> None:
    model = tiny_model(kind)
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for norm in norms:
        nn.init.normal_(norm.weight, std=0.3)
    fuse_modules(model, kernels)
    for norm in norms:
        assert isinstance(norm.forward, FusedNorm)
        x = torch.randn(70, norm.weight.shape[0], generator=torch.Generator().manual_seed(3)) * 4 + 1
        with torch.inference_mode():
            assert torch.allclose(norm(x), type(norm).forward(norm, x), rtol=1e-5, atol=1e-6)
            assert torch.equal(norm(x[5:6]), norm(x)[5:6])


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_mlp_is_its_modules_own_row_by_row(activation: str, bias: bool, kernels: Kernels) -> None:
    config = LlamaConfig(**sizes(hidden_act=activation, mlp_bias=bias, hidden_size=48, intermediate_size=100))
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    mlp = model.model.layers[0].mlp
    x = torch.randn(1, 130, 48, generator=torch.Generator().manual_seed(1)) * 6
    with torch.inference_mode():
        expected = mlp(x)
        pack_linears(model, kernels)
        fuse_modules(model, kernels)
        assert isinstance(mlp.forward, FusedGatedMLP)
        found = mlp(x)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        for rows in (1, 2, 13, 49, 97):
            assert torch.equal(mlp(x[:, 3 : 3 + rows]), found[:, 3 : 3 + rows])
        assert mlp(torch.full((1, 1, 48), float("nan"))).isnan().all(), "what is not a number stays so"


def sizes(**fields: Any) -> dict[str, Any]:
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None, "bos_token_id": None}
    return small | heads | fields


def test_another_activation_keeps_its_own_forward(kernels: Kernels) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes(hidden_act="relu"))).eval()
    pack_linears(model, kernels)
    assert fuse_modules(model, kernels) == {"norms": 3, "MLPs": 0, "attention modules": 1, "layers": 0, "stacks": 0}


class Doubling(nn.Module):
    """Wraps a module's forward in something that the fused one would leave out."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._own = module.forward

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        result = self._own(*arguments, **keywords)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result


@pytest.mark.parametrize(("name", "kind"), [("self_attn", "attention modules"), ("mlp", "MLPs"), ("", "layers")])
def test_a_module_that_does_more_keeps_its_own_forward(name: str, kind: str, kernels: Kernels) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes())).eval()
    pack_linears(model, kernels)
    module = model.model.layers[0].get_submodule(name)
    module.forward = Doubling(module).forward
    fused = fuse_modules(model, kernels)
    assert fused[kind] == 0
    assert fused["layers"] == fused["stacks"] == 0
    assert fused["norms"] == 3


class Scaled(nn.Module):
    """A model whose embedding is scaled on the way to the layers, as Gemma's is, but by the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._embedding, self._own = model.embed_tokens, model.forward

    def forward(self, input_ids: torch.Tensor, **keywords: Any) -> Any:
        return self._own(inputs_embeds=3 * self._embedding(input_ids), **keywords)


def test_a_model_that_does_more_keeps_its_own_forward(kernels: Kernels) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes())).eval()
    pack_linears(model, kernels)
    model.model.forward = Scaled(model.model).forward
    fused = fuse_modules(model, kernels)
    assert (fused["layers"], fused["stacks"]) == (1, 0)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64,
         "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_a_stack_is_its_models_own(rope: dict[str, Any], layers: int, kernels: Kernels) -> None:
    fields = {"rope_parameters": {"rope_theta": 1e4, **rope}, "max_position_embeddings": 256}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes(**fields, num_hidden_layers=layers))).eval()
    pack_linears(model, kernels)
    assert fuse_modules(model, kernels)["stacks"] == 1
    stack = model.model.forward
    assert isinstance(stack, FusedStack)
    shape = stack._layers[0].shape
    # The angles of some kinds depend on the longest position so far, and both must meet the same.
    for first in (0, 50, 300, 5, 1200):
        results = []
        for forward in (stack, stack._own):
            span = Span(0, 5, 5, ((0, 5),), (0,))
            step = PagedStep(
                CpuAttention(kernels), KVCache(dict.fromkeys(range(layers), shape), 1, 16), [span], torch.arange(5)
            )
            ids, positions = torch.tensor([[5, 9, 2, 7, 31]]), torch.arange(first, first + 5)[None]
            with torch.inference_mode():
                result = forward(input_ids=ids, position_ids=positions, use_cache=False, **{STEP_KEYWORD: step})
            results.append(result.last_hidden_state)
        assert torch.allclose(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_a_stack_that_is_called_in_another_way_is_the_models_own(kernels: Kernels) -> None:
    model, fused = fused_model(tiny_model("llama"), kernels)
    assert fused["stacks"] == 1
    original = tiny_model("llama")
    for one in (model, original):
        one.set_attn_implementation("eager")
    with torch.inference_mode():
        embedded = original.model.embed_tokens(IDS)
        expected = original(inputs_embeds=embedded, output_hidden_states=True)
        found = model(inputs_embeds=embedded, output_hidden_states=True)
    assert torch.allclose(found.logits, expected.logits, atol=1e-3, rtol=1e-4)
    assert found.hidden_states is not None


def test_only_whole_rotated_heads_of_the_paged_path_are_fused() -> None:
    x, step = torch.zeros(1, 5, 64), object()
    whole = (torch.zeros(1, 5, 16), torch.zeros(1, 5, 16))
    assert paged_step(x, None, whole, 16, {STEP_KEYWORD: step}) is step
    assert paged_step(x, None, whole, 16, {}) is None
    assert paged_step(x, torch.zeros(5, 5), whole, 16, {STEP_KEYWORD: step}) is None
    assert paged_step(x, None, None, 16, {STEP_KEYWORD: step}) is None
    part = (torch.zeros(1, 5, 8), torch.zeros(1, 5, 8))
    assert paged_step(x, None, part, 16, {STEP_KEYWORD: step}) is None


def test_layers_share_the_plan_of_a_step(kernels: Kernels) -> None:
    model, _ = fused_model(tiny_model("llama"), kernels)
    layers = [layer.forward for layer in model.model.layers]
    assert all(isinstance(layer, FusedLayer) for layer in layers)
    assert len({id(layer._plans) for layer in layers}) == 1
    assert all(isinstance(layer.self_attn.forward, FusedAttention) for layer in model.model.layers)


def test_products_of_one_input_in_one_pass_are_those_of_each(kernels: Kernels) -> None:
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(out, 40, generator=generator) for out in (100, 31, 64)]
    biases = [torch.randn(100, generator=generator), None, torch.randn(64, generator=generator)]
    linears = [PackedLinear(kernels, *pair) for pair in zip(weights, biases, strict=True)]
    products = Products(linears)
    x = torch.randn(1, 61, 40, generator=generator)
    for found, linear in zip(products(x), linears, strict=True):
        assert torch.equal(found, linear(x))
    addend, sums = torch.randn(61, 100, generator=generator), torch.empty(61, 100)
    part = linears[0].part()
    part.result, part.addend = sums.data_ptr(), addend.data_ptr()
    kernels.linear(x.data_ptr(), 40, ctypes.addressof(part), 1, 61, 40)
    assert torch.equal(sums, linears[0](x)[0] + addend)
