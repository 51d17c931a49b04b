"""The private names of Ray: each is there and does what we use it for, and one module of serve_app has them all.

When a test fails after an update of Ray, its message says which name is to be mended in `ray_internals`.
"""

from __future__ import annotations

import ast
import asyncio
import importlib
import inspect
import logging
import socket
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import ray

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "serve_app" / "deployments" / "ray_internals.py"
OTHERS = sorted(path for path in (ROOT / "serve_app").rglob("*.py") if path != PLACE)

NAMES = [
    ("ray._private.state", "state.get_draining_nodes"),
    ("ray._private.state", "available_resources_per_node"),
    ("ray.experimental.internal_kv", "_internal_kv_put"),
    ("ray.experimental.internal_kv", "_internal_kv_get"),
    ("ray.experimental.internal_kv", "_internal_kv_del"),
    ("ray.serve._private.constants", "SERVE_NAMESPACE"),
    ("ray.serve._private.default_impl", "add_grpc_address"),
    ("ray.serve._private.common", "REPLICA_ID_FULL_ID_STR_PREFIX"),
    ("ray.serve.context", "_get_global_client"),
    ("ray.serve.context", "_get_serve_request_context"),
    ("ray.serve.context", "_serve_request_context"),
    ("ray.serve.context", "_RequestContext"),
    ("ray.serve._private.client", "ServeControllerClient.get_serve_details"),
    ("ray.serve._private.client", "ServeControllerClient.http_config"),
]
WHOLE = (".state", ".constants", ".default_impl", ".client")
"""Modules that are imported as a whole, or not at all."""
UNLIKE_OTHERS = ("_deployment_id", "__serve_build_asgi_app__", "serve_access_log", "SERVE_REPLICA::")
"""What no import gives away."""


def broken(what: str) -> str:
    return f"Ray {ray.__version__} has broken {what}; mend {PLACE.relative_to(ROOT)}"


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_the_name_is_there(module: str, name: str) -> None:
    try:
        attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(broken(f"{module}.{name}: {error}"))


def test_every_imported_name_is_among_those() -> None:
    known = {(module, name.partition(".")[0]) for module, name in NAMES}
    assert set(private_imports(ast.parse(PLACE.read_text(encoding="utf-8")))) == {
        ("ray._private", "state"),
        ("ray.serve._private", "constants"),
        ("ray.serve._private", "default_impl"),
        *((module, name) for module, name in known if not module.endswith(WHOLE)),
    }


def test_notes_are_written_as_we_write_them() -> None:
    from ray.experimental import internal_kv as store

    try:
        inspect.signature(store._internal_kv_put).bind("key", b"note", overwrite=False, namespace="serve_app")
        inspect.signature(store._internal_kv_get).bind("key", namespace="serve_app")
        inspect.signature(store._internal_kv_del).bind("key", namespace="serve_app")
    except TypeError as error:
        pytest.fail(broken(f"the key-value store: {error}"))


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_the_cluster_answers() -> None:
    from serve_app.deployments import ray_internals

    key = "a note of test_ray_internals"
    assert ray_internals.get_note(key) is None, broken("_internal_kv_get")
    ray_internals.put_note(key, "one")
    ray_internals.put_note(key, b"another", overwrite=False)
    assert ray_internals.get_note(key) == b"one", broken("_internal_kv_put")
    ray_internals.put_note(key, b"two")
    assert ray_internals.get_note(key) == b"two", broken("_internal_kv_put")
    ray_internals.delete_note(key)
    ray_internals.delete_note(key)
    assert ray_internals.get_note(key) is None, broken("_internal_kv_del")
    assert any("CPU" in node for node in ray_internals.free_resources()), broken("available_resources_per_node")
    details = ray_internals.serve_details()
    assert {"http_options", "applications"} <= details.keys(), broken("get_serve_details")
    assert isinstance(details["applications"], dict), broken("get_serve_details")
    assert ray_internals.http_host(), broken("http_config")


def test_a_detached_call_is_no_part_of_the_request() -> None:
    from ray.serve import context

    from serve_app.deployments.ray_internals import call_detached

    request = context._RequestContext(route="/stream", request_id="outer", _internal_request_id="inner")
    token = context._serve_request_context.set(request)
    try:
        seen: Any = call_detached(context._get_serve_request_context)
        assert (seen.request_id, seen._internal_request_id) == ("outer", ""), broken("_RequestContext")
        assert context._get_serve_request_context() == request, broken("_serve_request_context")
    finally:
        context._serve_request_context.reset(token)


def test_serve_looks_for_our_hook() -> None:
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD as HOOK

    from serve_app.deployments.ray_internals import AsgiDeployment

    application = object()
    deployment = type("Deployment", (AsgiDeployment,), {"asgi_app": lambda self: application})()
    assert getattr(deployment, HOOK, lambda: None)() is application, broken("__serve_build_asgi_app__")


def test_serves_access_lines_are_told_apart() -> None:
    from ray.serve._private.logging_utils import log_access_log_filter as is_other

    from serve_app.deployments.ray_internals import is_access_line

    other = logging.makeLogRecord({})
    access = logging.makeLogRecord({"serve_access_log": True})
    assert [is_other(access), is_other(other)] == [False, True], broken("serve_access_log")
    assert [is_access_line(access), is_access_line(other)] == [True, False]


