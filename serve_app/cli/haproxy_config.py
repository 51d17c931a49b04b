"""What is changed in the configuration that Serve writes for HAProxy, as scripts for sed.

A launcher runs them before each start and reload, where a Python program would take a hundred times as long. Promises
that whatever HAProxy answers by itself has the API's form, and that nobody but this user reaches its sockets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from serve_app.api.errors import INVALID_REQUEST, SERVER_ERROR, ApiError
from serve_app.deployments.client_address import HEADER

BUFFER_BYTES = 131_072
"""`tune.bufsize`: the longest request line with headers that HAProxy can hold. Longer ones, more than 100 headers, what
is not HTTP, and headers that never end get the 400 and 408 in HTML that are built into HAProxy: 2.8 has no setting for
them (haproxy/haproxy#3032)."""
MAX_URL_BYTES = 32_768
MAX_HEADER_BYTES = 32_768
"""Of all headers together."""
HEADER_TIMEOUT_S = 10
"""How long a client may take for its request line and headers; it holds one of HAProxy's connections meanwhile."""

REWRITTEN = "# Rewritten by serve-app"
OFF_THE_PORTS = (
    r"/^frontend (http|grpc)_frontend$/,/^[[:space:]]*bind /s~^([[:space:]]*bind) ([^ ]+)~\1 abns@serve-app-\2~" "\n"
)
"""The sed script for a HAProxy that knows no application while a stand-in serves: it listens where nobody comes."""
_METHODS = "GET HEAD POST PUT PATCH DELETE OPTIONS TRACE"
"""Methods that the servers behind HAProxy can parse; they answer others with plain text."""
_RETRY = {"Retry-After": "1"}
_NO_RETRY = {"x-should-retry": "false"}
"""The API's own errors have this header, too: openai-python repeats every 5xx twice unless told not to."""
_CLOSE = {"Connection": "close"}
_OWN_ERRORS: tuple[tuple[int, str, str, Mapping[str, str]], ...] = (
    (400, "The request is not valid HTTP.", "invalid_http", _CLOSE),
    (403, "The proxy refuses this request.", "refused", {}),
    (408, f"The request did not arrive within {HEADER_TIMEOUT_S} s.", "request_timeout", _CLOSE),
    (413, "The request is larger than the proxy takes.", "body_too_large", _CLOSE),
    (500, "The proxy made a mistake.", "internal_error", _NO_RETRY),
    (501, "The proxy does not support what the request asks for.", "not_implemented", _NO_RETRY),
    (502, "The server that had this request went; send it again.", "replica_lost", _RETRY),
    (503, "No server can take this request at the moment; send it again.", "overloaded", _RETRY),
    (504, "The server that had this request did not answer in time.", "deadline_exceeded", _NO_RETRY),
)
"""What HAProxy answers when it can't pass a request on, or an answer back."""


def _error(
    status: int, message: str, code: str, headers: Mapping[str, str], *, keyword: str = "http-request return"
) -> str:
    """A configuration line by which HAProxy answers with OpenAI's error object."""
    kind = SERVER_ERROR if status >= 500 else INVALID_REQUEST
    body = ApiError(status, message, type=kind, code=code).body().decode()
    assert not {"'", "~", "&", "\\"} & set(body)  # not safe in HAProxy's quotes or in sed's scripts
    extra = "".join(f" hdr {name} '{value}'" for name, value in headers.items())
    return f"    {keyword} status {status} content-type application/json string '{body}'{extra}"


def rewriting(loopback_ports: Iterable[int], client_secret: str, *, logs_requests: bool) -> str:
    """The sed script for every configuration. `loopback_ports`: ports that shall listen on 127.0.0.1 only.

    `client_secret` comes before the client's address in the header that tells an ingress that address. Unless
    `logs_requests`, no request line goes to the system's log: it may hold a prompt, or a stream's id.
    """
    ports = "|".join(str(port) for port in loopback_ports)
    defaults = [
        f"    timeout http-request {HEADER_TIMEOUT_S}s",
        "    option http-ignore-probes",  # no 408 on a connection that a browser opened in advance
        *(_error(*row, keyword="http-error") for row in _OWN_ERRORS),
    ]
    allow = {"Allow": "DELETE, GET, HEAD, OPTIONS, POST"}
    method = _error(405, "This method is served nowhere.", "method_not_allowed", allow)
    message = f"The URL is longer than {MAX_URL_BYTES} bytes; send long prompts with POST."
    long_url = _error(414, message, "url_too_long", {})
    message = f"The headers are longer than {MAX_HEADER_BYTES} bytes together."
    long_headers = _error(431, message, "headers_too_long", {})
    rules = [
        f'    http-request set-header {HEADER} "{client_secret} %[src]"',
        f"{method} unless {{ method {_METHODS} }}",
        f"{long_url} if {{ url_len gt {MAX_URL_BYTES} }}",
        f"{long_headers} if {{ req.hdrs,length gt {MAX_HEADER_BYTES} }}",
    ]
    unavailable = _error(503, "The service is not ready.", "not_ready", _RETRY)
    return "\n".join(
        [
            f"1i\\\n{REWRITTEN}",
            rf"s/^([[:space:]]*bind) \*?:({ports})$/\1 127.0.0.1:\2/",
            r"s/^([[:space:]]*stats socket .*) mode 666 /\1 mode 600 /",
            "/^[[:space:]]*errorfile 50[234] /d",
            *([] if logs_requests else ["/^[[:space:]]*log .* local0 /d"]),
            _after("^defaults$", defaults),
            _after("^frontend http_frontend$", rules),
            # The answers of /-/healthz and /-/routes.
            rf's~^    http-request return status 503 content-type text/plain string ".*" if ~{unavailable} if ~',
            "",
        ]
    )


def unknown_path(*, starting: bool) -> str:
    """The sed script for the answer where no application is: 503 while HAProxy knows none (`starting`), else 404."""
    if starting:
        line = _error(503, "The service is starting.", "not_ready", _RETRY)
    else:
        line = _error(404, "Nothing is served at this path.", "not_found", {})
    return f"/^    http-request return status 404 content-type text\\/plain /c\\\n{line}\n"


def _after(pattern: str, lines: Iterable[str]) -> str:
    text = "\\\n".join(lines)
    return f"/{pattern}/a\\\n{text}"
