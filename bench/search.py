"""Does the search find the best pair, and at what price? Replays strategies on recorded tables.

`make bench-search` replays ours, random search, Optuna's samplers and pruners, one short run each,
and full grids on the tables of bench/tables, and on made-up worlds; nothing is trained. `FULL=1`
first trains what the table with several settings lacks; it can be stopped and goes on.
"""

import argparse
import warnings
from pathlib import Path

import optuna

from bench import search_report, search_table, selection_cases, selection_report
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="measure what the table lacks")
    parser.add_argument("--limit", type=int, help="with --full: at most so many runs")
    parser.add_argument("--data", type=Path, help="folder of .jsonl or .jsonl.gz files")
    parser.add_argument("--datasets", nargs="+", help="names of files in it, without endings")
    parser.add_argument(
        "--table", type=Path, default=search_table.TABLE, help="where rows are kept"
    )
    parser.add_argument(
        "--replicates", type=int, default=REPLICATES, help="made-up worlds of each law"
    )
    options = parser.parse_args()
    if not options.full and (options.limit or options.data or options.datasets):
        parser.error("--limit, --data and --datasets are of what is measured: add --full")
    if min(options.replicates, options.limit or 1) < 1:
        parser.error("--limit and --replicates are 1 or more")
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