@pytest.mark.parametrize(("host", "listens"), [("127.0.0.1", "127.0.0.1"), (None, "127.0.0.1"), ("0.0.0.0", "::")])
async def test_serves_grpc_listens_where_its_http_does(
    monkeypatch: pytest.MonkeyPatch, host: str | None, listens: str
) -> None:
    from ray.serve._private import default_impl
    from ray.serve._private.grpc_util import start_grpc_server
    from ray.serve.config import gRPCOptions

    from serve_app.deployments import ray_internals

    monkeypatch.setattr(default_impl, "add_grpc_address", default_impl.add_grpc_address)
    monkeypatch.setattr(ray_internals, "http_host", lambda: host)
    ray_internals.keep_grpc_on_http_host()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running, server = await start_grpc_server(
        lambda **_: None, gRPCOptions(port=port), event_loop=asyncio.get_running_loop()
    )
    try:
        sockets = psutil.Process().net_connections("tcp")
        found = {
            each.laddr.ip.removeprefix("::ffff:")
            for each in sockets
            if each.laddr.port == port and each.status == "LISTEN"
        }
        assert found == {listens}, broken("add_grpc_address")
    finally:
        await server.stop(None)
        await running


def test_serves_traceback_of_a_refused_call_is_told_apart() -> None:
    from ray.exceptions import RayTaskError
    from ray.serve.exceptions import gRPCStatusError

    from serve_app.api.grpc.refusal import Refusal
    from serve_app.deployments.ray_internals import is_answered_refusal

    refused = gRPCStatusError(Refusal(grpc.StatusCode.NOT_FOUND, "no"), grpc.StatusCode.NOT_FOUND, "no")
    as_the_proxy_gets_it = RayTaskError("Stream", "traceback", refused).as_instanceof_cause()
    as_a_replica_has_it = refused.original_exception
    for error, expected in [
        (refused, True),
        (as_the_proxy_gets_it, True),
        (as_a_replica_has_it, True),
        (KeyError(), False),
    ]:
        record = logging.makeLogRecord({"exc_info": (type(error), error, None)})
        assert is_answered_refusal(record) is expected, broken("gRPCStatusError")
    assert not is_answered_refusal(logging.makeLogRecord({}))


def test_replicas_have_the_names_that_we_know_them_by() -> None:
    from ray.serve._private.common import DeploymentID, ReplicaID

    from serve_app.deployments.ray_internals import SERVE_REPLICA_PREFIX

    name = ReplicaID("x", DeploymentID("ModelServer", "app")).to_full_id_str()
    assert name.startswith(SERVE_REPLICA_PREFIX), broken("REPLICA_ID_FULL_ID_STR_PREFIX")


def test_a_router_knows_its_deployment() -> None:
    from ray.serve.request_router import RequestRouter

    assert "_deployment_id" in RequestRouter.__init__.__code__.co_names, broken("RequestRouter._deployment_id")


def test_serve_has_the_settings_that_make_streams_cheap() -> None:
    from ray.serve._private import constants

    from serve_app.deployments.serve_settings import CHEAP_STREAMS

    gone = [name for name in CHEAP_STREAMS if not hasattr(constants, name)]
    assert not gone, broken(f"{', '.join(gone)} (mend serve_settings, too)")


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_uses_a_private_name(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    found = [f"{module}.{name}" for module, name in private_imports(ast.parse(text))]
    found += [name for name in UNLIKE_OTHERS if name in text]
    assert not found, f"private names of Ray belong into {PLACE.relative_to(ROOT)}"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from ray._private import state", [("ray._private", "state")]),
        ("def f():\n    import ray.serve._private.constants as c", [("ray.serve._private.constants", "")]),
        ("from ray.serve.context import a, _b", [("ray.serve.context", "_b")]),
        ("import ray\nray._private.worker.x", [("ray", "_private")]),
        ("from ray import serve\nserve.api._f()", [("serve.api", "_f")]),
        ("from ray.experimental.internal_kv import x", [("ray.experimental.internal_kv", "x")]),
        ("from ray import serve\nfrom ray.serve.handle import A\nfrom rayleigh import _x\nray.__version__", []),
    ],
)
def test_private_names_are_found(code: str, found: list[tuple[str, str]]) -> None:
    assert list(private_imports(ast.parse(code))) == found


def private_imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module, name) of each private name of Ray in a module's imports, or after a dot behind `ray` and `serve`."""

    def is_private(dotted: str) -> bool:
        parts = dotted.split(".")
        return any(p.startswith("_") and not p.endswith("__") for p in parts) or "experimental" in parts

    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            module = node.module or ""
            yield from ((module, each.name) for each in node.names if is_private(f"{module}.{each.name}"))
        elif isinstance(node, ast.Import):
            names = (each.name for each in node.names)
            yield from ((name, "") for name in names if name.split(".")[0] == "ray" and is_private(name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if owner.split(".")[0] in ("ray", "serve"):
                yield owner, node.attr
