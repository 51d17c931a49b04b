"""The demo model as a float32 GGUF, for llama.cpp, made once from the file that the demo model is converted from.

Promises the numbers that serve_app computes with: both dequantise the same Q4_1 tensors to float32.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from serve_app.models.demo import fetch_demo_gguf


class ConversionFailed(Exception):
    """llama.cpp's own converter failed; the message has its last words."""


def ensure_float32_gguf(target: Path, quantize: Path) -> None:
    """Make `target` with llama.cpp's `quantize` unless it is there. Raises `ConversionFailed`, `ModelError`."""
    if target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        source = fetch_demo_gguf(Path(work), progress=lambda stage: None)
        partial = Path(work) / "f32.gguf"
        done = subprocess.run(
            [quantize, "--allow-requantize", source, partial, "F32"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConversionFailed(f"{quantize.name} failed: {(done.stderr or done.stdout).strip()[-300:]}")
        os.replace(partial, target)
