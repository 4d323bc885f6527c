"""What must hold of the turns of a pair; each violation is a RowFault with its place."""

from collections.abc import Sequence
from itertools import pairwise

from worker.ingest.canonical import Message, Role
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.rows import JsonObject, JsonValue, kind

SAME_SIDES = "`chosen` and `rejected` are the same"
_ROLES = frozenset(Role)


def text_field(row: JsonObject, name: str) -> str:
    """Return a text that is not blank."""
    value = _present(row, name)
    if not isinstance(value, str):
        raise RowFault(
            RowCode.WRONG_TYPE,
            f"`{name}` is of type {kind(value)}, expected string",
            pointer=f"/{name}",
        )
    if not value.strip():
        raise RowFault(RowCode.EMPTY_TEXT, f"`{name}` is empty", pointer=f"/{name}")
    return value


def messages_field(row: JsonObject, name: str) -> tuple[Message, ...]:
    """Return a list of turns; their order is checked by `check_prompt` and `check_completion`."""
    value = _present(row, name)
    if not isinstance(value, list):
        raise RowFault(
            RowCode.WRONG_TYPE,
            f"`{name}` is of type {kind(value)}, expected a list of messages",
            pointer=f"/{name}",
        )
    if not value:
        raise RowFault(RowCode.EMPTY_TEXT, f"`{name}` has no messages", pointer=f"/{name}")
    return tuple(_message(item, f"/{name}/{index}") for index, item in enumerate(value))


def optional_number(row: JsonObject, name: str) -> float | None:
    """Return a number, or None where there is none."""
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowFault(
            RowCode.WRONG_TYPE,
            f"`{name}` is of type {kind(value)}, expected number",
            pointer=f"/{name}",
        )
    return float(value)


def check_prompt(prompt: Sequence[Message], pointer: str) -> None:
    """A prompt is [system] user, assistant, …, and ends with user or tool."""
    if not prompt:
        raise RowFault(RowCode.NO_PROMPT, "there is no prompt before the answers", pointer=pointer)
    turns = prompt[1:] if prompt[0].role is Role.SYSTEM else prompt
    if not turns or turns[0].role is not Role.USER:
        raise RowFault(
            RowCode.ROLE_ORDER,
            "the first turn after an optional system message must be user",
            pointer=pointer,
        )
    _check_order(turns, pointer)
    if turns[-1].role not in (Role.USER, Role.TOOL):
        raise RowFault(
            RowCode.ROLE_ORDER,
            f"the prompt ends with {turns[-1].role}, expected user or tool",
            pointer=pointer,
        )


def check_completion(completion: Sequence[Message], pointer: str) -> None:
    """A completion begins and ends with assistant and has no turn of user or system."""
    if not completion:
        raise RowFault(RowCode.EMPTY_TEXT, "there is no answer after the prompt", pointer=pointer)
    for message in completion:
        if message.role in (Role.USER, Role.SYSTEM):
            raise RowFault(
                RowCode.LAST_TURN_DIFFERS,
                f"an answer has a turn of {message.role}: the sides part before the last turn",
                pointer=pointer,
            )
    if completion[0].role is not Role.ASSISTANT or completion[-1].role is not Role.ASSISTANT:
        raise RowFault(
            RowCode.ROLE_ORDER, "an answer must begin and end with assistant", pointer=pointer
        )
    _check_order(completion, pointer)


def check_differs(chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    """The two sides must differ by more than white space at the ends."""
    if [(m.role, m.content.strip()) for m in chosen] == [
        (m.role, m.content.strip()) for m in rejected
    ]:
        raise RowFault(RowCode.IDENTICAL_PAIR, SAME_SIDES)


def _check_order(turns: Sequence[Message], pointer: str) -> None:
    for before, after in pairwise(turns):
        if after.role is Role.SYSTEM:
            raise RowFault(
                RowCode.ROLE_ORDER, "a system message may only come first", pointer=pointer
            )
        if before.role is after.role and after.role is not Role.TOOL:
            raise RowFault(
                RowCode.ROLE_ORDER, f"two turns of {after.role} follow each other", pointer=pointer
            )
        if after.role is Role.TOOL and before.role is Role.USER:
            raise RowFault(
                RowCode.ROLE_ORDER, "a tool turn must follow assistant or tool", pointer=pointer
            )


def _present(row: JsonObject, name: str) -> JsonValue:
    value = row.get(name)
    if value is None:
        state = "null" if name in row else "missing"
        raise RowFault(RowCode.MISSING_FIELD, f"`{name}` is {state}", pointer=f"/{name}")
    return value


def _message(item: JsonValue, pointer: str) -> Message:
    if not isinstance(item, dict):
        raise RowFault(
            RowCode.WRONG_TYPE,
            f"a message is of type {kind(item)}, expected object",
            pointer=pointer,
        )
    role, content = item.get("role"), item.get("content")
    if role is None:
        raise RowFault(RowCode.MISSING_FIELD, "a message has no `role`", pointer=f"{pointer}/role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RowFault(
            RowCode.UNKNOWN_ROLE,
            f"the role is not one of {', '.join(Role)}",
            pointer=f"{pointer}/role",
        )
    if item.get("tool_calls") or isinstance(content, list):
        raise RowFault(
            RowCode.UNSUPPORTED_CONTENT,
            "the message has tool calls or a list of parts; only text is read",
            pointer=pointer,
        )
    if content is None:
        raise RowFault(
            RowCode.MISSING_FIELD, "a message has no `content`", pointer=f"{pointer}/content"
        )
    if not isinstance(content, str):
        raise RowFault(
            RowCode.WRONG_TYPE,
            f"`content` is of type {kind(content)}, expected string",
            pointer=f"{pointer}/content",
        )
    if not content.strip():
        raise RowFault(
            RowCode.EMPTY_TEXT, "the content of a message is empty", pointer=f"{pointer}/content"
        )
    return Message(Role(role), content)
