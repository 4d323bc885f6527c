"""Does the search find the best pair, and at what price? Replays strategies on recorded tables.

`make bench-search` replays ours, random search, Optuna's samplers and pruners, one short run each,
and full grids on the tables of bench/tables, and on made-up worlds; nothing is trained. `FULL=1`
first trains what the table with several settings lacks; it can be stopped and goes on.
"""

import warnings

import optuna

from bench import search_report, search_table, selection_cases, selection_report
from bench.options import parse, table_parser
from bench.search_report import LAWS, Findings
from bench.search_table import worlds
from bench.selection import find
from bench.train_report import Table

REPLICATES = 40
"""Made-up worlds of each law: a minute or two for all."""


def findings(tuned: Table, single: Table, *, replicates: int) -> Findings:
    """Replay everything on two tables and on made-up worlds."""
    with_settings, told = worlds(tuned.rows, budget=search_table.BUDGET, rungs=search_table.RUNGS)
    with_one, also = worlds(single.rows, budget=selection_cases.BUDGET, rungs=selection_cases.RUNGS)
    return Findings(
        tuned=search_report.on_recorded([w for w in with_settings if len(w.grid) > 1]),
        single=search_report.on_recorded(with_one),
        told=[*told, *also],
        made_up={
            name: search_report.on_made_up(law, replicates=replicates) for name, law in LAWS.items()
        },
        replicates=replicates,
    )


def main() -> None:
    parser = table_parser(__doc__, table=search_table.TABLE)
    parser.add_argument(
        "--replicates", type=int, default=REPLICATES, help="made-up worlds of each law"
    )
    options = parse(parser)
    if options.replicates < 1:
        parser.error(f"--replicates {options.replicates}: expected 1 or more made-up worlds")
    table = Table(options.table)
    if options.full:
        search_table.fill(table, find(options.data, options.datasets), limit=options.limit)
    # Optuna says every trial, and that its own pruners are experimental.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    search_report.report(
        findings(table, Table(selection_report.TABLE), replicates=options.replicates),
        publish=options.table == search_table.TABLE,
    )


if __name__ == "__main__":
    main()
