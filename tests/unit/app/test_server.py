"""The bounds of a connection, on a real socket."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from app.server import MAX_HEAD_BYTES, Protocol

HEAD = b"POST / HTTP/1.1\r\nHost: here\r\n"


async def count(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the number of bytes of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    config = uvicorn.Config(count, http=Protocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(10)


def answer(port: int, *parts: bytes) -> bytes:
    """All that the server says to these bytes until it closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        for part in parts:
            connection.sendall(part)
        said = b""
        while data := connection.recv(65_536):
            said += data
        return said


def close(length: int) -> bytes:
    return b"Connection: close\r\nContent-Length: %d\r\n\r\n" % length


def test_body_is_not_bounded_by_the_head(port: int) -> None:
    body = b"x" * (40 * MAX_HEAD_BYTES)
    said = answer(port, HEAD + close(len(body)), body)
    assert said.startswith(b"HTTP/1.1 200 OK\r\n")
    assert str(len(body)).encode() in said


def test_many_requests_on_a_connection_are_not_one_long_head(port: int) -> None:
    one = HEAD + b"X-Filler: " + b"y" * 3000 + b"\r\nContent-Length: 0\r\n\r\n"
    said = answer(port, *[one] * 39, HEAD + close(0))
    assert said.count(b"HTTP/1.1 200 OK\r\n") == 40


@pytest.mark.parametrize(
    "endless",
    [
        HEAD + b"X-Endless: ",
        b"GET /",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\nX-Trailer: ",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;x=",
    ],
    ids=["header", "path", "trailer", "extension of a chunk"],
)
def test_what_never_ends_is_refused(port: int, endless: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(endless)
        # Far more than the server may take in, and more than the buffers between hold.
        with pytest.raises(ConnectionError):
            connection.sendall(b"z" * (1000 * MAX_HEAD_BYTES))
