"""What can be trained, read off the types in `core.spec`: formulas, parameters, ranges, modes."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import Field

from app.responses import Schema
from core.spec import (
    DivergenceName,
    DivergenceSpec,
    FDivergenceSpec,
    FSpec,
    KernelName,
    KernelSpec,
    SpecModel,
    has_link,
)

# Seconds of a training step over plain DPO's, on a CPU: docs/benchmarks.md, llama-32m. Penalties
# pass over the vocabulary; kernels work on one vector for each answer and have not been timed.
PENALTY_COST: Mapping[str, float] = {
    "kl": 1.21,
    "jensen_shannon": 1.23,
    "hellinger": 1.22,
    "renyi": 1.25,
    "bhattacharyya": 1.27,
    "wasserstein": 1.57,
    "f_divergence": 1.19,
}
# Beyond the ranges; each with parameters that it refuses.
CONSTRAINTS: Mapping[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "spectral": (("rank must not exceed landmarks", {"landmarks": 8, "rank": 9}),),
    "hmk": (
        (
            "learning_rate and entropy act on learned weights only: learned must be true",
            {"learned": False, "entropy": 0.1},
        ),
    ),
    "renyi": (("order 1 is kl: use that", {"order": 1.0}),),
    "alpha": (("order 1 is kl: use that", {"order": 1.0}),),
}


class Parameter(Schema):
    """One number or choice of a kernel or divergence; `a.b` is `b` inside the object `a`."""

    name: str
    type: str
    default: Any
    minimum: float | None = None
    exclusive_minimum: float | None = None
    maximum: float | None = None
    exclusive_maximum: float | None = None
    choices: list[Any] | None = None
    description: str | None = None


class Constraint(Schema):
    """What holds beyond the ranges, and an example of parameters that are refused for it."""

    text: str
    refused: dict[str, Any]


class Variant(Schema):
    """One f of an f-divergence."""

    name: str
    formula: str
    modes: list[Literal["penalty", "link"]]
    parameters: list[Parameter]
    constraints: list[Constraint]


class KernelEntry(Schema):
    """A kernel on embeddings of prompts and answers."""

    object: Literal["kernel"] = "kernel"
    name: KernelName
    formula: str
    notes: str | None
    modes: tuple[Literal["joint", "separate"], ...] = ("joint", "separate")
    embeddings: tuple[Literal["policy", "encoder"], ...] = ("policy", "encoder")
    parameters: list[Parameter]
    constraints: list[Constraint]
    cost_factor: float | None = Field(
        description="seconds of a training step over plain DPO's; null: not measured"
    )


class DivergenceEntry(Schema):
    """A divergence between the policy and its reference."""

    object: Literal["divergence"] = "divergence"
    name: DivergenceName
    formula: str
    notes: str | None
    modes: list[Literal["penalty", "link"]]
    parameters: list[Parameter]
    constraints: list[Constraint]
    variants: list[Variant]
    cost_factor: float | None = Field(
        description="seconds of a training step with the penalty over plain DPO's; a link costs "
        "nothing"
    )


def kernels() -> list[KernelEntry]:
    """Return all kernels in the order of their names' enum."""
    return [
        KernelEntry(
            name=KernelName(_name(spec)),
            formula=_formula(spec),
            notes=_notes(spec),
            parameters=_parameters(spec),
            constraints=_constraints(_name(spec)),
            cost_factor=None,
        )
        for spec in _members(KernelSpec)
    ]


def divergences() -> list[DivergenceEntry]:
    """Return all divergences in the order of their names' enum."""
    entries = []
    for spec in _members(DivergenceSpec):
        name = DivergenceName(_name(spec))
        is_family = spec is FDivergenceSpec
        entries.append(
            DivergenceEntry(
                name=name,
                formula=_formula(spec),
                notes=_notes(spec),
                modes=["penalty", "link"] if is_family else _modes(spec()),
                parameters=[] if is_family else _parameters(spec),
                constraints=_constraints(name.value),
                variants=_variants() if is_family else [],
                cost_factor=PENALTY_COST[name.value],
            )
        )
    return entries


def _variants() -> list[Variant]:
    return [
        Variant(
            name=_name(f),
            formula=_formula(f),
            modes=_modes(FDivergenceSpec.model_validate({"f": _name(f)})),
            parameters=_parameters(f),
            constraints=_constraints(_name(f)),
        )
        for f in _members(FSpec)
    ]


def _modes(spec: Any) -> list[Literal["penalty", "link"]]:
    return ["penalty", "link"] if has_link(spec) else ["penalty"]


def _members(union: Any) -> tuple[type[SpecModel], ...]:
    """Return the classes of an annotated union."""
    return get_args(get_args(union)[0])


def _name(spec: type[SpecModel]) -> str:
    return str(spec.model_fields["type"].default)


def _formula(spec: type[SpecModel]) -> str:
    return _caption(spec)[0].removesuffix(".")


def _notes(spec: type[SpecModel]) -> str | None:
    return " ".join(_caption(spec)[1].split()) or None


def _caption(spec: type[SpecModel]) -> tuple[str, str]:
    """Return the first line of what a class says of itself, and the rest."""
    first, _, rest = inspect.cleandoc(spec.__doc__ or "").partition("\n")
    return first, rest


def _constraints(name: str) -> list[Constraint]:
    return [Constraint(text=text, refused=refused) for text, refused in CONSTRAINTS.get(name, ())]


def _parameters(spec: type[SpecModel]) -> list[Parameter]:
    schema = spec.model_json_schema()
    defaults = spec().model_dump(mode="json")
    return list(_flat(schema, schema.get("$defs", {}), defaults, prefix=""))


def _flat(
    schema: Mapping[str, Any],
    definitions: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    prefix: str,
) -> Iterator[Parameter]:
    """Return the leaves of a JSON Schema of objects."""
    for name, given in schema["properties"].items():
        if name == "type":
            continue
        reference = given.get("$ref")
        if reference is not None:
            inner = definitions[reference.rpartition("/")[2]]
            yield from _flat(inner, definitions, defaults[name], prefix=f"{prefix}{name}.")
            continue
        # An optional number is one of two types, of which null has nothing to say.
        kinds = [one for one in given.get("anyOf", [given]) if one.get("type") != "null"]
        kind = kinds[0]
        yield Parameter(
            name=prefix + name,
            type=str(kind.get("type", "integer")),
            default=defaults[name],
            minimum=kind.get("minimum"),
            exclusive_minimum=kind.get("exclusiveMinimum"),
            maximum=kind.get("maximum"),
            exclusive_maximum=kind.get("exclusiveMaximum"),
            choices=kind.get("enum"),
            description=given.get("description"),
        )
