"""The canonical rows as one Parquet file.

Imported only where there are rows to write: a text must not load Arrow before.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pyarrow as pa
from pyarrow import parquet as pq

from core.settings import MIB
from worker.ingest.files import atomic_writer

SCHEMA_VERSION = "1"
_MESSAGES = pa.list_(
    pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)])
)
# `meta` is an object of any form: JSON text.
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), False),
        pa.field("line", pa.int64(), False),
        pa.field("prompt", _MESSAGES, False),
        pa.field("chosen", _MESSAGES, False),
        pa.field("rejected", _MESSAGES, False),
        pa.field("margin", pa.float64()),
        pa.field("weight", pa.float64(), False),
        pa.field("group_id", pa.string(), False),
        pa.field("source", pa.string(), False),
        pa.field("meta", pa.string(), False),
        pa.field("split", pa.string(), False),
    ],
    metadata={"kdpo.schema_version": SCHEMA_VERSION},
)
# Bytes of JSON in a row group: what is in memory at once, some times over.
_GROUP_BYTES = 4 * MIB
_GROUP_ROWS = 20_000


def write_parquet(canonical: Path, target: Path, *, on_part: Callable[[], None]) -> None:
    """Write the rows of a canonical file as Parquet; the same rows give the same bytes.

    `on_part` is called between row groups and may raise to stop; no file is left then.
    """
    # Arrow's own pool reserves a gigabyte of address space, which is limited here.
    pa.set_memory_pool(pa.system_memory_pool())
    pa.set_cpu_count(1)
    with (
        atomic_writer(target) as file,
        pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer,
    ):
        for rows in _groups(canonical):
            writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))
            on_part()


def _groups(canonical: Path) -> Iterator[list[dict[str, object]]]:
    rows: list[dict[str, object]] = []
    size = 0
    with canonical.open("rb") as file:
        for line in file:
            row = orjson.loads(line)
            rows.append({**row, "meta": orjson.dumps(row["meta"]).decode()})
            size += len(line)
            if size >= _GROUP_BYTES or len(rows) >= _GROUP_ROWS:
                yield rows
                rows, size = [], 0
    if rows:
        yield rows
