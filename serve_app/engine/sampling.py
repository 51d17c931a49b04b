"""From logits to token ids, one vectorised pass over the rows of a step.

The draw for output position i is a pure function of (seed, choice, i) and the row's logits: a counter-based uniform
(Philox4x32-10, Salmon et al., SC'11) and the inverse CDF over the filtered distribution in vocabulary order. Rows
never see each other: each operation reduces within a row of fixed length.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from serve_app.core import SamplingParams, TokenLogprobs
from serve_app.engine.cpu.library import Kernels
from serve_app.engine.masks import Masks
from serve_app.engine.sequence import DraftPosition, Sequence

NOT_A_NUMBER = -1
"""In place of a token id: the row's logits are not finite numbers, so the model's output can't be used."""
NO_TOKEN = -2
"""In place of a token id: the row's grammar allows none."""

TOP_P_CANDIDATES = 512
"""How many of the largest probabilities top-p sorts at first. Sorting a whole row of 49,152 takes 3 ms on a CPU."""

_SORTED_ROWS = 8
"""How many rows are sorted whole at a time, if that is needed. A sort on a GPU holds about 18 copies of its input."""
_SORTED_IDS = 4096
"""`topk` of more ids than this sorts the whole row on a GPU."""
_COPIES, _COPIES_SORTED = 9, 18
"""Copies in float32 at the peak of memory. `_COPIES` of `[rows, vocab]`: logits, log-probabilities, scaled logits,
probabilities, the same in float64, and their cumulative sums. `_COPIES_SORTED` of the rows that are being sorted."""

_U32 = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: npt.NDArray[np.uint64], key: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Philox4x32 with 10 rounds: counters `[n, 4]` and keys `[n, 2]` of 32-bit words -> `[n, 4]` random words."""
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key[:, 0], key[:, 1]
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0
        p1 = np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _U32, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _U32, (k1 + np.uint64(0xBB67AE85)) & _U32
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(seeds: SequenceOf[int], choices: SequenceOf[int], positions: SequenceOf[int]) -> npt.NDArray[np.float64]:
    """One draw in [0, 1) with 53 bits for each (seed, choice, output position), `[n]`."""
    seed = np.array(seeds, dtype=np.uint64)
    counter = np.zeros((len(seeds), 4), dtype=np.uint64)
    counter[:, 0] = positions
    counter[:, 1] = choices
    words = philox4x32(counter, np.stack((seed & _U32, seed >> _SHIFT), axis=1))
    return ((words[:, 0] << np.uint64(21)) ^ (words[:, 1] >> np.uint64(11))) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome for one row."""

    token_id: int
    """Or `NOT_A_NUMBER`, or `NO_TOKEN`."""
    logprobs: TokenLogprobs | None = None


def scratch_bytes(rows: int, vocab_size: int) -> int:
    """Memory that sampling holds at its peak for logits `[rows, vocab]`, the logits included."""
    return 4 * vocab_size * (_COPIES * rows + _COPIES_SORTED * min(rows, _SORTED_ROWS))


