"""The arithmetic of the quality report: perplexity, agreement, and the table."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, prompts_of, tiny_model

from loadtest.quality import BASE, KINDS, TEXT, agreement, perplexity, table
from loadtest.quality_worker import score, score_logits, windows
from serve_app.core import Fingerprint
from serve_app.models.loader import LoadedModel


def _loaded(context: int = 2048) -> LoadedModel:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    return LoadedModel(model, Fingerprint(""), "tiny", context, torch.device("cpu"), torch.float32, ())


def test_who_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    result = score_logits(torch.zeros(600, 50), [i % 50 for i in range(600)])
    assert perplexity(result.surprise_nats, len(result.top)) == pytest.approx(50)
    assert result.top == (0,) * 599


def test_who_knows_all_has_one() -> None:
    ids = [3, 1, 4, 1, 5]
    logits = torch.full((5, 10), -1e4)
    for position, following in enumerate(ids[1:]):
        logits[position, following] = 0.0
    result = score_logits(logits, ids)
    assert perplexity(result.surprise_nats, 4) == pytest.approx(1.0)
    assert result.top == (1, 4, 1, 5)


def test_it_is_the_models_own_loss() -> None:
    (ids,) = prompts_of([300])
    result = score(_loaded(), ids)
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        loss = tiny_model("llama")(tokens, labels=tokens).loss.item()
    assert math.log(perplexity(result.surprise_nats, len(result.top))) == pytest.approx(loss, rel=1e-5)
    assert len(result.top) == 299


def test_a_long_text_is_read_in_windows() -> None:
    assert windows(list(range(7)), 3) == [[0, 1, 2], [3, 4, 5]], "one token alone predicts nothing"
    (ids,) = prompts_of([100])
    whole, parts = score(_loaded(), ids), score(_loaded(context=50), ids)
    assert len(parts.top) == 98
    assert parts.top[:49] == whole.top[:49]
    assert all(0 <= token < VOCAB for token in parts.top)


def test_agreement_is_a_share_of_the_same_positions() -> None:
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75
    with pytest.raises(ValueError, match="longer"):
        agreement([1], [1, 2])


def test_the_table_compares_with_no_quantization() -> None:
    base = {
        "surprise_nats": 4 * math.log(8),
        "top": [1, 2, 3, 4],
        "held_bytes": 100e6,
        "predicted_bytes": 100e6,
        "grown_bytes": None,
        "tokens_per_s": {1: [10.0, 30.0, 20.0], 8: [40.0]},
    }
    other = base | {"surprise_nats": 4 * math.log(10), "top": [1, 2, 3, 5], "held_bytes": 50e6, "grown_bytes": 60e6}
    other["tokens_per_s"] = {1: [40.0], 8: [10.0]}
    rows = table({BASE: base, "bnb-nf4": other}).splitlines()
    assert rows[2] == "| none | 8.000 | 1.0000 | 100.0% | 100 | 100 |  | 20.0 | 1.00 | 40.0 | 1.00 |"
    assert rows[3] == "| bnb-nf4 | 10.000 | 1.2500 | 75.0% | 50 | 100 | 60 | 40.0 | 2.00 | 10.0 | 0.25 |"


def test_every_kind_is_measured_on_a_text_that_is_here() -> None:
    assert KINDS == ("none", "bnb-int8", "bnb-nf4", "bnb-fp4")
    assert 3000 < len(Path(TEXT).read_text(encoding="utf-8")) < 6000
