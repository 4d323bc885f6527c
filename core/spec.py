"""What can be trained, as types: kernels, divergences and the objective they make.

One definition serves request validation, JSON columns, the search space, the trainer and OpenAPI.
Combinations in which an option would be ignored cannot be written down or are refused.
Symbols are those of docs/maths.md.
"""

from enum import StrEnum
from typing import Annotated, Literal, Self, assert_never

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from core.json_kinds import KindModel


class SpecModel(KindModel):
    """Base of all specs: frozen; unknown fields, NaN, infinity and `true` for 1 are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KernelName(StrEnum):
    """The four kernels and their mixture."""

    RBF = "rbf"
    POLYNOMIAL = "polynomial"
    MAHALANOBIS = "mahalanobis"
    SPECTRAL = "spectral"
    HMK = "hmk"


class DivergenceName(StrEnum):
    """The seven divergences."""

    KL = "kl"
    JENSEN_SHANNON = "jensen_shannon"
    HELLINGER = "hellinger"
    RENYI = "renyi"
    BHATTACHARYYA = "bhattacharyya"
    WASSERSTEIN = "wasserstein"
    F_DIVERGENCE = "f_divergence"


BASE_KERNELS = (
    KernelName.RBF,
    KernelName.POLYNOMIAL,
    KernelName.MAHALANOBIS,
    KernelName.SPECTRAL,
)


def _named(value: object) -> object:
    """Let a bare name stand for the object with that `type` and its defaults."""
    return {"type": value} if isinstance(value, str) else value


# ------------------------------------------------------------------ kernels


class RbfKernelSpec(SpecModel):
    """K = exp(-||a-b||^2 / 2 sigma^2), sigma^2 = width * median squared distance."""

    type: Literal["rbf"] = "rbf"
    width: float = Field(default=1.0, ge=0.25, le=4.0)


class PolynomialKernelSpec(SpecModel):
    """K = (cos(a, b) + offset)^degree."""

    type: Literal["polynomial"] = "polynomial"
    offset: float = Field(default=1.5, gt=1.0, le=10.0)
    degree: Literal[2, 3, 4] = 2


class MahalanobisKernelSpec(SpecModel):
    """K = exp(-1/2 (a-b)' Sigma^-1 (a-b) / k), Sigma the Ledoit-Wolf covariance."""

    type: Literal["mahalanobis"] = "mahalanobis"


class SpectralKernelSpec(SpecModel):
    """K = sum_i lambda_i^t phi_i(a) phi_i(b) over Nystrom eigenfunctions of the rbf Gram matrix."""

    type: Literal["spectral"] = "spectral"
    landmarks: int = Field(default=256, ge=8, le=512)
    rank: int = Field(default=16, ge=1, le=64)
    time: float = Field(default=1.0, gt=0.0, le=8.0)

    @model_validator(mode="after")
    def _rank_fits(self) -> Self:
        if self.rank > self.landmarks:
            raise ValueError(
                f"rank {self.rank} must not exceed landmarks {self.landmarks}; lower the rank"
            )
        return self


class MixtureWeights(SpecModel):
    """HMK weights: each of the three groups lies on a simplex, given by its first member."""

    tau_local: float = Field(default=0.5, gt=0.0, lt=1.0, description="tau_global = 1 - tau_local")
    rbf: float = Field(default=0.5, gt=0.0, lt=1.0, description="polynomial = 1 - rbf")
    spectral: float = Field(default=0.5, gt=0.0, lt=1.0, description="mahalanobis = 1 - spectral")


class MixtureKernelSpec(SpecModel):
    """HMK: tau_local (l1 rbf + l2 polynomial) + tau_global (l3 spectral + l4 mahalanobis).

    `weights` are the start when `learned`, else fixed; `entropy` is eta of the bonus eta * H.
    """

    type: Literal["hmk"] = "hmk"
    weights: MixtureWeights = MixtureWeights()
    learned: bool = True
    learning_rate: float | None = Field(default=None, gt=0.0, le=1.0)
    entropy: float | None = Field(default=None, ge=0.0, le=10.0)
    rbf: RbfKernelSpec = RbfKernelSpec()
    polynomial: PolynomialKernelSpec = PolynomialKernelSpec()
    spectral: SpectralKernelSpec = SpectralKernelSpec()
    mahalanobis: MahalanobisKernelSpec = MahalanobisKernelSpec()

    @model_validator(mode="after")
    def _learning_options(self) -> Self:
        if not self.learned and (self.learning_rate is not None or self.entropy is not None):
            raise ValueError(
                "learning_rate and entropy act on learned weights only and would be ignored: "
                "drop them or set learned=true"
            )
        return self

    @property
    def weights_learning_rate(self) -> float:
        """Learning rate of the mixture logits."""
        return 0.05 if self.learning_rate is None else self.learning_rate

    @property
    def eta(self) -> float:
        """Strength of the entropy bonus; 0 for fixed weights."""
        if not self.learned:
            return 0.0
        return 0.01 if self.entropy is None else self.entropy


KernelSpec = Annotated[
    RbfKernelSpec
    | PolynomialKernelSpec
    | MahalanobisKernelSpec
    | SpectralKernelSpec
    | MixtureKernelSpec,
    Field(discriminator="type"),
    BeforeValidator(_named),
]


# ------------------------------------------------------------- divergences


class KlSpec(SpecModel):
    """D = sum p log(p/q), the reverse KL of RLHF; link g(rho) = rho."""

    type: Literal["kl"] = "kl"


class JensenShannonSpec(SpecModel):
    """D = KL(p||m)/2 + KL(q||m)/2, m = (p+q)/2; link g = log 2 + log sigma(rho)."""

    type: Literal["jensen_shannon"] = "jensen_shannon"


class HellingerSpec(SpecModel):
    """D = 1 - sum sqrt(pq); link g = 1 - exp(-rho/2)."""

    type: Literal["hellinger"] = "hellinger"


class RenyiSpec(SpecModel):
    """D = log sum p^a q^(1-a) / (a-1); link g = (exp((a-1) rho) - 1) / (a-1).

    At order 1/2 it is bhattacharyya up to scale, near 1 it is kl; at 2 it is log(1 + chi^2).
    """

    type: Literal["renyi"] = "renyi"
    order: float = Field(default=2.0, gt=0.0, le=4.0, description="a; not 1, which is kl")

    @model_validator(mode="after")
    def _not_one(self) -> Self:
        if abs(self.order - 1.0) < 1e-3:
            raise ValueError(f"renyi of order {self.order} is kl; use divergence `kl`")
        return self


class BhattacharyyaSpec(SpecModel):
    """D = -log sum sqrt(pq); link as hellinger."""

    type: Literal["bhattacharyya"] = "bhattacharyya"


class WassersteinSpec(SpecModel):
    """Sliced W1 over fixed unit directions of the output-embedding rows; penalty only."""

    type: Literal["wasserstein"] = "wasserstein"
    directions: int = Field(default=8, ge=1, le=64)
    seed: int = Field(default=0, ge=0)


class FTotalVariation(SpecModel):
    """f(u) = |u-1|/2; penalty only."""

    type: Literal["total_variation"] = "total_variation"


class FPearsonChi2(SpecModel):
    """f(u) = (u-1)^2; penalty only (0 is in the domain of f')."""

    type: Literal["pearson_chi2"] = "pearson_chi2"


class FNeymanChi2(SpecModel):
    """f(u) = (u-1)^2 / u; penalty only here."""

    type: Literal["neyman_chi2"] = "neyman_chi2"


class FForwardKl(SpecModel):
    """f(u) = -log u, D = KL(q||p); link g = 1 - exp(-rho)."""

    type: Literal["forward_kl"] = "forward_kl"


class FJeffreys(SpecModel):
    """f(u) = (u-1) log u; penalty only here."""

    type: Literal["jeffreys"] = "jeffreys"


class FAlpha(SpecModel):
    """f(u) = (u^a - a u + a - 1) / (a (a-1)); link g = (exp((a-1) rho) - 1) / (a-1)."""

    type: Literal["alpha"] = "alpha"
    order: float = Field(default=0.5, gt=0.0, le=4.0)

    @model_validator(mode="after")
    def _not_one(self) -> Self:
        if abs(self.order - 1.0) < 1e-3:
            raise ValueError(f"alpha of order {self.order} is kl; use divergence `kl`")
        return self


FSpec = Annotated[
    FTotalVariation | FPearsonChi2 | FNeymanChi2 | FForwardKl | FJeffreys | FAlpha,
    Field(discriminator="type"),
    BeforeValidator(_named),
]


class FDivergenceSpec(SpecModel):
    """D = sum q f(p/q) for a convex f with f(1) = 0."""

    type: Literal["f_divergence"] = "f_divergence"
    f: FSpec = FForwardKl()


DivergenceSpec = Annotated[
    KlSpec
    | JensenShannonSpec
    | HellingerSpec
    | RenyiSpec
    | BhattacharyyaSpec
    | WassersteinSpec
    | FDivergenceSpec,
    Field(discriminator="type"),
    BeforeValidator(_named),
]


def has_link(divergence: DivergenceSpec) -> bool:
    """Whether the divergence has a link form g = f' with 0 outside the domain of f'."""
    match divergence:
        case KlSpec() | JensenShannonSpec() | HellingerSpec() | RenyiSpec() | BhattacharyyaSpec():
            return True
        case WassersteinSpec():
            return False
        case FDivergenceSpec(f=f):
            return isinstance(f, FForwardKl | FAlpha)
        case _:
            assert_never(divergence)


# --------------------------------------------------------------- objective


class KernelTerm(SpecModel):
    """gamma * [log K(e_x, e+) - log K(e_x, e-)], inside sigma (`joint`) or as its own loss."""

    kernel: KernelSpec
    gamma: float = Field(default=0.1, gt=0.0, le=10.0)
    mode: Literal["joint", "separate"] = "joint"
    embedding: Literal["policy", "encoder"] = "policy"
    encoder: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        description="frozen model to embed with when embedding=encoder; default: the reference",
    )

    @model_validator(mode="after")
    def _encoder_is_used(self) -> Self:
        if self.encoder is not None and self.embedding == "policy":
            raise ValueError(
                "encoder names a model that embedding=policy would ignore: drop it or set "
                "embedding=encoder"
            )
        return self

    @model_validator(mode="after")
    def _encoder_has_gradient(self) -> Self:
        if self.embedding == "encoder" and self.mode == "separate" and not self._learns_weights:
            raise ValueError(
                "a separate kernel loss on frozen encoder embeddings has no gradient and would be "
                "ignored: use mode=joint, embedding=policy, or a mixture with learned weights"
            )
        return self

    @property
    def _learns_weights(self) -> bool:
        return isinstance(self.kernel, MixtureKernelSpec) and self.kernel.learned


