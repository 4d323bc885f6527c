"""Does the search find the best pair, and at what price? Replays strategies on recorded tables.

`make bench-search` replays ours, random search, Optuna's samplers and pruners, one short run each,
and full grids on the tables of bench/tables, and on made-up worlds; nothing is trained. `FULL=1`
first trains what the table with several settings lacks; it can be stopped and goes on.
"""

import warnings
from collections.abc import Sequence

import optuna

from bench import search_fit, search_record, search_report, selection_cases, selection_report
from bench.options import parse, table_parser
from bench.search_fit import ShortRuns
from bench.search_parts import parts_of
from bench.search_report import LAWS, MIN_DATASETS, Findings
from bench.search_table import Case, Judge, cases, halved, worlds
from bench.search_ties import named
from bench.selection import SEEDS, find
from bench.train_report import Row, Table

REPLICATES = 40
"""Made-up worlds of each law: a minute or two for all."""


def comparable(found: Sequence[Case]) -> list[Case]:
    """The cases with their first settings, as many as at least four datasets have."""
    if not found:
        return []
    ranked = sorted((case.settings for case in found), reverse=True)
    settings = ranked[min(MIN_DATASETS, len(ranked)) - 1]
    return [case.first(settings) for case in found if case.settings >= settings]


def short_runs(found: Sequence[Case], single: Sequence[Row]) -> list[ShortRuns]:
    """What short runs of both tables say of whole ones."""
    budget, rungs = selection_cases.BUDGET, selection_cases.RUNGS
    runs = [look for case in found for look in search_fit.looks_of_runs(case)]
    halves = [look for case in found for look in search_fit.looks_of_case(case)]
    seeds = search_fit.looks_of_seeds(single, budget=budget, rungs=rungs)
    return [
        ShortRuns.of("the same runs, `bench/tables/search.jsonl`", runs, search_fit.STEPS),
        ShortRuns.of("other seeds, the same table", halves, search_fit.STEPS),
        ShortRuns.of(
            "other seeds, `bench/tables/selection.jsonl`", seeds, (*rungs, budget["steps"])
        ),
    ]


def findings(tuned: Table, single: Table, *, replicates: int) -> Findings:
    """Replay everything on two tables and on made-up worlds."""
    with_settings, told = cases(tuned.rows)
    found = comparable(with_settings)
    with_one, also = worlds(single.rows, budget=selection_cases.BUDGET, rungs=selection_cases.RUNGS)
    return Findings(
        tuned=search_report.on_recorded(halved(found, judge=Judge.CHECKPOINT)),
        again=search_report.on_recorded(halved(found, judge=Judge.OTHER_SEEDS)),
        single=search_report.on_recorded(with_one),
        told=[*told, *also],
        made_up={
            name: search_report.on_made_up(law, replicates=replicates) for name, law in LAWS.items()
        },
        replicates=replicates,
        settings=found[0].settings if found else 0,
        twice=min((case.twice for case in found), default=0),
        names=[named(case) for case in found],
        short=short_runs(found, single.rows),
        parts=[parts_of(case) for case in found],
    )


def main() -> None:
    parser = table_parser(__doc__, table=search_record.TABLE)
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        choices=SEEDS,
        help="with --full: record these only, and report nothing; processes that each record "
        "their own may fill one table together",
    )
    parser.add_argument(
        "--replicates", type=int, default=REPLICATES, help="made-up worlds of each law"
    )
    options = parse(parser)
    if options.replicates < 1:
        parser.error(f"--replicates {options.replicates}: expected 1 or more made-up worlds")
    if options.seeds and not options.full:
        parser.error("--seeds is of what is measured: add --full")
    if options.full:
        sources = find(options.data, options.datasets or search_record.DATASETS)
        seeds = options.seeds or SEEDS
        search_record.fill(options.table, sources, seeds=seeds, limit=options.limit)
    if options.seeds:
        return
    # Optuna says every trial, and that its own pruners are experimental.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    tables = Table(options.table), Table(selection_report.TABLE)
    search_report.report(
        findings(*tables, replicates=options.replicates),
        publish=options.table == search_record.TABLE,
    )


if __name__ == "__main__":
    main()
