"""Searches of jobs that run in this process, and what their tables say."""

from typing import Any

from models.experiment import StudyRow
from models.repositories.experiments import ExperimentRepository
from models.repositories.searches import SearchRepository, TaskRecord
from tests.integration.training_world import TrainingWorld

STEPS = 17


def auto(**search: Any) -> dict[str, Any]:
    """Rungs at 5 steps and at the end."""
    params = {"batch_size": 14, "lora_r": 2, "n_epochs": 4}
    return {"type": "auto", "auto": {"search": search, "hyperparameters": params}}


def study_of(world: TrainingWorld, job_id: str) -> tuple[StudyRow, list[TaskRecord]]:
    with world.database.reading() as session:
        study = ExperimentRepository(session).study_of(job_id)
        assert study is not None
        return study, SearchRepository(session).records(study.id)
