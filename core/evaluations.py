"""What an evaluation of a checkpoint found, as plain values that go to JSON and back."""

from typing import Literal

from pydantic import Field

from core.profile import Estimate
from core.results import Evaluation
from core.spec import SpecModel


class ScoredSample(SpecModel):
    """One held-out prompt, answered greedily by the base and by the checkpoint."""

    number: int = Field(description="from 1, in the order of the pairs")
    pair_id: str = Field(description="`id` of the pair whose prompt it is")
    prompt: str = Field(description="its last turn")
    base: str
    aligned: str
    base_reward: float | None = Field(description="null until it is scored")
    aligned_reward: float | None = Field(description="null until it is scored")


class WinRate(SpecModel):
    """How often the checkpoint's answer has the higher reward; a tie counts one half."""

    reward_model: str
    prompts: int
    wins: int
    ties: int
    losses: int
    rate: Estimate
    difference: Estimate = Field(description="mean of reward(checkpoint) - reward(base)")
    verdict: Literal["better", "worse", "no significant difference"]
    sentence: str


class EvaluationResult(SpecModel):
    """Quality of a checkpoint on pairs that it was not trained on; intervals are 95 %."""

    measured: Evaluation
    accuracy: Estimate = Field(description="share of pairs whose chosen answer it prefers")
    log_loss: Estimate = Field(description="calibrated, nats; guessing has ln 2 = 0.693")
    drift: Estimate = Field(description="mean token KL(checkpoint || base), nats")
    win_rate: WinRate | None = Field(default=None, description="null without a reward model")
