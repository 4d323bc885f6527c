"""Bodies of jobs that are kept for who asks again."""

from dataclasses import replace

from app.conditional import Answers
from app.job_views import any_job, fine_tuning_job
from core.lifecycle import JobKind, JobStatus
from core.queue import QueueName
from models.repositories.job_requests import JobPulse

PULSE = JobPulse(
    id="ftjob_1", owner_id="own_1", kind=JobKind.TRAINING, status=JobStatus.RUNNING,
    queue=QueueName.GPU, run_after=0.0, version=3, event_seq=5, heartbeat_at=1.0, lease_until=2.0,
    gpu_seconds=0.0,
)  # fmt: skip


def test_a_body_is_found_only_by_all_that_it_shows() -> None:
    answers = Answers()
    answers.put(any_job, PULSE, None, b"a")
    assert answers.get(any_job, replace(PULSE), None) == b"a"
    assert answers.get(fine_tuning_job, PULSE, None) is None
    assert answers.get(any_job, PULSE, 0) is None
    for change in ({"version": 4}, {"event_seq": 6}, {"heartbeat_at": 1.5}, {"gpu_seconds": 0.1}):
        assert answers.get(any_job, replace(PULSE, **change), None) is None


def test_those_not_asked_for_longest_make_room() -> None:
    answers = Answers(max_bytes=30)
    for number in range(3):
        answers.put(any_job, replace(PULSE, version=number), None, b"x" * 10)
    answers.put(any_job, replace(PULSE, version=2), None, b"y" * 10)
    assert answers.get(any_job, replace(PULSE, version=0), None) is not None
    answers.put(any_job, replace(PULSE, version=3), None, b"x" * 10)
    found = {v for v in range(4) if answers.get(any_job, replace(PULSE, version=v), None)}
    assert found == {0, 2, 3}
    assert answers.get(any_job, replace(PULSE, version=2), None) == b"y" * 10
    answers.put(any_job, replace(PULSE, version=9), None, b"z" * 31)
    assert answers.get(any_job, replace(PULSE, version=9), None) is None
