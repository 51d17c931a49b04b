"""Selects the GPU that a launch goes to, where PyTorch does not do so by itself.

A Triton launch, a new stream, "the current stream" and `synchronize` belong to the thread's current device, wherever
the tensors are. A thread starts with the first GPU as its current device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within it `device` is the current one. Does nothing for a device that is no GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
