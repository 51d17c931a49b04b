"""Names how a batch-invariant engine computes: engines of the same name and the same weights give the same bits.

Everything that may change a bit of a logit is in the name: kernels, processor, libraries, fixed shapes. An engine that
is not batch-invariant has no name, since its bits also depend on its other requests.
"""

from __future__ import annotations

import hashlib
import platform

import torch
import transformers

from serve_app.engine.cpu.library import Kernels


def numerics_id(
    backend: str,
    kernels: Kernels | None,
    device: torch.device,
    *,
    page_tokens: int,
    fixed_rows: tuple[int, int] | None,
) -> str:
    """A digest of 16 hexadecimal digits.

    Args:
        backend: name of the attention kernel.
        kernels: our CPU kernels; their key stands for their source, the compiler and the processor's instructions.
        device: where the model is.
        page_tokens: page size of the KV cache; some kernels sum in blocks of pages.
        fixed_rows: tokens and rows of logits that every step is padded to; None without padding.
    """
    parts = [backend, torch.__version__, transformers.__version__, str(page_tokens), str(fixed_rows)]
    if device.type == "cuda":
        parts += [torch.cuda.get_device_name(device), str(torch.version.cuda)]
    else:
        parts += [platform.machine(), torch.backends.cpu.get_cpu_capability()]
        # Our kernels give the same bits with any number of threads, which is tested. torch's kernels may not.
        parts += [kernels.key] if kernels is not None else [str(torch.get_num_threads())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
