"""From an uploaded file to canonical rows, rejected rows and a report.

Two passes: the first parses, converts and checks each row and knows the prompts at its end; the
second writes each pair with its split. Memory holds one line, and for each pair and each prompt a
hash of 16 bytes in a set, which Python makes about 100 bytes.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import orjson

from core.errors import ErrorDetail, InvalidInput, KdpoError, TooLarge, UnsupportedMedia
from core.lifecycle import DatasetStatus
from core.run_spec import DatasetPolicy
from core.settings import MIB, DataLimits
from worker.ingest.canonical import Split, canonical_row, digest, from_line, to_line
from worker.ingest.containers import Line, LineReader
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.files import atomic_writer, full_disk_as_error
from worker.ingest.layouts import detect
from worker.ingest.report import Tally, build_report, status_of
from worker.ingest.rows import JsonObject, parse_row
from worker.ingest.split import SplitPlan, plan_split, rank

CANONICAL_NAME = "canonical.jsonl"
REJECTED_NAME = "rejected.jsonl"
_DETECT_ROWS = 100
_DETECT_BYTES = 8 * MIB
_PROGRESS_BYTES = MIB
_PROGRESS_ROWS = 10_000

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class IngestResult:
    """What became of an upload; `failure` says why when the status is `invalid`."""

    status: DatasetStatus
    report: dict[str, object]
    canonical_sha256: str | None
    num_rows: int
    num_rejected: int
    num_pairs: int
    num_prompts: int
    failure: KdpoError | None


@dataclass(frozen=True, slots=True)
class _Parsed:
    """One row after parsing: an object, or the fault that it is not."""

    line: Line
    outcome: JsonObject | RowFault


@dataclass
class _FirstPass:
    """The state of the first pass."""

    tally: Tally
    seed: int
    spool: BinaryIO
    rejected: BinaryIO
    seen: set[bytes] = field(default_factory=set)
    ranks: set[bytes] = field(default_factory=set)
    waiting: list[_Parsed] = field(default_factory=list)


def ingest(
    source: Path,
    *,
    out_dir: Path,
    dataset_id: str,
    policy: DatasetPolicy,
    limits: DataLimits,
    on_progress: Progress,
) -> IngestResult:
    """Read an upload; write `canonical.jsonl` and `rejected.jsonl` to `out_dir`.

    A file that cannot become a dataset is not an exception: the result is `invalid`, its report
    complete as far as reading went, `failure` says why, and there is no canonical file.
    `on_progress(bytes read, bytes in all)` may raise to stop; nothing is left behind then.

    Raises:
        StorageFull: the disk has no room.
    """
    tally = Tally(limits)
    reader = LineReader(source, limits=limits)
    canonical_path = out_dir / CANONICAL_NAME
    sha256: str | None = None
    with full_disk_as_error(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        canonical_path.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=out_dir) as spool:
            with atomic_writer(out_dir / REJECTED_NAME) as rejected:
                state = _FirstPass(tally, policy.split.seed, spool, rejected)
                failure = _first_pass(reader, state, limits=limits, on_progress=on_progress)
            tally.prompts = len(state.ranks)
            failure = failure or _verdict(tally, policy=policy, limits=limits)
            if failure is None:
                plan = plan_split(state.ranks, policy.split)
                spool.seek(0)
                sha256 = _publish(
                    spool,
                    canonical_path,
                    plan=plan,
                    tally=tally,
                    on_progress=lambda: on_progress(reader.total_bytes, reader.total_bytes),
                )
    unread = isinstance(failure, UnsupportedMedia)
    return IngestResult(
        status=status_of(tally, failure),
        report=build_report(
            tally,
            dataset_id=dataset_id,
            container=None if unread else reader.container,
            policy=policy.split,
            failure=failure,
        ),
        canonical_sha256=sha256,
        num_rows=tally.rows,
        num_rejected=tally.rejected,
        num_pairs=tally.pairs,
        num_prompts=tally.prompts,
        failure=failure,
    )


def _first_pass(
    reader: LineReader, state: _FirstPass, *, limits: DataLimits, on_progress: Progress
) -> KdpoError | None:
    """Read and handle all rows; return why the file as a whole could not be read, if so."""
    failure: KdpoError | None = None
    try:
        _read(reader, state, limits=limits, on_progress=on_progress)
    except (InvalidInput, TooLarge, UnsupportedMedia) as error:
        # The traceback would keep the state of the pass alive with the result.
        failure = error.with_traceback(None)
    _handle_waiting(state)
    if failure is not None:
        state.tally.stopped_early = True
        summary = ErrorDetail(code=failure.code, detail=failure.message, hint=failure.hint)
        failure.errors = (summary, *state.tally.details())
    return failure


def _read(
    reader: LineReader, state: _FirstPass, *, limits: DataLimits, on_progress: Progress
) -> None:
    """Read all rows; the layout is detected on the first ones, which wait until it is known.

    The caller handles those that still wait at the end, whether reading ended well or not.
    """
    waiting_bytes = 0
    detected = False
    for parsed in _parse_all(reader, state.tally, limits=limits, on_progress=on_progress):
        if detected:
            _handle(parsed, state)
        else:
            state.waiting.append(parsed)
            waiting_bytes += len(parsed.line.data)
            if len(state.waiting) >= _DETECT_ROWS or waiting_bytes >= _DETECT_BYTES:
                detected, waiting_bytes = _handle_waiting(state), 0
        if state.tally.rejected >= limits.max_errors:
            state.tally.stopped_early = True
            return


def _parse_all(
    reader: LineReader, tally: Tally, *, limits: DataLimits, on_progress: Progress
) -> Iterator[_Parsed]:
    """Yield the rows of a file; blank lines are none. Reports progress each MiB and at the end."""
    reported = 0
    for line in reader:
        if reader.read_bytes - reported >= _PROGRESS_BYTES:
            reported = reader.read_bytes
            on_progress(reported, reader.total_bytes)
        if not line.oversize and not line.data.strip():
            continue
        if tally.rows == 0:
            _refuse_array(line)
        if tally.rows >= limits.max_rows:
            raise TooLarge(
                f"the file has more than {limits.max_rows} rows",
                code="too_many_rows",
                hint="upload a sample, or raise KDPO_DATA__MAX_ROWS",
                param="file",
            )
        tally.rows += 1
        try:
            yield _Parsed(line, parse_row(line, limits=limits))
        except RowFault as fault:
            yield _Parsed(line, fault)
    on_progress(reader.total_bytes, reader.total_bytes)


def _refuse_array(line: Line) -> None:
    """Raise when the first row shows that the file is one JSON array."""
    text = line.data.strip()
    if text[:1] == b"[" and text[1:].lstrip()[:1] in (b"", b"{"):
        raise UnsupportedMedia(
            "received one JSON array; expected JSON Lines, one object a line",
            hint="convert it: jq -c '.[]' data.json > data.jsonl",
            param="file",
        )


def _handle_waiting(state: _FirstPass) -> bool:
    """Detect the layout and handle the rows that waited; False when no layout fits them."""
    found = detect([p.outcome for p in state.waiting if not isinstance(p.outcome, RowFault)])
    state.tally.detection = found or state.tally.detection
    for parsed in state.waiting:
        _handle(parsed, state)
    state.waiting.clear()
    return found is not None and found.confidence > 0.0


def _handle(parsed: _Parsed, state: _FirstPass) -> None:
    """Convert one row and spool the pair, or write it to the rejected rows."""
    tally, number = state.tally, parsed.line.number
    try:
        if isinstance(parsed.outcome, RowFault):
            raise parsed.outcome
        if tally.detection is None:
            raise _unknown_layout(parsed.outcome)
        pair = tally.detection.layout.convert(parsed.outcome)
    except RowFault as fault:
        place = tally.reject(number, fault)
        entry: dict[str, object] = {
            "line": number,
            "code": fault.code,
            "pointer": place.pointer,
            "detail": place.detail,
        }
        if not isinstance(parsed.outcome, RowFault):
            entry["row"] = parsed.outcome
        state.rejected.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        return
    row = canonical_row(pair, line=number, split=Split.TRAIN)
    tally.ignore(pair.ignored)
    key = bytes.fromhex(row.id)
    if key in state.seen:
        tally.duplicate(row)
        return
    state.seen.add(key)
    state.ranks.add(rank(row.group_id, seed=state.seed))
    tally.accept(row, conflict=digest(pair.prompt, pair.rejected, pair.chosen)[:16] in state.seen)
    state.spool.write(to_line(row))


def _unknown_layout(row: JsonObject) -> RowFault:
    names = ", ".join(f"`{name[:40]}`" for name in list(row)[:8]) or "no field"
    return RowFault(RowCode.UNKNOWN_LAYOUT, f"the row has {names}; no known layout has these")


def _verdict(tally: Tally, *, policy: DatasetPolicy, limits: DataLimits) -> KdpoError | None:
    """Return why the rows are not a dataset, or None when they are."""
    if tally.rows == 0:
        return InvalidInput(
            "the file has no rows",
            code="empty_file",
            hint="upload JSON Lines with one preference pair a line",
            param="file",
        )
    details = tally.details()
    if set(tally.by_code) == {RowCode.LINE_TOO_LONG} and tally.converted == 0:
        return TooLarge(
            f"all {tally.rows} lines are longer than {limits.max_line_bytes} bytes",
            code="line_too_long",
            hint="write one JSON object a line; " + str(details[0].hint),
            param="file",
            errors=details,
        )
    if details and (
        tally.converted == 0
        or tally.stopped_early
        or tally.rejected / tally.rows > policy.invalid_limit
    ):
        first = details[0]
        return InvalidInput(
            f"{tally.rejected} of {tally.rows} rows were rejected, at most "
            f"{policy.invalid_limit:.4g} of them may be; most often {first.code} ({first.count} "
            f"rows), first on line {first.line}: {first.detail}",
            code="dataset_invalid",
            hint=f"{first.hint}; or raise max_invalid_fraction to skip these rows",
            param="file",
            errors=details,
        )
    for what, count, least in (
        ("pairs", tally.pairs, limits.min_pairs),
        ("prompts", tally.prompts, limits.min_prompts),
    ):
        if count < least:
            return InvalidInput(
                f"the file has {count} distinct {what}; at least {least} are needed",
                code=f"too_few_{what}",
                hint=f"add more preference pairs over at least {limits.min_prompts} prompts",
                param="file",
                errors=details,
            )
    return None


def _publish(
    spool: BinaryIO,
    path: Path,
    *,
    plan: SplitPlan,
    tally: Tally,
    on_progress: Callable[[], None],
) -> str:
    """Write the spooled pairs with their splits; return the SHA-256 of the file."""
    checksum = hashlib.sha256()
    tally.split_prompts = dict(plan.sizes)
    with atomic_writer(path) as file:
        for number, line in enumerate(spool, start=1):
            row = from_line(line)
            row = replace(row, split=plan.split_of(row.group_id))
            tally.split_pairs[row.split] += 1
            data = to_line(row)
            checksum.update(data)
            file.write(data)
            if number % _PROGRESS_ROWS == 0:
                on_progress()
    tally.preview = [replace(row, split=plan.split_of(row.group_id)) for row in tally.preview]
    return checksum.hexdigest()
