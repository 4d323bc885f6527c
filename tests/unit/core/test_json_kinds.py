"""A value of another kind of JSON is refused, and not turned into the field's."""

from enum import StrEnum
from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from core.json_kinds import KindModel


class Colour(StrEnum):
    RED = "red"


class Inner(KindModel):
    weight: float = 1.0


class Model(KindModel):
    count: Annotated[int, Field(ge=0)] = 0
    rate: float | None = None
    flag: bool = False
    limit: Annotated[int, Field(ge=0)] | Literal["unlimited"] | None = None
    always: Literal[True] = True
    names: list[str] = Field(default_factory=list)
    numbers: list[int] = Field(default_factory=list)
    weights: dict[Colour, float] = Field(default_factory=dict)
    inner: Inner = Inner()
    inners: list[Inner] = Field(default_factory=list)
    colour: Colour = Colour.RED
    either: bool | int = 0


@pytest.mark.parametrize(
    "given",
    [
        {"count": 3}, {"count": 3.0}, {"rate": 1}, {"rate": None}, {"flag": True}, {"limit": 3},
        {"limit": "unlimited"}, {"limit": None}, {"always": True}, {"names": ["1"]},
        {"numbers": [1, 2]}, {"weights": {"red": 1}}, {"inner": {"weight": 2}}, {"colour": "red"},
        {"either": True}, {"either": 3}, {"inners": [{"weight": 1}]},
    ],
)  # fmt: skip
def test_values_of_their_kind_pass(given: dict[str, object]) -> None:
    shown = Model.model_validate(given).model_dump(mode="json", exclude_unset=True)
    assert shown == given
    assert Model.model_validate_json(Model.model_validate(given).model_dump_json())


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"count": True}, ("count",)),
        ({"count": "3"}, ("count",)),
        ({"rate": False}, ("rate",)),
        ({"rate": "1.5"}, ("rate",)),
        ({"flag": 1}, ("flag",)),
        ({"flag": 0.0}, ("flag",)),
        ({"flag": "yes"}, ("flag",)),
        ({"limit": True}, ("limit",)),
        ({"limit": "3"}, ("limit",)),
        ({"always": 1}, ("always",)),
        ({"numbers": [1, True]}, ("numbers",)),
        ({"numbers": ["1"]}, ("numbers",)),
        ({"weights": {"red": True}}, ("weights",)),
        ({"inner": {"weight": "2"}}, ("inner", "weight")),
        ({"inners": [{}, {"weight": True}]}, ("inners", 1, "weight")),
        ({"either": "1"}, ("either",)),
    ],
)
def test_values_of_another_kind_are_refused_where_they_are(
    given: dict[str, object], where: tuple[str | int, ...]
) -> None:
    with pytest.raises(ValidationError) as caught:
        Model.model_validate(given)
    assert [(one["type"], one["loc"]) for one in caught.value.errors()] == [("json_kind", where)]


def test_forms_have_texts_only() -> None:
    made = Model.model_validate_strings({"count": "3", "flag": "true"})
    assert (made.count, made.flag) == (3, True)
