"""What a call does, without doing it: requests, and the effects that a driver performs.

A call is a generator (a `Flow`). It yields effects, is given what came of them, and returns its
result. One driver performs effects with threads and sockets that block, the other one awaits them,
so that everything a call decides (retries, pages, ranges, when to stop listening) is written once.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, cast

T = TypeVar("T")
QueryValue: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class FilePart:
    """A file that goes up as the part `file` of a form; `on_bytes` hears how much has gone."""

    path: Path
    on_bytes: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Request:
    """One request, relative to the server's address."""

    method: str
    path: str
    query: Mapping[str, QueryValue] = field(default_factory=dict)
    json: object | None = None
    file: FilePart | None = None
    form: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    read_timeout_s: float | None = None


@dataclass(frozen=True)
class Reply:
    """An answer that has been read to its end; header names are lower-case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


class Stream(Protocol):
    """An answer whose body is still to come."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers by their lower-case names."""


@dataclass(frozen=True)
class Send:
    """Send a request and read its answer: a `Reply`. Raises ConnectionFailed into the flow."""

    request: Request


@dataclass(frozen=True)
class Open:
    """Send a request and stop before its body: a `Stream`. Raises ConnectionFailed."""

    request: Request


@dataclass(frozen=True)
class Read:
    """Read the next bytes of a stream; empty at its end. Raises ConnectionFailed."""

    stream: Stream


@dataclass(frozen=True)
class Close:
    """Close a stream; what a flow leaves open is closed when it ends."""

    stream: Stream


@dataclass(frozen=True)
class Sleep:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Run:
    """Call a function that blocks (files, hashes); its value, or its error, comes back."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Together:
    """Run flows beside each other, at most `limit` at a time; the first error stops all."""

    flows: Sequence["Flow[Any]"]
    limit: int


@dataclass(frozen=True)
class Emit(Generic[T]):
    """Give an item to whoever iterates over the call."""

    item: T


Effect: TypeAlias = Send | Open | Read | Close | Sleep | Run | Together
Flow: TypeAlias = Generator[Effect, Any, T]
"""A call that returns a `T`."""
Items: TypeAlias = Generator[Effect | Emit[T], Any, Any]
"""A call that emits items of type `T`."""


def run(function: Callable[[], T]) -> Flow[T]:
    """Call a function that blocks."""
    value: T = yield Run(function)
    return value


def open_stream(request: Request) -> Flow[Stream]:
    """Begin an answer whose body is read bit by bit."""
    stream: Stream = yield Open(request)
    return stream


def read_stream(stream: Stream) -> Flow[bytes]:
    """Return the next bytes of a stream; empty at its end."""
    chunk: bytes = yield Read(stream)
    return chunk


def together(flows: Sequence[Flow[T]], *, limit: int) -> Flow[list[T]]:
    """Run flows beside each other and return what they return, in their order."""
    values: list[T] = yield Together(flows, limit)
    return values


class Steps(Generic[T]):
    """Walks through a call: `next` gives its effects, `with steps:` keeps an error for it.

    A call must not yield in a `finally`: whoever stops iterating over it closes it there.
    """

    def __init__(self, flow: Generator[Effect | Emit[Any], Any, T]) -> None:
        self._flow = flow
        self._error: BaseException | None = None
        self._result: T | None = None
        self.value: Any = None

    def next(self) -> Effect | Emit[Any] | None:
        """Tell the call what came of its effect, and return the next one; None at its end."""
        value, error = self.value, self._error
        self.value, self._error = None, None
        try:
            return self._flow.send(value) if error is None else self._flow.throw(error)
        except StopIteration as end:
            self._result = end.value
            return None

    @property
    def result(self) -> T:
        """What the call has returned."""
        return cast(T, self._result)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._error = error
        return error is not None


def heard(items: Generator[Effect | Emit[Any], Any, T], listener: Callable[[Any], None]) -> Flow[T]:
    """Return a call that gives what another one emits to a listener, and returns the same."""
    steps = Steps(items)
    while (effect := steps.next()) is not None:
        if isinstance(effect, Emit):
            listener(effect.item)
        else:
            with steps:
                steps.value = yield effect
    return steps.result
