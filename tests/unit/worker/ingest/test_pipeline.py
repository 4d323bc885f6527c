"""From bytes to a result: verdicts, report, files on disk, stopping."""

import errno
import hashlib
import statistics

import orjson
import pytest

from core.errors import CancelRequested, Category, InvalidInput, StorageFull
from core.run_spec import DatasetPolicy
from core.settings import MIB, DataLimits
from worker.ingest.canonical import from_line, read_canonical, to_line
from worker.ingest.files import atomic_writer, full_disk_as_error
from worker.ingest.pipeline import CANONICAL_NAME, REJECTED_NAME, ingest


def test_ready_dataset(run, lines, good):
    outcome = run(lines(good(40)))
    result = outcome.result
    assert (result.status, result.failure) == ("ready", None)
    assert (result.num_rows, result.num_rejected) == (40, 0)
    assert (result.num_pairs, result.num_prompts) == (40, 40)
    data = (outcome.out_dir / CANONICAL_NAME).read_bytes()
    assert result.canonical_sha256 == hashlib.sha256(data).hexdigest()
    assert sorted(p.name for p in outcome.out_dir.iterdir()) == [CANONICAL_NAME, REJECTED_NAME]
    assert (outcome.out_dir / REJECTED_NAME).read_bytes() == b""


def test_report_has_the_documented_shape(run, lines, good):
    outcome = run(lines(good(40)))
    report = outcome.report
    assert orjson.loads(orjson.dumps(report)) == report
    assert report["object"] == "dataset.report"
    assert (report["dataset_id"], report["status"]) == ("ds_test", "ready")
    assert report["complete"] is True
    assert report["detected"] == {
        "layout": "trl_standard",
        "confidence": 1.0,
        "container": "jsonl",
        "alternatives": [],
    }
    assert report["mapping"] == {name: name for name in ("prompt", "chosen", "rejected")}
    assert report["counts"] == {
        "rows": 40,
        "converted": 40,
        "rejected": 0,
        "without_pair": 0,
        "ties_dropped": 0,
        "below_margin": 0,
        "identical_answers": 0,
        "unpaired": 0,
        "over_limit": 0,
        "duplicates": 0,
        "pairs": 40,
        "prompts": 40,
        "train": 28,
        "validation": 6,
        "test": 6,
    }
    assert (report["errors"], report["failure"]) == ([], None)
    assert [check["check"] for check in report["lint"]] == [
        "length_bias",
        "identical_pair",
        "duplicate_pair",
        "label_conflict",
        "tie",
        "near_duplicate",
        "eval_overlap",
        "eval_similar",
        "prompt_leak",
    ]
    shown = [entry["canonical"] for entry in report["preview"]]
    assert shown == [orjson.loads(to_line(row)) for row in outcome.rows[:3]]
    assert [entry["raw"] for entry in report["preview"]] == good(40)[:3]
    assert all(entry["rendered"] is None for entry in report["preview"])


def test_dry_run_reports_and_keeps_no_pairs(run, lines, good):
    kept = run(lines(good(40)))
    outcome = run(lines(good(40)), policy=DatasetPolicy(dry_run=True))
    assert (outcome.result.status, outcome.result.failure) == ("checked", None)
    assert outcome.result.canonical_sha256 is None
    assert [path.name for path in outcome.out_dir.iterdir()] == [REJECTED_NAME]
    assert outcome.report == {**kept.report, "status": "checked"}
    assert run(b"junk\n", policy=DatasetPolicy(dry_run=True)).result.status == "invalid"


def test_same_bytes_give_the_same_dataset(run, lines, good):
    first, second = run(lines(good(40))), run(lines(good(40)))
    assert first.result == second.result


def test_canonical_rows_round_trip(run, lines, good):
    outcome = run(lines(good(12)))
    assert [from_line(to_line(row)) for row in outcome.rows] == outcome.rows
    path = outcome.out_dir / CANONICAL_NAME
    by_split = [list(read_canonical(path, split)) for split in ("train", "validation", "test")]
    assert sum(map(len, by_split)) == 12
    assert all(row.split == "test" for row in by_split[2])
    with pytest.raises(InvalidInput, match="received split 'dev', expected one of train"):
        list(read_canonical(path, "dev"))


