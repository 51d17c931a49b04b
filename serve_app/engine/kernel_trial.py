"""Tries an attention kernel in a child process before this process may launch it.

A kernel that reads outside the GPU's memory ends its process's use of the GPU, and a kernel can hang. In a child only
the child is lost, and the next kernel serves. Starting PyTorch and CUDA takes the child seconds, so kernels that passed
are remembered in the cache folder, under a key of everything that the outcome depends on.
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
from serve_app.engine.attention.kernel_check import check_attention
from serve_app.engine.model_runner import AttentionLayer

logger = logging.getLogger(__name__)

TRIAL_LIMIT_S = 180.0
"""A child takes about 10 s for imports, and some seconds for each shape for which Triton compiles a new kernel."""
_ROOM_BYTES = 2**28
"""GPU memory that the child allocates first, more than the check needs. PyTorch keeps it for the check."""
_BEGUN, _VERDICT = "kernels begin", "verdict: "


@dataclass(frozen=True, slots=True)
class Trial:
    """A kernel, and the layers and page size to try it with."""

    backend: AttentionBackend
    layers: tuple[AttentionLayer, ...]
    page_tokens: int

    def key(self) -> str:
        """A digest of everything that the outcome depends on: kernel and shapes, source, libraries, processor."""
        folders = (Path(__file__).with_name("attention"), Path(__file__).with_name("cuda"))
        sources = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.py"))]
        devices = sorted({str(layer.shape.device) for layer in self.layers if layer.shape.device.type == "cuda"})
        names = [torch.cuda.get_device_name(device) for device in devices]
        versions = (torch.__version__, torch.version.cuda, sys.version)
        kernel = (type(self.backend).__qualname__, sorted(vars(self.backend).items()))
        facts = repr((kernel, self.layers, self.page_tokens, names, versions)).encode()
        return hashlib.sha256(b"\0".join((facts, *sources))).hexdigest()[:24]

    def run(self) -> str | None:
        """Try the kernel in this process; what is wrong, or None."""
        for layer in self.layers:
            complaint = check_attention(self.backend, layer.shape, layer.query_heads, layer.params, self.page_tokens)
            if complaint is not None:
                return complaint
        return None


def try_apart(trial: Trial, passed: Path | None) -> str | None:
    """Try the kernel in a child process; returns what is wrong with it.

    None when it passed, now or at an earlier start, or when the child failed before it launched the kernel.

    Args:
        trial: a new process must be able to import its kernel's class.
        passed: folder that remembers which trials have passed; without one every trial runs.
    """
    remembered = passed / trial.key() if passed is not None else None
    if remembered is not None and remembered.exists():
        return None
    complaint, begun = _in_child(trial)
    if begun and complaint is not None:
        return complaint
    if complaint is not None:
        # The child failed before the kernel ran: the GPU may admit one process only, or memory may be short.
        logger.warning(
            "attention kernel %s could not be tried in a process of its own (%s): it is tried in this one",
            trial.backend.name, complaint,
        )  # fmt: skip
    elif remembered is not None:
        _remember(remembered)
    return None


def _in_child(trial: Trial, limit_s: float = TRIAL_LIMIT_S) -> tuple[str | None, bool]:
    """What is wrong, or None; and whether the child had begun to run the kernel."""
    # The child must find the same modules, also those on search paths that were only added to `sys.path`.
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


def main() -> None:
    """The child process. It ends itself by a timer, since its parent may have been killed."""
    signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
    with torch.inference_mode():
        trial: Trial = pickle.load(sys.stdin.buffer)
        for device in {layer.shape.device for layer in trial.layers}:
            # This shows that the device can be used and has room: whatever fails after it is the kernel's fault.
            torch.empty(_ROOM_BYTES, dtype=torch.uint8, device=device)[:1].zero_().item()
        _tell(_BEGUN)
        complaint = trial.run()
    _tell(f"{_VERDICT}{complaint or ''}")


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    from serve_app.engine import kernel_trial as imported  # not `__main__`: pickles name this module

    imported.main()
