"""What the process that loads Optuna and Arrow is asked for; it imports little else."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from core.lifecycle import TrialStatus
from core.run_spec import CandidateSpec
from core.spec import SpecModel

Target = Literal["log_loss", "drift", "gpu_seconds"]


class Kind(StrEnum):
    """What the cells of a column are."""

    BOOL = "bool"
    INT = "int"
    FLOAT = "float"
    TEXT = "text"


class MeasuredCandidate(SpecModel):
    """A candidate and what came of it."""

    candidate: CandidateSpec
    value: float


class ImportanceTask(SpecModel):
    """Which parameters mattered; answered by `Importances` as JSON."""

    kind: Literal["importance"] = "importance"
    target: Target
    trials: tuple[MeasuredCandidate, ...]


class TrialCopy(SpecModel):
    """A trial for Optuna; `constraints` are violations, at most 0 where one is kept."""

    number: int
    candidate: CandidateSpec
    status: TrialStatus
    value: float | None
    started: float
    finished: float | None
    constraints: dict[str, float]
    attributes: dict[str, str | int | float | bool | None]


class JournalTask(SpecModel):
    """A search as a file of Optuna's journal storage."""

    kind: Literal["journal"] = "journal"
    name: str
    trials: tuple[TrialCopy, ...]


class ColumnCopy(SpecModel):
    """A column of a table."""

    name: str
    kind: Kind
    cells: tuple[str | int | float | bool | None, ...]


class ParquetTask(SpecModel):
    """A table as a Parquet file."""

    kind: Literal["parquet"] = "parquet"
    columns: tuple[ColumnCopy, ...]


Task = Annotated[ImportanceTask | JournalTask | ParquetTask, Field(discriminator="kind")]
