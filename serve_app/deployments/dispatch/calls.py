"""Serve's streaming calls between our deployments: made apart from the HTTP request that needs them, and cancelled.

Promises that a call lasts as long as its caller wants it to, no shorter and no longer.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

from ray.exceptions import RayError
from ray.serve.context import _get_serve_request_context, _RequestContext, _serve_request_context
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentResponseGenerator

logger = logging.getLogger(__name__)


def in_its_own_right(call: Callable[[], Any]) -> DeploymentResponseGenerator[Any]:
    """Make a call that does not count as part of the HTTP request in whose context it is made.

    Serve gives all calls of one request the same internal id, by which our router would take two waiting choices for
    one, and cancels them all when the client goes, though a resumable stream is to go on. We cancel what is to end.
    """

    def detached() -> DeploymentResponseGenerator[Any]:
        context: ContextVar[_RequestContext] = _serve_request_context  # type: ignore[assignment]
        context.set(replace(_get_serve_request_context(), _internal_request_id=""))
        return cast("DeploymentResponseGenerator[Any]", call())

    return contextvars.copy_context().run(detached)


def caller_cancelled() -> bool:
    """Whether this task was told to stop. A replica's own cancellation arrives as a bare CancelledError too."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def cancel(call: Any) -> None:
    """Cancel a call on its replica, or before it gets to one: Serve's response, or what is in that. Twice is once."""
    try:
        call.cancel()
    except (RayError, RayServeException) as error:  # it was refused in this moment: nothing runs
        logger.debug("a call could not be cancelled: %s", error)