class PenaltyTerm(SpecModel):
    """alpha * mean_t D(policy || reference), D scaled to KL's curvature at p = q."""

    mode: Literal["penalty"] = "penalty"
    divergence: DivergenceSpec
    alpha: float = Field(default=1.0, gt=0.0, le=1000.0)


class LinkTerm(SpecModel):
    """f-DPO: the log-ratios pass through g = f' of the divergence."""

    mode: Literal["link"] = "link"
    divergence: DivergenceSpec

    @model_validator(mode="after")
    def _linkable(self) -> Self:
        if not has_link(self.divergence):
            name: str = self.divergence.type
            if isinstance(self.divergence, FDivergenceSpec):
                name = f"{name}({self.divergence.f.type})"
            raise ValueError(f"{name} has no link form; use mode `penalty`")
        return self


DivergenceTerm = Annotated[PenaltyTerm | LinkTerm, Field(discriminator="mode")]


class ObjectiveSpec(SpecModel):
    """The DPO-Kernels objective of docs/maths.md; without terms it is exactly DPO."""

    beta: float = Field(default=0.1, gt=0.0, le=10.0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)
    kernel_term: KernelTerm | None = None
    divergence_term: DivergenceTerm | None = None

    @property
    def is_plain_dpo(self) -> bool:
        """Whether this is DPO: no kernel, no penalty, and g the identity."""
        term = self.divergence_term
        linear = term is None or (
            isinstance(term, LinkTerm) and isinstance(term.divergence, KlSpec)
        )
        return self.kernel_term is None and linear

    @property
    def kernel_name(self) -> str:
        """Name of the kernel, `none` without one."""
        return "none" if self.kernel_term is None else self.kernel_term.kernel.type

    @property
    def divergence_name(self) -> str:
        """Name of the divergence; that of DPO is kl."""
        return "kl" if self.divergence_term is None else self.divergence_term.divergence.type

    @property
    def label(self) -> str:
        """A short name for tables: `dpo`, or `rbf × jensen_shannon (penalty)`."""
        if self.is_plain_dpo:
            return "dpo"
        mode = "" if self.divergence_term is None else f" ({self.divergence_term.mode})"
        return f"{self.kernel_name} × {self.divergence_name}{mode}"
