"""Measures a dataset under a model and ranks the kernel–divergence pairs; trains nothing."""

import time
from collections.abc import Sequence
from typing import Any

from core.errors import FailureCode, RunAborted
from core.lifecycle import Phase
from core.profile import DatasetProfile, Recommendation
from core.run_spec import TrainSpec
from models.repositories.experiments import ExperimentRepository
from selection.features import ReferenceFeatures
from selection.history import refine
from selection.metrics.noise import LabelFacts, Origin
from selection.profile import MAX_PAIRS, profile_dataset, sampled_rows
from selection.recommender import recommend
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.past import past_searches
from worker.jobs.scopes import Span
from worker.jobs.workbench import Workbench, open_workbench
from worker.training.batches import computed_tokens
from worker.training.lanes import lanes_of
from worker.training.reference import compute_reference
from worker.training.tokenize import TokenizedPair

# The early answer costs a second pass over its pairs: worth it where they are an eighth at most,
# and where the whole pass keeps somebody waiting.
PROVISIONAL_PAIRS = 100
PROVISIONAL_ABOVE = 8 * PROVISIONAL_PAIRS
PROVISIONAL_ABOVE_S = 30.0
_TIMED_PAIRS = 8
_METRICS_BEGIN = 0.8
_EARLY_SHARE = 0.1


class Laps:
    """Where the time of a job goes: seconds by part, in the order in which parts begin."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def end(self, part: str) -> None:
        """Count the time since the last part's end to this one."""
        now = time.monotonic()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._since, 3)
        self._since = now


def run(context: JobContext) -> dict[str, Any]:
    """Do one recommendation job; the result names the stored recommendation.

    `seconds` in it are those of the attempt that has made it: `model` to load, `tokenize`,
    `provisional` for the whole early answer, `reference`, `metrics`, `rank`, `store`.

    Raises:
        RunAborted: model or data cannot be used.
        CancelRequested, Preempted: the attempt was asked to stop.
        LeaseLost: another attempt owns the job.
    """
    context.plan(["recommend"])
    done = context.step_result("recommend")
    if done is not None:
        return done
    laps = Laps()
    bench = open_workbench(context, spec=TrainSpec(), splits=())
    laps.end("model")
    bench.load_sample(Split.TRAIN, limit=MAX_PAIRS)
    laps.end("tokenize")
    for warning in bench.warnings:
        context.warn(warning)
    with context.step("recommend") as result:
        check_prompts(bench.pairs[Split.TRAIN])
        result["recommendation_id"] = _recommend_from_sample(bench, laps)
        result["seconds"] = laps.seconds
    return dict(result)


def make_recommendation(bench: Workbench, *, span: Span) -> tuple[str, Recommendation]:
    """Measure, rank and store for a job that needs the reference of the whole split anyway.

    What is measured is the sample that a recommendation job would draw with the same seed.

    Raises:
        RunAborted: the data have a single prompt (`dataset_invalid`).
    """
    pairs = bench.pairs[Split.TRAIN]
    check_prompts(pairs)
    bench.context.phase(Phase.COMPUTING_METRICS)
    table = bench.reference(Span(span.start, span.at(_METRICS_BEGIN)))
    rows = sampled_rows([pair.group_id for pair in pairs], limit=MAX_PAIRS, seed=bench.seed)
    sample = [pairs[row] for row in rows.tolist()]
    features = table.features(pairs).take(rows)
    recommendation = _ranked(bench, _profiled(bench, sample, features, limit=MAX_PAIRS))
    return _store(bench, recommendation), recommendation


def check_prompts(pairs: Sequence[TokenizedPair]) -> None:
    """Refuse data that no metric can be cross-validated on.

    Raises:
        RunAborted: the data have a single prompt (`dataset_invalid`).
    """
    if len({pair.group_id for pair in pairs}) < 2:
        raise RunAborted(
            "the training split has pairs of one prompt only; metrics need at least two",
            failure=FailureCode.DATASET_INVALID,
            hint="upload pairs of more prompts",
        )


