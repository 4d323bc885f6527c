"""Warm starts against cold ones: what is drawn, what is measured, and what the goals ask for."""

import json

import numpy as np
import pytest

from bench.history import _named, lost, past_search, recorded, whole_searches
from bench.history_report import (
    PAGE,
    SUMMARY,
    TABLES,
    Findings,
    Start,
    block,
    goals,
    lines,
    summary,
)
from bench.history_worlds import PAIRS, Past, merits, service
from bench.report import ROOT
from bench.search_world import Law, made_of
from bench.selection_cases import PAIRS as TRAINED
from bench.selection_read import read
from bench.selection_report import TABLE
from bench.train_report import Table
from core.spec import DivergenceName, KernelName
from tests.unit.selection.samples import profile


def start(kind: str, harm: float, *, data: int = 0, searches: int = 20) -> Start:
    return Start(
        kind=kind, searches=searches, data=f"data {data}", used=True, cold=1.0, warm=1.0 + harm,
        cold_tau=0.1, warm_tau=0.2, cheap=1.0 + harm,
    )  # fmt: skip


def starts(kind: str, harm: float, *, data: int = 8) -> list[Start]:
    return [start(kind, harm, data=i) for i in range(data)]


def test_services_are_drawn_by_the_seed_and_are_what_they_are_called() -> None:
    one, again = (service(Past.SAME, 6, template=profile(), seed=3) for _ in range(2))
    assert one.gains == again.gains
    assert one.warm == again.warm
    assert service(Past.SAME, 6, template=profile(), seed=4).gains != one.gains
    noise = service(Past.NOISE, 6, template=profile(), seed=3)
    assert noise.gains == pytest.approx(noise.cold)
    assert noise.regret(noise.cold) == pytest.approx(0.0)
    assert merits(np.random.default_rng(0), scale=0.0) == dict.fromkeys(
        [*KernelName, *DivergenceName], 0.0
    )


def test_the_reverse_service_is_misled_and_the_same_one_is_not() -> None:
    misled = service(Past.REVERSE, 20, template=profile(), seed=0)
    assert misled.regret(misled.warm) > misled.regret(misled.cold)
    helped = service(Past.SAME, 20, template=profile(), seed=0)
    assert helped.regret(helped.warm) < helped.regret(helped.cold)


def test_searches_that_are_not_asked_change_nothing() -> None:
    found = whole_searches(Past.OWN, 4, template=profile(), number=2)
    assert [s.used for s in found] == [False, False], "four searches are too few to be asked"
    assert [s.harm for s in found] == [0.0, 0.0]
    assert all(s.cheap is None for s in found)


def test_a_search_whose_runs_show_the_truth_loses_nothing_whatever_it_was_told() -> None:
    true = _named(service(Past.SAME, 5, template=profile(), seed=0).gains)
    clear = Law(
        curvature=0.0, shrink=(1.0,) * 4, correlation=(1.0,) * 4, seed_sd=(0.0,) * 4,
        score_sd=(0.0,) * 4,
    )  # fmt: skip
    world = made_of(clear, 0, gains=true, scores=true)
    wrong = {name: -gain for name, gain in true.items()}
    for said in (true, wrong):
        assert lost(world, said, budget=0.05 * world.grid_cost(), seeds=(0, 1)) == pytest.approx(0)
    nothing = lost(world, wrong, budget=0.01 * world.grid_cost(), seeds=(0,))
    assert nothing > 0.5, "with money for a few short runs the first of a wrong ranking stays"


def test_pairs_of_worlds_are_those_that_are_trained() -> None:
    assert set(_named(dict.fromkeys(PAIRS, 0.0))) == set(TRAINED)


def test_a_recorded_case_becomes_a_finished_search() -> None:
    found = read(Table(TABLE).rows)[0][0]
    past = past_search(found)
    assert len({(g.kernel, g.divergence) for g in past.gains}) == len(past.gains) == 28
    best = max(past.gains, key=lambda gain: gain.percent)
    name = f"{best.kernel} × {best.divergence}"
    assert name == TRAINED[int(found.case.trained.argmin())]


@pytest.mark.parametrize(
    ("same", "other", "reverse", "met"),
    [
        (-0.5, 0.0, 0.0, [True, True, True, True, True, True]),
        (0.05, 0.05, 0.05, [False, True, True, True, True, True]),
        (-0.5, 0.2, 0.0, [True, False, True, False, True, True]),
        (-0.5, 0.0, 0.2, [True, True, True, True, False, True]),
    ],
)
def test_goals_ask_for_the_upper_end(
    same: float, other: float, reverse: float, met: list[bool]
) -> None:
    made = [
        *starts(Past.SAME, same), *starts(Past.NOISE, 0.0), *starts(Past.OWN, other),
        *starts(Past.REVERSE, reverse),
    ]  # fmt: skip
    found = Findings(made, made, starts(TABLES[0], 0.0), starts(TABLES[0], 0.0))
    assert [goal["met"] for goal in goals(found)] == met


def test_few_recorded_datasets_and_nothing_measured_meet_no_goal() -> None:
    few = Findings([], [], starts(TABLES[0], -1.0, data=3), starts(TABLES[0], -1.0, data=3))
    assert [(g["measured"], g["met"]) for g in goals(few)] == [(None, False)] * 6


def test_a_line_is_over_the_starts_of_one_kind_and_number() -> None:
    several = [*starts("a", 0.5), start("a", 9.0, searches=5), *starts("b", -0.5)]
    found = lines(several)
    assert [(x.kind, x.searches, x.harm.value) for x in found] == [
        ("a", 20, 0.5), ("a", 5, 9.0), ("b", 20, -0.5),
    ]  # fmt: skip
    assert found[0].saved is not None
    assert found[0].saved.value == pytest.approx(0.5)


def test_the_page_has_what_was_kept_and_the_kept_is_whole() -> None:
    kept = json.loads(SUMMARY.read_text(encoding="utf-8"))
    assert block(kept) in PAGE.read_text(encoding="utf-8")
    assert {"goals", "sources"} == set(kept)
    made = starts(Past.SAME, 0.0)
    assert set(summary(Findings(made, made, made, made))["sources"]) == set(kept["sources"])


def test_every_recorded_case_is_new_to_the_searches_before_it() -> None:
    table = Table(ROOT / "bench" / "tables" / "selection.jsonl")
    cases = read(table.rows)[0]
    first, _ = recorded(table)
    assert len(first) == 2 * len(cases)
    for found in first:
        others = [each for each in cases if each.case.data != found.data]
        assert found.searches == len(others)
