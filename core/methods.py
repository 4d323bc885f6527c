"""`method` of a fine-tuning job: `dpo`, `kernel_dpo`, `auto` (OpenAI's shape, two types added)."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.run_spec import AutoFloat, FinalRunSpec, LoraSpec, SearchSpec, TrainSpec
from core.spec import (
    DivergenceSpec,
    KernelSpec,
    KernelTerm,
    LinkTerm,
    ObjectiveSpec,
    PenaltyTerm,
    SpecModel,
)

AUTO_WARMUP = 0.0125
"""Part of an `auto` run: the first rung of its search, 2 % of it, is one and a half warm-ups."""


class TrainHyperparameters(FinalRunSpec):
    """Hyperparameters that every method has."""

    learning_rate: AutoFloat = "auto"
    n_epochs: float = Field(default=1.0, gt=0.0, le=50.0)
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000)
    batch_size: int = Field(default=16, ge=2, le=4096)
    max_length: int = Field(default=1024, ge=16, le=131_072)
    lora_r: int = Field(default=8, ge=1, le=256)
    lora_alpha: float = Field(default=16.0, gt=0.0, le=1024.0)

    @model_validator(mode="after")
    def _adapter_exists(self) -> Self:
        # By value: what was stored has what was not given as well.
        defaults = TrainHyperparameters.model_fields
        given = [
            name
            for name, value in (("lora_alpha", self.lora_alpha), ("lora_r", self.lora_r))
            if value != defaults[name].default
        ]
        if self.adaptation == "full" and given:
            raise ValueError(
                f"{' and '.join(given)} describe an adapter and adaptation `full` has none: drop it"
            )
        return self

    def train_spec(self) -> TrainSpec:
        """Return the training part."""
        shared = self.model_dump(include=set(FinalRunSpec.model_fields))
        if self.adaptation == "lora":
            shared["lora"] = LoraSpec(r=self.lora_r, alpha=self.lora_alpha)
        return TrainSpec(
            learning_rate=self.learning_rate,
            n_epochs=self.n_epochs,
            max_steps=self.max_steps,
            batch_size=self.batch_size,
            max_length=self.max_length,
            **shared,
        )


class DpoHyperparameters(TrainHyperparameters):
    """Hyperparameters of plain DPO."""

    beta: float = Field(default=0.1, gt=0.0, le=10.0)
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=0.5)


class KernelDpoHyperparameters(DpoHyperparameters):
    """Hyperparameters of a named pair; a strength without its term is refused."""

    gamma: float | None = Field(default=None, gt=0.0, le=10.0)
    alpha: float | None = Field(default=None, gt=0.0, le=1000.0)


class KernelDpo(SpecModel):
    """A kernel–divergence pair by name or with its parameters."""

    kernel: KernelSpec | None = None
    kernel_mode: Literal["joint", "separate"] | None = None
    embedding: Literal["policy", "encoder"] | None = None
    encoder: str | None = Field(default=None, min_length=1, max_length=512)
    divergence: DivergenceSpec | None = None
    divergence_mode: Literal["penalty", "link"] | None = None
    hyperparameters: KernelDpoHyperparameters = KernelDpoHyperparameters()

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        params = self.hyperparameters
        if self.kernel is None and self.divergence is None:
            raise ValueError("name a kernel, a divergence or both; plain DPO is method type `dpo`")
        needs: tuple[tuple[str, object, str, object], ...] = (
            ("hyperparameters.gamma", params.gamma, "kernel", self.kernel),
            ("kernel_mode", self.kernel_mode, "kernel", self.kernel),
            ("embedding", self.embedding, "kernel", self.kernel),
            ("encoder", self.encoder, "kernel", self.kernel),
            ("hyperparameters.alpha", params.alpha, "divergence", self.divergence),
            ("divergence_mode", self.divergence_mode, "divergence", self.divergence),
        )
        for name, value, owner, present in needs:
            if value is not None and present is None:
                raise ValueError(f"{name} acts on a {owner} and none is named: drop it")
        if self.divergence_mode == "link" and params.alpha is not None:
            raise ValueError(
                "hyperparameters.alpha is the strength of a penalty and would be ignored in "
                "divergence_mode `link`: drop it or use `penalty`"
            )
        self.objective()
        return self

    def objective(self) -> ObjectiveSpec:
        """Return the objective that this names."""
        params = self.hyperparameters
        kernel_term = None
        if self.kernel is not None:
            kernel_term = KernelTerm(
                kernel=self.kernel,
                gamma=0.1 if params.gamma is None else params.gamma,
                mode=self.kernel_mode or "joint",
                embedding=self.embedding or "policy",
                encoder=self.encoder,
            )
        divergence_term: PenaltyTerm | LinkTerm | None = None
        if self.divergence is not None:
            if self.divergence_mode == "link":
                divergence_term = LinkTerm(divergence=self.divergence)
            else:
                divergence_term = PenaltyTerm(
                    divergence=self.divergence, alpha=1.0 if params.alpha is None else params.alpha
                )
        return ObjectiveSpec(
            beta=params.beta,
            label_smoothing=params.label_smoothing,
            kernel_term=kernel_term,
            divergence_term=divergence_term,
        )


class Dpo(SpecModel):
    """Plain DPO, the baseline."""

    hyperparameters: DpoHyperparameters = DpoHyperparameters()

    def objective(self) -> ObjectiveSpec:
        """Return plain DPO at the given beta."""
        params = self.hyperparameters
        return ObjectiveSpec(beta=params.beta, label_smoothing=params.label_smoothing)


class Auto(SpecModel):
    """Metrics, search and final run in one job."""

    search: SearchSpec = SearchSpec()
    hyperparameters: TrainHyperparameters = TrainHyperparameters()

    def train_spec(self) -> TrainSpec:
        """Return the training part; its warm-up is short, for trials end after a few steps."""
        spec = self.hyperparameters.train_spec()
        return spec.model_copy(update={"warmup_fraction": AUTO_WARMUP})

    @model_validator(mode="after")
    def _trials_are_like_the_run(self) -> Self:
        if self.hyperparameters.adaptation == "full":
            raise ValueError(
                "adaptation `full` does not go with method `auto`: its trials train low-rank "
                "adapters, whose learning rates and strengths are not those of a full fine-tuning; "
                "search with `lora`, then name the pair that it found in a method `kernel_dpo`"
            )
        return self


class DpoMethod(SpecModel):
    """`{"type": "dpo", "dpo": {...}}`."""

    type: Literal["dpo"]
    dpo: Dpo = Dpo()


class KernelDpoMethod(SpecModel):
    """`{"type": "kernel_dpo", "kernel_dpo": {...}}`."""

    type: Literal["kernel_dpo"]
    kernel_dpo: KernelDpo


class AutoMethod(SpecModel):
    """`{"type": "auto", "auto": {...}}`."""

    type: Literal["auto"]
    auto: Auto = Auto()


Method = Annotated[DpoMethod | KernelDpoMethod | AutoMethod, Field(discriminator="type")]
