"""Checks of the paged path before an engine may serve: against the model's own code, and for batch invariance.

After a mismatch of one kernel the next one is tried. A mismatch of the plain path means that the model computes
something unknown, and the model is refused. Where logits depend on the batch, that is only reported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch

from serve_app.core import Fingerprint, GenerationRequest, SamplingParams
from serve_app.engine.core import EngineCore
from serve_app.engine.kv_cache import PagePool
from serve_app.engine.masks import Masks
from serve_app.engine.model_runner import ModelRunner
from serve_app.engine.prompt_lookup import ROW_COST
from serve_app.engine.sampling import Sampled, Sampler
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import DraftPosition, Sequence

TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""Largest |a - b| / |b| of a row of logits. A wrong mask or page gives 0.3 and more."""
ROUNDED_TOLERANCE = 1e-1
"""The tolerance for quantised weights. A last bit of the input can change what a layer rounds by a whole step: paging
alone gave 0.012 with int8 activations and 0.003 with 4-bit weights, which some CPUs compute in bfloat16."""
_LENGTHS = (41, 23, 7)
_STEP_TOKENS = 16
_DECODED = {0: 12, 2: 6}
"""Number of a sequence -> how many of its last tokens the check of batch invariance decodes one by one. The contexts of
1 to 7 and of 30 to 41 tokens have all remainders modulo 8. Decoding all 71 tokens took 1.5 s more at every start and
reached no other kernel."""
_TIMED_ROWS, _TIMED_STEPS = 8, 3
_LONG_LENGTHS = (200, 391, 520)
_LONG_STEP_TOKENS = 160
_LONG_DECODED = 8
"""`_LONG_LENGTHS` pass the numbers of keys at which torch's kernels were seen to change: 193, 384 and 512. They are
computed in chunks that end on either side of these, and again with the last tokens decoded one by one: 22 steps."""


def check_model(runner: ModelRunner) -> str | None:
    """Compute three sequences in chunks, side by side, through the paged path; returns what is wrong, or None."""
    forced = _ForcedTokens(runner, dict(enumerate(_LENGTHS)))
    rows = forced.run(_STEP_TOKENS)
    for number, token_ids in forced.tokens.items():
        if (complaint := _compare(runner, token_ids, rows[number])) is not None:
            return complaint
    return None


def check_batch_invariance(runner: ModelRunner, longest_tokens: int) -> bool:
    """Whether the logits are the same bits alone, in a shuffled batch, in chunks, and decoded token by token.

    Args:
        runner: its cache is overwritten.
        longest_tokens: the longest context to check. Pass the longest that will be served, or 0 for a kernel that is
            known to compute few keys and many in the same way. Contexts beyond 520 tokens are not checked.
    """

    def rows(lengths: Mapping[int, int], step_tokens: int, decoded: int = 0) -> dict[int, torch.Tensor]:
        return _ForcedTokens(runner, lengths, decoded).run(step_tokens)

    def rows_alone(lengths: Mapping[int, int]) -> dict[int, torch.Tensor]:
        return {arrival: rows({arrival: length}, 512)[arrival] for arrival, length in lengths.items()}

    def same(rows: Mapping[int, torch.Tensor], others: Mapping[int, torch.Tensor]) -> bool:
        return all(torch.equal(row, others[arrival]) for arrival, row in rows.items())

    lengths = dict(enumerate(_LENGTHS))
    alone = rows_alone(lengths)
    shuffled = dict(reversed(lengths.items()))
    if not all(same(alone, rows(shuffled, step_tokens)) for step_tokens in (5, _STEP_TOKENS, 33, 512)):
        return False
    if not all(same(rows({arrival: lengths[arrival]}, 512, n), alone) for arrival, n in _DECODED.items()):
        return False
    reached = {min(length, longest_tokens) for length in _LONG_LENGTHS if longest_tokens > max(_LENGTHS)}
    lengths = dict(enumerate(sorted(reached, reverse=True), start=len(_LENGTHS)))
    alone = rows_alone(lengths)
    return same(alone, rows(lengths, _LONG_STEP_TOKENS)) and same(alone, rows(lengths, 512, _LONG_DECODED))


