"""Held-out prompts of an evaluation: what base and checkpoint answer, and the rewards of both."""

from sqlalchemy import Double, ForeignKey, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from models.base import Base


class AnsweredPrompt(Base):
    """A prompt that is answered; without rewards it waits for the reward model."""

    __tablename__ = "answered_prompt"

    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    pair_id: Mapped[str] = mapped_column(String(64))
    prompt: Mapped[str] = mapped_column(Text)
    base: Mapped[str] = mapped_column(Text)
    aligned: Mapped[str] = mapped_column(Text)
    base_reward: Mapped[float | None] = mapped_column(Double)
    aligned_reward: Mapped[float | None] = mapped_column(Double)
