"""The demo model for llama.cpp: the file that the demo model is converted from, and a float32 GGUF made of it once.

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


def ensure_gguf(source: Path, target: Path, quantize: Path) -> None:
    """Fetch the file as `source` and make `target` of it with llama.cpp's `quantize`, unless they are there.

    Raises `ConversionFailed`, `ModelError`.
    """
    if source.exists() and target.exists():
        return
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        fetched = fetch_demo_gguf(Path(work), progress=lambda stage: None)
        partial = Path(work) / "f32.gguf"
        done = subprocess.run(
            [quantize, "--allow-requantize", fetched, partial, "F32"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ConversionFailed(f"{quantize.name} failed: {(done.stderr or done.stdout).strip()[-300:]}")
        os.replace(partial, target)
        os.replace(fetched, source)
