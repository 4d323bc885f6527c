"""Plays calls without a network: a script says what comes of each effect, in order."""

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kdpo.errors import ConnectionFailed
from kdpo.flows import Close, Emit, Open, Read, Reply, Request, Run, Send, Sleep, Steps


def reply(body: object = None, status: int = 200, **headers: str) -> Reply:
    """An answer; header names with `_` for `-`."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(
        status, {name.replace("_", "-"): value for name, value in headers.items()}, content
    )


def problem(status: int, code: str = "some_code", **headers: str) -> Reply:
    return reply({"code": code, "detail": "it is so", "request_id": "req_1"}, status, **headers)


def broke(*, sent: bool = True) -> ConnectionFailed:
    return ConnectionFailed("the connection broke", sent=sent)


@dataclass
class Body:
    """An answer whose body comes in pieces; an error among them is raised."""

    pieces: list[bytes | ConnectionFailed]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Played:
    """What a call did."""

    requests: list[Request] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    emitted: list[Any] = field(default_factory=list)
    closed: int = 0
    result: Any = None


Answer = Reply | Body | ConnectionFailed | Callable[[Request], Reply | Body]


def play(flow: Any, *answers: Answer) -> Played:
    """Run a call to its end; each request takes the next answer, and all must be taken."""
    left, played, steps = deque(answers), Played(), Steps[Any](flow)
    try:
        while (effect := steps.next()) is not None:
            with steps:
                steps.value = _perform(effect, left, played)
        played.result = steps.result
    except Exception as error:
        error.played = played  # type: ignore[attr-defined]
        raise
    assert not left, f"{len(left)} answers were not asked for"
    return played


def _perform(effect: Any, left: deque[Answer], played: Played) -> Any:
    match effect:
        case Send() | Open():
            played.requests.append(effect.request)
            assert left, f"one request too many: {effect.request}"
            answer = left.popleft()
            if callable(answer):
                answer = answer(effect.request)
            if isinstance(answer, ConnectionFailed):
                raise answer
            if isinstance(effect, Open) and isinstance(answer, Reply):
                return Body([answer.content], answer.status, dict(answer.headers))
            return answer
        case Read():
            piece = effect.stream.pieces.pop(0) if effect.stream.pieces else b""
            if isinstance(piece, ConnectionFailed):
                raise piece
            return piece
        case Close():
            played.closed += 1
            return None
        case Sleep():
            played.pauses.append(effect.seconds)
            return None
        case Run():
            return effect.function()
        case Emit():
            played.emitted.append(effect.item)
            return None
        case _:
            raise AssertionError(f"not expected: {effect}")
