"""The whole OpenAPI document against a live server: what it promises is what is answered.

Each operation gets requests that follow the document and requests that break it, both with ids
that exist and with ids that do not, and every answer passes all checks of schemathesis. As many
cases as `SCHEMA_CASES` (`make soak`: 20,000); without it the cases are the same in every run.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.core.failures import FailureGroup
from schemathesis.core.parameters import ParameterLocation
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
)

from tests.integration.schema_world import Live, live_server, name_of, operations, read_schema

CASES = int(os.environ.get("SCHEMA_CASES", "1000"))
IS_SOAK = "SCHEMA_CASES" in os.environ

# What a request that follows the document may still be refused for, with 422.
SEMANTIC = {
    "create_dataset": "the policy is JSON in a form field; a source must be allowed",
    "update_dataset": "a name that can be shown",
    "create_dataset_version": "options of a policy that would be ignored",
    "list_dataset_rows": "formats of some views only",
    "head_dataset_rows": "formats of some views only",
    "create_recommendation": "the model must be there",
    "accept_recommendation": "hyperparameters that need each other",
    "create_fine_tuning_job": "one of two fields, models, hyperparameters that need each other",
    "get_fine_tuning_job": "a version to wait for, without `wait`",
    "get_job": "a version to wait for, without `wait`",
    "list_fine_tuning_events": "a cursor is a number or an id",
    "list_job_events": "a cursor is a number or an id",
    "get_job_logs": "lines from the start or from the end, not both",
    "create_study": "models, budgets and hyperparameters that need each other",
    "clone_study": "what is given must go with what the study has",
    "update_study": "something must change",
    "create_trial": "arms and strengths that the study has",
    "clone_trial": "strengths that the trial has",
    "get_pareto_front": "rungs that the study has",
    "get_importance": "rungs that the study has",
    "create_evaluation": "the model must be there",
    "update_checkpoint": "a time that is past",
    "export_checkpoint": "something to do, options that would be ignored",
    "create_download_url": "how long links may work is a setting",
    "create_file": "fields that need each other",
    "create_webhook": "hosts that are allowed",
    "update_webhook": "hosts that are allowed",
    "create_api_key": "a time that is past",
    "get_usage": "days in order, and not too many",
}
# What a request that breaks the document may be accepted with: in a form all is text.
FORMS = frozenset({"create_dataset", "create_recommendation", "create_file"})
# And with 413: how large uploads may be is a setting.
SIZED = frozenset({"create_upload"})
# These start a process that loads numpy, Arrow or Optuna, for a second each.
SLOW = frozenset(
    {
        "get_best_trial", "get_importance", "export_study", "get_study_quote", "update_study",
        "create_trial", "clone_trial",
    }
)  # fmt: skip


@pytest.fixture
def live(sqlite_url: str, tmp_path: Path) -> Iterator[Live]:
    with live_server(sqlite_url, tmp_path) as one:
        yield one


def test_every_answer_is_in_the_document(live: Live) -> None:
    found = operations(read_schema(live))
    known = {name_of(operation) for operation in found}
    assert SEMANTIC.keys() | SLOW | SIZED | FORMS <= known
    # Some operations have few cases or none: there is no wrong way to ask for /healthz.
    each = -(-CASES * 6 // (5 * 2 * len(found)))
    seen: Counter[str] = Counter()
    wrong: list[str] = []
    for operation in found:
        count = max(2, each // 5) if name_of(operation) in SLOW else each
        for mode in GenerationMode:
            try:
                _try(live, operation, mode, count, seen)
            except Unsatisfiable:
                assert not operation.body
            except (Exception, FailureGroup) as error:
                wrong.append(f"{operation.label} ({mode.value}):\n{error}"[:1500])
    assert not wrong, f"{len(wrong)} failures\n\n" + "\n\n".join(wrong)
    assert sum(seen.values()) >= CASES, seen


def _try(
    live: Live, operation: APIOperation, mode: GenerationMode, count: int, seen: Counter[str]
) -> None:
    name = name_of(operation)
    ids = live.of(name)

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=not IS_SOAK,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Case) -> None:
        seen[operation.label] += 1
        if seen[operation.label] % 2 and _has_good_path(case):
            for parameter in case.path_parameters or {}:
                if parameter in ids:
                    case.path_parameters[parameter] = ids[parameter]
        response = case.call(base_url=live.url, session=live.session)
        case.validate_response(
            response,
            excluded_checks=_excused(name, response.status_code, case),
            transport_kwargs={"base_url": live.url, "session": live.session},
        )

    check()


def _excused(name: str, status: int, case: Case) -> list[CheckFunction]:
    """Return which check says nothing of this answer."""
    if _may_refuse(name, status, case):
        return [positive_data_acceptance]
    if name in FORMS and case.media_type == "multipart/form-data" and status < 300:
        return [negative_data_rejection]
    return []


def _may_refuse(name: str, status: int, case: Case) -> bool:
    """Whether an operation may refuse so what follows the document."""
    match status:
        case 412:
            return "if-match" in (case.headers or {})  # of another version
        case 413:
            return name in SIZED
        case 422:
            return name in SEMANTIC
        case _:
            return False


def _has_good_path(case: Case) -> bool:
    path = None if case.meta is None else case.meta.components.get(ParameterLocation.PATH)
    return path is None or path.mode.is_positive
