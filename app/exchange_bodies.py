"""Bodies of requests and answers on their way through `app.idempotency`."""

import hashlib
import re
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

MAX_KEPT_BYTES = 1024 * 1024


class Body:
    """A request's body on its way to the endpoint, hashed as it passes."""

    def __init__(self, receive: Receive, scope: Scope) -> None:
        self._receive = receive
        self._ahead: list[Message] = []
        self.is_complete = False
        self._hash = BodyHash(Headers(scope=scope).get("content-type", ""))
        self._hash.begin(scope.get("query_string", b""))

    async def receive(self) -> Message:
        """Pass on the next message."""
        if self._ahead:
            return self._ahead.pop(0)
        return await self._next()

    async def read_ahead(self) -> None:
        """Read the rest and keep it for the endpoint; for small bodies only."""
        while not self.is_complete:
            message = await self._next()
            self._ahead.append(message)
            if message["type"] != "http.request":
                return

    async def drain(self) -> None:
        """Read the rest, for its hash only."""
        while not self.is_complete:
            if (await self._next())["type"] != "http.request":
                return

    @property
    def fingerprint(self) -> str:
        """SHA-256 of query and body."""
        return self._hash.hexdigest()

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._hash.feed(message.get("body", b""))
            self.is_complete = self.is_complete or not message.get("more_body", False)
        return message


class BodyHash:
    """SHA-256 of a body in which the boundary of a form, new in each retry, has no part."""

    def __init__(self, content_type: str) -> None:
        kind, _, parameters = content_type.partition(";")
        found = re.search(r'boundary="?([^";,]{1,200})"?', parameters)
        is_form = kind.strip().lower().startswith("multipart/")
        self._delimiter = f"--{found[1]}".encode() if is_form and found else b""
        self._hash = hashlib.sha256()
        self._tail = b""

    def begin(self, query: bytes) -> None:
        """Hash what comes before the body."""
        self._hash.update(len(query).to_bytes(4) + query)

    def feed(self, chunk: bytes) -> None:
        """Hash the next bytes."""
        if not self._delimiter:
            self._hash.update(chunk)
            return
        *parts, rest = (self._tail + chunk).split(self._delimiter)
        for part in parts:
            self._hash.update(part + b"--boundary")
        # A delimiter may begin in this chunk and end in the next one.
        keep = min(len(rest), len(self._delimiter) - 1)
        self._hash.update(rest[: len(rest) - keep])
        self._tail = rest[len(rest) - keep :]

    def hexdigest(self) -> str:
        """Return the hash of all that was fed."""
        whole = self._hash.copy()
        whole.update(self._tail)
        return whole.hexdigest()


@dataclass
class Answer:
    """An answer on its way to the client, held back until it is kept."""

    send: Send
    status: int = 0
    headers: Headers = field(default_factory=Headers)
    body: bytearray = field(default_factory=bytearray)
    is_held: bool = True
    _held: list[Message] = field(default_factory=list)

    async def take(self, message: Message) -> None:
        """Hold a message back, or pass it on when the answer is too long to be kept."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], Headers(raw=message["headers"])
        elif message["type"] == "http.response.body" and self.is_held:
            self.body += message.get("body", b"")
        self._held.append(message)
        if len(self.body) > MAX_KEPT_BYTES or not self.is_held:
            self.is_held = False
            await self.pass_on()

    async def pass_on(self) -> None:
        """Send what is held."""
        held, self._held = self._held, []
        for message in held:
            await self.send(message)

    @property
    def kept_body(self) -> str | None:
        """The body as it is kept; None of one that is too long, or not to be stored anywhere."""
        if not self.is_held or "no-store" in self.headers.get("cache-control", ""):
            return None
        try:
            text = self.body.decode()
        except UnicodeDecodeError:
            return None
        return None if "\0" in text else text
