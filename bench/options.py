"""Arguments that the benchmarks which fill a table share."""

import argparse
from pathlib import Path


def table_parser(description: str | None, *, table: Path) -> argparse.ArgumentParser:
    """A parser of what is measured, and of where its rows are kept."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--full", action="store_true", help="measure what the table lacks")
    parser.add_argument("--limit", type=int, help="with --full: at most so many runs")
    parser.add_argument("--data", type=Path, help="folder of .jsonl or .jsonl.gz files")
    parser.add_argument("--datasets", nargs="+", help="names of files in it, without endings")
    parser.add_argument("--table", type=Path, default=table, help="where rows are kept")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments of `table_parser`; one that would be ignored ends the program."""
    options = parser.parse_args()
    if not options.full and (options.limit or options.data or options.datasets):
        parser.error("--limit, --data and --datasets are of what is measured: add --full")
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit {options.limit}: expected 1 or more runs")
    return options
