"""What a job trains: its runs, what they need of the reference, and how their ends are judged."""

from dataclasses import dataclass
from typing import assert_never

from pydantic import TypeAdapter

from core.errors import FailureCode, RunAborted
from core.lifecycle import EndedBy, JobKind
from core.methods import AutoMethod, DpoMethod, KernelDpoMethod, Method
from core.modelref import ModelRef
from core.run_spec import TrainSpec
from core.spec import MixtureKernelSpec, ObjectiveSpec, PenaltyTerm
from models.job import Job
from worker.ingest.canonical import Split
from worker.training.run import RunOutcome

FINAL_SCOPES = frozenset({"train", "baseline"})
_METHOD: TypeAdapter[Method] = TypeAdapter(Method)


@dataclass(frozen=True)
class RunRequest:
    """One training run: what is optimised, for how long, under which name.

    A trial ends after `stop_after` steps of the whole run; `repeat` numbers its seeds. A final run
    goes on from the points of the trial `adopts` where that was the same run.
    """

    scope: str
    objective: ObjectiveSpec
    learning_rate: float
    stop_after: int | None = None
    repeat: int = 0
    adopts: str | None = None

    @property
    def is_final(self) -> bool:
        """Whether it is a full-length run, whose weights are published."""
        return self.scope in FINAL_SCOPES


def train_spec(method: Method) -> TrainSpec:
    """How the runs of a method train."""
    match method:
        case AutoMethod():
            return method.auto.train_spec()
        case DpoMethod():
            return method.dpo.hyperparameters.train_spec()
        case KernelDpoMethod():
            return method.kernel_dpo.hyperparameters.train_spec()
        case _:
            assert_never(method)


def encoder_of(job: Job) -> ModelRef | None:
    """The encoder that a job names."""
    encoder = job.spec.get("encoder")
    return None if encoder is None else ModelRef.model_validate(encoder)


def abort_unless_complete(outcome: RunOutcome, *, scope: str) -> None:
    """Raise what ended a run that a job cannot do without.

    Raises:
        RunAborted: the run met NaN or ran out of memory.
    """
    if outcome.ended_by is EndedBy.OOM:
        raise RunAborted(
            f"run `{scope}`: {outcome.message}",
            failure=FailureCode.OUT_OF_MEMORY,
            hint="lower max_length or micro_batch_tokens, set gradient_checkpointing, or take a "
            "smaller model",
        )
    if outcome.ended_by is not EndedBy.BUDGET:
        raise RunAborted(
            f"run `{scope}`: {outcome.message}",
            failure=FailureCode.LOSS_NAN,
            hint="lower the learning rate, or look at the pairs that are named",
        )


def weights_learning_rate(objective: ObjectiveSpec) -> float:
    """The rate at which mixture weights are learned; 0 where there are none."""
    term = objective.kernel_term
    if term is None or not isinstance(term.kernel, MixtureKernelSpec):
        return 0.0
    return term.kernel.weights_learning_rate


def splits_with_states(job: Job) -> frozenset[Split]:
    """Splits on which a job uses the reference's hidden states, so that one pass gives all.

    Drift is measured on held-out pairs; penalties are for training, and `auto` may try any.
    """
    if job.kind not in (JobKind.TRAINING, JobKind.SEARCH):
        return frozenset()
    measured = frozenset({Split.VALIDATION, Split.TEST})
    method = _METHOD.validate_python(job.spec["method"])
    match method:
        case AutoMethod():
            return measured | {Split.TRAIN}
        case DpoMethod():
            return measured
        case KernelDpoMethod():
            term = method.kernel_dpo.objective().divergence_term
            return measured | {Split.TRAIN} if isinstance(term, PenaltyTerm) else measured
        case _:
            assert_never(method)
