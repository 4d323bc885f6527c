"""The client's types are those of the server: each member exists there, and each path."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from app import (
    checkpoint_views,
    dataset_views,
    errors,
    events,
    job_views,
    recommendation_views,
)
from app import evaluations as evaluation_views
from app.main import create_app
from core import evaluations, profile
from core.settings import Settings
from kdpo import types

ROOT = Path(__file__).parents[3]
PAIRS: list[tuple[type[BaseModel], type[BaseModel]]] = [
    (types.Job, job_views.AnyJob),
    (types.Progress, job_views.Progress),
    (types.ProgressEvent, events.ProgressEvent),
    (types.QueuePlace, job_views.QueuePlace),
    (types.JobError, job_views.JobError),
    (types.Step, job_views.StepView),
    (types.Event, job_views.EventView),
    (types.Metrics, job_views.MetricsView),
    (types.MetricPoint, job_views.MetricView),
    (types.Dataset, dataset_views.DatasetView),
    (types.Row, dataset_views.RowView),
    (types.ErrorItem, errors.ProblemDetail),
    (types.Recommendation, recommendation_views.RecommendationView),
    (types.Answer, recommendation_views.Answer),
    (types.RankedPair, profile.RankedPair),
    (types.Choice, profile.Choice),
    (types.Estimate, profile.Estimate),
    (types.Matrix, recommendation_views.RecommendationMatrix),
    (types.MatrixCell, recommendation_views.MatrixCell),
    (types.Evaluation, evaluation_views.EvaluationView),
    (types.EvaluationResult, evaluations.EvaluationResult),
    (types.WinRate, evaluations.WinRate),
    (types.EvaluationSample, evaluations.ScoredSample),
    (types.Checkpoint, checkpoint_views.CheckpointView),
    (types.CheckpointFile, checkpoint_views.FileView),
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda model: model.__name__)
def test_members_exist_on_the_server(ours: type[BaseModel], theirs: type[BaseModel]) -> None:
    names = {field.alias or name for name, field in ours.model_fields.items()}
    assert names <= set(theirs.model_fields)


def test_unknown_members_are_kept() -> None:
    job = types.Job.model_validate({"id": "job_1", "status": "new_state", "colour": "red"})
    assert job.model_dump()["colour"] == "red"
    assert not job.ended


def test_every_path_of_the_client_is_one_of_the_server(tmp_path: Path) -> None:
    paths = create_app(Settings(data_dir=tmp_path)).openapi()["paths"]
    served = {re.sub(r"\{[^}]*\}", "{}", path) for path in paths}
    asked: set[str] = set()
    for file in (ROOT / "kdpo").glob("*.py"):
        for text in re.findall(r'"(/v1/[^"?]*)"', file.read_text()):
            asked.add(re.sub(r"\{[^{}]*(?:\([^()]*\))?[^{}]*\}", "{}", text))
    assert len(asked) > 15
    assert asked <= served, sorted(asked - served)
