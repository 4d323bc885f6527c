"""Who may win a search, and what it is compared with, where seeds drift differently."""

import math

from models.experiment import TrialRow
from tests.unit.selection.searches import plan
from worker.jobs.search import Config, baseline_of, within_budget


def config(number: int, *drifts: float, log_loss: float = 0.6, limit: float = 0.05) -> Config:
    return Config(
        trials=(TrialRow(number=number),),
        log_losses={0: log_loss},
        log_loss=log_loss,
        drift=max(drifts),
        own_drift=drifts[0],
        feasible=max(drifts) <= limit,
        losses=None,
    )


def test_the_search_s_own_seed_counts_where_second_ones_take_all_beyond_the_budget() -> None:
    made = plan(number=4, drift_budget=0.05)
    both = [config(1, 0.04, 0.06), config(2, 0.049, 0.051), config(3, 0.07)]
    assert [c.feasible for c in within_budget(made, both)] == [True, True, False]
    assert [c.drift for c in within_budget(made, both)] == [0.04, 0.049, 0.07]
    one = [config(1, 0.04, 0.06), config(2, 0.01)]
    assert [c.feasible for c in within_budget(made, one)] == [False, True]
    free = [config(1, math.inf, limit=math.inf)]
    assert within_budget(plan(number=4), free) == free


def test_the_baseline_is_the_best_plain_dpo_within_the_drift_budget() -> None:
    far, near, worse = (
        config(1, 0.2, log_loss=0.5),
        config(2, 0.01, log_loss=0.55),
        config(3, 0.02, log_loss=0.6),
    )
    assert baseline_of([worse, far, near]) is near
    assert baseline_of([far]) is far
    assert baseline_of([]) is None
