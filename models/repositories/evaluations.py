"""Answered prompts of evaluations: added in order, then scored, never changed."""

from collections.abc import Sequence

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from models.evaluation import AnsweredPrompt
from models.repositories.jobs import Fence, JobRepository


class AnswerRepository:
    """Reads and fenced writes of answered prompts in one transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def count(self, job_id: str) -> int:
        """Return how many prompts are answered."""
        counted = select(func.count()).where(AnsweredPrompt.job_id == job_id)
        return self._session.execute(counted.select_from(AnsweredPrompt)).scalar_one()

    def add(self, fence: Fence, answers: Sequence[AnsweredPrompt], *, gpu_seconds: float) -> None:
        """Keep answers and charge what they took.

        Raises:
            LeaseLost: another attempt owns the job.
        """
        self._charge(fence, gpu_seconds)
        self._session.add_all(answers)

    def score(
        self,
        fence: Fence,
        rewards: Sequence[tuple[int, float, float]],
        *,
        gpu_seconds: float,
    ) -> None:
        """Keep rewards (number, of the base's answer, of the checkpoint's), charge what they took.

        Raises:
            LeaseLost: another attempt owns the job.
        """
        self._charge(fence, gpu_seconds)
        for number, base, aligned in rewards:
            row = self._session.get_one(AnsweredPrompt, (fence.job_id, number))
            row.base_reward, row.aligned_reward = base, aligned

    def page(
        self, job_id: str, *, after: int = 0, limit: int | None = None
    ) -> Sequence[AnsweredPrompt]:
        """Return answered prompts in order, those behind number `after`."""
        rows = (
            select(AnsweredPrompt)
            .where(AnsweredPrompt.job_id == job_id, AnsweredPrompt.number > after)
            .order_by(AnsweredPrompt.number)
            .limit(limit)
        )
        return self._session.execute(rows).scalars().all()

    def _charge(self, fence: Fence, seconds: float) -> None:
        jobs = JobRepository(self._session)
        jobs.add_gpu_seconds(fence, seconds)
        jobs.progressed(fence)
