"""The search as a pure function: (plan, what is known) -> what to do next.

All recommended arms are screened at the first rung, in the order of the recommendation; those that
promise most together go on to longer rungs (successive halving: Jamieson & Talwalkar 2016;
asynchronous: Li et al., "A System for Massively Parallel Hyperparameter Tuning", 1810.05934), each
from where it stopped; settings are drawn inside the leading arms; plain DPO is tuned with as many
draws and goes all the way; the last ones are repeated with a second seed where they are too close
to tell.

Nothing is remembered between calls and nothing is drawn from a global generator: whoever asks, in
whatever process, after whatever crash, gets the same answer for the same study. Callers serialise
"ask, then write the task" per study; between two such turns any number of workers may train.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from core.run_spec import CandidateSpec
from core.seeds import levels
from selection.belief import Config, believe
from selection.draws import RECOMMENDED, Density, Setting, active_dimensions, draw
from selection.standing import Standing, candidate_of
from selection.study import (
    Action,
    Arm,
    Ended,
    Origin,
    Plan,
    Stop,
    StoppedBy,
    Study,
    Task,
    Trial,
    Wait,
    places_left,
)

MATTERS = 0.5
"""Percent of log-loss that a search goes on for."""
DOUBT = 0.05
PROPOSALS = 8
_BEST_FOR_DRAWS = 3
_Z90 = 1.6448536269514722


def decide(plan: Plan, study: Study) -> Action:
    """Say what a free worker should do now.

    The same plan and study give the same action, however results are ordered. A task that is in
    the study is never started again, except a waiting one, which comes first. What does not fit
    into the budget is not started: neither its expected cost into the budget, nor its limit into
    1.02 times it, both with everything that runs. Plain DPO's and one finalist's way to the end
    are kept free.

    Raises:
        InvalidInput: the study has tasks that the plan cannot have.
    """
    now = Standing(plan, study)
    for task in sorted(study.waiting, key=lambda task: (task.rung, task.key)):
        if (start := now.start(task, "its worker was lost, or a person asked for it")) is not None:
            return start
    refused = False
    for wanted in _wanted(now):
        if isinstance(wanted, Stop):
            return Wait("the last tasks are running") if study.running else wanted
        task, reason = wanted
        if (start := now.start(task, reason)) is not None:
            return start
        refused = True
    if study.running:
        return Wait("what comes next depends on what is running")
    if refused or study.waiting:
        return Stop(StoppedBy.BUDGET, f"nothing that is left fits into the budget; {now.money}")
    return Stop(StoppedBy.FINISHED, f"all of the plan is done; {now.money}")


@dataclass(frozen=True)
class Answer:
    """The best there is at this moment, and those it may be compared with.

    `rung` is how far they have come, None before any result: then `trial` is the first arm's.
    `compared` holds every measured task of that rung within the drift budget.
    """

    trial: Trial
    candidate: CandidateSpec
    rung: int | None
    log_loss: float | None
    compared: tuple[Ended, ...]


def answer(plan: Plan, study: Study) -> Answer:
    """The answer if the search ended now; there is one at any time.

    Taken from the highest rung that any arm besides plain DPO has reached within the drift budget
    (or plain DPO alone); of it the lowest log-loss on one level of seeds. Trials that `ruled_out`
    names are not looked at. Who needs ties and drift goes by `compared` and `select_winner`.
    """
    now = Standing(plan, study)
    fine = [ended for ended in now.measured if ended.task.key not in now.failed]
    others = [ended for ended in fine if not plan.arm(ended.task.trial.arm).is_plain]
    if not fine:
        arms = plan.screened
        arm = arms[1] if len(arms) > 1 else arms[0]
        return Answer(_first_trial(arm), arm.candidate, None, None, ())
    rung = max(ended.task.rung for ended in others or fine)
    compared = tuple(ended for ended in fine if ended.task.rung == rung)
    losses = _levels([ended for ended in now.measured if ended.task.rung == rung])
    best = min(compared, key=lambda ended: (losses[ended.task.trial.config], ended.task.key))
    trial = best.task.trial
    return Answer(trial, candidate_of(plan, trial), rung, losses[trial.config], compared)


def _levels(measured: Sequence[Ended]) -> dict[Config, float]:
    """Log-losses of the configurations of a rung, all on one level of seeds."""
    found: dict[Config, dict[int, float]] = {}
    for ended in measured:
        if ended.log_loss is not None:
            trial = ended.task.trial
            found.setdefault(trial.config, {})[trial.repeat] = ended.log_loss
    return dict(zip(found, levels(list(found.values())), strict=True))


def _first_trial(arm: Arm) -> Trial:
    origin = Origin.BASELINE if arm.is_plain else Origin.SCREEN
    return Trial(arm.name, 0, 0, RECOMMENDED, origin)


# ------------------------------------------------------------ what is wanted

Wanted = tuple[Task, str] | Stop


def _wanted(now: Standing) -> Iterator[Wanted]:
    """Everything that could be started now, the best first; Stop where the rest is not worth it.

    Lower rungs come first: what is known there decides who goes on. A worker that would be idle
    goes up with those who would go on however what still runs there turns out.
    """
    plan = now.plan
    for arm in plan.screened:
        if not now.has((arm.name, 0), 0):
            yield Task(_first_trial(arm), 0, 0), "every arm is screened"
    if plan.draw_rung == 0:
        yield from _drawn(now)
    for rung in range(1, plan.last):
        yield from _promoted(now, rung)
        if rung == plan.draw_rung:
            yield from _drawn(now)
    stop = _decided(now)
    if plan.last and stop is None:
        yield from _promoted(now, plan.last)
    yield from _repeated(now)
    if stop is not None:
        yield stop


def _promoted(now: Standing, rung: int) -> Iterator[Wanted]:
    """Trials that go on to a rung: who promises most together, and the best of plain DPO."""
    plan, start = now.plan, now.plan.rungs[rung - 1]
    plain = plan.plain.name
    below = now.at(rung - 1)
    ahead = [
        task
        for task in now.tasks.values()
        if task.rung == rung and task.start == start and not task.trial.repeat
    ]
    gone = {task.trial.key for task in ahead}
    usable = [task for task in ahead if task.key not in now.failed]
    taken = sum(task.trial.arm != plain for task in usable)
    places = now.allowed(plan.shape.kept[rung - 1], rung)
    left = places_left(places, sum(task.trial.arm != plain for task in ahead), taken)
    waiting = [ended for ended in below if ended.task.trial.key not in gone]
    pairs = [ended for ended in waiting if ended.task.trial.arm != plain]
    going = now.set_apart(pairs, [t for t in usable if t.trial.arm != plain], left)
    best = [ended for ended in waiting if ended.task.trial.arm == plain]
    started = any(task.trial.arm == plain for task in usable)
    one = 1 if not taken else 0
    for ended in going[:one]:
        yield Task(ended.task.trial, rung, start), f"the best at step {start}"
    # Before the others: what is left of a budget has to pay for it too.
    if best and not started and now.allowed(1, rung):
        yield Task(best[0].task.trial, rung, start), "plain DPO is always in the race"
    for ended in going[one:]:
        yield Task(ended.task.trial, rung, start), f"among the best at step {start}"


def _drawn(now: Standing) -> Iterator[Wanted]:
    """The next drawn setting of each leading arm and of plain DPO, fewest draws first.

    Settings are drawn in rounds, one of each arm, when all arms as they are recommended have come
    to that rung and the rounds before have: what they are depends on these results and on no
    others, however many workers there are.
    """
    plan, shape = now.plan, now.plan.shape
    running = [running.task for running in now.study.running if running.task.rung <= plan.draw_rung]
    if not shape.draws or any(not task.trial.draw for task in running):
        return
    plain = plan.plain.name
    # What a person asked for makes no arm a leading one, and takes no draw from any.
    own = {
        a.name: [t for t in now.draws_of(a.name) if t.origin is not Origin.HAND] for a in plan.arms
    }
    belief = believe(plan, _known_to(now, own, 0))
    screened = {e.task.trial.arm for e in now.at(0) if not e.task.trial.draw}
    pairs = sorted(
        ((arm, 0) for arm in screened if arm != plain), key=lambda c: (-belief.value(c), c)
    )
    drawn = [config for config in pairs if own[config[0]]]
    fresh = [config for config in pairs if not own[config[0]]]
    drawn += belief.set_apart(fresh, drawn, shape.leading - len(drawn))
    leading = [arm for arm, _ in drawn]
    fine = [e for e in now.measured if e.task.key == (plain, 0, 0, 0) and plan.accepts(e)]
    arms = leading + [plain] * len(fine)
    open_rounds = [_round_of(task.trial, own) for task in running]
    for arm in sorted(arms, key=lambda arm: len(own[arm])):
        number = len(own[arm])
        if number >= shape.draws or any(of < number for of in open_rounds):
            continue
        known = _known_to(now, own, number)
        if (trial := _next_draw(now, plan.arm(arm), known)) is not None:
            yield Task(trial, plan.draw_rung, 0), f"{arm} leads, and its strengths are tuned"


Own = Mapping[str, Sequence[Trial]]


def _round_of(trial: Trial, own: Own) -> int:
    """In which round a setting was drawn, from 0; -1 of those that were not."""
    return own[trial.arm].index(trial) if trial in own[trial.arm] else -1


def _known_to(now: Standing, own: Own, number: int) -> Study:
    """What settings of a round are drawn by: results up to that rung, of rounds before it."""
    rung = now.plan.draw_rung
    return Study(
        ended=tuple(
            ended
            for ended in now.study.ended
            if ended.task.rung <= rung
            and not ended.task.trial.repeat
            and _round_of(ended.task.trial, own) < number
        )
    )


def _next_draw(now: Standing, arm: Arm, known: Study) -> Trial | None:
    """The next drawn trial of an arm; None where a pool has none left.

    Of some settings drawn from the mix the one with the largest expected improvement over the
    arm's best: the mix says where to look, the results where not to look again.
    """
    plan = now.plan
    drawn = now.draws_of(arm.name)
    number = 1 + max((trial.draw for trial in drawn), default=0)
    belief = believe(plan, known)
    own = [
        ended.task.trial
        for ended in known.ended
        if ended.task.trial.arm == arm.name
        and ended.task.rung == plan.draw_rung
        and ended.task.key not in now.failed
    ]
    own.sort(key=lambda trial: (-belief.value(trial.config), trial.key))
    proposals: dict[Config, tuple[Setting, Density]] = {}
    tried = [RECOMMENDED, *(trial.setting for trial in drawn)]
    for turn in range(PROPOSALS):
        found = draw(
            seed=f"{plan.seed}:{arm.name}:{number}:{turn}",
            dimensions=active_dimensions(arm.candidate),
            rung=plan.draw_rung,
            best=[trial.setting for trial in own[:_BEST_FOR_DRAWS]],
            tried=tried,
            pool=plan.pool,
        )
        if found is None:
            return None
        proposals[arm.name, -1 - turn] = found
    belief = believe(plan, known, proposed={c: s for c, (s, _) in proposals.items()})
    top = max(belief.value(config) for config in belief.configs if _is_tried(arm, config))
    chosen = max(proposals, key=lambda config: (belief.improvement(config, top), config[1]))
    setting, density = proposals[chosen]
    return Trial(arm.name, number, 0, setting, Origin(density.value))


def _is_tried(arm: Arm, config: Config) -> bool:
    return config[0] == arm.name and config[1] >= 0


def _repeated(now: Standing) -> Iterator[Wanted]:
    """A second seed for the first finalists, where the best two are too close to tell."""
    plan = now.plan
    final = now.at(plan.last)
    if plan.shape.repeats == 0 or len(final) < 2 or now.open_below(plan.last + 1):
        return
    final = sorted(final, key=lambda e: (e.log_loss, e.task.key))
    first, second = (-100.0 * math.log(e.log_loss) for e in final[:2] if e.log_loss)
    if first - second > _Z90 * math.sqrt(2.0) * now.belief.sizes.noise:
        return
    for ended in final[: plan.shape.repeats]:
        trial = ended.task.trial
        again = Trial(trial.arm, trial.draw, 1, trial.setting, Origin.REPEAT)
        if not now.has(trial.config, plan.last, repeat=1):
            yield Task(again, plan.last, 0), "finalists are too close to tell from one seed"


def _decided(now: Standing) -> Stop | None:
    """Stop when those who would still go to full length would hardly beat the leader there.

    sum over them of P(better by more than 0.5 %) < 5 %: the union bound on the probability that any
    is. Only once a pair and plain DPO have come to the end themselves, and somebody is left.
    """
    plan, final = now.plan, now.at(now.plan.last)
    plain = plan.plain.name
    at_end = [task for task in now.tasks.values() if task.rung == plan.last]
    usable = [task for task in at_end if task.key not in now.failed and not task.trial.repeat]
    rivals = [ended for ended in final if ended.task.trial.arm != plain]
    if not plan.last or not rivals or all(task.trial.arm != plain for task in usable):
        return None
    finished = {task.trial.config for task in at_end}
    free = places_left(
        plan.shape.kept[-1],
        sum(arm != plain for arm, _ in finished),
        sum(task.trial.arm != plain for task in usable),
    )
    waiting = [
        ended
        for ended in now.at(plan.last - 1)
        if ended.task.trial.arm != plain and ended.task.trial.config not in finished
    ]
    ahead = [task for task in usable if task.trial.arm != plain and task.start]
    left = [ended.task.trial.config for ended in now.set_apart(waiting, ahead, free)]
    if not left:
        return None
    leader = final[0].task.trial.config
    chance = math.fsum(now.belief.beats(config, leader, by=MATTERS) for config in left)
    if chance >= DOUBT:
        return None
    return Stop(
        StoppedBy.DECIDED,
        f"the chance that any trial that is left is better by {MATTERS} % of log-loss is "
        f"{chance:.1%}; {now.money}",
    )
