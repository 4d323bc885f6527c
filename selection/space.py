"""The search space: candidates to Optuna parameters and back.

Every parameter is suggested in every trial, used or not, so that a multivariate sampler sees one
joint space instead of a different one for every kernel (docs/selection.md, "Search space").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import assert_never

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from core.errors import InvalidInput
from core.run_spec import CandidateSpec
from core.spec import (
    BhattacharyyaSpec,
    DivergenceName,
    DivergenceSpec,
    FAlpha,
    FDivergenceSpec,
    FForwardKl,
    FJeffreys,
    FNeymanChi2,
    FPearsonChi2,
    FSpec,
    FTotalVariation,
    HellingerSpec,
    JensenShannonSpec,
    KernelName,
    KernelSpec,
    KernelTerm,
    KlSpec,
    LinkTerm,
    MahalanobisKernelSpec,
    MixtureKernelSpec,
    MixtureWeights,
    ObjectiveSpec,
    PenaltyTerm,
    PolynomialKernelSpec,
    RbfKernelSpec,
    RenyiSpec,
    SpectralKernelSpec,
    WassersteinSpec,
)

ParamValue = str | bool | int | float
Params = dict[str, ParamValue]
OFF = "off"

# Two links are missing on purpose: that of kl is the identity (plain DPO, so `off`), and that of
# bhattacharyya is the link of hellinger.
DIVERGENCE_TERMS = (
    OFF,
    *(f"{name.value}:penalty" for name in DivergenceName),
    "jensen_shannon:link",
    "hellinger:link",
    "renyi:link",
    "f_divergence:link",
)
F_PENALTY = (
    "forward_kl",
    "alpha",
    "total_variation",
    "pearson_chi2",
    "neyman_chi2",
    "jeffreys",
)
F_LINK = ("forward_kl", "alpha")
DEGREES = (2, 3, 4)

_DEFAULTS: Params = {
    "kernel": OFF,
    "gamma": 0.1,
    "rbf_width": 1.0,
    "polynomial_offset": 1.5,
    "polynomial_degree": 2,
    "spectral_rank": 16,
    "spectral_time": 1.0,
    "hmk_learned": True,
    "hmk_tau_local": 0.5,
    "hmk_rbf": 0.5,
    "hmk_spectral": 0.5,
    "divergence": OFF,
    "alpha": 1.0,
    "f_penalty": "forward_kl",
    "f_link": "forward_kl",
    "order": 0.5,
    "renyi_order": 2.0,
}


@dataclass(frozen=True)
class SearchSpace:
    """All candidates that a search may try around one learning rate."""

    learning_rate: float

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Every parameter with its range; names are stable, stored studies depend on them."""
        rate = self.learning_rate
        return {
            "kernel": CategoricalDistribution((OFF, *(name.value for name in KernelName))),
            "divergence": CategoricalDistribution(DIVERGENCE_TERMS),
            "beta": FloatDistribution(0.01, 2.0, log=True),
            "gamma": FloatDistribution(0.01, 1.0, log=True),
            "alpha": FloatDistribution(0.03, 30.0, log=True),
            "learning_rate": FloatDistribution(rate / 4, min(rate * 4, 1.0), log=True),
            "rbf_width": FloatDistribution(0.25, 4.0, log=True),
            "polynomial_offset": FloatDistribution(1.05, 4.0, log=True),
            "polynomial_degree": CategoricalDistribution(DEGREES),
            "spectral_rank": IntDistribution(4, 64, log=True),
            "spectral_time": FloatDistribution(0.25, 4.0, log=True),
            "hmk_learned": CategoricalDistribution((True, False)),
            "hmk_tau_local": FloatDistribution(0.05, 0.95),
            "hmk_rbf": FloatDistribution(0.05, 0.95),
            "hmk_spectral": FloatDistribution(0.05, 0.95),
            "f_penalty": CategoricalDistribution(F_PENALTY),
            "f_link": CategoricalDistribution(F_LINK),
            "order": FloatDistribution(0.1, 0.9),
            "renyi_order": FloatDistribution(1.1, 4.0, log=True),
        }

    def params_of(self, candidate: CandidateSpec) -> Params:
        """Return the parameters of a candidate; what it does not use stands at its default.

        Raises InvalidInput for a candidate outside of the space, naming what is outside.
        """
        params = {**_DEFAULTS, **used_params(candidate)}
        for name, distribution in self.distributions.items():
            _check_contained(name, params[name], distribution)
        if self.candidate_of(params) != candidate:
            raise InvalidInput(
                f"candidate {candidate.objective.label!r} sets something that the search does not "
                "vary (label smoothing, kernel mode, embedding, landmarks, HMK learning rate or "
                "entropy, Wasserstein directions, kl link, orders of alpha outside [0.1, 0.9], "
                "of renyi outside [1.1, 4])",
                hint="leave those at their defaults in candidates of a search",
            )
        return params

    def candidate_of(self, params: Mapping[str, ParamValue]) -> CandidateSpec:
        """Return the candidate that a full set of parameters means."""
        kernel = _kernel_of(params)
        term = None
        if kernel is not None:
            term = KernelTerm(kernel=kernel, gamma=float(params["gamma"]))
        return CandidateSpec(
            objective=ObjectiveSpec(
                beta=float(params["beta"]),
                kernel_term=term,
                divergence_term=_divergence_term_of(params),
            ),
            learning_rate=float(params["learning_rate"]),
        )


