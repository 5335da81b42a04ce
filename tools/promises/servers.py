"""A web server on this machine, and a proxy that puts network faults before a server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web

_CHUNK = 1 << 16


class Web:
    """Serves a directory, with byte ranges; `statuses` are what it answers instead, by path."""

    def __init__(self, directory: Path) -> None:
        self.statuses: dict[str, int] = {}
        self.asked: list[str] = []
        self.port = 0
        self._directory = directory
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Web:
        self._thread.start()
        assert self._ready.wait(30)
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._ready.set()
        self._loop.run_forever()

    async def _serve(self) -> None:
        app = web.Application(middlewares=[self._answer])
        app.router.add_static("/", self._directory)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]

    @web.middleware
    async def _answer(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.path}")
        if status := self.statuses.get(request.path.lstrip("/")):
            return web.Response(status=status)
        response: web.StreamResponse = await handler(request)
        return response


class Proxy:
    """Passes connections on to a port of this machine, with a fault in each of the next requests.

    `faults` are taken from the left, one per request: `reset` cuts the connection in the middle of
    the answer, `refuse` before it, `slow` delays it; `None` leaves it alone.
    """

    def __init__(self, upstream: int) -> None:
        self.faults: deque[str | None] = deque()
        self.done: list[str] = []
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            with socket.create_connection(("127.0.0.1", self._upstream)) as upstream:
                cut = threading.Event()
                back = threading.Thread(target=self._answer, args=(upstream, client, cut))
                back.start()
                while data := client.recv(_CHUNK):
                    fault = self.faults.popleft() if self.faults else None
                    if fault:
                        self.done.append(fault)
                    if fault == "refuse":
                        _reset(client)
                        break
                    if fault == "reset":
                        cut.set()
                    if fault == "slow":
                        time.sleep(0.3)
                    upstream.sendall(data)
            back.join()

    def _answer(self, upstream: socket.socket, client: socket.socket, cut: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := upstream.recv(_CHUNK):
                if cut.is_set():
                    client.sendall(data[: len(data) // 2])
                    _reset(client)
                    return
                client.sendall(data)


def _reset(connection: socket.socket) -> None:
    """Close it so that the other side notices at once (RST)."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RD)
    connection.close()


@contextlib.contextmanager
def faulty(upstream: int) -> Iterator[Proxy]:
    """A proxy before a port of this machine."""
    with Proxy(upstream) as proxy:
        yield proxy
