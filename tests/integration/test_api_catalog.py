"""What the server says that it can do is what its types accept."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from app.catalog_entries import CONSTRAINTS, PENALTY_COST
from core.spec import DivergenceName, DivergenceSpec, KernelName, KernelSpec, LinkTerm
from tests.integration.api_world import ROOT, World, running_api
from tests.integration.test_api import check_problem

KERNEL: TypeAdapter[Any] = TypeAdapter(KernelSpec)
DIVERGENCE: TypeAdapter[Any] = TypeAdapter(DivergenceSpec)


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    with running_api(sqlite_url, tmp_path) as made:
        yield made


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def outside(parameter: dict[str, Any]) -> Iterator[Any]:
    """Values that the stated range excludes."""
    for name, step in (("minimum", -1), ("maximum", 1)):
        if parameter[name] is not None:
            yield parameter[name] + step
        if parameter[f"exclusive_{name}"] is not None:
            yield parameter[f"exclusive_{name}"]
    if parameter["choices"] is not None:
        yield max(parameter["choices"]) + 1


def check_parameters(entry: dict[str, Any], accepts: Any) -> None:
    accepts({})
    for parameter in entry["parameters"]:
        if parameter["default"] is not None:
            accepts(nested(parameter["name"], parameter["default"]))
        for value in outside(parameter):
            with pytest.raises(ValidationError):
                accepts(nested(parameter["name"], value))
    for constraint in entry["constraints"]:
        with pytest.raises(ValidationError):
            accepts(constraint["refused"])


def test_kernels(world: World) -> None:
    listed = world.get("/v1/kernels").json()["data"]
    assert [one["name"] for one in listed] == [name.value for name in KernelName]
    for entry in listed:
        assert world.get(f"/v1/kernels/{entry['name']}").json() == entry
        assert entry["formula"]
        check_parameters(
            entry, lambda given, e=entry: KERNEL.validate_python({"type": e["name"], **given})
        )
    rbf = listed[0]
    assert rbf["formula"].startswith("K = exp(-||a-b||^2 / 2 sigma^2)")
    width = {p["name"]: p for p in rbf["parameters"]}["width"]
    assert (width["default"], width["minimum"], width["maximum"]) == (1.0, 0.25, 4.0)
    names = [p["name"] for p in listed[-1]["parameters"]]
    assert {"weights.tau_local", "spectral.rank", "entropy"} <= set(names)


def test_divergences(world: World) -> None:
    listed = world.get("/v1/divergences").json()["data"]
    assert [one["name"] for one in listed] == [name.value for name in DivergenceName]
    for entry in listed:
        assert world.get(f"/v1/divergences/{entry['name']}").json() == entry
        check_parameters(
            entry, lambda given, e=entry: DIVERGENCE.validate_python({"type": e["name"], **given})
        )
        for variant in entry["variants"]:

            def accepts(given: dict[str, Any], name: str = variant["name"]) -> Any:
                return DIVERGENCE.validate_python(
                    {"type": "f_divergence", "f": {"type": name, **given}}
                )

            check_parameters(variant, accepts)
            check_link(variant["modes"], accepts({}))
        if not entry["variants"]:
            check_link(entry["modes"], DIVERGENCE.validate_python(entry["name"]))
    assert len(listed[-1]["variants"]) == 6
    stated = {
        c["text"] for one in listed for e in (one, *one["variants"]) for c in e["constraints"]
    }
    assert stated == {text for name in ("renyi", "alpha") for text, _ in CONSTRAINTS[name]}


def check_link(modes: list[str], divergence: Any) -> None:
    if "link" in modes:
        LinkTerm(divergence=divergence)
    else:
        with pytest.raises(ValidationError):
            LinkTerm(divergence=divergence)


def test_costs_are_those_that_were_measured() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    rows = re.findall(r"^\| llama-32m \| (\w+) \| \d+ \| ([\d.]+) \|$", text, re.M)
    assert {name: float(ratio) for name, ratio in rows if name != "dpo"} == PENALTY_COST


def test_capabilities(world: World) -> None:
    answer = world.get("/v1/capabilities")
    found = answer.json()
    assert found["models"] == ["tiny-lm"]
    assert found["methods"] == ["dpo", "kernel_dpo", "auto"]
    assert found["hub"] is False
    assert found["limits"]["body_bytes"] == world.settings.api.max_body_bytes
    assert "openai" in found["layouts"]
    for path in ("/v1/capabilities", "/v1/kernels", "/v1/kernels/hmk", "/v1/divergences/kl"):
        etag = world.get(path).headers["etag"]
        assert world.get(path, headers={"If-None-Match": etag}).status_code == 304
    check_problem(world.client.get("/v1/kernels"), 401, "missing_api_key")
    assert "rbf" in check_problem(world.get("/v1/kernels/x"), 404, "not_found")["hint"]
    check_problem(world.get("/v1/divergences/x"), 404, "not_found")