@pytest.mark.parametrize("damage", [b"{}\n", b"not json\n", b"[]\n", b'{"split": "train"}\n'])
def test_damaged_canonical_file(run, lines, good, damage):
    path = run(lines(good(12))).out_dir / CANONICAL_NAME
    path.write_bytes(path.read_bytes() + damage)
    with pytest.raises(InvalidInput, match="line 13 of the canonical file is damaged") as caught:
        list(read_canonical(path))
    assert caught.value.code == "canonical_damaged"


def test_invalid_fraction_decides(run, lines, good):
    bad = [{"prompt": "q", "chosen": "yes"}]
    data = lines(good(99) + bad)
    assert run(data).result.status == "ready_with_warnings"

    outcome = run(lines(good(98) + bad * 2))
    failure = outcome.result.failure
    assert (failure.code, failure.category) == ("dataset_invalid", Category.INVALID)
    assert "2 of 100 rows were rejected" in failure.message
    assert "missing_field (2 rows), first on line 99: `rejected` is missing" in failure.message
    assert outcome.report["counts"]["converted"] == 98
    assert outcome.report["failure"]["code"] == "dataset_invalid"
    assert not (outcome.out_dir / CANONICAL_NAME).exists()
    assert len(outcome.rejected) == 2

    assert run(data, policy=DatasetPolicy(on_invalid="fail")).result.status == "invalid"
    lenient = DatasetPolicy(max_invalid_fraction=0.02)
    assert run(lines(good(98) + bad * 2), policy=lenient).result.failure is None


def test_one_pair_is_too_few(run, lines, good):
    outcome = run(lines(good(1)))
    assert outcome.result.failure.code == "too_few_pairs"
    assert "1 distinct pairs; at least 10" in outcome.result.failure.message
    assert outcome.result.num_pairs == 1
    assert outcome.report["preview"][0]["canonical"]["line"] == 1


def test_too_few_prompts(run, lines):
    rows = [{"prompt": f"q{n % 2}", "chosen": f"y{n}", "rejected": "no"} for n in range(20)]
    assert run(lines(rows)).result.failure.code == "too_few_prompts"


def test_invalid_upload_removes_an_older_canonical_file(run, lines, good):
    path = run(lines(good(20))).out_dir / CANONICAL_NAME
    assert path.exists()
    run(b"")
    assert not path.exists()


def test_duplicates_are_dropped_and_counted(run, lines, good):
    outcome = run(lines(good(20) + good(3)))
    assert outcome.result.status == "ready_with_warnings"
    counts = outcome.report["counts"]
    assert (counts["rows"], counts["converted"], counts["rejected"]) == (23, 23, 0)
    assert (counts["duplicates"], counts["pairs"]) == (3, 20)
    assert outcome.lint("duplicate_pair")["lines"] == [21, 22, 23]


