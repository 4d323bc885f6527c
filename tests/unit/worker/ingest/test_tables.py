"""CSV, Parquet and Arrow: the same rows as from JSON Lines, and what goes wrong in them."""

import csv
import gzip
import io
import json
from decimal import Decimal

import pyarrow as pa
import pytest
import zstandard
from pyarrow import feather, ipc
from pyarrow import parquet as pq

from core.errors import Category
from core.run_spec import DatasetPolicy
from tests.unit.worker.ingest.layout_fixtures import FACTS, FIXTURES

LIMITS = {"min_pairs": 5, "min_prompts": 5}
# Columns of text, of numbers, of true and false, and of messages.
FLAT = [
    "trl_standard",
    "argilla_ultrafeedback",
    "shp",
    "helpsteer2",
    "helpsteer2_preference",
    "arena",
    "arena_kaggle",
    "kto",
    "orca",
    "pku_saferlhf",
    "webgpt",
    "ms_swift",
    "openai",
    "nectar",
    "ultrafeedback_raw",
    "trl_conversational",
]


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()}
        )
    return text.getvalue().encode()


def as_parquet(rows, **options):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def as_arrow(rows, compression="uncompressed"):
    sink = io.BytesIO()
    feather.write_feather(pa.Table.from_pylist(rows), sink, compression=compression)
    return sink.getvalue()


def as_stream(rows):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


FORMS = {
    "csv": as_csv,
    "tsv": lambda rows: as_csv(rows, "\t"),
    "csv-semicolon": lambda rows: as_csv(rows, ";"),
    "parquet": as_parquet,
    "arrow": as_arrow,
    "arrow-stream": as_stream,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FLAT)