def _recommend_from_sample(bench: Workbench, laps: Laps) -> str:
    """Run the reference over what will be measured, and no more; answer early where that is long.

    The early answer is of a part of the same sample, by the same rule, and says so.
    """
    bench.context.phase(Phase.COMPUTING_METRICS)
    span, sample = Span(0.0, _METRICS_BEGIN), bench.pairs[Split.TRAIN]
    if len(sample) > PROVISIONAL_ABOVE and _expected_s(bench, sample) > PROVISIONAL_ABOVE_S:
        early = Span(span.start, span.at(_EARLY_SHARE))
        span = Span(early.end, span.end)
        group = [pair.group_id for pair in sample]
        rows = sampled_rows(group, limit=PROVISIONAL_PAIRS, seed=bench.seed).tolist()
        few = [sample[row] for row in rows]
        found = _measured(bench, few, early, Laps(), limit=PROVISIONAL_PAIRS)
        _store(bench, _provisional(found))
        laps.end("provisional")
    recommendation = _measured(bench, sample, span, laps, limit=MAX_PAIRS)
    recommendation_id = _store(bench, recommendation)
    laps.end("store")
    return recommendation_id


def _expected_s(bench: Workbench, sample: Sequence[TokenizedPair]) -> float:
    """How many seconds the reference will take, from how long a few of the pairs do."""
    form = bench.policy.form
    timed = sample[:_TIMED_PAIRS]
    began = time.monotonic()
    compute_reference(bench.policy, timed, progress=_unheard)
    tokens, of = (sum(computed_tokens(p, form) for p in pairs) for pairs in (timed, sample))
    # They are one batch, which has one lane to itself.
    return (time.monotonic() - began) * of / tokens / lanes_of(bench.policy)


def _unheard(_done: int, _total: int) -> None:
    """Progress of what takes a moment."""


def _measured(
    bench: Workbench, sample: Sequence[TokenizedPair], span: Span, laps: Laps, *, limit: int
) -> Recommendation:
    table = bench.reference_of(sample, span)
    laps.end("reference")
    profile = _profiled(bench, sample, table.features(sample), limit=limit)
    laps.end("metrics")
    recommendation = _ranked(bench, profile)
    laps.end("rank")
    return recommendation


def _profiled(
    bench: Workbench,
    sample: Sequence[TokenizedPair],
    features: ReferenceFeatures,
    *,
    limit: int,
) -> DatasetProfile:
    """All metrics of pairs that were drawn within `limit` from the training split."""
    whole = bench.loaded[Split.TRAIN]
    return profile_dataset(
        features,
        seed=bench.seed,
        max_pairs=limit,
        drawn_from=(whole.of_pairs, whole.of_prompts),
        labels=_label_facts(bench, sample),
    )


def _label_facts(bench: Workbench, pairs: Sequence[TokenizedPair]) -> LabelFacts:
    """Where the pairs are from, and how many of the dataset validation saw contradicted."""
    rows = {row.id: row for row in bench.rows[Split.TRAIN]}
    report = bench.dataset.report or {}
    conflicts = [
        check["count"] for check in report.get("lint", ()) if check["check"] == "label_conflict"
    ]
    of = report.get("counts", {}).get("pairs", 0)
    return LabelFacts(
        origins=tuple(
            Origin(id=pair.id, line=rows[pair.id].line, margin=rows[pair.id].margin)
            for pair in pairs
        ),
        contradictions=sum(conflicts),
        contradictions_of=of if conflicts else 0,
    )


def _ranked(bench: Workbench, profile: DatasetProfile) -> Recommendation:
    """Rank with the metrics, the prior table and what the owner's finished searches say."""
    history = refine(profile, model=bench.model.name, past=past_searches(bench.context))
    found = recommend(profile, history=history)
    return found.model_copy(update={"data": bench.loaded[Split.TRAIN].report()})


def _provisional(found: Recommendation) -> Recommendation:
    profile = found.profile
    says = f"Provisional, from {profile.sampled_pairs} of {profile.pairs} pairs. {found.summary}"
    return found.model_copy(update={"provisional": True, "summary": says})


def _store(bench: Workbench, recommendation: Recommendation) -> str:
    context = bench.context
    context.raise_if_stopped()
    with context.transaction() as session:
        row = ExperimentRepository(session).save_recommendation(
            context.fence,
            owner_id=context.job.owner_id,
            dataset_id=bench.dataset.id,
            model=bench.model.name,
            result=recommendation.model_dump(mode="json"),
        )
        return row.id


def stored_recommendation(context: JobContext) -> Recommendation:
    """Return what an earlier attempt of the job has recommended."""
    with context.database.reading() as session:
        row = ExperimentRepository(session).recommendation_of(context.fence.job_id)
    assert row is not None, "the step `recommend` ends after its row is written"
    return Recommendation.model_validate(row.result)
