"""A run's other process on a small device: `python -m ... <tokens> <arguments of rank_main>`."""

import sys

import torch

from worker.training import rank_main
from worker.training.model import Policy
from worker.training.rank_job import RankJob


class SmallJob(RankJob):
    """A job whose model runs out of memory beyond `limit` tokens at once."""

    limit = 0

    def policy(self, device: torch.device) -> Policy:
        """Load the model, which refuses what is too large."""
        policy = super().policy(device)
        policy.causal.base_model.register_forward_pre_hook(self._check, with_kwargs=True)
        return policy

    def _check(self, _module: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        tokens = inputs["input_ids"].numel()
        if tokens > self.limit:
            raise torch.OutOfMemoryError(f"{tokens} tokens")


if __name__ == "__main__":
    SmallJob.limit = int(sys.argv[1])
    rank_main.RankJob = SmallJob  # type: ignore[attr-defined]
    rank_main.main(sys.argv[2:])