class Sampler:
    """Chooses the next token of each sequence of a step."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        """`kernels`: choose the tokens for logits on a CPU, by the same function and 8 to 30 times as fast."""
        self._kernels = kernels

    def sample(
        self, logits: torch.Tensor, sequences: SequenceOf[Sequence | DraftPosition], masks: Masks | None = None
    ) -> list[Sampled]:
        """Logits `[n, vocab]` in float32 (changed in place), one row per sequence -> one token each."""
        # Log-probabilities are those of the model's own distribution, so they are taken before the logits are changed.
        logprobs = {
            row: (logits[row].log_softmax(dim=-1), top)
            for row, s in enumerate(sequences)
            if (top := s.request.sampling.logprobs) is not None
        }
        on_cpu = self._kernels is not None and logits.device.type == "cpu"
        if on_cpu:
            logits = logits.contiguous()
        self._adjust(logits, sequences)
        if masks is not None:
            self._mask(logits, masks)
        chosen = self._choose_by_kernel(logits, sequences) if on_cpu else self._choose(logits, sequences)
        for row in masks.ended if masks is not None else ():
            chosen[row] = NO_TOKEN
        return [
            Sampled(token_id, _logprobs_of(token_id, *logprobs[row]) if row in logprobs and token_id >= 0 else None)
            for row, token_id in enumerate(chosen)
        ]

    def _choose(self, logits: torch.Tensor, sequences: SequenceOf[Sequence | DraftPosition]) -> list[int]:
        """One token id for each row; `NOT_A_NUMBER` for a row whose logits are not finite numbers."""
        best, token_ids = logits.max(dim=-1)
        drawn = [row for row, s in enumerate(sequences) if s.request.sampling.temperature > 0]
        if drawn:
            rows = _to(torch.tensor(drawn), logits.device)
            token_ids = token_ids.index_copy(0, rows, self._draw(logits[rows], [sequences[row] for row in drawn]))
        # One copy from the device, and one wait for it.
        chosen: list[int] = token_ids.masked_fill(~torch.isfinite(best), NOT_A_NUMBER).tolist()
        return chosen

    def _choose_by_kernel(self, logits: torch.Tensor, sequences: SequenceOf[Sequence | DraftPosition]) -> list[int]:
        """`_choose`, computed by `kernels/sampling.cpp`."""
        assert self._kernels is not None
        choices = np.zeros((len(sequences), 5))
        drawn = [row for row, s in enumerate(sequences) if s.request.sampling.temperature > 0]
        if drawn:
            params = [sequences[row].request.sampling for row in drawn]
            choices[drawn, :4] = [(p.temperature, p.top_k, p.top_p, p.min_p) for p in params]
            choices[drawn, 4] = _draws([sequences[row] for row in drawn])
        ids = np.empty(len(sequences), dtype=np.int64)
        self._kernels.sample(logits.data_ptr(), *logits.shape, choices.ctypes.data, ids.ctypes.data)
        chosen: list[int] = ids.tolist()
        return chosen

    def _mask(self, logits: torch.Tensor, masks: Masks) -> None:
        """Add -inf to the logits of the ids that a grammar forbids; one that is not a number stays that."""
        if self._kernels is not None and logits.device.type == "cpu":
            rows = np.array(masks.rows, dtype=np.int64)
            words, vocab = masks.words, logits.shape[1]
            self._kernels.mask(logits.data_ptr(), vocab, words.ctypes.data, words.shape[1], rows.ctypes.data, len(rows))
            return
        octets = _to(torch.from_numpy(masks.words.view(np.uint8)), logits.device).int()
        # One table entry for eight ids: on a CPU `masked_fill_` takes six times as long.
        added = functional.embedding(octets, _octets(logits.device)).flatten(1)[:, : logits.shape[1]]
        if masks.rows == list(range(len(logits))):
            logits += added
        else:
            logits.index_add_(0, _to(torch.tensor(masks.rows), logits.device), added)

    def _adjust(self, logits: torch.Tensor, sequences: SequenceOf[Sequence | DraftPosition]) -> None:
        """Bias, penalties and forbidden stop ids. Each is a function of the output ids so far."""
        for row, sequence in enumerate(sequences):
            params, request = sequence.request.sampling, sequence.request
            if params.repetition_penalty != 1.0:
                # Repeated ids get the same score repeatedly: removing duplicates would take longer.
                seen = self._ids(sequence.token_ids, logits.device)
                scores = logits[row, seen]
                penalty = params.repetition_penalty
                logits[row, seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
            if params.presence_penalty or params.frequency_penalty:
                output = self._ids(sequence.token_ids[sequence.prompt_len :], torch.device("cpu"))
                ids, counts = output.unique(return_counts=True)  # type: ignore[no-untyped-call]
                penalties = params.presence_penalty + params.frequency_penalty * counts.float()
                logits[row, ids.to(logits.device)] -= penalties.to(logits.device)
            if params.logit_bias:
                ids, biases = zip(*params.logit_bias, strict=True)
                logits[row, self._ids(ids, logits.device)] += torch.tensor(biases, device=logits.device)
            if sequence.output_len < params.min_tokens and request.stop_token_ids:
                logits[row, self._ids(request.stop_token_ids, logits.device)] = float("-inf")

    @staticmethod
    def _ids(ids: SequenceOf[int], device: torch.device) -> torch.Tensor:
        return torch.from_numpy(np.array(ids, dtype=np.int64)).to(device)

    def _draw(self, logits: torch.Tensor, sequences: SequenceOf[Sequence | DraftPosition]) -> torch.Tensor:
        """Temperature, filters and the inverse CDF, `[n, vocab]` -> `[n]` ids."""
        params = [s.request.sampling for s in sequences]

        def column(value: Callable[[SamplingParams], float]) -> torch.Tensor:
            return _to(torch.tensor([value(p) for p in params], dtype=torch.float32), logits.device)[:, None]

        # Subtracting the maximum first keeps a tiny temperature from overflowing.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / column(lambda p: p.temperature)
        if any(p.top_k for p in params):
            self._keep_top_k(logits, [p.top_k for p in params])
        probs = logits.softmax(dim=-1)
        if any(p.top_p < 1 for p in params):
            self._keep_top_p(probs, [p.top_p for p in params])
        if any(p.min_p > 0 for p in params):
            probs.masked_fill_(probs < probs.amax(dim=-1, keepdim=True) * column(lambda p: p.min_p), 0.0)
        return inverse_cdf(probs, _to(torch.from_numpy(_draws(sequences)), logits.device))

    @staticmethod
    def _keep_top_k(logits: torch.Tensor, top_k: list[int]) -> None:
        """All logits that tie with the k-th largest stay, as in transformers' TopKLogitsWarper."""
        rows = [row for row, k in enumerate(top_k) if 0 < k < logits.shape[-1]]
        at_once = _SORTED_ROWS if max((top_k[row] for row in rows), default=0) > _SORTED_IDS else max(1, len(rows))
        for start in range(0, len(rows), at_once):
            few = rows[start : start + at_once]
            chosen = logits[few]
            ks = torch.tensor([top_k[row] for row in few], device=logits.device)
            thresholds = chosen.topk(int(ks.max()), dim=-1).values.gather(1, ks[:, None] - 1)
            logits[few] = chosen.masked_fill_(chosen < thresholds, float("-inf"))

    @staticmethod
    def _keep_top_p(probs: torch.Tensor, top_p: list[float]) -> None:
        """Keep the fewest largest probabilities whose sum reaches top_p, and all that tie with the smallest of them."""
        rows = [row for row, p in enumerate(top_p) if p < 1]
        wanted = torch.tensor([top_p[row] for row in rows], dtype=torch.float64, device=probs.device)[:, None]
        chosen = probs[rows]
        largest = chosen.topk(min(TOP_P_CANDIDATES, chosen.shape[-1]), dim=-1).values
        cumulative = largest.double().cumsum(-1)
        flat = (cumulative[:, -1:] < wanted).any(dim=-1)
        thresholds = _top_p_threshold(largest, cumulative, wanted)
        if bool(flat.any()):
            for few in torch.split(flat.nonzero()[:, 0], _SORTED_ROWS):
                whole = chosen[few].sort(dim=-1, descending=True).values
                thresholds[few] = _top_p_threshold(whole, whole.double().cumsum(-1), wanted[few])
        probs[rows] = chosen.masked_fill_(chosen < thresholds, 0.0)