def used_params(candidate: CandidateSpec) -> Params:
    """Return the parameters that a candidate makes use of, in the space's names, wherever it lies.

    What the space does not vary (label smoothing, kernel mode, embedding …) has no name here.
    """
    objective = candidate.objective
    return {
        "beta": objective.beta,
        "learning_rate": candidate.learning_rate,
        **_kernel_params(objective.kernel_term),
        **_divergence_params(objective.divergence_term),
    }


def _check_contained(name: str, value: ParamValue, distribution: BaseDistribution) -> None:
    match distribution:
        case CategoricalDistribution(choices=choices):
            inside = value in choices
            wanted = f"one of {list(choices)}"
        case FloatDistribution(low=low, high=high) | IntDistribution(low=low, high=high):
            inside = low <= float(value) <= high
            wanted = f"{low:g} to {high:g}"
        case _:
            raise AssertionError(f"{name} has an unexpected distribution {distribution}")
    if not inside:
        raise InvalidInput(
            f"{name} of the candidate is {value!r}; the search space holds {wanted}", param=name
        )


# ------------------------------------------------------------------- kernel


def _kernel_params(term: KernelTerm | None) -> Params:
    if term is None:
        return {"kernel": OFF}
    head: Params = {"kernel": term.kernel.type, "gamma": term.gamma}
    match term.kernel:
        case RbfKernelSpec() as rbf:
            return head | _rbf_params(rbf)
        case PolynomialKernelSpec() as polynomial:
            return head | _polynomial_params(polynomial)
        case MahalanobisKernelSpec():
            return head
        case SpectralKernelSpec() as spectral:
            return head | _spectral_params(spectral)
        case MixtureKernelSpec() as hmk:
            return (
                head
                | _rbf_params(hmk.rbf)
                | _polynomial_params(hmk.polynomial)
                | _spectral_params(hmk.spectral)
                | {
                    "hmk_learned": hmk.learned,
                    "hmk_tau_local": hmk.weights.tau_local,
                    "hmk_rbf": hmk.weights.rbf,
                    "hmk_spectral": hmk.weights.spectral,
                }
            )
        case _:
            assert_never(term.kernel)


def _rbf_params(kernel: RbfKernelSpec) -> Params:
    return {"rbf_width": kernel.width}


def _polynomial_params(kernel: PolynomialKernelSpec) -> Params:
    return {"polynomial_offset": kernel.offset, "polynomial_degree": kernel.degree}


