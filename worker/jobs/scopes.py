"""One run inside a job: its metrics, its progress and its resume points, in the database."""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from models.experiment import ResumePoint
from models.repositories.experiments import ExperimentRepository
from worker.context import JobContext
from worker.training.checkpoint import (
    Identity,
    IdentityMismatch,
    SavedState,
    read_point,
    write_point,
)
from worker.training.folders import FolderDamaged

log = logging.getLogger("kdpo.jobs")

KEPT_POINTS = 2
TRIAL_SCOPE = "trial:"


@dataclass(frozen=True)
class Span:
    """The part of the whole job's progress bar that something fills."""

    start: float
    end: float

    def at(self, fraction: float) -> float:
        """Overall progress when `fraction` of the part is done."""
        return self.start + (self.end - self.start) * min(max(fraction, 0.0), 1.0)

    def part(self, index: int, count: int) -> "Span":
        """The `index`-th of `count` equal parts."""
        return Span(self.at(index / count), self.at((index + 1) / count))


@dataclass(frozen=True)
class Reporter:
    """Reports `unit`s of a part of the job and stops it between two of them."""

    context: JobContext
    unit: str
    span: Span

    def __call__(self, done: int, total: int) -> None:
        """Report, then raise if the attempt must stop."""
        overall = self.span.at(done / total if total else 1.0)
        self.context.progress(unit=self.unit, done=done, total=total, overall=overall)
        self.context.raise_if_stopped()


@dataclass(frozen=True)
class ScopeHooks:
    """`RunHooks` of one scope: `train`, `baseline` or `trial:<number>`."""

    context: JobContext
    scope: str
    span: Span

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Store the means of a window of steps."""
        with self.context.transaction() as session:
            ExperimentRepository(session).record_metrics(
                self.context.fence, job_id=self.context.home_id, scope=self.scope, step=step,
                values=values,
            )  # fmt: skip

    def stepped(self, step: int, total: int) -> None:
        """Report progress."""
        self.context.progress(
            unit="steps", done=step, total=total, overall=self.span.at(step / total)
        )

    def stopping(self) -> bool:
        """Whether the user or the worker wants the attempt to end."""
        return self.context.stopping()

    def raise_if_stopped(self) -> None:
        """Raise why the attempt ends."""
        self.context.raise_if_stopped()


class ScopeStore:
    """`ResumeStore` of one scope: folders of this attempt, rows under its fence.

    Points of trials lie with the job whose search it is, for whoever goes on with them. Where the
    scope has none, one of `adopts` is taken if that was the very same run.
    """

    def __init__(
        self, context: JobContext, *, scope: str, identity: Identity, adopts: str | None = None
    ) -> None:
        self._context = context
        self._scope = scope
        self._identity = identity
        self._adopts = adopts
        self._last = time.monotonic()

    @property
    def _folder(self) -> Path:
        context, name = self._context, self._scope.replace(":", "-")
        if not self._scope.startswith(TRIAL_SCOPE):
            return context.attempt_dir / "resume" / name
        return context.trials_dir / name / f"{context.fence.job_id}-a{context.fence.attempt}"

    def is_due(self) -> bool:
        """Whether `checkpoint_every_s` has passed since the last point."""
        return time.monotonic() - self._last >= self._context.settings.training.checkpoint_every_s

    def save(self, state: SavedState) -> None:
        """Write a point, record it, and forget all but the last two."""
        context = self._context
        sealed = write_point(
            state,
            self._folder / f"step-{state.step:06d}",
            attempt=context.fence.attempt,
            scope=self._scope,
            identity=self._identity,
        )
        with context.transaction() as session:
            experiments = ExperimentRepository(session)
            experiments.add_resume_point(
                context.fence,
                job_id=context.home_id,
                scope=self._scope,
                step=state.step,
                path=str(sealed.path.relative_to(context.settings.artifact_dir)),
                manifest_sha256=sealed.sha256,
                size_bytes=sealed.size_bytes,
            )
            points = experiments.resume_points(context.home_id, self._scope)
            oldest_kept = points[min(KEPT_POINTS, len(points)) - 1].step
            dropped = experiments.drop_resume_points(
                context.fence, job_id=context.home_id, scope=self._scope,
                keep_from_step=oldest_kept,
            )  # fmt: skip
        self._remove(dropped)
        self._last = time.monotonic()

    def load(self) -> SavedState | None:
        """Return the furthest point that verifies and belongs to this very run.

        What is refused on the way is forgotten and removed: it would outrank fresh points when
        old ones are dropped, and hide that the run makes progress.
        """
        context = self._context
        for point in self._points(self._scope):
            try:
                return self._read(point)
            except (FolderDamaged, IdentityMismatch) as error:
                context.warn(
                    f"The resume point of `{self._scope}` at step {point.step} is not used.",
                    reason=str(error),
                    step=point.step,
                )
                with context.transaction() as session:
                    ExperimentRepository(session).forget_resume_point(context.fence, point)
                self._remove([point.path])
        return self._adopted()

    def _adopted(self) -> SavedState | None:
        if self._adopts is None:
            return None
        for point in self._points(self._adopts):
            try:
                return self._read(point)
            except (FolderDamaged, IdentityMismatch) as error:
                log.info("the point of %s is not gone on with: %s", self._adopts, error)
        return None

    def _points(self, scope: str) -> list[ResumePoint]:
        with self._context.database.reading() as session:
            return ExperimentRepository(session).resume_points(self._context.home_id, scope)

    def _read(self, point: ResumePoint) -> SavedState:
        path = self._context.settings.artifact_dir / point.path
        return read_point(path, sha256=point.manifest_sha256, identity=self._identity)

    def clear(self) -> None:
        """Forget and remove all points of the scope, adopted ones too: nobody will ask for them."""
        context = self._context
        dropped: list[str] = []
        with context.transaction() as session:
            for scope in filter(None, (self._scope, self._adopts)):
                dropped += ExperimentRepository(session).drop_resume_points(
                    context.fence, job_id=context.home_id, scope=scope, keep_from_step=2**31 - 1
                )
        self._remove(dropped)

    def _remove(self, paths: list[str]) -> None:
        for path in paths:
            folder: Path = self._context.settings.artifact_dir / path
            shutil.rmtree(folder, ignore_errors=True)
