"""LongRoPE: one set of angles for all that is computed, whatever is computed beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from model_builders import ignore_progress, tiny_tokenizer
from tiny_models import FINGERPRINT, request_for

from serve_app.config import EngineConfig, ModelConfig
from serve_app.core import TokenBatch
from serve_app.engine.engine import Engine
from serve_app.models.loader import LoadedModel, load
from serve_app.models.model_error import ModelError
from serve_app.models.rotary import choose_angles
from serve_app.models.source import resolve

ORIGINAL, CONTEXT = 64, 256
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": CONTEXT,
}
FACTORS = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Phi-3 whose attention matters."""
    folder = tmp_path_factory.mktemp("models") / "tiny-phi"
    torch.manual_seed(3)
    config = tf.Phi3Config(**SHAPE, original_max_position_embeddings=ORIGINAL, rope_parameters=dict(FACTORS))
    model = tf.Phi3ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def loaded(folder: Path, max_model_len: int | None = None) -> LoadedModel:
    model = ModelConfig(source=str(folder), max_model_len=max_model_len)
    return load(resolve(model, folder, progress=ignore_progress), model, has_gpu=False, progress=ignore_progress)


async def answers(model: LoadedModel, *rounds: list[list[int]], **config: Any) -> list[list[list[int]]]:
    """Of an engine of their own: the tokens after each prompt. The prompts of a round are computed together."""
    settings = EngineConfig.model_validate({"kv_cache_memory": "16MiB", "threads": 1, "prompt_lookup": False, **config})
    engine = Engine(model.model, settings, context_tokens=model.context_tokens, fingerprint=FINGERPRINT)

    async def tokens_after(prompt: list[int]) -> list[int]:
        replies = [reply async for reply in engine.generate(request_for(prompt, 20))]
        assert all(isinstance(reply, TokenBatch) for reply in replies)
        return [token for reply in replies for token in reply.token_ids]  # type: ignore[union-attr]

    try:
        return [await asyncio.gather(*map(tokens_after, prompts)) for prompts in rounds]
    finally:
        engine.stop()


SHORT = [(7 * i) % 290 + 5 for i in range(30)]
LONG = [(11 * i) % 290 + 5 for i in range(200)]


async def test_a_long_prompt_is_the_same_in_one_step_and_in_many(folder: Path) -> None:
    model = loaded(folder)
    assert model.context_tokens == CONTEXT
    whole, parts = [await answers(model, [LONG], max_step_tokens=tokens) for tokens in (512, 32)]
    assert whole == parts


async def test_what_is_computed_beside_and_cached_changes_nothing(folder: Path) -> None:
    model = loaded(folder)
    ((alone,),) = await answers(model, [SHORT])
    (_, beside), (cached,) = await answers(model, [LONG, SHORT], [SHORT])
    assert beside == cached == alone


def test_positions_have_their_angles_whatever_is_beside_them(folder: Path) -> None:
    rotary = loaded(folder).model.model.rotary_emb
    hidden = torch.zeros(1, 1, 32)
    short, beside = (rotary(hidden, torch.arange(tokens)[None]) for tokens in (30, 200))
    for one, other in zip(short, beside, strict=True):
        assert torch.equal(one, other[:, :30])


def test_the_context_that_is_served_decides_and_is_told_apart(folder: Path) -> None:
    long, short = loaded(folder), loaded(folder, max_model_len=ORIGINAL)
    assert long.fingerprint != short.fingerprint
    assert any(f"max_model_len: {ORIGINAL}" in note for note in long.notes)
    assert short.notes == ()
    own = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([SHORT])
    assert torch.equal(short.model(ids).logits, own(ids).logits)
    ids = torch.tensor([LONG])
    assert torch.equal(long.model(ids).logits, own(ids).logits)


def test_a_model_whose_own_code_chooses_is_served_up_to_where_there_is_no_choice() -> None:
    scales = {"short_mscale": 1.0, "long_mscale": 1.2, "original_max_position_embeddings": ORIGINAL}
    config = tf.PhimoeConfig(**SHAPE, rope_parameters={**FACTORS, **scales})
    assert choose_angles(config, ORIGINAL, "phi-moe") == "short"
    with pytest.raises(ModelError, match=f"phi-moe chooses .* set model.max_model_len to {ORIGINAL} or less"):
        choose_angles(config, ORIGINAL + 1, "phi-moe")
    assert choose_angles(tf.LlamaConfig(**SHAPE), CONTEXT, "llama") == ""
