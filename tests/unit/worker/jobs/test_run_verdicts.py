import pytest

from core.errors import FailureCode, RunAborted
from core.lifecycle import EndedBy
from worker.jobs.flags import is_displaced, is_diverging
from worker.jobs.runs import abort_unless_complete
from worker.jobs.scopes import Span
from worker.training.run import RunOutcome


def outcome(ended_by: EndedBy) -> RunOutcome:
    return RunOutcome(
        steps=3, pairs_seen=12, seconds=1.0, ended_by=ended_by, message="at step 3; pairs a, b"
    )


@pytest.mark.parametrize(
    ("ended_by", "failure"),
    [(EndedBy.NAN, FailureCode.LOSS_NAN), (EndedBy.OOM, FailureCode.OUT_OF_MEMORY)],
)
def test_a_final_run_that_broke_ends_the_job_and_says_where(
    ended_by: EndedBy, failure: FailureCode
) -> None:
    with pytest.raises(RunAborted, match="run `train`: at step 3; pairs a, b") as caught:
        abort_unless_complete(outcome(ended_by), scope="train")
    assert caught.value.failure is failure
    assert not caught.value.retryable


def test_a_complete_run_passes() -> None:
    abort_unless_complete(outcome(EndedBy.BUDGET), scope="train")


def test_displacement_is_measured_against_the_margins() -> None:
    assert is_displaced(-0.6, mean_margin=1.0)
    assert not is_displaced(-0.4, mean_margin=1.0)
    assert not is_displaced(0.3, mean_margin=0.1)


def test_divergence_compares_the_ends_of_the_curve() -> None:
    assert is_diverging([0.7, 0.7, 0.6, 0.7, 0.8, 0.9, 0.8, 0.9])
    assert not is_diverging([0.7, 0.7, 0.9, 0.9, 0.9, 0.9, 0.6, 0.7])
    assert not is_diverging([0.1, 9.0]), "too few points to say"


def test_spans_nest() -> None:
    span = Span(0.2, 0.6)
    assert span.at(0.5) == pytest.approx(0.4)
    assert span.at(7.0) == pytest.approx(0.6)
    second = span.part(1, 4)
    assert (second.start, second.end) == pytest.approx((0.3, 0.4))
