"""Fine-tunes a model: metrics and search where asked for, the run, its baseline, the evidence.

Every step's result is kept; an attempt that follows a lost one begins at the first unfinished step
and, inside it, at the last resume point.
"""

import logging
from typing import Any, assert_never

from pydantic import TypeAdapter

from core.ids import IdPrefix, new_id
from core.lifecycle import EndedBy, Phase
from core.methods import AutoMethod, DpoMethod, KernelDpoMethod, Method
from core.results import Comparison, Evaluation, RunSummary, SearchSummary, TrainingResult
from core.run_spec import CandidateSpec, SearchSpec
from core.spec import ObjectiveSpec
from models.repositories.experiments import ExperimentRepository
from models.repositories.jobs import JobRepository
from models.repositories.steps import StepRepository
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.evidence import Evidence, Plan, Trained, refuse_non_finite, run_summary
from worker.jobs.flags import raise_flags
from worker.jobs.publish_run import Publication, publish_run
from worker.jobs.recommend import make_recommendation, stored_recommendation
from worker.jobs.runs import abort_unless_complete, encoder_of, train_spec
from worker.jobs.scopes import Reporter, Span
from worker.jobs.search import Choice, search
from worker.jobs.workbench import Workbench, open_workbench
from worker.training.evaluate import (
    Measured,
    baseline_diverged,
    compare,
    evaluation,
    fit_temperature,
    same_objective,
)
from worker.training.export import versions
from worker.training.generate import generate_samples
from worker.training.heavy_tail import heavy_tails
from worker.training.run import RunOutcome
from worker.training.trainer import Leave, check_trackers

log = logging.getLogger("kdpo.jobs")

_METHOD: TypeAdapter[Method] = TypeAdapter(Method)
_AUTO_STEPS = {
    "recommend": Span(0.0, 0.08),
    "search": Span(0.08, 0.6),
    "train": Span(0.6, 0.75),
    "baseline": Span(0.75, 0.88),
    "evaluate": Span(0.88, 0.96),
    "save": Span(0.96, 1.0),
}
_NAMED_STEPS = {
    "train": Span(0.0, 0.45),
    "baseline": Span(0.45, 0.88),
    "evaluate": Span(0.88, 0.96),
    "save": Span(0.96, 1.0),
}


def run(context: JobContext) -> dict[str, Any]:
    """Do one fine-tuning job and return its `TrainingResult` as JSON.

    Raises:
        RunAborted: model or data cannot be used, the machine has not what is asked for, the final
            run diverged, no trial was usable.
        StorageFull: the disk has no room.
        CancelRequested, Preempted: the attempt was asked to stop; a resume point was saved.
        LeaseLost: another attempt owns the job.
    """
    method = _METHOD.validate_python(context.job.spec["method"])
    spans = _AUTO_STEPS if isinstance(method, AutoMethod) else _NAMED_STEPS
    context.plan(list(spans))
    check_trackers(context.settings.training.trackers)
    bench = open_workbench(
        context,
        spec=train_spec(method),
        splits=(Split.TRAIN, Split.VALIDATION, Split.TEST),
        encoder=encoder_of(context.job),
    )
    log.info("final runs have %d processes", bench.processes)
    if context.step_result(next(iter(spans))) is None:
        for warning in bench.warnings:
            context.warn(warning)
    return _FineTune(bench, method, spans).run()