def measure_row_cost(runner: ModelRunner) -> float:
    """The time that one more row adds to a decode step, as a share of a step of one row, measured in eight steps.

    The device must have finished a step when the call returns, as a CPU has. Returns `ROW_COST` when the cache has no
    room for two sequences.
    """
    most = _TIMED_ROWS if runner.fixed_rows is None else runner.fixed_rows[0]
    rows = min(_TIMED_ROWS, (runner.cache.num_pages - 1) // 2, most)  # all are admitted at once
    if rows < 2:
        return ROW_COST
    one, many = (_decode_seconds(runner, count) for count in (1, rows))
    return min(max(0.0, many / one - 1) / (rows - 1), 1.0)


def _decode_seconds(runner: ModelRunner, count: int) -> float:
    """Seconds of a step in which `count` sequences decode: the fastest of `_TIMED_STEPS`, which was disturbed least."""
    forced = _ForcedTokens(runner, dict.fromkeys(range(count), 1 + _TIMED_STEPS), decoded=_TIMED_STEPS)
    core = forced.core(step_tokens=count)
    times = []
    for _ in range(1 + _TIMED_STEPS):  # the first step computes the prompts
        begin = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - begin)
    return min(times[1:])


class _ForcedTokens(Sampler):
    """A sampler that ignores the logits and continues each sequence with known tokens, for comparisons of the logits.

    Each sequence computes its first tokens as a prompt and its last `decoded` ones one a step. The logits that follow
    its last token are kept.
    """

    def __init__(self, runner: ModelRunner, lengths: Mapping[int, int], decoded: int = 0) -> None:
        """`lengths`: number of a sequence -> how many tokens it has."""
        super().__init__()
        self.tokens = {
            number: tuple((17 * number + 7 * i * i + 3) % runner.vocab_size for i in range(length))
            for number, length in lengths.items()
        }
        self._runner = runner
        self._decoded = decoded
        self._rows: dict[int, torch.Tensor] = {}

    def core(self, step_tokens: int) -> EngineCore:
        """An engine's core with an empty cache and all sequences in its queue. Its sampler is this object."""
        cache, fixed_rows = self._runner.cache, self._runner.fixed_rows
        if fixed_rows is not None:
            step_tokens = min(step_tokens, fixed_rows[0])
        scheduler = Scheduler(
            PagePool(cache.num_pages - 1),
            page_tokens=cache.page_tokens,
            max_running=len(self.tokens),
            max_step_tokens=step_tokens,
        )
        for number, token_ids in self.tokens.items():
            prompt = token_ids[: len(token_ids) - self._decoded]
            request = GenerationRequest(str(number), Fingerprint(""), prompt, _GREEDY, self._decoded + 1)
            scheduler.add(Sequence(request, number))
        return EngineCore(self._runner, scheduler, self)

    def run(self, step_tokens: int) -> dict[int, torch.Tensor]:
        """Compute all sequences to their ends; returns the logits `[vocab]` after the last token of each."""
        core = self.core(step_tokens)
        while core.has_work:
            core.step()
        return self._rows

    def sample(
        self, logits: torch.Tensor, sequences: SequenceOf[Sequence | DraftPosition], masks: Masks | None = None
    ) -> list[Sampled]:
        return [self._next(position, row) for position, row in zip(sequences, logits, strict=True)]

    def _next(self, position: Sequence | DraftPosition, row: torch.Tensor) -> Sampled:
        number, known = int(position.request.request_id), len(position.token_ids)
        if known < len(self.tokens[number]):
            return Sampled(self.tokens[number][known])
        self._rows[number] = row
        return Sampled(0)  # the id does not matter: the sequence ends here


_GREEDY = SamplingParams(seed=0, temperature=0)


def _compare(runner: ModelRunner, token_ids: SequenceOf[int], row: torch.Tensor) -> str | None:
    expected = runner.reference_logits(list(token_ids))[-1]
    difference = ((row - expected).norm() / expected.norm()).item()
    dtypes = {layer.shape.dtype for layer in runner.layers.values()}
    tolerance = max(TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) for dtype in dtypes)
    if runner.quantized:
        tolerance = max(tolerance, ROUNDED_TOLERANCE)
    if not difference <= tolerance:  # NaN too
        return f"its logits differ from the model's own attention by {difference:.2g} (at most {tolerance:g})"
    return None
