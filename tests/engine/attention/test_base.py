"""What transformers gets back from the paged attention."""

from __future__ import annotations

import torch
from torch import nn

from serve_app.engine.attention.base import STEP_KEYWORD, AttentionParams, paged_attention


class Transposed:
    """A step whose kernel has the heads first."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, params: AttentionParams
    ) -> torch.Tensor:
        return query.transpose(1, 2)


def test_models_may_take_a_view_of_what_attention_answers() -> None:
    module = nn.Module()
    module.layer_idx = 0
    x = torch.arange(2 * 3 * 4.0).reshape(1, 2, 3, 4)
    output, weights = paged_attention(module, x, x, x, None, output_router_logits=False, **{STEP_KEYWORD: Transposed()})
    assert torch.equal(output.view(1, 3, 8), x.transpose(1, 2).reshape(1, 3, 8))
    assert weights is None
