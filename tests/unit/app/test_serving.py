"""What the commands of a server stand on: its socket, its settings."""

import asyncio
import socket

import pytest

from app.serving import listening
from core.errors import Unavailable
from core.settings import Settings


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Without TCP_NODELAY each answer of head and body takes 40 ms on Linux."""

    async def nodelay(listener: socket.socket) -> int:
        asked: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            served: socket.socket = writer.get_extra_info("socket")
            asked.set_result(served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(answer, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            found = await asked
            writer.close()
            await writer.wait_closed()
        return found

    with listening(Settings(api={"port": 0})) as listener:
        assert asyncio.run(nodelay(listener)) == 1


def test_a_taken_port_names_itself() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(Unavailable, match=f"127.0.0.1:{port}"),
            listening(Settings(api={"port": port})),
        ):
            pass
