"""Attention kernels that end the process which launches them, as a fault on a GPU does, or never end at all."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from serve_app.engine.attention.plain import PlainAttention


class FatalAttention(PlainAttention):
    """In the process that made it, it computes; in another it does what `fault` says."""

    name = "fatal"

    def __init__(self, fault: str) -> None:
        self._fault, self._home = fault, os.getpid()

    def attend(self, *arguments: Any) -> torch.Tensor:
        if os.getpid() != self._home:
            match self._fault:
                case "abort":
                    os.abort()
                case "hang":
                    time.sleep(600)
                case "wrong":
                    return super().attend(*arguments) + 1
        return super().attend(*arguments)


class Unloadable(FatalAttention):
    """A child can't even be handed it."""

    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("all CUDA-capable devices are busy or unavailable")
