"""A Python client for serve_app's API over HTTP and gRPC, sync and async.

Streams documents as the server makes them, raises typed errors, and ends the work on the server when an iterator is
closed. Imports nothing of the server but the messages of `serve_app.proto`, and those only for a `grpc://` address.
"""

from serve_app.client.asynchronous import AsyncClient, AsyncStream
from serve_app.client.documents import Completion, Done, Message, Model, ModelOutputDocument, Options, Readiness, Usage
from serve_app.client.errors import (
    APIError,
    AuthenticationError,
    BadRequest,
    ConnectionLost,
    ContextLengthExceeded,
    NotReady,
    Overloaded,
    PermissionDenied,
    ServeAppError,
    ServerError,
    StreamError,
)
from serve_app.client.synchronous import Client, Stream

__all__ = [
    "APIError",
    "AsyncClient",
    "AsyncStream",
    "AuthenticationError",
    "BadRequest",
    "Client",
    "Completion",
    "ConnectionLost",
    "ContextLengthExceeded",
    "Done",
    "Message",
    "Model",
    "ModelOutputDocument",
    "NotReady",
    "Options",
    "Overloaded",
    "PermissionDenied",
    "Readiness",
    "ServeAppError",
    "ServerError",
    "Stream",
    "StreamError",
    "Usage",
]
