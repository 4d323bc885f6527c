"""What must hold of the turns of a pair; each violation is a RowFault with its place."""

from collections.abc import Sequence
from itertools import pairwise

from worker.ingest.canonical import Message, Role
from worker.ingest.faults import RowCode, RowFault, escape_pointer
from worker.ingest.rows import JsonObject, JsonValue, kind

SAME_SIDES = "`chosen` and `rejected` are the same"
_ROLES = frozenset(Role)


def text_field(row: JsonObject, name: str, at: str = "") -> str:
    """Return a text that is not blank; `at` is the pointer of an object inside the row."""
    value = present(row, name, at)
    if not isinstance(value, str):
        raise wrong_type(value, name, "string", at)
    if not value.strip():
        raise RowFault(RowCode.EMPTY_TEXT, f"`{name}` is empty", pointer=f"{at}/{name}")
    return value


def object_field(row: JsonObject, name: str, at: str = "") -> JsonObject:
    """Return an object."""
    value = present(row, name, at)
    if not isinstance(value, dict):
        raise wrong_type(value, name, "object", at)
    return value


def list_field(row: JsonObject, name: str, at: str = "") -> list[JsonValue]:
    """Return a list that is not empty."""
    value = present(row, name, at)
    if not isinstance(value, list):
        raise wrong_type(value, name, "list", at)
    if not value:
        raise RowFault(RowCode.EMPTY_TEXT, f"`{name}` is an empty list", pointer=f"{at}/{name}")
    return value


def objects_field(row: JsonObject, name: str, at: str = "") -> list[JsonObject]:
    """Return a list of objects that is not empty."""
    found = []
    for index, item in enumerate(list_field(row, name, at)):
        if not isinstance(item, dict):
            raise wrong_type(item, str(index), "object", f"{at}/{name}")
        found.append(item)
    return found


def messages_field(row: JsonObject, name: str, at: str = "") -> tuple[Message, ...]:
    """Return a list of turns; their order is checked by `check_prompt` and `check_completion`."""
    value = present(row, name, at)
    if not isinstance(value, list):
        raise wrong_type(value, name, "a list of messages", at)
    if not value:
        raise RowFault(RowCode.EMPTY_TEXT, f"`{name}` has no messages", pointer=f"{at}/{name}")
    return tuple(message_of(item, f"{at}/{name}/{index}") for index, item in enumerate(value))


def number_field(row: JsonObject, name: str, at: str = "") -> float:
    """Return a number."""
    present(row, name, at)
    value = optional_number(row, name, at)
    assert value is not None
    return value


def optional_number(row: JsonObject, name: str, at: str = "") -> float | None:
    """Return a number, or None where there is none."""
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(value, name, "number", at)
    return float(value)


def one_of(row: JsonObject, name: str, allowed: tuple[JsonValue, ...], at: str = "") -> JsonValue:
    """Return a value that must be one of a few; true and false are no numbers."""
    value = present(row, name, at)
    for known in allowed:
        if value == known and isinstance(value, bool) == isinstance(known, bool):
            return value
    raise RowFault(
        RowCode.UNKNOWN_VALUE,
        f"`{name}` is not one of {', '.join(map(repr, allowed))}",
        pointer=f"{at}/{name}",
    )


def wrong_type(value: JsonValue, name: str, expected: str, at: str = "") -> RowFault:
    """Return the fault of a value that is not of the expected type."""
    return RowFault(
        RowCode.WRONG_TYPE,
        f"`{name}` is of type {kind(value)}, expected {expected}",
        pointer=f"{at}/{escape_pointer(name)}",
    )


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
    if same_turns(chosen, rejected):
        raise RowFault(RowCode.IDENTICAL_PAIR, SAME_SIDES)


def same_turns(a: Sequence[Message], b: Sequence[Message]) -> bool:
    """Return whether two answers are the same but for white space at the ends of turns."""
    return [(m.role, m.content.strip()) for m in a] == [(m.role, m.content.strip()) for m in b]


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


def present(row: JsonObject, name: str, at: str = "") -> JsonValue:
    """Return a value that must be there."""
    value = row.get(name)
    if value is None:
        state = "null" if name in row else "missing"
        raise RowFault(
            RowCode.MISSING_FIELD, f"`{name}` is {state}", pointer=f"{at}/{escape_pointer(name)}"
        )
    return value


def message_of(item: JsonValue, pointer: str) -> Message:
    """Return one `{"role", "content"}`; a content that is a list of texts is joined."""
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
    if isinstance(content, list):
        content = _joined(content)
    if item.get("tool_calls") or isinstance(content, list):
        raise RowFault(
            RowCode.UNSUPPORTED_CONTENT,
            "the message has tool calls or parts that are no text; only text is read",
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


def _joined(parts: list[JsonValue]) -> str | list[JsonValue]:
    """Return `[{"type": "text", "text": …}, …]` as one text, anything else as it is."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return parts
        texts.append(text)
    return "".join(texts)
