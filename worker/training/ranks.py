"""The processes that train together: what each computes, and how they agree.

Everything else reads as if there were one process; with one, all of this is the identity.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from worker.training.batches import Form, computed_tokens, micro_batches, spread
from worker.training.tokenize import TokenizedPair


@dataclass(frozen=True)
class Ranks:
    """Process `rank` of `size`.

    Of `sharded` ones each has a part of the weights, so that all of them have to run the model
    equally often.
    """

    rank: int = 0
    size: int = 1
    sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process reports and saves."""
        return self.rank == 0

    def micro_batches(
        self,
        pairs: Sequence[TokenizedPair],
        index: Sequence[int],
        *,
        max_tokens: int,
        form: Form,
        lanes: int = 1,
    ) -> list[list[int]]:
        """This process's micro-batches of a step; the processes have equally many tokens of it.

        A pure function of its arguments. Groups may be empty where processes are sharded and
        others have more of them. One process alone may have `lanes`.
        """
        if self.size == 1:
            return micro_batches(pairs, index, max_tokens=max_tokens, form=form, lanes=lanes)
        sizes = {i: computed_tokens(pairs[i], form) for i in index}
        shares = spread(index, sizes, self.size)
        groups = [micro_batches(pairs, s, max_tokens=max_tokens, form=form) for s in shares]
        mine = groups[self.rank]
        if self.sharded:
            mine = mine + [[]] * (max(len(g) for g in groups) - len(mine))
        return mine

    def sum(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums of the processes' scalars."""
        if self.size == 1:
            return values
        names = sorted(values)
        total = torch.stack([values[name].detach().float() for name in names])
        dist.all_reduce(total)
        return dict(zip(names, total.unbind(), strict=True))

    def agreed(self, values: Sequence[float]) -> list[float]:
        """What the first process says."""
        if self.size == 1:
            return list(values)
        told = torch.tensor(values, dtype=torch.float64)
        # On the host: a GPU need not be waited for.
        dist.broadcast(told, src=0)
        found: list[float] = told.tolist()
        return found


ALONE = Ranks()


@contextmanager
def unsynced(model: nn.Module) -> Iterator[None]:
    """Let processes keep their gradients to themselves within the block."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
