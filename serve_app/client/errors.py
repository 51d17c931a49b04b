"""The errors of a request to the server, all derived from ServeAppError.

An APIError is an error that the server sent; a ConnectionLost means that an answer is missing or incomplete. Knows no
HTTP library.
"""

from __future__ import annotations


class ServeAppError(Exception):
    """Any error of a request to the server."""


class ConnectionLost(ServeAppError):
    """No server at the address, or the connection ended before the answer did. What was yielded stays valid."""


class APIError(ServeAppError):
    """The server answered with an error."""

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        """The server's sentence: what is wrong and what to do."""
        self.status = status
        """HTTP status; None when the error came inside a stream that had begun with 200."""
        self.code = code
        """The server's machine-readable code, e.g. `context_length_exceeded`."""
        self.request_id = request_id
        """Stands in every log line of the server about this request."""
        self.retry_after_s = retry_after_s
        """Seconds after which the server asks to be tried again."""

    def __str__(self) -> str:
        details = [str(self.status)] if self.status is not None else []
        details += [self.code] if self.code else []
        details += [f"request {self.request_id}"] if self.request_id else []
        return f"{self.message} ({', '.join(details)})" if details else self.message


class BadRequest(APIError):
    """4xx: the request itself is wrong; repeating it does not help."""


class AuthenticationError(BadRequest):
    """401: the server asks for an API key, and the request had none or a wrong one."""


class PermissionDenied(BadRequest):
    """403: the key may not do this, or the server does not answer this caller."""


class ContextLengthExceeded(BadRequest):
    """The prompt does not fit the model's context or the server's cache; the message has the limit."""


class ServerError(APIError):
    """5xx: the server failed."""


class Overloaded(ServerError):
    """429 or 503: the server is full, or has lost its replicas. Nothing was delivered."""


class NotReady(Overloaded):
    """503: no replica has loaded the model yet; `wait_until_ready` waits for one."""


class StreamError(APIError):
    """The server reported an error in the middle of a stream, and ended it."""
