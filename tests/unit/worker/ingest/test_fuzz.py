"""Whatever the bytes: a result, never an exception, and a report that can be written."""

import gzip
import lzma

import orjson
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import KdpoError
from tests.unit.worker.ingest.conftest import good_row, jsonl
from tests.unit.worker.ingest.test_archives import PACK
from tests.unit.worker.ingest.test_tables import FORMS

quick = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

texts = st.text(st.characters(codec="utf-8"), max_size=20)
scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)
turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["system", "user", "assistant", "tool", "bot", None, ["user"]]),
            "content": texts | values,
        },
    ),
    max_size=4,
)
sides = texts | turns | values | texts.map(lambda t: f"\n\nHuman: {t}\n\nAssistant: {t}")
rows = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("prompt", "chosen", "rejected"), sides),
        **dict.fromkeys(("margin", "score_chosen", "meta", "source", "x"), values),
    },
)


def check(outcome):
    result = outcome.result
    assert (result.failure is None) == result.status.is_usable
    assert result.failure is None or isinstance(result.failure, KdpoError)
    assert (result.canonical_sha256 is not None) == result.status.is_usable
    assert orjson.loads(orjson.dumps(result.report)) is not None
    counts = result.report["counts"]
    assert counts["rows"] == counts["converted"] + counts["rejected"] + counts["without_pair"]
    assert counts["without_pair"] >= 0
    assert counts["pairs"] + counts["duplicates"] >= counts["converted"] // 2
    assert len(outcome.rejected) == counts["rejected"]
    assert len(outcome.rows) == (counts["pairs"] if result.status.is_usable else 0)


@quick
@given(st.binary(max_size=300))
def test_any_bytes(run, data):
    check(run(data))
    check(run(b"\x1f\x8b" + data))
    check(run(gzip.compress(data)))


@quick
@given(st.lists(rows | values, max_size=12), st.sampled_from([b"\n", b"\r\n", b"\n\n", b""]))
def test_any_rows(run, lines, good, data, end):
    encoded = end.join(orjson.dumps(row) for row in data if _writable(row))
    check(run(encoded))
    check(run(lines(good(30)) + encoded))


@quick
@given(st.data())
def test_damaged_files(run, lines, good, data):
    whole = bytearray(gzip.compress(lines(good(30))))
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] = data.draw(st.integers(0, 255))
    check(run(bytes(whole[: data.draw(st.integers(0, len(whole)))])))


ROWS = [good_row(number) for number in range(30)]
CONTAINERS = {
    **{name: form(ROWS) for name, form in FORMS.items()},
    **{name: pack({"a.jsonl": jsonl(ROWS)}) for name, pack in PACK.items()},
    "zst": zstandard.compress(jsonl(ROWS)),
    "xz": lzma.compress(jsonl(ROWS)),
    "json": b"[" + jsonl(ROWS).strip().replace(b"\n", b",") + b"]",
}


@quick
@given(st.data())
def test_damaged_containers(run, data):
    whole = bytearray(CONTAINERS[data.draw(st.sampled_from(sorted(CONTAINERS)))])
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=8))
    try:
        outcome = run(bytes(whole))
    except MemoryError:
        # A length that the file claims; the job turns it into an error of its own.
        return
    check(outcome)


def _writable(row):
    try:
        orjson.dumps(row)
    except TypeError:
        return False
    return True
