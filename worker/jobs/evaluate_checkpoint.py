"""Measures a published adapter on held-out pairs, and against its base under a reward model."""

import time
from typing import Any

import numpy as np
from peft import PeftModel, set_peft_model_state_dict
from pydantic import TypeAdapter
from safetensors.torch import load_file

from core.errors import FailureCode, RunAborted
from core.evaluations import EvaluationResult
from core.hub import fetch
from core.lifecycle import Phase
from core.methods import Method
from core.modelref import ModelRef
from models.repositories.jobs import JobRepository
from models.repositories.steps import StepRepository
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.export import adapter_row, check_base, verified
from worker.jobs.runs import train_spec
from worker.jobs.scopes import Span
from worker.jobs.win_rate import answer_prompts, fetch_judge, judged, share
from worker.jobs.workbench import Workbench, open_workbench
from worker.training.evaluate import (
    Measured,
    bootstrap_mean,
    bootstrap_ratio,
    cross_fitted_temperatures,
    evaluation,
    fit_temperature,
    preference_losses,
    rights,
)
from worker.training.folders import SealedFolder
from worker.training.model import Policy

_METHOD: TypeAdapter[Method] = TypeAdapter(Method)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_WITH_JUDGE = {
    "evaluate": Span(0.0, 0.3),
    "answer": Span(0.3, 0.85),
    "score": Span(0.85, 1.0),
}


def run(context: JobContext) -> dict[str, Any]:
    """Do one evaluation job; the result is a `core.evaluations.EvaluationResult`.

    The policy is given up before the reward model is loaded, so that both need not fit at once.

    Raises:
        RunAborted: checkpoint, data or reward model cannot be used.
        InvalidInput: the reward model is none, or a model's folder is gone.
        CancelRequested, Preempted: the attempt was asked to stop.
        LeaseLost: another attempt owns the job.
    """
    judge = fetch_judge(context)
    spans = {"evaluate": Span(0.0, 1.0)} if judge is None else _WITH_JUDGE
    context.plan(list(spans))
    result = _with_policy(context, spans)
    if judge is not None:
        context.phase(Phase.EVALUATING)
        won = judged(context, judge, spans["score"])
        result = result.model_copy(update={"win_rate": won})
    return result.model_dump(mode="json")


def _with_policy(context: JobContext, spans: dict[str, Span]) -> EvaluationResult:
    """Do what is left of the steps that need the checkpoint's weights."""
    done = context.step_result("evaluate")
    answers = "answer" in spans and context.step_result("answer") is None
    if done is not None and not answers:
        return EvaluationResult.model_validate(done)
    spec = context.job.spec
    source = adapter_row(context, to="measure")
    adapter = verified(context.settings.artifact_dir / source.path, sha256=source.manifest_sha256)
    check_base(fetch(ModelRef.model_validate(spec["model"]), context.settings), adapter.manifest)
    split = Split(spec["split"])
    bench = open_workbench(
        context,
        spec=train_spec(_METHOD.validate_python(spec["method"])),
        splits=(Split.VALIDATION,) if split is Split.VALIDATION else (Split.VALIDATION, split),
    )
    load_published(bench.policy, adapter)
    context.phase(Phase.EVALUATING)
    if done is None:
        for warning in bench.warnings:
            context.warn(warning)
        result = _measured(context, bench, split, spans["evaluate"])
    else:
        result = EvaluationResult.model_validate(done)
    if answers:
        answer_prompts(context, bench, spans["answer"])
    return result


def load_published(policy: Policy, adapter: SealedFolder) -> None:
    """Put the weights of a published adapter into a policy of its base.

    Raises:
        RunAborted: they are not all of the policy's (`checkpoint_corrupt`).
    """
    weights = load_file(adapter.path / ADAPTER_WEIGHTS)
    if not isinstance(policy.model, PeftModel) or len(weights) != len(policy.adapter()):
        raise RunAborted(
            f"the adapter has {len(weights)} weights, the model takes {len(policy.adapter())}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="run the fine-tuning job again",
        )
    loaded = set_peft_model_state_dict(policy.model, weights)
    unknown = list(loaded.unexpected_keys)  # type: ignore[attr-defined]
    if unknown:
        raise RunAborted(
            f"the adapter has weights that the model lacks, first {unknown[0]}",
            failure=FailureCode.CHECKPOINT_CORRUPT,
            hint="run the fine-tuning job again",
        )


def _measured(context: JobContext, bench: Workbench, split: Split, span: Span) -> EvaluationResult:
    """Measure on a split, whose pairs are never judged at a temperature that they were fitted to.

    That of test is fitted on validation, that of a half of validation on its other half.
    """
    began = time.monotonic()
    with context.transaction() as session:
        StepRepository(session).start(context.fence, "evaluate")
    validation = _finite(bench.measure(Split.VALIDATION, span=span.part(0, 2)))
    held_out, temperature = validation, cross_fitted_temperatures(validation)
    if split is not Split.VALIDATION:
        held_out = _finite(bench.measure(split, span=span.part(1, 2)))
        temperature = np.full(held_out.margins.shape, fit_temperature(validation.margins))
    losses = preference_losses(held_out.margins, temperature)
    tokens = held_out.chosen_tokens + held_out.rejected_tokens
    group, seed = held_out.group, bench.seed
    found = EvaluationResult(
        measured=evaluation(held_out, temperature=temperature),
        accuracy=share(bootstrap_mean(rights(held_out.margins), group, seed=seed)),
        log_loss=bootstrap_mean(losses, group, seed=seed),
        drift=bootstrap_ratio(held_out.kl_sum, tokens, group, seed=seed),
    )
    # One transaction: an attempt that dies in between would charge the step twice.
    with context.transaction() as session:
        JobRepository(session).add_gpu_seconds(context.fence, time.monotonic() - began)
        StepRepository(session).succeed(context.fence, "evaluate", found.model_dump(mode="json"))
    return found


def _finite(found: Measured) -> Measured:
    """Return what was measured.

    Raises:
        RunAborted: a log-prob is not finite (`loss_nan`).
    """
    if found.is_finite:
        return found
    raise RunAborted(
        "log-probs of the held-out pairs are not finite",
        failure=FailureCode.LOSS_NAN,
        hint="the checkpoint is of no use: run the fine-tuning job again with a lower learning "
        "rate",
    )
