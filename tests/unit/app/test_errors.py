"""Categories have statuses, and pydantic's locations become pointers into what was sent."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from app.errors import json_pointer, status_of, validation_detail
from core.errors import Category
from core.methods import Method


def test_statuses() -> None:
    assert {category.value: status_of(category) for category in Category} == {
        "malformed": 400,
        "invalid": 422,
        "unauthenticated": 401,
        "not_permitted": 403,
        "not_found": 404,
        "conflict": 409,
        "changed": 412,
        "too_many": 429,
        "too_large": 413,
        "unsupported_media": 415,
        "unavailable": 503,
        "storage_full": 507,
        "run_aborted": 500,
    }


@pytest.mark.parametrize(
    ("location", "body", "keeps_last", "pointer"),
    [
        (("a", "b"), {"a": {"b": 1}}, False, "/a/b"),
        (("a", 0, "b"), {"a": [{"b": 1}]}, False, "/a/0/b"),
        (("a", "tag", "b"), {"a": {"b": 1}}, False, "/a/b"),
        (("a", "tag"), {"a": {}}, False, "/a"),
        (("a", "missing"), {"a": {}}, True, "/a/missing"),
        (("a/b", "c~d"), {"a/b": {"c~d": 1}}, False, "/a~1b/c~0d"),
        ((), None, False, ""),
        (("a",), None, True, "/a"),
    ],
)
def test_json_pointer(
    location: tuple[str | int, ...], body: object, keeps_last: bool, pointer: str
) -> None:
    assert json_pointer(location, body, keeps_last=keeps_last) == pointer


def test_union_tags_that_are_also_keys() -> None:
    body: dict[str, Any] = {"type": "kernel_dpo", "kernel_dpo": {"kernel": {"type": "rbf", "x": 1}}}
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(Method).validate_python(body)
    item = caught.value.errors()[0]
    assert item["loc"][:2] == ("kernel_dpo", "kernel_dpo")
    detail = validation_detail({**item, "loc": ("body", *item["loc"])}, body)
    assert detail.pointer == "/kernel_dpo/kernel/x"
    assert detail.code == "extra_forbidden"
