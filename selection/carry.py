"""What a new search takes from an earlier one of the same pairs: settings that did well there."""

from selection.draws import Setting
from selection.standing import Standing
from selection.study import Plan, Study, Trial


def best_settings(plan: Plan, study: Study, *, leading: int) -> dict[str, Setting]:
    """Return the best drawn setting of plain DPO and of each of the `leading` best pairs.

    Best at full length by the belief of the earlier search, within its drift budget, wherever its
    trials have stopped. A pair that did best as recommended has none: every search tries that.
    """
    now = Standing(plan, study)
    fine = [e for e in now.measured if not e.task.trial.repeat and plan.accepts(e)]
    fine.sort(key=lambda e: (-now.belief.value(e.task.trial.config), e.task.key))
    best: dict[str, Trial] = {}
    for ended in fine:
        best.setdefault(ended.task.trial.arm, ended.task.trial)
    plain = plan.plain.name
    pairs = [arm for arm in best if arm != plain][:leading]
    arms = [plain, *pairs] if plain in best else pairs
    return {arm: best[arm].setting for arm in arms if best[arm].draw}


def has_room(plan: Plan, number: int) -> bool:
    """Whether a plan's budget of trials pays for its arms and so many draws beside them."""
    shape, limit = plan.shape, plan.budget.trials
    return limit is None or 1 + shape.screened + max((1 + shape.leading) * shape.draws, number) <= (
        limit
    )
