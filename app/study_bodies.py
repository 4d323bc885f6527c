"""What people send to searches: a new one, other limits, a trial by hand, a clone."""

from typing import Annotated, Self

from fastapi import Path
from pydantic import ConfigDict, Field, StringConstraints, model_validator

from app.deps import ID_PATTERN, TEXT_PATTERN
from app.fine_tuning import DatasetId, Metadata, ModelName, Seed, Suffix
from app.search_tasks import Strengths
from core.methods import Auto, AutoMethod, TrainHyperparameters
from core.run_spec import SearchSpec, ShapeName
from core.spec import SpecModel

StudyId = Annotated[str, Path(pattern=ID_PATTERN)]
TrialNumber = Annotated[int, Path(ge=0, lt=2**31)]
ArmName = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=TEXT_PATTERN)]


class CreateStudy(SpecModel):
    """A search: the same as a fine-tuning job with method `auto`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "tiny-lm", "dataset_id": "ds_01jd", "search": {"gpu_seconds": 3600}},
                {
                    "model": "Qwen/Qwen2.5-0.5B", "dataset_id": "ds_01jd", "seed": 7,
                    "search": {"shape": "lean", "drift_budget": 0.05, "parallelism": 2},
                    "hyperparameters": {"n_epochs": 2},
                },
            ]
        }
    )  # fmt: skip

    model: ModelName
    dataset_id: DatasetId
    search: SearchSpec = SearchSpec()
    hyperparameters: TrainHyperparameters = Field(
        default=TrainHyperparameters(), description="of every trial and of the final run"
    )
    seed: Seed = 0
    suffix: Suffix | None = None
    metadata: Metadata = Field(default_factory=dict)
    auto_start: bool = Field(
        default=True, description="false: a draft, which waits until its job is resumed"
    )

    @property
    def method(self) -> AutoMethod:
        """The method of its job."""
        auto = Auto(search=self.search, hyperparameters=self.hyperparameters)
        return AutoMethod(type="auto", auto=auto)

    @model_validator(mode="after")
    def _makes_a_job(self) -> Self:
        _ = self.method  # refuses what does not go with a search
        return self


class CloneStudy(SpecModel):
    """What a new search has otherwise than the one that it is made from."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {},
                {
                    "search": {"gpu_seconds": 7200, "shape": "wide"},
                    "hyperparameters": {"n_epochs": 2}, "seed": 8,
                },
            ]
        }
    )  # fmt: skip

    model: ModelName | None = Field(default=None, description="null: the same, at the same commit")
    dataset_id: DatasetId | None = Field(default=None, description="null: the same")
    search: SearchSpec = Field(
        default=SearchSpec(), description="what is given replaces the limits that the study has now"
    )
    hyperparameters: TrainHyperparameters = Field(
        default=TrainHyperparameters(), description="what is given replaces those of its job"
    )
    seed: Seed | None = Field(default=None, description="null: the same")
    suffix: Suffix | None = None
    metadata: Metadata = Field(default_factory=dict)
    warm_start: bool = Field(
        default=True,
        description="begin with the best settings that the study has drawn in its leading pairs "
        "and in plain DPO; false: know nothing of it",
    )
    auto_start: bool = Field(
        default=True, description="false: a draft, which waits until its job is resumed"
    )


class UpdateStudy(SpecModel):
    """Other limits for a search that goes on; what is not given stays, null takes a limit away."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"gpu_seconds": 7200, "parallelism": 4},
                {"max_trials": 80, "shape": "lean"},
            ]
        }
    )

    gpu_seconds: float | None = Field(
        default=None, gt=0.0, description="device time of all trials together, from the start"
    )
    max_trials: int | None = Field(
        default=None, ge=2, le=1000, description="configurations begun, from the start"
    )
    deadline_seconds: float | None = Field(
        default=None, gt=0.0, description="wall time from the start of the search"
    )
    shape: ShapeName | None = Field(
        default=None, description="null: the dearest that the new budget pays for"
    )
    parallelism: int | None = Field(
        default=None, ge=1, le=64, description="workers at once; null: all there are"
    )

    @model_validator(mode="after")
    def _something_changes(self) -> Self:
        if not self.model_fields_set:
            raise ValueError(
                f"nothing to change: expected one of {sorted(type(self).model_fields)}"
            )
        return self


class TrialStrengths(SpecModel):
    """Strengths of a trial: factors on what is recommended for its pair, or the values as such."""

    factors: Strengths | None = Field(
        default=None, description="times the recommended values, each from 1/4 to 4"
    )
    values: Strengths | None = Field(default=None, description="in place of `factors`")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.factors is not None and self.values is not None:
            raise ValueError("expected either factors or values: drop one of the two")
        return self

    @property
    def strengths(self) -> Strengths:
        """What was given, in whichever way."""
        return self.factors or self.values or Strengths()


class EnqueueTrial(TrialStrengths):
    """A trial by hand; what is not given is as recommended."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"arm": "rbf × jensen_shannon", "factors": {"learning_rate": 2.0, "gamma": 0.5}},
                {"arm": "dpo", "values": {"beta": 0.3}},
            ]
        }
    )

    arm: ArmName = Field(description="`dpo` or kernel × divergence: one of `plan.arms`")


class CloneTrial(TrialStrengths):
    """A trial like another one; what is not given is as it is there."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"factors": {"learning_rate": 2.0}}, {"values": {"beta": 0.2}}]
        }
    )
