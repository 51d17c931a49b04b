"""Where a replica's log lines go, and which libraries are told to be quiet.

Our loggers write where Serve's own do: the terminal of `serve run`, and the replica's file in the session's log folder,
with Serve's format, level and request id.
"""

from __future__ import annotations

import logging
import os

from serve_app.deployments.ray_internals import is_access_line, is_answered_refusal

QUIET = {"transformers": logging.ERROR, "huggingface_hub": logging.ERROR, "httpx": logging.WARNING}
"""Libraries whose log lines are advice for programmers, and the lowest level that is logged of each."""


def use_serve_log() -> None:
    """Send this process's `serve_app` log lines to Serve's handlers. Call it first in a replica's constructor.

    Serve's own access line of each call is left out: the ingress writes one per request that says more. So are its
    tracebacks of gRPC calls that were refused.
    """
    serve = logging.getLogger("ray.serve")
    serve.addFilter(lambda record: not is_access_line(record))
    leave_out_refusals()
    ours = logging.getLogger("serve_app")
    ours.handlers = serve.handlers
    ours.setLevel(serve.getEffectiveLevel())
    ours.propagate = False
    for name, level in QUIET.items():
        logging.getLogger(name).setLevel(level)
    # The libraries read these when a replica imports them later. Stages are logged in place of progress bars.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def leave_out_refusals() -> None:
    """Log no traceback of a gRPC call that an ingress has refused: the ingress writes a line of it."""
    logging.getLogger("ray.serve").addFilter(lambda record: not is_answered_refusal(record))
