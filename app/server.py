"""The HTTP server: uvicorn with httptools, a bound on the head of a request, and event streams that
end before the server waits for its connections.
"""

import ctypes
import socket
import sys

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from core.settings import MIB

MAX_HEAD_BYTES = 64 * 1024
# glibc's names of what mallopt sets, and how much: room for the buffers of some transfers.
_MALLOC = {-1: 32 * MIB, -3: 8 * MIB}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD


class Protocol(HttpToolsProtocol):
    """One connection; what comes between two pieces of a body is bounded.

    httptools keeps heads, extensions of chunks and trailers of any length.
    """

    _unread_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Feed the parser, and end a connection that sends more than a head may have."""
        self._unread_bytes += len(data)
        super().data_received(data)
        if self._unread_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self._unread_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._unread_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request; another may follow."""
        self._unread_bytes = 0
        super().on_message_complete()


class Server(uvicorn.Server):
    """Stops without waiting for clients that follow a job; they connect again."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open responses end, then stop as uvicorn does."""
        self._app.state.followers.close()
        await super().shutdown(sockets)


def keep_freed_memory() -> None:
    """Let glibc keep what was freed, up to some MiB.

    Else each buffer of an upload is given back to the kernel and asked for again, page by page,
    which takes longer than to receive it.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return
    for name, size in _MALLOC.items():
        mallopt(name, size)
