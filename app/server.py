"""The HTTP server: uvicorn, which ends open event streams before it waits for its connections."""

import socket

import uvicorn
from fastapi import FastAPI


class Server(uvicorn.Server):
    """Stops without waiting for clients that follow a job; they connect again."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let open responses end, then stop as uvicorn does."""
        self._app.state.followers.close()
        await super().shutdown(sockets)