def test_contradicting_pairs_are_kept_and_reported(run, lines, good):
    rows = good(20)
    swapped = {**rows[4], "chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]}
    outcome = run(lines([*rows, swapped]))
    assert outcome.result.num_pairs == 21
    check = outcome.lint("label_conflict")
    assert (check["level"], check["count"], check["lines"]) == ("warn", 1, [21])


def test_length_bias_is_cohens_d(run, lines):
    lengths = [(10 + n % 7, 8 + n % 5) for n in range(30)]
    rows = [
        {"prompt": f"q{n}", "chosen": "c" * c, "rejected": "r" * r}
        for n, (c, r) in enumerate(lengths)
    ]
    outcome = run(lines(rows))
    chosen, rejected = zip(*lengths, strict=True)
    pooled = ((statistics.variance(chosen) + statistics.variance(rejected)) / 2) ** 0.5
    expected = (statistics.fmean(chosen) - statistics.fmean(rejected)) / pooled
    check = outcome.lint("length_bias")
    assert check["value"] == pytest.approx(expected, abs=1e-4)
    assert (check["level"], outcome.result.status) == ("warn", "ready_with_warnings")


@pytest.mark.parametrize(("rejected", "level", "value"), [("xx", "warn", None), ("xyx", "ok", 0.0)])
def test_length_bias_without_variance(run, lines, rejected, level, value):
    rows = [{"prompt": f"q{n}", "chosen": "xxx", "rejected": rejected} for n in range(12)]
    check = run(lines(rows)).lint("length_bias")
    assert (check["level"], check["value"]) == (level, value)


def test_preview_cuts_long_texts(run, lines, good):
    rows = good(12)
    rows[0]["prompt"] = "p" * 10_000
    rows[0]["meta"] = {"k": "m" * 10_000}
    shown = run(lines(rows)).report["preview"][0]
    preview = shown["canonical"]
    assert shown["raw"]["prompt"] == "p" * 2000 + "…"
    assert preview["prompt"][0]["content"] == "p" * 2000 + "…"
    assert preview["meta"] == {}


def test_row_and_error_limits(run, lines, good):
    outcome = run(lines(good(40)), max_rows=39)
    assert (outcome.result.failure.code, outcome.result.num_rows) == ("too_many_rows", 39)
    assert outcome.result.failure.category is Category.TOO_LARGE

    outcome = run(b"junk\n" * 5000 + lines(good(40)), max_errors=200)
    assert outcome.result.failure.code == "dataset_invalid"
    assert outcome.report["complete"] is False
    assert outcome.result.num_rejected == 200


def test_deep_rows_that_the_limits_allow_can_be_written(run, lines, good):
    rows = good(12)
    rows[0]["meta"] = orjson.loads(b'{"k":' + b"[" * 150 + b"]" * 150 + b"}")
    rows[1]["meta"] = orjson.loads(b'{"k":' + b"[" * 600 + b"]" * 600 + b"}")
    lenient = DatasetPolicy(max_invalid_fraction=0.5)
    data = b"".join(orjson_or_raw(row) for row in rows)
    outcome = run(data, policy=lenient, max_depth=1000)
    assert outcome.codes == {"too_deep": 1}
    assert outcome.result.num_pairs == 11


def orjson_or_raw(row):
    try:
        return orjson.dumps(row) + b"\n"
    except TypeError:
        meta = b'{"k":' + b"[" * 600 + b"]" * 600 + b"}"
        return orjson.dumps({**row, "meta": 0}).replace(b'"meta":0', b'"meta":' + meta) + b"\n"


def test_progress_reaches_the_end(run, lines, good):
    data = lines([{**row, "prompt": row["prompt"] + "x" * 5000} for row in good(600)])
    assert len(data) > 2 * MIB
    progress = run(data).progress
    assert len(progress) >= 3
    assert progress == sorted(progress)
    assert progress[-1] == (len(data), len(data))


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_stopping_leaves_nothing_behind(tmp_path, lines, good, stop_at):
    source = tmp_path / "upload"
    source.write_bytes(lines(good(11_000)))
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == stop_at:
            raise CancelRequested("cancelled")

    with pytest.raises(CancelRequested):
        ingest(
            source,
            out_dir=tmp_path / "out",
            dataset_id="ds",
            policy=DatasetPolicy(),
            limits=DataLimits(),
            on_progress=stop,
        )
    left = {path.name for path in (tmp_path / "out").iterdir()}
    # The third call comes in the second pass, when the rejected rows are complete.
    assert left == (set() if stop_at < 3 else {REJECTED_NAME})


def test_atomic_writer_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_writer(path) as file:
        file.write("text, not bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
    with atomic_writer(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_full_disk_is_named_and_other_faults_pass(tmp_path):
    with pytest.raises(StorageFull, match="no room left under"), full_disk_as_error(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(StorageFull, match="No space left on device"), full_disk_as_error(tmp_path):
        raise ValueError("I/O error: No space left on device (os error 28)")
    with pytest.raises(ValueError, match="os error 2"), full_disk_as_error(tmp_path):
        raise ValueError("No such file or directory (os error 2)")
    with pytest.raises(PermissionError), full_disk_as_error(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
