"""The services of the gRPC port: which methods there are. Knows no implementation: `servicer` has one.

A Serve config names `add_services` in `grpc_options.grpc_servicer_functions`. Serve then calls the method of the
ingress deployment that has the RPC's name.
"""

from __future__ import annotations

from typing import Any

import grpc

SERVICE = "serve_app.v1.ServeApp"
JINA_SERVICE = "jina.JinaSingleDocumentRequestRPC"
HEALTH_SERVICE = "grpc.health.v1.Health"
STREAM = f"/{SERVICE}/Stream"
STREAM_DOC = f"/{JINA_SERVICE}/stream_doc"
CHECK = f"/{HEALTH_SERVICE}/Check"
SERVICES = frozenset({"", SERVICE, JINA_SERVICE})
"""Names for which the health service knows the state: the whole server's, which is empty, and each service's."""


def add_services(servicer: Any, server: Any) -> None:
    """Register the methods `Stream`, `stream_doc` and `Check` of `servicer` with a gRPC server.

    Requests come as bytes, since the servicer itself has to answer those that can't be read. Of gRPC's health service
    there is no `Watch`: clients then take the server as healthy.
    """
    from serve_app.proto import jina_pb2, serve_app_pb2  # noqa: F401 - the server's reflection looks them up

    methods: dict[str, dict[str, grpc.RpcMethodHandler]] = {
        SERVICE: {"Stream": _stream(servicer.Stream)},
        JINA_SERVICE: {"stream_doc": _stream(servicer.stream_doc)},
        HEALTH_SERVICE: {"Check": grpc.unary_unary_rpc_method_handler(servicer.Check, response_serializer=_serialize)},
    }
    for service, handlers in methods.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))


def _stream(behavior: Any) -> grpc.RpcMethodHandler:
    return grpc.unary_stream_rpc_method_handler(behavior, response_serializer=_serialize)


def _serialize(message: Any) -> bytes:
    content: bytes = message.SerializeToString()
    return content
