"""Batches side by side on the cores of a CPU, one thread each, instead of all cores on one batch.

A narrow model's operations are too short to be shared out: threads wait for one another after each
of them, and the longer the busier the machine is.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from worker.training.model import Policy

WIDEST = 512
"""Hidden sizes above it fill the cores with one batch, and would take its memory once a core."""
_CHANGING_POSITIONS = frozenset({"dynamic", "longrope"})

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def lanes_of(policy: Policy) -> int:
    """How many batches run at once, by model and threads alone."""
    config = policy.causal.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    # One set for all layers, or one for each kind of layer.
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    # These models keep the frequencies of the latest input in themselves.
    keeps_state = any(kind.get("rope_type") in _CHANGING_POSITIONS for kind in kinds)
    if policy.device.type != "cpu" or policy.hidden_size > WIDEST or keeps_state:
        return 1
    return torch.get_num_threads()


def in_lanes(
    items: Sequence[_Item],
    work: Callable[[_Item], _Result],
    *,
    lanes: int,
    gradients: bool = False,
) -> Generator[_Result, None, None]:
    """Yield `work(item)` in the order of the items; a few are done ahead.

    With one lane, or one item, everything runs in the caller's thread. Close it when results are
    left (`contextlib.closing`): only then have all lanes ended. Work with gradients must not leave
    them in parameters, where lanes would meet.
    """
    if min(lanes, len(items)) <= 1:
        yield from (_with_gradients(gradients, work, item) for item in items)
        return
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=(1,))
    ahead: deque[Future[_Result]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(_with_gradients, gradients, work, item))
            if len(ahead) > lanes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # A lane's number is also what threads to come would begin with.
        torch.set_num_threads(threads)


def _with_gradients(wanted: bool, work: Callable[[_Item], _Result], item: _Item) -> _Result:
    # What is set in one thread is not in another.
    with torch.set_grad_enabled(wanted):
        return work(item)