def _logprobs_of(token_id: int, logprobs: torch.Tensor, top: int) -> TokenLogprobs:
    """The log-probabilities of the chosen id and of the `top` most likely ids, taken from those of a row, `[vocab]`."""
    best = logprobs.topk(top)
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenLogprobs(float(logprobs[token_id]), pairs)


def _draws(sequences: SequenceOf[Sequence | DraftPosition]) -> npt.NDArray[np.float64]:
    """Each sequence's draw for its next output position, `[n]`."""
    return uniforms(
        [s.request.sampling.seed for s in sequences],
        [s.request.choice for s in sequences],
        [s.output_len for s in sequences],
    )


@cache
def _octets(device: torch.device) -> torch.Tensor:
    """For each byte of a mask what is added to the logits of its eight ids, `[256, 8]`."""
    added = [[0.0 if octet >> bit & 1 else float("-inf") for bit in range(8)] for octet in range(256)]
    return torch.tensor(added, device=device)


def _to(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device that doesn't wait for its running work."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


def _top_p_threshold(descending: torch.Tensor, cumulative: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    last = (cumulative < wanted).sum(dim=-1, keepdim=True).clamp_(max=descending.shape[-1] - 1)
    return descending.gather(1, last)


def inverse_cdf(probs: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The first id whose cumulative weight exceeds draw times the total, `[n, vocab]` and `[n]` -> `[n]`.

    `probs` need not sum to 1. An id of weight 0 is never chosen.
    """
    cumulative = probs.double().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding may lift draw * total to total itself, which no id exceeds.
    target = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
