"""A stranger at the ports of a running Ray: without the token nothing is unpickled for them."""

from __future__ import annotations

import os
from collections.abc import Callable

import grpc
import psutil
import pytest
import ray
from ray import serve

from serve_app.cli.ray_token import asks_for_token

CALL = "/ray.serve.ASGIService/HandleRequest"
"""Of Serve's replicas: its metadata and its arguments are pickles."""
REFUSAL = "Invalid or missing authentication token"


@serve.deployment
class Doors:
    """Says on which ports its process listens on all addresses."""

    def __call__(self) -> list[int]:
        connections = psutil.Process().net_connections("tcp6")
        return [each.laddr.port for each in connections if each.status == "LISTEN" and each.laddr.ip == "::"]


def knock(port: int, token: str | None) -> tuple[grpc.StatusCode, str]:
    """What a call with nothing in it is answered."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(CALL)(b"", timeout=30, metadata=metadata)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@pytest.mark.ray
def test_a_replica_takes_no_call_without_the_token(deployed: Callable[..., str]) -> None:
    deployed(Doors.bind(), "doors")
    ports = serve.get_app_handle("doors").remote().result()
    refused = [port for port in ports if knock(port, None) == (grpc.StatusCode.UNAUTHENTICATED, REFUSAL)]
    assert refused, f"none of {ports} is the port for calls of other replicas"
    for port in refused:
        assert knock(port, "of somebody else")[0] == grpc.StatusCode.UNAUTHENTICATED
        assert knock(port, os.environ["RAY_AUTH_TOKEN"])[0] != grpc.StatusCode.UNAUTHENTICATED
    for port in ports:
        assert knock(port, None)[0] != grpc.StatusCode.OK


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_a_cluster_that_asks_for_a_token_is_known() -> None:
    assert asks_for_token(ray.get_runtime_context().gcs_address, {}) is True
