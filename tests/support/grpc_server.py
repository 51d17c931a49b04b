"""A plain gRPC server in this process: what Serve does with the methods of an ingress, without Serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from ray.serve.generated.serve_pb2 import HealthzResponse
from ray.serve.generated.serve_pb2_grpc import (
    RayServeAPIServiceServicer,
    add_RayServeAPIServiceServicer_to_server,
)

from serve_app.api.grpc.refusal import Refusal
from serve_app.api.grpc.servicer import Servicer
from serve_app.api.grpc.services import add_services


class _Methods:
    """Named as the RPCs are, like those of the ingress deployment."""

    def __init__(self, servicer: Servicer) -> None:
        self._servicer = servicer

    async def Stream(self, request: bytes, context: Any) -> AsyncGenerator[Any, None]:
        try:
            async for message in self._servicer.stream(request, context):
                yield message
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.details)

    async def stream_doc(self, request: bytes, context: Any) -> AsyncGenerator[Any, None]:
        try:
            async for message in self._servicer.stream_doc(request, context):
                yield message
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.details)

    async def Check(self, request: bytes, context: Any) -> Any:
        try:
            return await self._servicer.check(request, context)
        except Refusal as refusal:
            await context.abort(refusal.code, refusal.details)


class _Healthy(RayServeAPIServiceServicer):
    """What Serve's HAProxy asks each server."""

    async def Healthz(self, request: Any, context: Any) -> HealthzResponse:
        return HealthzResponse(message="success")


@asynccontextmanager
async def grpc_server(servicer: Servicer, port: int = 0) -> AsyncIterator[str]:
    """Its `host:port`, until the block ends."""
    server = grpc.aio.server()
    add_services(_Methods(servicer), server)
    add_RayServeAPIServiceServicer_to_server(_Healthy(), server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        await server.stop(None)
