"""How things run, as types: training, search, candidates, data policy."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from core.layout_names import LayoutName
from core.spec import ObjectiveSpec, SpecModel

ColumnName = Annotated[str, Field(min_length=1, max_length=200)]
AutoFloat = Annotated[float, Field(gt=0.0, le=1.0)] | Literal["auto"]


class LoraSpec(SpecModel):
    """Low-rank adapter on every linear layer of the trunk."""

    r: int = Field(default=8, ge=1, le=256)
    alpha: float = Field(default=16.0, gt=0.0, le=1024.0)


class FinalRunSpec(SpecModel):
    """What is trained and how weights are kept, and how a final run watches itself."""

    adaptation: Literal["lora", "full"] = Field(
        default="lora", description="train a low-rank adapter, or all weights"
    )
    quantization: Literal["4bit"] | None = Field(
        default=None, description="keep the frozen base in 4 bits: CUDA and bitsandbytes"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto: float32 on a CPU, bfloat16 on CUDA; `full` keeps its weights in float32 "
        "and computes in this",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="compute a layer again in the backward pass: less memory"
    )
    micro_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        le=16_777_216,
        description="most tokens of a batch that goes through the model, a longer pair excepted; "
        "on a CPU each thread may have one. null: what suits the device. Steps are the same "
        "however they are cut",
    )
    eval_every: float | None = Field(
        default=None,
        gt=0.0,
        le=1_000_000,
        description="score on validation every so many steps, or every such fraction of the run "
        "when below 1; the best weights are published; null: the last ones, without scoring",
    )
    early_stopping_patience: int | None = Field(
        default=None, ge=1, le=1000, description="end a run after so many scores without a better"
    )

    @model_validator(mode="after")
    def _nothing_of_it_ignored(self) -> Self:
        if self.quantization is not None and self.adaptation == "full":
            raise ValueError(
                "quantization `4bit` freezes the weights that adaptation `full` would train: drop "
                "one of the two"
            )
        if self.early_stopping_patience is not None and self.eval_every is None:
            raise ValueError(
                "early_stopping_patience counts scores on validation and eval_every is not set: "
                "set it, e.g. to 0.1, or drop the patience"
            )
        if self.eval_every is not None and self.eval_every > 1 and self.eval_every % 1:
            raise ValueError(
                f"eval_every {self.eval_every} is neither a fraction below 1 nor a whole number of "
                "steps"
            )
        return self


class TrainSpec(FinalRunSpec):
    """How a run trains, whatever its objective; `auto` is resolved against the model and data."""

    learning_rate: AutoFloat = "auto"
    n_epochs: float = Field(default=1.0, gt=0.0, le=50.0)
    max_steps: int | None = Field(default=None, ge=1, le=1_000_000)
    batch_size: int = Field(default=16, ge=2, le=4096, description="pairs per optimizer step")
    max_length: int = Field(default=1024, ge=16, le=131_072, description="tokens per sequence")
    warmup_fraction: float = Field(default=0.1, ge=0.0, le=0.5)
    schedule: Literal["linear", "constant"] = "linear"
    weight_decay: float = Field(default=0.0, ge=0.0, le=1.0)
    max_grad_norm: float = Field(default=1.0, gt=0.0, le=100.0)
    lora: LoraSpec = LoraSpec()

    @model_validator(mode="after")
    def _adapter_exists(self) -> Self:
        # By value: what was stored has what was not given as well.
        if self.adaptation == "full" and self.lora != LoraSpec():
            raise ValueError("lora describes an adapter and adaptation `full` has none: drop it")
        return self


class CandidateSpec(SpecModel):
    """One point of the search: an objective and what else the search may turn."""

    objective: ObjectiveSpec
    learning_rate: float = Field(gt=0.0, le=1.0)


ShapeName = Literal["wide", "usual", "lean", "narrow", "few", "least"]


class SearchSpec(SpecModel):
    """Budget and shape of a search; it stops at whichever limit comes first (docs/search.md)."""

    max_trials: int | None = Field(
        default=None, ge=2, le=1000, description="configurations that are begun, plain DPO's too"
    )
    gpu_seconds: float | None = Field(
        default=None, gt=0.0, description="device time of all trials together"
    )
    deadline_seconds: float | None = Field(
        default=None, gt=0.0, description="wall time from the first trial on"
    )
    shape: ShapeName | None = Field(
        default=None,
        description="how many pairs go how far; null: the dearest that the budget pays for, "
        "`usual` without a budget",
    )
    drift_budget: float | None = Field(
        default=None, gt=0.0, description="largest mean token KL(policy || reference), nats"
    )
    parallelism: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="workers that train its trials at once; null: as many as there are",
    )


class SplitPolicy(SpecModel):
    """Fractions of prompts (not pairs) that are held out."""

    validation: float = Field(default=0.15, gt=0.0, lt=0.5)
    test: float = Field(default=0.15, gt=0.0, lt=0.5)
    seed: int = Field(default=0, ge=0, lt=2**31)


class ComparisonPolicy(SpecModel):
    """Which answers are compared and which comparisons are kept.

    What is not set is left to the layout; what is set and would be ignored by it is refused.
    """

    on_tie: Literal["drop", "keep_half", "both"] | None = Field(
        default=None,
        description="comparisons without a winner: left out (the default), or kept in both orders "
        "with weight 0.5 or 1 each",
    )
    pairing: Literal["best_worst", "adjacent", "all", "random"] | None = Field(
        default=None,
        description="which answers to a prompt are compared where rows are not pairs: the best and "
        "the worst (the default), each and the next, all, or `max_pairs_per_prompt` (1) by lot",
    )
    max_pairs_per_prompt: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="those with the largest margins are kept, equal ones by lot",
    )
    min_margin: float | None = Field(
        default=None, gt=0.0, description="leave out pairs with a smaller margin, or without one"
    )
    target: Literal["better", "safer"] | None = Field(
        default=None, description="which verdict of PKU-SafeRLHF counts; default: better"
    )

    @model_validator(mode="after")
    def _ties_have_no_margin(self) -> Self:
        if self.min_margin is not None and self.on_tie not in (None, "drop"):
            raise ValueError(
                f"min_margin leaves out all ties and on_tie is `{self.on_tie}`: drop one of the two"
            )
        return self


class DatasetPolicy(ComparisonPolicy):
    """How rows become pairs."""

    layout: LayoutName | None = Field(
        default=None, description="what the rows are; detected when not set"
    )
    column_mapping: dict[ColumnName, ColumnName] = Field(
        default={},
        max_length=50,
        description="from a field of the layout to the column of the file that has it",
    )
    on_invalid: Literal["fail", "skip"] = "skip"
    max_invalid_fraction: float | None = Field(default=None, ge=0.0, le=1.0)
    dry_run: bool = Field(default=False, description="read and report, and keep no pairs")
    model: str | None = Field(
        default=None,
        min_length=1,
        max_length=500,
        description="report tokens, truncation and a preview as this model would see the pairs",
    )
    max_length: int | None = Field(
        default=None,
        ge=16,
        le=131_072,
        description="tokens per sequence of the jobs to come, for that report; null: their default",
    )
    split: SplitPolicy = SplitPolicy()

    @model_validator(mode="after")
    def _each_column_once(self) -> Self:
        columns = list(self.column_mapping.values())
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise ValueError(f"column_mapping takes {', '.join(twice)} for more than one field")
        return self

    @model_validator(mode="after")
    def _length_of_a_model(self) -> Self:
        if self.max_length is not None and self.model is None:
            raise ValueError(
                "max_length is for the report on tokens, which needs `model`: name one, or drop it"
            )
        return self

    @model_validator(mode="after")
    def _skip_only(self) -> Self:
        if self.on_invalid == "fail" and self.max_invalid_fraction is not None:
            raise ValueError(
                "max_invalid_fraction has no meaning with on_invalid=fail: drop one of the two"
            )
        return self

    @property
    def invalid_limit(self) -> float:
        """Largest fraction of rows that may be rejected before the dataset is invalid."""
        if self.on_invalid == "fail":
            return 0.0
        return 0.01 if self.max_invalid_fraction is None else self.max_invalid_fraction
