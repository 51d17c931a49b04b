"""A TCP proxy that cuts connections after as many bytes of the answer as it is told, wherever that is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit


class CuttingProxy:
    """In front of `target`; `cut_after()` says for each connection after how many bytes it is cut, None: never."""

    def __init__(
        self, target: str, cut_after: Callable[[], int | None], before: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        parts = urlsplit(target)
        self._target = parts.hostname, parts.port
        self._cut_after = cut_after
        self._before = before
        self.connections = 0
        self.cuts = 0
        self.passed = bytearray()
        """All that clients were sent, whole reads one after the other."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        left = self._cut_after()
        if self._before is not None:
            await self._before()
        upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        forwarding = asyncio.create_task(self._forward(reader, upstream_writer))
        try:
            while data := await upstream_reader.read(2**16):
                if left is not None and len(data) >= left:
                    writer.write(data[:left])
                    await writer.drain()
                    self.cuts += 1
                    break
                left = None if left is None else left - len(data)
                self.passed += data
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass  # the client has gone
        finally:
            forwarding.cancel()
            for side in (writer, upstream_writer):
                side.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
        writer.close()


@asynccontextmanager
async def cutting_proxy(
    target: str, cut_after: Callable[[], int | None], before: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[tuple[str, CuttingProxy]]:
    """(its URL, the proxy), until the block ends. `before`: awaited before each connection goes on to the target."""
    proxy = CuttingProxy(target, cut_after, before)
    server = await asyncio.start_server(proxy.handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", proxy
