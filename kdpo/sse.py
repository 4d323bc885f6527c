"""Server-sent events from bytes (WHATWG HTML, 9.2.6)."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_EVENT_BYTES = 16 * 1024 * 1024
_BOM = b"\xef\xbb\xbf"
_END_OF_LINE = re.compile(rb"\r\n|\r|\n")


@dataclass(frozen=True)
class ServerEvent:
    """One event of a stream; `id` is the last one that the stream has named."""

    type: str
    data: str
    id: str | None


@dataclass
class EventParser:
    """Turns chunks of a stream into events, however the chunks are cut."""

    last_id: str | None = None
    retry_ms: int | None = None
    _buffer: bytearray = field(default_factory=bytearray)
    _type: str = ""
    _data: list[str] = field(default_factory=list)
    _started: bool = False

    def feed(self, chunk: bytes) -> Iterator[ServerEvent]:
        """Yield the events that a chunk completes.

        Raises:
            ValueError: one event is larger than any that kdpo sends, so this is no event stream.
        """
        self._buffer += chunk
        if not self._started and len(self._buffer) >= len(_BOM):
            if self._buffer.startswith(_BOM):
                del self._buffer[: len(_BOM)]
            self._started = True
        while (line := self._line()) is not None:
            event = self._take(line)
            if event is not None:
                yield event
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise ValueError(f"a line of the event stream is longer than {MAX_EVENT_BYTES} bytes")

    def _line(self) -> str | None:
        """Return the next whole line; a CR at the end may be half of a CRLF and waits."""
        found = _END_OF_LINE.search(self._buffer)
        if found is None or (found.group() == b"\r" and found.end() == len(self._buffer)):
            return None
        line = self._buffer[: found.start()].decode("utf-8", errors="replace")
        del self._buffer[: found.end()]
        return line

    def _take(self, line: str) -> ServerEvent | None:
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._type = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self.last_id = value
            case "retry" if value.isascii() and value.isdigit():
                self.retry_ms = int(value)
            case _:  # a comment (an empty name), or a field that the standard lets us ignore
                pass
        return None

    def _dispatch(self) -> ServerEvent | None:
        data, kind = self._data, self._type
        self._data, self._type = [], ""
        if not data:
            return None
        return ServerEvent(kind or "message", "\n".join(data), self.last_id)