def test_layouts_in_every_table(run, lines, form, name):
    rows = FIXTURES[name]
    if name == "openai" and form not in ("csv", "tsv", "csv-semicolon"):
        rows = [{**row, "input": {"messages": row["input"]["messages"]}} for row in rows]
    outcome = run(FORMS[form](rows), **LIMITS)
    assert outcome.report["detected"]["container"] == form
    assert outcome.report["detected"]["layout"] == name
    plain = run(lines(rows), **LIMITS)
    assert {(r.id, r.margin, r.split) for r in outcome.rows} == {
        (r.id, r.margin, r.split) for r in plain.rows
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_compressed_tables(run, form, wrap):
    outcome = run(wrap[1](FORMS[form](FIXTURES["trl_standard"])), **LIMITS)
    assert outcome.result.num_pairs == 5
    assert outcome.report["detected"]["container"] == f"{form}.{wrap[0]}"


def test_large_tables_come_in_order(run, good):
    rows = good(3000)
    for data in (
        as_parquet(rows, row_group_size=700),
        as_parquet(rows, compression="zstd", use_dictionary=False),
        as_arrow(rows, "lz4"),
        as_stream(rows),
        as_csv(rows),
    ):
        outcome = run(data)
        assert outcome.result.num_pairs == 3000
        assert outcome.rows[-1].prompt[0].content == rows[-1]["prompt"]
        assert outcome.progress[-1] == (len(data), len(data))
        assert outcome.progress == sorted(outcome.progress)


def test_quotes_separators_and_line_ends_in_cells(run):
    text = 'He said "a, b";\n\tthen\r\nleft'
    rows = [{"prompt": f"{n} {p}", "chosen": text, "rejected": r} for n, (p, _, r) in
            enumerate(FACTS)]  # fmt: skip
    outcome = run(as_csv(rows), **LIMITS)
    assert [row.chosen[0].content for row in outcome.rows] == [text] * 5
    # Rows are named by the line on which they begin.
    assert [row.line for row in outcome.rows] == [2, 5, 8, 11, 14]


def test_byte_order_mark_and_windows_line_ends_of_csv(run):
    plain = run(as_csv(FIXTURES["trl_standard"]), **LIMITS)
    marked = b"\xef\xbb\xbf" + as_csv(FIXTURES["trl_standard"]).replace(b"\r\n", b"\n")
    assert [row.id for row in run(marked, **LIMITS).rows] == [row.id for row in plain.rows]


def test_rows_of_csv_that_do_not_fit(run):
    data = as_csv(FIXTURES["trl_standard"])
    bad = b'one,two\r\n1,2,3,4\r\n"a"b,c,d\r\n\xff\xfe,b,c\r\n,b,c\r\n\r\n'
    outcome = run(data + bad, policy=DatasetPolicy(max_invalid_fraction=0.6), **LIMITS)
    assert outcome.result.num_pairs == 5
    assert outcome.codes == {"malformed_row": 4, "missing_field": 1}
    details = [row["detail"] for row in outcome.rejected]
    assert [row["line"] for row in outcome.rejected] == [7, 8, 9, 10, 11]
    assert details[:2] == [
        "the row has 2 cells and the header 3",
        "the row has 4 cells and the header 3",
    ]
    assert "is no CSV" in details[2]
    assert "not valid UTF-8" in details[3]
    assert details[4] == "`prompt` is null"


def test_quote_that_never_ends(run):
    data = as_csv(FIXTURES["trl_standard"]) + b'"open,' + b"x" * 50_000
    lenient = DatasetPolicy(max_invalid_fraction=0.9)
    outcome = run(data, policy=lenient, max_line_bytes=10_000, **LIMITS)
    assert outcome.result.num_pairs == 5
    assert set(outcome.codes) == {"malformed_row"}


def test_numbers_in_texts_of_csv_stay_texts(run):
    rows = [{"prompt": f"{n}", "chosen": "42", "rejected": "[1]"} for n in range(5)]
    row = run(as_csv(rows), **LIMITS).rows[0]
    assert (row.prompt[0].content, row.rejected[0].content) == ("0", "[1]")


def test_mapped_columns_of_csv_are_read_by_their_field(run):
    rows = [{"q": p, "a": a, "ok": ok} for p, c, r in FACTS for a, ok in ((c, "TRUE"), (r, "0"))]
    mapping = {"prompt": "q", "completion": "a", "label": "ok"}
    outcome = run(as_csv(rows), policy=DatasetPolicy(column_mapping=mapping), **LIMITS)
    assert outcome.report["detected"]["layout"] == "kto"
    assert outcome.result.num_pairs == 5


def test_header_of_unknown_names_is_named(run):
    rows = [{"frage": p, "gut": c, "schlecht": r} for p, c, r in FACTS]
    outcome = run(as_csv(rows), **LIMITS)
    assert outcome.report["detected"]["container"] == "csv"
    assert "`frage`, `gut`, `schlecht`" in outcome.result.failure.message


def test_values_that_json_has_not(run):
    rows = [
        {
            "prompt": p,
            "chosen": c,
            "rejected": r,
            "margin": Decimal("1.5"),
            "meta": {"raw": b"\xff", "text": b"ok"},
        }
        for p, c, r in FACTS
    ]
    row = run(as_parquet(rows), **LIMITS).rows[0]
    assert (row.margin, row.meta) == (1.5, {"raw": "/w==", "text": "ok"})


@pytest.mark.parametrize("form", ["parquet", "arrow", "arrow-stream"])
def test_damaged_tables(run, good, form):
    whole = FORMS[form](good(2000))
    for data in (
        whole[: len(whole) // 2],
        whole[:8] + b"\x00" * 2000 + whole[2008:],
        whole[:-40] + b"\xff" * 40,
    )[: 2 if form == "arrow-stream" else 3]:
        failure = run(data).result.failure
        assert failure.code == f"corrupt_{form.replace('-', '_')}"
        assert failure.category is Category.INVALID
        assert "What is" not in failure.message


def test_offsets_that_lead_out_of_the_file_are_refused(run, good):
    texts = pa.array([row["prompt"] for row in good(20)])
    offsets = bytearray(texts.buffers()[1].to_pybytes())
    offsets[4:8] = (2**31 - 1).to_bytes(4, "little")
    buffers = [None, pa.py_buffer(bytes(offsets)), texts.buffers()[2]]
    broken = pa.Array.from_buffers(pa.string(), len(texts), buffers)
    batch = pa.RecordBatch.from_arrays([broken, texts, texts], ["prompt", "chosen", "rejected"])
    sink = io.BytesIO()
    with ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    assert run(sink.getvalue()).result.failure.code == "corrupt_arrow_stream"


@pytest.mark.parametrize("form", ["parquet", "arrow", "arrow-stream"])
def test_tables_without_rows(run, form):
    schema = pa.schema([("prompt", pa.string()), ("chosen", pa.string())])
    table, sink = pa.Table.from_pylist([], schema), io.BytesIO()
    if form == "parquet":
        pq.write_table(table, sink)
    else:
        new = ipc.new_file if form == "arrow" else ipc.new_stream
        with new(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist([], schema))
    assert run(sink.getvalue()).result.failure.code == "empty_file"


def test_tables_larger_than_the_limit(run, good):
    rows = [{**row, "chosen": "x" * 2000} for row in good(500)]
    for form in ("parquet", "arrow", "csv"):
        failure = run(FORMS[form](rows), max_decompressed_bytes=100_000).result.failure
        assert (failure.code, failure.category) == ("file_too_large", Category.TOO_LARGE)


def test_rows_of_tables_beyond_the_line_limit(run, good):
    rows = [*good(12), {"prompt": "long", "chosen": "x" * 5000, "rejected": "y"}]
    lenient = DatasetPolicy(max_invalid_fraction=0.5)
    for form in FORMS:
        outcome = run(FORMS[form](rows), policy=lenient, max_line_bytes=1000)
        assert outcome.result.num_pairs == 12
        assert sum(outcome.codes.values()) == 1


def test_compressed_table_bomb(run):
    rows = [{"prompt": "q", "chosen": "x" * 100_000, "rejected": "y"}] * 300
    failure = run(as_parquet(rows), max_decompressed_bytes=10_000_000).result.failure
    assert failure.code == "file_too_large"
