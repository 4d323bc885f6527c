"""Measures a dataset under a model and ranks the kernel–divergence pairs; trains nothing."""

from typing import Any

from core.errors import FailureCode, RunAborted
from core.lifecycle import Phase
from core.profile import Recommendation
from core.run_spec import TrainSpec
from models.repositories.experiments import ExperimentRepository
from selection.profile import profile_dataset
from selection.recommender import recommend
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.scopes import Span
from worker.jobs.workbench import Workbench, open_workbench

_METRICS_BEGIN = 0.8


def run(context: JobContext) -> dict[str, Any]:
    """Do one recommendation job; the result names the stored recommendation.

    Raises:
        RunAborted: model or data cannot be used.
        CancelRequested, Preempted: the attempt was asked to stop.
        LeaseLost: another attempt owns the job.
    """
    context.plan(["recommend"])
    done = context.step_result("recommend")
    if done is not None:
        return done
    bench = open_workbench(context, spec=TrainSpec(), splits=(Split.TRAIN,))
    for warning in bench.warnings:
        context.warn(warning)
    with context.step("recommend") as result:
        result["recommendation_id"] = make_recommendation(bench, span=Span(0.0, 1.0))[0]
    return dict(result)


def make_recommendation(bench: Workbench, *, span: Span) -> tuple[str, Recommendation]:
    """Run the reference over the training split, measure, rank and store; return id and ranking.

    Raises:
        RunAborted: the data have a single prompt (`dataset_invalid`).
    """
    context = bench.context
    context.phase(Phase.COMPUTING_METRICS)
    pairs = bench.pairs[Split.TRAIN]
    if len({pair.group_id for pair in pairs}) < 2:
        raise RunAborted(
            "the training split has pairs of one prompt only; metrics need at least two",
            failure=FailureCode.DATASET_INVALID,
            hint="upload pairs of more prompts",
        )
    table = bench.reference(Span(span.start, span.at(_METRICS_BEGIN)))
    recommendation = recommend(profile_dataset(table.features(pairs), seed=bench.seed))
    context.raise_if_stopped()
    with context.transaction() as session:
        row = ExperimentRepository(session).save_recommendation(
            context.fence,
            owner_id=context.job.owner_id,
            dataset_id=bench.dataset.id,
            model=bench.model.name,
            result=recommendation.model_dump(mode="json"),
        )
        return row.id, recommendation


def stored_recommendation(context: JobContext) -> Recommendation:
    """Return what an earlier attempt of the job has recommended."""
    with context.database.reading() as session:
        row = ExperimentRepository(session).recommendation_of(context.fence.job_id)
    assert row is not None, "the step `recommend` ends after its row is written"
    return Recommendation.model_validate(row.result)
