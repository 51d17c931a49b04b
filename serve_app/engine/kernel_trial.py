"""Tries an attention kernel in a process of its own before this one may launch it.

A fault on a GPU (an access to memory that is not there) ends the process's use of the GPU for good, and a kernel can
hang. In a child it costs the child, and the next kernel serves. Seconds for the child's own PyTorch and CUDA: what has
passed is remembered in the cache folder, by all that it depends on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from serve_app.engine.attention.base import AttentionBackend
from serve_app.engine.attention.check import check_attention
from serve_app.engine.model_runner import AttentionLayer

logger = logging.getLogger(__name__)

TRIAL_LIMIT_S = 180.0
"""Imports take a child some 10 s, and Triton's compiling of a new kernel some seconds a shape."""
_ROOM_BYTES = 2**28
"""What the check takes of a GPU's memory, with room to spare; PyTorch keeps it for the check."""
_BEGUN, _VERDICT = "kernels begin", "verdict: "


@dataclass(frozen=True, slots=True)
class Trial:
    """A kernel, and all that it is to be tried on."""

    backend: AttentionBackend
    layers: tuple[AttentionLayer, ...]
    page_tokens: int

    def key(self) -> str:
        """Of everything that the outcome depends on: kernel and shapes, source, libraries, processor."""
        folders = (Path(__file__).with_name("attention"), Path(__file__).with_name("cuda"))
        sources = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py"))]
        devices = sorted({str(layer.shape.device) for layer in self.layers if layer.shape.device.type == "cuda"})
        names = [torch.cuda.get_device_name(device) for device in devices]
        versions = (torch.__version__, torch.version.cuda, sys.version)
        kernel = (type(self.backend).__qualname__, sorted(vars(self.backend).items()))
        told = repr((kernel, self.layers, self.page_tokens, names, versions)).encode()
        return hashlib.sha256(b"\0".join((told, *sources))).hexdigest()[:24]


def try_apart(trial: Trial, passed: Path | None, limit_s: float = TRIAL_LIMIT_S) -> str | None:
    """What is wrong with the kernel, or None: it passed, now or before, or no child could get as far as launching it.

    Args:
        trial: of a kernel whose class a new process can import.
        passed: folder in which what has passed is remembered; without one it is tried each time.
        limit_s: for the child to take.
    """
    remembered = passed / trial.key() if passed is not None else None
    if remembered is not None and remembered.exists():
        return None
    complaint, begun = _in_child(trial, limit_s)
    if complaint is None:
        if remembered is not None:
            _remember(remembered)
        return None
    if begun:
        return complaint
    # Its faults are none of the kernel's: a GPU that lets one process in, memory that is short.
    logger.warning(
        "attention kernel %s could not be tried in a process of its own (%s): it is tried in this one",
        trial.backend.name, complaint,
    )  # fmt: skip
    return None


def _in_child(trial: Trial, limit_s: float) -> tuple[str | None, bool]:
    """What is wrong, and whether the kernel had begun by then."""
    # A replica may have got its code by a search path that no variable holds.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(limit_s)],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        try:
            child.communicate(pickle.dumps(trial), timeout=limit_s)
            ended = None
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            ended = f"it did not end within {limit_s:g} s"
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    verdicts = [line.removeprefix(_VERDICT) for line in lines if line.startswith(_VERDICT)]
    begun = _BEGUN in lines
    if ended is None and verdicts:
        return verdicts[-1] or None, begun
    last = next((line.strip() for line in reversed(lines) if line.strip() and line != _BEGUN), "it said nothing")
    return ended or f"the process that tried it ended with status {child.returncode}: {last}", begun


def _remember(place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    except OSError as error:
        logger.info("kernels will be tried again at the next start: %s", error)


def run(trial: Trial) -> str | None:
    """Try the kernel here; what is wrong, or None."""
    for device in {layer.shape.device for layer in trial.layers}:
        # The device can be used, and has room: what fails from here on is the kernel.
        torch.empty(_ROOM_BYTES, dtype=torch.uint8, device=device)[:1].zero_().item()
    _tell(_BEGUN)
    for layer in trial.layers:
        complaint = check_attention(trial.backend, layer.shape, layer.query_heads, layer.params, trial.page_tokens)
        if complaint is not None:
            return complaint
    return None


def main() -> None:
    """The child. It ends by itself when its time is up: a parent that was killed can't end it."""
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
    with torch.inference_mode():
        complaint = run(pickle.load(sys.stdin.buffer))
    _tell(f"{_VERDICT}{complaint or ''}")


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    from serve_app.engine import kernel_trial as imported  # pickled classes are those of this name

    imported.main()
