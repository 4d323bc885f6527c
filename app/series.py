"""Which points of a metric series are shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query

from app.deps import TEXT_PATTERN
from models.experiment import MetricPoint

_NAMES = r"^ *[^ ,]+ *(, *[^ ,]+ *){0,99}$"


@dataclass(frozen=True)
class SeriesQuery:
    """A scope of a job, and what of its points is asked for."""

    scope: str
    names: frozenset[str]
    after_step: int | None
    max_points: int | None

    def choose(self, points: Sequence[MetricPoint]) -> list[tuple[MetricPoint, dict[str, float]]]:
        """Return the points that are asked for, evenly thinned, with the asked values of each.

        The first and the last one stay.
        """
        found = []
        for point in points:
            values = point.metrics
            if self.names:
                values = {name: values[name] for name in values if name in self.names}
            if values and (self.after_step is None or point.step > self.after_step):
                found.append((point, values))
        if self.max_points is None or len(found) <= self.max_points:
            return found
        last, gaps = len(found) - 1, self.max_points - 1
        return [found[last * place // gaps] for place in range(self.max_points)]


async def series_query(
    scope: Annotated[
        str,
        Query(
            max_length=40,
            pattern=TEXT_PATTERN,
            description="`train`, `baseline` or `trial:<number>`",
        ),
    ] = "train",
    names: Annotated[
        str | None,
        Query(
            max_length=2000,
            pattern=_NAMES,
            description="of metrics, up to 100, e.g. `loss,rewards/margins`",
        ),
    ] = None,
    after_step: Annotated[int | None, Query(ge=0, lt=2**31)] = None,
    max_points: Annotated[
        int | None, Query(ge=2, le=10_000, description="a longer series is thinned evenly")
    ] = None,
) -> SeriesQuery:
    """Return which points are asked for."""
    wanted = [] if names is None else [name.strip(" ") for name in names.split(",")]
    return SeriesQuery(scope, frozenset(wanted), after_step, max_points)


Series = Annotated[SeriesQuery, Depends(series_query)]