def _spectral_params(kernel: SpectralKernelSpec) -> Params:
    return {"spectral_rank": kernel.rank, "spectral_time": kernel.time}


def _kernel_of(params: Mapping[str, ParamValue]) -> KernelSpec | None:
    if params["kernel"] == OFF:
        return None
    rbf = RbfKernelSpec(width=float(params["rbf_width"]))
    polynomial = PolynomialKernelSpec.model_validate(
        {"offset": params["polynomial_offset"], "degree": params["polynomial_degree"]}
    )
    spectral = SpectralKernelSpec(
        rank=int(params["spectral_rank"]), time=float(params["spectral_time"])
    )
    name = KernelName(str(params["kernel"]))
    match name:
        case KernelName.RBF:
            return rbf
        case KernelName.POLYNOMIAL:
            return polynomial
        case KernelName.MAHALANOBIS:
            return MahalanobisKernelSpec()
        case KernelName.SPECTRAL:
            return spectral
        case KernelName.HMK:
            return MixtureKernelSpec(
                weights=MixtureWeights(
                    tau_local=float(params["hmk_tau_local"]),
                    rbf=float(params["hmk_rbf"]),
                    spectral=float(params["hmk_spectral"]),
                ),
                learned=bool(params["hmk_learned"]),
                rbf=rbf,
                polynomial=polynomial,
                spectral=spectral,
            )
        case _:
            assert_never(name)


# --------------------------------------------------------------- divergence


def _divergence_params(term: PenaltyTerm | LinkTerm | None) -> Params:
    if term is None:
        return {"divergence": OFF}
    params: Params = {"divergence": f"{term.divergence.type}:{term.mode}"}
    if isinstance(term, PenaltyTerm):
        params["alpha"] = term.alpha
    match term.divergence:
        case RenyiSpec(order=order):
            params["renyi_order"] = order
        case FDivergenceSpec(f=f):
            params[f"f_{term.mode}"] = f.type
            if isinstance(f, FAlpha):
                params["order"] = f.order
        case _:
            pass
    return params


def _divergence_term_of(params: Mapping[str, ParamValue]) -> PenaltyTerm | LinkTerm | None:
    if params["divergence"] == OFF:
        return None
    name, mode = str(params["divergence"]).split(":")
    f = _f_of(str(params[f"f_{mode}"]), order=float(params["order"]))
    order = float(params["renyi_order"])
    divergence = _divergence_named(DivergenceName(name), order=order, f=f)
    if mode == "link":
        return LinkTerm(divergence=divergence)
    return PenaltyTerm(divergence=divergence, alpha=float(params["alpha"]))


def _divergence_named(name: DivergenceName, *, order: float, f: FSpec) -> DivergenceSpec:
    """Return the divergence of that name; `order` is that of renyi, `f` that of f_divergence."""
    match name:
        case DivergenceName.KL:
            return KlSpec()
        case DivergenceName.JENSEN_SHANNON:
            return JensenShannonSpec()
        case DivergenceName.HELLINGER:
            return HellingerSpec()
        case DivergenceName.RENYI:
            return RenyiSpec(order=order)
        case DivergenceName.BHATTACHARYYA:
            return BhattacharyyaSpec()
        case DivergenceName.WASSERSTEIN:
            return WassersteinSpec()
        case DivergenceName.F_DIVERGENCE:
            return FDivergenceSpec(f=f)
        case _:
            assert_never(name)


def _f_of(name: str, *, order: float) -> FSpec:
    match name:
        case "forward_kl":
            return FForwardKl()
        case "alpha":
            return FAlpha(order=order)
        case "total_variation":
            return FTotalVariation()
        case "pearson_chi2":
            return FPearsonChi2()
        case "neyman_chi2":
            return FNeymanChi2()
        case "jeffreys":
            return FJeffreys()
        case _:
            raise AssertionError(f"f_divergence named {name!r} is not in the space")
