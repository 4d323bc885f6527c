"""The processes that train together: what each computes, and how they agree.

Everything else reads as if there were one process: with one, all of this is the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from worker.training.batches import Form, computed_tokens, spread
from worker.training.tokenize import TokenizedPair


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `size`; `control` is a group of CPU tensors that they agree over."""

    rank: int = 0
    size: int = 1
    control: "dist.ProcessGroup | None" = None

    @property
    def is_first(self) -> bool:
        """Whether this process reports and saves."""
        return self.rank == 0

    def share(
        self, pairs: Sequence[TokenizedPair], index: Sequence[int], *, form: Form
    ) -> list[int]:
        """This process's part of a step's pairs, with as many tokens as the others'.

        A pure function of its arguments; together the parts are the step.
        """
        if self.size == 1:
            return list(index)
        sizes = {i: computed_tokens(pairs[i], form) for i in index}
        return spread(index, sizes, self.size)[self.rank]

    def sum(self, values: dict[str, Tensor], *, weight: float) -> dict[str, Tensor]:
        """Sum of the processes' scalars, this one's times `weight`."""
        if self.size == 1:
            return values
        names = sorted(values)
        total = torch.stack([values[name].detach() * weight for name in names])
        dist.all_reduce(total)
        return dict(zip(names, total.unbind(), strict=True))

    def agreed(self, values: Sequence[float]) -> list[float]:
        """What the first process says."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(told, src=0, group=self.control)
        return told.tolist()


ALONE = Ranks()
