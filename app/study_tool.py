"""The process that loads numpy, Optuna and Arrow, so that the API does not have to.

`python -m app.study_tool` reads one task as JSON from its standard input, writes the answer to its
standard output, and ends.
"""

import io
import sys
from datetime import UTC, datetime
from typing import assert_never

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from app.study_tasks import (
    ColumnCopy,
    ImportanceTask,
    JournalTask,
    Kind,
    ParquetTask,
    Task,
    TrialCopy,
)
from selection.importance import Importances, importances
from selection.optuna_copy import TrialRecord, journal


def answer(task: ImportanceTask | JournalTask | ParquetTask) -> bytes:
    """Return what a task asks for."""
    match task:
        case ImportanceTask(target=target, trials=trials):
            found = importances([(t.candidate, t.value) for t in trials], target=target)
            return TypeAdapter(Importances).dump_json(found)
        case JournalTask(name=name, trials=trials):
            return journal(name, [_record(trial) for trial in trials])
        case ParquetTask(columns=columns):
            return _parquet(columns)
        case _:
            assert_never(task)


def _record(trial: TrialCopy) -> TrialRecord:
    return TrialRecord(
        number=trial.number,
        candidate=trial.candidate,
        status=trial.status,
        value=trial.value,
        started=datetime.fromtimestamp(trial.started, UTC),
        finished=None if trial.finished is None else datetime.fromtimestamp(trial.finished, UTC),
        constraints=trial.constraints,
        attributes=trial.attributes,
    )


def _parquet(columns: tuple[ColumnCopy, ...]) -> bytes:
    types = {
        Kind.BOOL: pa.bool_(),
        Kind.INT: pa.int64(),
        Kind.FLOAT: pa.float64(),
        Kind.TEXT: pa.string(),
    }
    table = pa.table(
        {column.name: pa.array(column.cells, type=types[column.kind]) for column in columns}
    )
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def main() -> None:
    """Answer the task of the standard input."""
    adapter: TypeAdapter[ImportanceTask | JournalTask | ParquetTask] = TypeAdapter(Task)
    sys.stdout.buffer.write(answer(adapter.validate_json(sys.stdin.buffer.read())))


if __name__ == "__main__":
    main()
