"""Tiny random models of each served architecture, and ways to run requests through an engine of them."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5_MoeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from serve_app.core import Failure, Fingerprint, GenerationRequest, SamplingParams, TokenBatch
from serve_app.engine.engine import Engine

FINGERPRINT = Fingerprint("tiny")
VOCAB = 128
CONTEXT = 256

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=16, sliding_window=24, attn_logit_softcapping=5.0),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=24),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=3, n_head=4, n_positions=CONTEXT, bos_token_id=None, eos_token_id=None
    ),
}
ARCHITECTURES = tuple(_CONFIGS)
_MIXTURE_CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
    ),
    "ernie4_5_moe": lambda: Ernie4_5_MoeConfig(**SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=48),
}
MIXTURES = tuple(_MIXTURE_CONFIGS)
"""Of experts: how many rows an expert gets depends on the company, so they are not batch-invariant."""


def tiny_model(kind: str) -> PreTrainedModel:
    """A random model of an architecture: always the same weights, in a copy, since an engine changes its model."""
    return copy.deepcopy(_pristine(kind))


@cache
def _pristine(kind: str) -> PreTrainedModel:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config((_CONFIGS | _MIXTURE_CONFIGS)[kind]()).eval()
    for parameter in model.parameters():
        # The usual initialisation is so small that attention hardly matters: errors in it would not show.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def greedy_reference(kind: str, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """What transformers' own `generate` continues a prompt with."""
    model = tiny_model(kind)
    model.set_attn_implementation("eager")
    output = model.generate(
        torch.tensor([list(prompt)]), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
    )
    return output[0, len(prompt) :].tolist()


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def request_for(prompt: Sequence[int], new_tokens: int = 20, **fields: Any) -> GenerationRequest:
    """A greedy request; `sampling` and the request's own fields can be given."""
    sampling = fields.pop("sampling", SamplingParams(seed=0, temperature=0))
    return GenerationRequest("test", FINGERPRINT, tuple(prompt), sampling, new_tokens, **fields)


async def collect(engine: Engine, request: GenerationRequest) -> list[TokenBatch | Failure]:
    return [reply async for reply in engine.generate(request)]


async def tokens_of(engine: Engine, request: GenerationRequest) -> list[int]:
    """The output ids; indices must be gapless and the last batch must carry a finish reason."""
    tokens = list(request.output_token_ids)
    reply: TokenBatch | Failure | None = None
    async for reply in engine.generate(request):
        assert isinstance(reply, TokenBatch), reply
        assert reply.first_index == len(tokens)
        tokens.extend(reply.token_ids)
    assert isinstance(reply, TokenBatch)
    assert reply.finish_reason is not None
    return tokens


async def all_tokens(engine: Engine, requests: Sequence[GenerationRequest]) -> list[list[int]]:
    return list(await asyncio.gather(*(tokens_of(engine, request) for request in requests)))


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    """Let other tasks and threads run until the condition holds; fails when it doesn't in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0)