class _FineTune:
    """The steps of one job on one workbench."""

    def __init__(self, bench: Workbench, method: Method, spans: dict[str, Span]) -> None:
        self._bench = bench
        self._context = bench.context
        self._method = method
        self._spans = spans

    def run(self) -> dict[str, Any]:
        """Do what is left of the job."""
        # Of a job that accepts one; an `auto` job makes its own.
        recommendation_id: str | None = self._context.job.spec.get("recommendation_id")
        summary: SearchSummary | None = None
        match self._method:
            case AutoMethod():
                recommendation_id, choice = self._search(self._method.auto.search)
                plan, summary = (
                    Plan(
                        winner=choice.winner,
                        baseline=choice.baseline,
                        plain_trials=choice.plain_trials,
                        adopts=choice.adopts,
                    ),
                    choice.summary,
                )
            case DpoMethod():
                plan = self._named(self._method.dpo.objective())
            case KernelDpoMethod():
                plan = self._named(self._method.kernel_dpo.objective())
            case _:
                assert_never(self._method)
        self._context.phase(Phase.TRAINING)
        trained = self._train(plan, "train")
        baseline = self._train_baseline(plan)
        evidence = self._evaluate(plan, trained, baseline)
        result = self._save(
            plan, trained, baseline, evidence, recommendation_id=recommendation_id, search=summary
        )
        for scope in ("train", "baseline"):
            self._bench.store(plan.request(scope)).clear()
        return result

    def _named(self, objective: ObjectiveSpec) -> Plan:
        rate = self._bench.learning_rate
        plain = ObjectiveSpec(beta=objective.beta, label_smoothing=objective.label_smoothing)
        return Plan(
            winner=CandidateSpec(objective=objective, learning_rate=rate),
            baseline=CandidateSpec(objective=plain, learning_rate=rate),
        )

    def _search(self, spec: SearchSpec) -> tuple[str, Choice]:
        context = self._context
        recommended = context.step_result("recommend")
        if recommended is None:
            with context.step("recommend") as recommended:
                recommendation_id, recommendation = make_recommendation(
                    self._bench, span=self._spans["recommend"]
                )
                recommended["recommendation_id"] = recommendation_id
        else:
            recommendation = stored_recommendation(context)
        found = context.step_result("search")
        if found is None:
            with context.step("search") as found:
                choice = search(self._bench, spec, recommendation, span=self._spans["search"])
                found |= choice.model_dump(mode="json")
        return str(recommended["recommendation_id"]), Choice.model_validate(found)

    def _train(self, plan: Plan, scope: str) -> Trained:
        context = self._context
        done = context.step_result(scope)
        if done is not None:
            return Trained.model_validate(done)
        with context.transaction() as session:
            StepRepository(session).start(context.fence, scope)
        request = plan.request(scope)
        outcome = self._bench.train(request, span=self._spans[scope])
        diverged = scope == "baseline" and outcome.ended_by is EndedBy.NAN
        if diverged:
            context.warn("Plain DPO diverged; the run is kept without it.", reason=outcome.message)
        else:
            abort_unless_complete(outcome, scope=scope)
        trained = Trained(
            steps=outcome.steps,
            best_step=outcome.best_step,
            pairs_seen=outcome.pairs_seen,
            seconds=outcome.seconds,
            mixture_weights=outcome.mixture_weights,
            diverged=outcome.message if diverged else None,
        )
        # One transaction: an attempt that dies in between would charge the run twice.
        with context.transaction() as session:
            seconds = outcome.seconds * self._bench.processes
            if request.adopts is not None and ExperimentRepository(session).copy_metrics(
                context.fence, source=request.adopts, target=scope
            ):
                seconds = 0.0  # the search has paid for it
            JobRepository(session).add_gpu_seconds(context.fence, seconds)
            StepRepository(session).succeed(context.fence, scope, trained.model_dump(mode="json"))
        return trained

    def _train_baseline(self, plan: Plan) -> Trained | None:
        """Train plain DPO; None when the run itself is plain DPO."""
        if plan.has_own_baseline:
            return self._train(plan, "baseline")
        if self._context.step_result("baseline") is None:
            with self._context.step("baseline") as result:
                result["same_as"] = "train"
        return None

    def _restore(self, plan: Plan, scope: str, *, leave: Leave = "best") -> RunOutcome:
        """Put a trained run's weights back; trains again what a damaged disk has lost."""
        span = self._spans["evaluate"]
        outcome = self._bench.train(plan.request(scope), span=span, leave=leave)
        abort_unless_complete(outcome, scope=scope)
        return outcome

    def _evaluate(self, plan: Plan, trained: Trained, baseline: Trained | None) -> Evidence:
        context = self._context
        done = context.step_result("evaluate")
        if done is not None:
            return Evidence.model_validate(done)
        context.phase(Phase.EVALUATING)
        span = self._spans["evaluate"]
        with context.step("evaluate") as result:
            run, run_temperature = self._measure(plan, "train", span=span.part(0, 4))
            refuse_non_finite(run)
            # Now, while the policy holds the run's weights.
            tails = heavy_tails(
                self._bench.policy, progress=Reporter(context, "layers", span.part(1, 4))
            )
            ours = evaluation(run, temperature=run_temperature)
            last = self._measure_last(plan, trained, span=span.part(2, 4))
            checkpoint_id = new_id(IdPrefix.CHECKPOINT)
            theirs: Evaluation | None = ours
            baseline_id: str | None = checkpoint_id
            comparison = same_objective()
            if baseline is not None:
                theirs, comparison = self._compare(
                    plan, baseline, (run, run_temperature), span=span.part(3, 4)
                )
                baseline_id = None if theirs is None else new_id(IdPrefix.CHECKPOINT)
            evidence = Evidence(
                run=ours,
                baseline=theirs,
                comparison=comparison,
                attention=raise_flags(
                    context,
                    chosen_displacement=ours.chosen_displacement,
                    mean_margin=float(abs(run.margins).mean()),
                ),
                heavy_tails=tails,
                checkpoint_id=checkpoint_id,
                baseline_checkpoint_id=baseline_id,
                last=last,
                last_checkpoint_id=None if last is None else new_id(IdPrefix.CHECKPOINT),
            )
            result |= evidence.model_dump(mode="json")
        return evidence

    def _measure_last(self, plan: Plan, trained: Trained, *, span: Span) -> Evaluation | None:
        """Evaluate the run's last weights where others are published."""
        if trained.published_step == trained.steps:
            return None
        last, temperature = self._measure(plan, "train", span=span, leave="last")
        return evaluation(last, temperature=temperature) if last.is_finite else None

    def _measure(
        self, plan: Plan, scope: str, *, span: Span, leave: Leave = "best"
    ) -> tuple[Measured, float]:
        """Measure a trained run on test, with the temperature that validation gives it."""
        self._restore(plan, scope, leave=leave)
        margins = self._bench.measure(Split.VALIDATION, span=span.part(0, 2)).margins
        return self._bench.measure(Split.TEST, span=span.part(1, 2)), fit_temperature(margins)

    def _compare(
        self, plan: Plan, baseline: Trained, run: tuple[Measured, float], *, span: Span
    ) -> tuple[Evaluation | None, Comparison]:
        """Evaluate plain DPO and hold the run against it."""
        label = plan.described("baseline")
        if baseline.diverged is not None:
            return None, baseline_diverged(label, why=baseline.diverged)
        base, temperature = self._measure(plan, "baseline", span=span)
        if not base.is_finite:
            return None, baseline_diverged(label, why="log-probs on test are not finite")
        comparison = compare(
            run[0],
            base,
            run_temperature=run[1],
            baseline_temperature=temperature,
            label=plan.described("train"),
            baseline_label=label,
            seed=self._bench.seed,
        )
        return evaluation(base, temperature=temperature), comparison

    def _save(
        self,
        plan: Plan,
        trained: Trained,
        baseline: Trained | None,
        evidence: Evidence,
        *,
        recommendation_id: str | None,
        search: SearchSummary | None,
    ) -> dict[str, Any]:
        context, bench = self._context, self._bench
        done = context.step_result("save")
        if done is not None:
            return done
        context.phase(Phase.SAVING)
        with context.step("save") as saved:
            theirs: RunSummary | None = None
            if baseline is not None:
                theirs = self._publish_baseline(plan, baseline, evidence, recommendation_id)
            last = self._publish_last(plan, trained, evidence, recommendation_id)
            outcome = self._restore(plan, "train")
            publish_run(
                bench,
                Publication(
                    label="final",
                    request=plan.request("train"),
                    checkpoint_id=evidence.checkpoint_id,
                    step=trained.published_step,
                    measured=evidence.run,
                    comparison=evidence.comparison,
                    mixture_weights=outcome.mixture_weights,
                    recommendation=recommendation_id,
                    heavy_tails=evidence.heavy_tails,
                ),
            )
            samples = generate_samples(
                bench.policy, bench.rows[Split.TEST], max_length=bench.max_length
            )
            ours = run_summary(plan.winner, trained, evidence.run, evidence.checkpoint_id)
            result = TrainingResult(
                recommendation_id=recommendation_id,
                search=search,
                run=ours,
                baseline=theirs if baseline is not None else ours,
                last=last,
                comparison=evidence.comparison,
                samples=samples,
                heavy_tails=evidence.heavy_tails,
                attention=evidence.attention,
                bundle=self._bundle(),
            )
            saved |= result.model_dump(mode="json")
        return dict(saved)

    def _publish_baseline(
        self, plan: Plan, baseline: Trained, evidence: Evidence, recommendation_id: str | None
    ) -> RunSummary | None:
        """Publish plain DPO beside the run, unless it diverged."""
        measured, checkpoint_id = evidence.baseline, evidence.baseline_checkpoint_id
        if measured is None or checkpoint_id is None:
            return None
        outcome = self._restore(plan, "baseline")
        publish_run(
            self._bench,
            Publication(
                label="baseline",
                request=plan.request("baseline"),
                checkpoint_id=checkpoint_id,
                step=baseline.published_step,
                measured=measured,
                comparison=same_objective(),
                mixture_weights=outcome.mixture_weights,
                recommendation=recommendation_id,
            ),
        )
        return run_summary(plan.baseline, baseline, measured, checkpoint_id)

    def _publish_last(
        self, plan: Plan, trained: Trained, evidence: Evidence, recommendation_id: str | None
    ) -> RunSummary | None:
        """Publish the run's last weights too, where earlier ones are its result."""
        measured, checkpoint_id = evidence.last, evidence.last_checkpoint_id
        if measured is None or checkpoint_id is None:
            return None
        outcome = self._restore(plan, "train", leave="last")
        publish_run(
            self._bench,
            Publication(
                label="last",
                request=plan.request("train"),
                checkpoint_id=checkpoint_id,
                step=trained.steps,
                measured=measured,
                comparison=evidence.comparison,
                mixture_weights=outcome.mixture_weights,
                recommendation=recommendation_id,
            ),
        )
        return run_summary(plan.winner, trained, measured, checkpoint_id, step=trained.steps)

    def _bundle(self) -> dict[str, str]:
        bench = self._bench
        return {
            "seed": str(bench.seed),
            "threads": str(bench.threads),
            "device": bench.policy.device.type,
            "reference": bench.reference_key,
            **bench.hashes,
            **{f"version.{name}": number for name, number in versions().items()},
        }
