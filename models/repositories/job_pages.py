"""Which jobs of an owner a list shows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sqlalchemy import ColumnElement

from core.lifecycle import JobKind, JobStatus
from models.job import Job


@dataclass(frozen=True)
class JobFilter:
    """What a listed job must have; times are unix seconds, labels are pairs of the user's own."""

    kind: JobKind | None = None
    status: JobStatus | None = None
    dataset_id: str | None = None
    model: str | None = None
    parent_id: str | None = None
    checkpoint_id: str | None = None
    created_after: float | None = None
    created_before: float | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def conditions(self) -> Iterator[ColumnElement[bool]]:
        """Return what the filter says, as SQL."""
        for column, value in (
            (Job.kind, self.kind),
            (Job.status, self.status),
            (Job.dataset_id, self.dataset_id),
            (Job.model, self.model),
            (Job.parent_id, self.parent_id),
        ):
            if value is not None:
                yield column == value
        if self.checkpoint_id is not None:
            yield Job.spec["checkpoint_id"].as_string() == self.checkpoint_id
        if self.created_after is not None:
            yield Job.created_at > self.created_after
        if self.created_before is not None:
            yield Job.created_at < self.created_before
        for name, label in self.labels.items():
            yield Job.labels[name].as_string() == label
