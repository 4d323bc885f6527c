"""JSON's kinds are kept apart: a boolean is no number, and a text is neither."""

from collections.abc import Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

_NUMBERS: frozenset[object] = frozenset({int, float})
_PLAIN = _NUMBERS | {bool, NoneType}


class KindModel(BaseModel):
    """A model that refuses `true` for 1, 1 for `true`, and `"1"` for either."""

    @model_validator(mode="before")
    @classmethod
    def _of_their_kinds(cls, data: object, info: ValidationInfo) -> object:
        if info.mode not in ("python", "json") or not isinstance(data, Mapping):
            return data
        wrong = [
            InitErrorDetails(type=error, loc=(name,), input=value)
            for name, value in data.items()
            if (error := _wrong_kind(_taken_by(cls, name), value)) is not None
        ]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return data


def _wrong_kind(takes: frozenset[object], value: object) -> PydanticCustomError | None:
    """Return what is wrong with a value that pydantic would turn into something of a field's."""
    if takes - _PLAIN and not all(isinstance(one, str) for one in takes - _PLAIN):
        return None  # something that has a way of its own to be written
    for one in _values(value):
        match one:
            case bool():
                is_known = bool in takes
            case int() | float():
                is_known = bool(takes & _NUMBERS)
            case str():
                is_known = one in takes or not takes & (_NUMBERS | {bool})
            case _:
                continue
        if not is_known:
            return PydanticCustomError(
                "json_kind",
                "Input should be a {expected}, received a {received}",
                {
                    "expected": "number" if takes & _NUMBERS else "boolean",
                    "received": type(one).__name__,
                },
            )
    return None


def _values(value: object) -> tuple[object, ...]:
    match value:
        case list() | tuple() | set() | frozenset():
            return tuple(value)
        case dict():
            return tuple(value.values())
        case _:
            return (value,)


@cache
def _taken_by(model: type[BaseModel], name: object) -> frozenset[object]:
    field = model.model_fields.get(str(name))
    return frozenset({object}) if field is None else _leaves(field.annotation)


def _leaves(annotation: Any) -> frozenset[object]:
    """Return the types of what a field takes, of members of lists too, and its literal texts."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _leaves(arguments[0])
    if origin is Literal:
        return frozenset(one if isinstance(one, str) else type(one) for one in arguments)
    if origin is dict:
        return _leaves(arguments[1])
    if origin is None:
        return frozenset({annotation if isinstance(annotation, type) else object})
    found = (_leaves(one) for one in arguments if one is not Ellipsis)
    return frozenset[object]().union(*found)
