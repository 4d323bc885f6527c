"""What commands print: progress on standard error, results on standard output."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from kdpo.types import Job, Recommendation

WIDTH_OF_A_PIPE = 160


def out() -> Console:
    """Return where results go."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_PIPE)


def err() -> Console:
    """Return where everything else goes."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: object, *, one_line: bool = False) -> None:
    """Print a value as JSON, on one line where nobody reads along."""
    indent = 2 if sys.stdout.isatty() and not one_line else None
    sys.stdout.write(json.dumps(plain(value), indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def plain(value: object) -> Any:
    """Return what JSON can say of a value."""
    match value:
        case BaseModel():
            return value.model_dump(mode="json", by_alias=True)
        case dict():
            return {key: plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _:
            return value


def table(*columns: str, rows: Sequence[Sequence[object]]) -> Table:
    """Return a table without lines, as other tools can cut it."""
    made = Table(*columns, box=None, pad_edge=False)
    for column in made.columns[:-1]:
        column.no_wrap = True
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


def when(seconds: float | None) -> str:
    """Return a time to the minute, in UTC."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(" ", "minutes")


class JobBar:
    """Tells how a job goes: a bar for people, a line for each new phase in a log."""

    def __init__(self, title: str, bars: Progress | None) -> None:
        self._title = title
        self._bars = bars
        self._task: TaskID | None = None
        self._said = ""

    def told(self, job: Job) -> None:
        """Show a job as it is now."""
        line, fraction = f"{self._title}: {self._doing(job)}", _fraction(job)
        if self._bars is None:
            if line != self._said:
                err().print(line)
            self._said = line
            return
        if self._task is None:
            self._task = self._bars.add_task(line, total=1.0, left="")
        eta = job.progress.eta_seconds if job.progress is not None else None
        self._bars.update(
            self._task,
            description=line,
            completed=fraction,
            left="" if eta is None or job.ended else f"{eta:.0f} s left",
        )

    def uploaded(self, done: int, total: int) -> None:
        """Show how much of a file has gone up."""
        if self._bars is None:
            return
        if self._task is None:
            self._task = self._bars.add_task(self._title, total=1.0, left="")
        self._bars.update(
            self._task, description=f"{self._title}: upload", completed=done / max(1, total)
        )

    def _doing(self, job: Job) -> str:
        if job.status == "queued" and job.queue is not None and job.queue.ahead:
            return f"queued, {job.queue.ahead} ahead"
        return job.phase.replace("_", " ") if job.phase and not job.ended else job.status


def _fraction(job: Job) -> float:
    if job.status == "succeeded":
        return 1.0
    return job.progress.fraction if job.progress is not None else 0.0


@contextmanager
def job_bar(title: str) -> Iterator[JobBar]:
    """Show one job while the block runs; on a terminal as a bar, elsewhere as lines."""
    console = err()
    if not console.is_terminal:
        yield JobBar(title, None)
        return
    columns = (
        TextColumn("{task.description:<40}"), BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        yield JobBar(title, bars)


@contextmanager
def byte_bar(title: str) -> Iterator[Progress | None]:
    """Show a download while the block runs, on a terminal."""
    console = err()
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), DownloadColumn(),
               TransferSpeedColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bars:
        bars.add_task(title, total=None)
        yield bars


def show_recommendation(found: Recommendation, *, top: int) -> None:
    """Print the pair, what can be said of it, the ranking, and how to go on."""
    console, answer = out(), found.answer
    if answer is None:
        console.print(f"{found.id} is {found.status} and has no answer yet")
        return
    told = "provisional, " if found.provisional else ""
    console.print(
        f"[bold]{answer.kernel} × {answer.divergence}[/bold]  ({told}confidence "
        f"{answer.confidence:.2f} that it is ahead of the next)"
    )
    console.print()
    console.print(answer.summary, soft_wrap=True)
    for reason in reasons(found):
        console.print(f"- {reason}", soft_wrap=True)
    console.print()
    console.print(ranking_table(found, top=top))
    hidden = len(found.ranking) - top
    if hidden > 0:
        console.print(f"and {hidden} more: --top {len(found.ranking)}, or --json")


def reasons(found: Recommendation) -> list[str]:
    """Return why, in sentences."""
    answer = found.answer
    said = [found.ranking[0].reason] if found.ranking else []
    if answer is not None:
        said += [
            choice.sentence
            for choice in (answer.kernel_choice, answer.divergence_choice)
            if choice is not None
        ]
    noise = (found.evidence or {}).get("noise")
    if isinstance(noise, Mapping) and isinstance(noise.get("sentence"), str):
        said.append(noise["sentence"])
    return [sentence for sentence in said if sentence]


def ranking_table(found: Recommendation, *, top: int) -> Table:
    """Return the best pairs with their scores, intervals, and which of them tie."""
    rows = []
    for pair in found.ranking[:top]:
        behind = (pair.model_extra or {}).get("behind")
        separated = isinstance(behind, Mapping) and bool(behind.get("separated"))
        rows.append(
            (
                pair.rank, pair.kernel, pair.divergence, pair.mode, f"{pair.score.value:.2f}",
                f"{pair.score.low:.2f} to {pair.score.high:.2f}",
                "" if pair.rank == 1 else ("behind" if separated else "tied"),
            )
        )  # fmt: skip
    return table("rank", "kernel", "divergence", "as", "score", "95 %", "to first", rows=rows)


def show_outcome(job: Job) -> None:
    """Print what a fine-tuning job found."""
    console, result = out(), job.result or {}
    comparison, search = result.get("comparison"), result.get("search")
    for part in (search, comparison):
        if isinstance(part, Mapping) and isinstance(part.get("sentence"), str):
            console.print(part["sentence"], soft_wrap=True)
    run, baseline = result.get("run") or {}, result.get("baseline") or {}
    rows = []
    for name, title in (
        ("log_loss", "calibrated log-loss"), ("accuracy", "accuracy"), ("drift", "drift, nats"),
    ):  # fmt: skip
        values = [_number((side.get("evaluation") or {}).get(name)) for side in (run, baseline)]
        if any(values):
            rows.append((title, *values))
    if rows:
        console.print(table("on the test split", "this model", "plain DPO", rows=rows))


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""
