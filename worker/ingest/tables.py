"""Rows of Parquet and Arrow files, as JSON.

Imported only for such files: a text must not load Arrow.
"""

import base64
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import BinaryIO

import orjson
import pyarrow as pa
from pyarrow import ipc
from pyarrow import parquet as pq

from core.errors import InvalidInput
from worker.ingest.decompress import Budget
from worker.ingest.formats import Format
from worker.ingest.texts import Line, made_line

# Rows that are turned into objects at once.
_ROWS = 64
_BUFFER = 256 * 1024
_JSON = orjson.OPT_NON_STR_KEYS | orjson.OPT_NAIVE_UTC | orjson.OPT_SERIALIZE_NUMPY

Progress = Callable[[float], None]


def table_rows(
    file: BinaryIO, format_: Format, *, budget: Budget, max_bytes: int, on_part: Progress
) -> Iterator[Line]:
    """Yield the rows of a table; `on_part` gets the part of the file that was read, in [0, 1].

    Raises:
        InvalidInput: `corrupt_<format>`.
        TooLarge: the rows are larger than the limit, as the file says or as they turn out.
        MemoryError: a part of the file needs more memory than the process may have.
    """
    # Arrow's own pool reserves a gigabyte of address space, which is limited here.
    pa.set_memory_pool(pa.system_memory_pool())
    pa.set_cpu_count(1)
    number = size = 0
    try:
        for batch in _batches(file, format_, budget=budget, on_part=on_part):
            # Offsets and lengths are the file's word: unchecked they may lead out of the memory.
            batch.validate(full=True)
            names = batch.schema.names
            columns: list[list[object]] = []
            for start in range(0, batch.num_rows, _ROWS):
                columns = [column.slice(start, _ROWS).to_pylist() for column in batch.columns]
                for cells in zip(*columns, strict=True):
                    number += 1
                    line = _line(number, dict(zip(names, cells, strict=True)), max_bytes)
                    size += line.length
                    budget.check_size(size)
                    yield line
            # Before the next one is read: a batch may be most of the file.
            del batch, columns
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        # Nothing of the text of the library's error: it may quote the file.
        raise InvalidInput(
            f"the {format_} file is damaged or cut off after {number} rows "
            f"({type(error).__name__})",
            code=f"corrupt_{format_.replace('-', '_')}",
            hint="write the file again and check that it can be read there",
            param="file",
        ) from None


def _batches(
    file: BinaryIO, format_: Format, *, budget: Budget, on_part: Progress
) -> Iterator[pa.RecordBatch]:
    match format_:
        case Format.PARQUET:
            with pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER) as table:
                budget.check_size(
                    sum(
                        table.metadata.row_group(index).total_byte_size
                        for index in range(table.num_row_groups)
                    )
                )
                rows, done = max(1, table.metadata.num_rows), 0
                for index in range(table.num_row_groups):
                    for batch in table.iter_batches(_ROWS, row_groups=[index], use_threads=False):
                        yield batch
                        done += batch.num_rows
                        on_part(min(1.0, done / rows))
        case Format.ARROW:
            with ipc.open_file(file) as reader:
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)
                    on_part((index + 1) / reader.num_record_batches)
        case Format.ARROW_STREAM:
            with ipc.open_stream(file) as reader:
                yield from reader
        case _:
            raise AssertionError(f"{format_} is no table")


def _line(number: int, row: dict[str, object], max_bytes: int) -> Line:
    try:
        data = orjson.dumps(row, default=_as_json, option=_JSON)
    except (orjson.JSONEncodeError, TypeError):
        return Line(number, b"", 0, oversize=False, fault="the row has values that JSON has not")
    return made_line(number, data, max_bytes=max_bytes)


def _as_json(value: object) -> object:
    match value:
        case Decimal():
            return float(value)
        case timedelta():
            return value.total_seconds()
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return base64.b64encode(value).decode()
        case _:
            raise TypeError(f"{type(value).__name__} is not JSON")
