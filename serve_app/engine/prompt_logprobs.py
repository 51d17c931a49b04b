"""The logprobs of one prompt's tokens, gathered chunk by chunk while the prompt is computed.

A row of logits is scored by itself, so the chunks a prompt is computed in change no bit. Knows no scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt
import torch

from serve_app.core import PromptLogprobs


class PromptScores:
    """The scores of a prompt's tokens from its second one on; `len` is the number of those that are known."""

    def __init__(self, top: int) -> None:
        """`top`: how many of the most likely tokens to list for each place."""
        self._top = top
        self._logprobs: list[npt.NDArray[np.float32]] = []
        """`[n, 1 + top]` of each chunk: of the prompt's token, then of the most likely ones."""
        self._numbers: list[npt.NDArray[np.uint32]] = []
        """`[n, 1 + top]` of each chunk: the rank of the prompt's token, then the ids of the most likely ones."""
        self._known = 0

    def __len__(self) -> int:
        return self._known

    def add(self, logits: torch.Tensor, prompt_token_ids: SequenceOf[int]) -> None:
        """Score the next tokens of the prompt by the logits `[n, vocab]` in float32 of the tokens before them."""
        first = 1 + self._known
        ids = torch.tensor(prompt_token_ids[first : first + len(logits)], device=logits.device)[:, None]
        logprobs = logits.log_softmax(dim=-1)
        own = logprobs.gather(1, ids)
        ranks = 1 + (logprobs > own).sum(dim=-1, keepdim=True)
        best = logprobs.topk(self._top, dim=-1)
        # Two copies from the device, each of which waits for it.
        self._logprobs.append(torch.cat((own, best.values), dim=-1).cpu().numpy())
        self._numbers.append(torch.cat((ranks, best.indices), dim=-1).cpu().numpy().astype(np.uint32))
        self._known += len(logits)

    @property
    def are_numbers(self) -> bool:
        """Whether all scores are numbers; if not, the model's output can't be used."""
        return not any(np.isnan(chunk[:, 0]).any() for chunk in self._logprobs)

    def packed(self) -> PromptLogprobs:
        """All of them."""
        width = 1 + self._top
        logprobs = np.concatenate((np.empty((0, width), np.float32), *self._logprobs))
        numbers = np.concatenate((np.empty((0, width), np.uint32), *self._numbers))
        return PromptLogprobs(
            self._top,
            logprobs[:, 0].tobytes(),
            numbers[:, 0].tobytes(),
            numbers[:, 1:].tobytes(),
            logprobs[:, 1:].tobytes(),
        )
