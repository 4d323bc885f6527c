"""What a person should look at after a run."""

from core.lifecycle import Attention
from models.repositories.experiments import ExperimentRepository
from worker.context import JobContext

DISPLACED = 0.5
DIVERGING = 1.1
MIN_POINTS = 8


def is_displaced(chosen_displacement: float, *, mean_margin: float) -> bool:
    """Whether chosen answers became less likely by more than half of the mean absolute margin.

    Then the run won its margins mostly by making everything less likely.
    """
    return chosen_displacement < -DISPLACED * mean_margin


def is_diverging(losses: list[float]) -> bool:
    """Whether the last quarter of a loss curve lies more than 10 % above its first quarter."""
    quarter = len(losses) // 4
    if len(losses) < MIN_POINTS:
        return False
    first, last = sum(losses[:quarter]), sum(losses[-quarter:])
    # A mixture's entropy bonus can make losses negative.
    return last > first + (DIVERGING - 1.0) * abs(first)


def raise_flags(
    context: JobContext, *, chosen_displacement: float, mean_margin: float
) -> tuple[str, ...]:
    """Flag the job's final run where there is reason to; return the flags."""
    found: dict[Attention, str] = {}
    if is_displaced(chosen_displacement, mean_margin=mean_margin):
        found[Attention.LIKELIHOOD_DISPLACEMENT] = (
            f"Chosen answers became less likely: their mean log-ratio on test is "
            f"{chosen_displacement:.2f} nats, at margins of {mean_margin:.2f}."
        )
    with context.database.reading() as session:
        points = ExperimentRepository(session).metrics(context.fence.job_id, "train")
    if is_diverging([float(point.metrics["loss"]) for point in points]):
        found[Attention.LOSS_DIVERGING] = (
            "The training loss rose during the run; lower the learning rate."
        )
    for flag, message in found.items():
        # An earlier attempt may have raised it and died before the step was done.
        if flag.value not in context.job.attention:
            context.attention(flag, message)
    return tuple(flag.value for flag in found)
