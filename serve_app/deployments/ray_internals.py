"""Every private name of Ray that this project uses, each behind one small function.

A release of Ray may change any of them without notice. tests/deployments/test_ray_internals.py checks each name on the
installed version, and that no other module of serve_app uses one. For each there is no public name that does the same.
"""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

from ray._private import state
from ray.exceptions import RayError
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put
from ray.serve._private import constants, default_impl
from ray.serve._private.common import REPLICA_ID_FULL_ID_STR_PREFIX
from ray.serve.context import (
    _get_global_client,
    _get_serve_request_context,
    _RequestContext,
    _serve_request_context,
)
from ray.serve.exceptions import RayServeException, gRPCStatusError
from ray.serve.handle import DeploymentResponseGenerator
from ray.serve.request_router import RequestRouter
from starlette.types import ASGIApp

from serve_app.api.grpc.refusal import Refusal

logger = logging.getLogger(__name__)

NOTES = "serve_app"
"""The namespace of this project's notes in Ray's key-value store."""
SERVE_NAMESPACE: str = constants.SERVE_NAMESPACE
"""The namespace of Serve's replica actors, which may differ from the one of the code that runs in them."""
SERVE_REPLICA_PREFIX: str = REPLICA_ID_FULL_ID_STR_PREFIX
"""How the name of every Serve replica's actor begins."""


def put_note(key: str, note: bytes | str, *, overwrite: bool = True) -> None:
    """Write to Ray's key-value store, in the GCS. Blocks for a round trip, as reading and deleting do.

    `overwrite=False`: a note that is there already stays.
    """
    _internal_kv_put(key, note, overwrite=overwrite, namespace=NOTES)


def get_note(key: str) -> bytes | None:
    """Read from Ray's key-value store; None when nothing is noted there."""
    note: bytes | None = _internal_kv_get(key, namespace=NOTES)
    return note


def delete_note(key: str) -> None:
    """Delete from Ray's key-value store; nothing happens when nothing is noted there."""
    _internal_kv_del(key, namespace=NOTES)


def free_resources() -> list[Mapping[str, float]]:
    """The free resources of each node that takes new actors, so of no draining node. Blocks for a round trip."""
    draining = state.state.get_draining_nodes()
    free = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return [resources for node, resources in free.items() if node not in draining]


def serve_details() -> dict[str, Any]:
    """Serve's `http_options` and `applications`, as its REST API has them. Blocks for a round trip.

    Serve has no public call for its own address from inside a replica; the REST API needs the dashboard.
    """
    details: dict[str, Any] = cast("Any", _get_global_client()).get_serve_details()
    return details


def http_host() -> str | None:
    """The host that Serve's proxies listen on, which a config's `args` do not know; None: Serve's default, 127.0.0.1.

    Blocks for a round trip.
    """
    host: str | None = cast("Any", _get_global_client()).http_config.host
    return host


def keep_grpc_on_http_host() -> None:
    """Let the gRPC servers that Serve starts in this process from now on listen on the host of its HTTP servers.

    Serve has no setting for their host, and would listen on all addresses.
    """

    def add_address(server: Any, address: str) -> None:
        host, port = http_host() or "127.0.0.1", address.rpartition(":")[2]
        if host not in ("0.0.0.0", "::"):
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        server.add_insecure_port(address)

    default_impl.add_grpc_address = add_address  # type: ignore[assignment]


def is_answered_refusal(record: logging.LogRecord) -> bool:
    """Whether this log record is Serve's traceback of a gRPC call that an ingress has refused with a status.

    Where it logs the error, Serve has it with or without a wrapper of its own.
    """
    return record.exc_info is not None and isinstance(record.exc_info[1], gRPCStatusError | Refusal)


def serve_setting(name: str, otherwise: bool) -> bool:
    """Whether a boolean setting is on in this process's Serve; `otherwise` if Serve has no setting of that name."""
    return bool(getattr(constants, name, otherwise))


def is_access_line(record: logging.LogRecord) -> bool:
    """Whether this log record is Serve's access line of a call, and not from the code in the replica."""
    return bool(getattr(record, "serve_access_log", False))


def call_detached(call: Callable[[], Any]) -> DeploymentResponseGenerator[Any]:
    """Make a call that does not count as part of the HTTP request in whose context it is made.

    Serve gives all calls of one request the same internal id, so our router would take two waiting choices for one.
    Serve would also cancel them all when the client goes, but a resumable stream goes on. We cancel calls ourselves.
    """

    def detached() -> DeploymentResponseGenerator[Any]:
        context: ContextVar[_RequestContext] = _serve_request_context  # type: ignore[assignment]
        context.set(replace(_get_serve_request_context(), _internal_request_id=""))
        return cast("DeploymentResponseGenerator[Any]", call())

    return contextvars.copy_context().run(detached)


def cancel(call: Any) -> None:
    """Cancel a call on its replica, or before it gets to one. Cancelling twice is the same as once.

    `call`: Serve's response, or the result that a router gets, whose type is private.
    """
    try:
        call.cancel()
    except (RayError, RayServeException) as error:  # the replica has just refused it: nothing runs
        logger.debug("a call could not be cancelled: %s", error)


def deployment_name(router: RequestRouter) -> str:
    """The name of the deployment whose replicas this router chooses from."""
    return str(router._deployment_id.name)


class AsgiDeployment:
    """Base of a deployment that makes its ASGI application in the replica; decorate it with `serve.ingress()`."""

    def asgi_app(self) -> ASGIApp:
        """The application. Called once, after the constructor."""
        raise NotImplementedError

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve."""
        return self.asgi_app()
