"""Every spec can be built, and what is missing is said."""

from typing import get_args

import pytest
import torch

import objectives
from core.spec import (
    BASE_KERNELS,
    DivergenceName,
    DivergenceSpec,
    FSpec,
    KernelName,
    KernelTerm,
    ObjectiveSpec,
    PenaltyTerm,
    WassersteinSpec,
)
from objectives import KernelModule, MixtureKernel, build_divergence, build_kernel, build_objective
from tests.unit.objectives.samples import distributions, geometry64, head_rows
from tests.unit.objectives.test_divergences import CASES
from tests.unit.objectives.test_kernels import SPECS

GEOMETRY = geometry64(pairs=12)


@pytest.mark.parametrize("kernel", list(KernelName))
@pytest.mark.parametrize("divergence", list(DivergenceName))
def test_every_pair_builds_from_bare_names(kernel: KernelName, divergence: DivergenceName) -> None:
    spec = ObjectiveSpec.model_validate(
        {
            "kernel_term": {"kernel": kernel},
            "divergence_term": {"mode": "penalty", "divergence": divergence},
        }
    )
    objective = build_objective(spec, geometry=GEOMETRY, head=head_rows())
    assert objective.divergence is not None
    assert objective.divergence(*distributions(0)).shape == (3,)
    assert isinstance(objective.kernel, KernelModule)


def test_the_contracts_cover_every_spec() -> None:
    """A kernel or divergence that is added and not tested fails here."""
    assert {spec.type for spec in SPECS.values()} == set(KernelName)
    assert {case.spec.type for case in CASES.values()} == set(DivergenceName)
    f_types = {get_args(member.model_fields["type"].annotation)[0] for member in _members(FSpec)}
    tested = {case.spec.f.type for case in CASES.values() if case.spec.type == "f_divergence"}
    assert tested == f_types
    assert len(_members(DivergenceSpec)) == len(DivergenceName)


def _members(union: object) -> tuple[type, ...]:
    return get_args(get_args(union)[0])


def test_a_mixture_holds_the_four_base_kernels() -> None:
    kernel = build_kernel(SPECS["hmk"], GEOMETRY)
    assert isinstance(kernel, MixtureKernel)
    assert {*BASE_KERNELS} <= kernel.weights().keys()
    assert len(kernel.members) == len(BASE_KERNELS)


def test_parts_follow_the_geometrys_precision() -> None:
    for spec in SPECS.values():
        for dtype in (torch.float32, torch.float64):
            kernel = build_kernel(spec, GEOMETRY.to(dtype=dtype))
            tensors = [*kernel.buffers(), *kernel.parameters()]
            assert {tensor.dtype for tensor in tensors} <= {dtype}


def test_a_wasserstein_penalty_moves_with_the_objective() -> None:
    spec = ObjectiveSpec(divergence_term=PenaltyTerm(divergence=WassersteinSpec()))
    objective = build_objective(spec, geometry=None, head=head_rows())
    assert [name for name, _ in objective.named_buffers()] == [
        "divergence.order",
        "divergence.gaps",
    ]


def test_kernel_term_without_geometry() -> None:
    spec = ObjectiveSpec(kernel_term=KernelTerm(kernel=SPECS["rbf"]))
    with pytest.raises(ValueError, match=r"received no geometry.*fit_geometry"):
        build_objective(spec, geometry=None, head=None)


def test_wasserstein_without_head() -> None:
    with pytest.raises(ValueError, match="received no head"):
        build_divergence(WassersteinSpec(), head=None)
    spec = ObjectiveSpec(divergence_term=PenaltyTerm(divergence=WassersteinSpec()))
    with pytest.raises(ValueError, match="received no head"):
        build_objective(spec, geometry=None, head=None)


def test_public_names_exist() -> None:
    assert all(hasattr(objectives, name) for name in objectives.__all__)
