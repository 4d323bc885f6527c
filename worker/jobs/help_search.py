"""Helps the search of another job: opens the same workbench and does tasks while there are any."""

from typing import Any

from pydantic import TypeAdapter

from core.lifecycle import Phase
from core.methods import Method
from worker.context import JobContext
from worker.ingest.canonical import Split
from worker.jobs.runs import encoder_of, train_spec
from worker.jobs.scopes import Span
from worker.jobs.search_tasks import work
from worker.jobs.workbench import open_workbench

IDLE_S = 30.0
"""How long a helper waits for tasks of others to end before it leaves its worker to other jobs."""
_METHOD: TypeAdapter[Method] = TypeAdapter(Method)
_PREPARED = 0.2


def run(context: JobContext) -> dict[str, Any]:
    """Do tasks of the study that the job names.

    Raises:
        RunAborted: model or data cannot be used.
        CancelRequested, Preempted: the attempt was asked to stop; its task waits again.
        LeaseLost: another attempt owns the job.
    """
    method = _METHOD.validate_python(context.job.spec["method"])
    context.plan(["search"])
    bench = open_workbench(
        context,
        spec=train_spec(method),
        splits=(Split.TRAIN, Split.VALIDATION),
        encoder=encoder_of(context.job),
    )
    bench.prepare(Span(0.0, _PREPARED))
    context.phase(Phase.SEARCHING)
    study_id = str(context.job.spec["study_id"])
    with context.step("search") as result:
        result["tasks"] = work(bench, study_id, span=Span(_PREPARED, 1.0), patience_s=IDLE_S)
    return dict(result)
