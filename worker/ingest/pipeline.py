"""From an uploaded file to canonical rows, rejected rows and a report.

Two passes: the first parses, converts and checks each row and spools its pairs on disk; when all
are known, the second writes each pair with its split. Memory holds one row, one byte for each pair,
and a part of the hashes (`worker/ingest/spool.py`).
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, assert_never

import orjson

from core.errors import ErrorDetail, InvalidInput, KdpoError, TooLarge, UnsupportedMedia
from core.lifecycle import DatasetStatus
from core.run_spec import DatasetPolicy
from core.settings import MIB, DataLimits
from worker.ingest.canonical import Answers, Pair, Split, canonical_row, to_line
from worker.ingest.choice import choose
from worker.ingest.containers import Contents, LineReader
from worker.ingest.faults import RowCode, RowFault
from worker.ingest.files import atomic_writer, full_disk_as_error
from worker.ingest.layout_common import Grouping
from worker.ingest.overlap import PromptIndex
from worker.ingest.pairing import Kept, keep, pairs_of
from worker.ingest.preview import PairObserver
from worker.ingest.report import build_report, status_of
from worker.ingest.rows import JsonObject, parse_row
from worker.ingest.split import SplitPlan, plan_by_place
from worker.ingest.spool import AnswerSpool, Mark, PairSpool, joined
from worker.ingest.tally import Tally
from worker.ingest.texts import Line
from worker.ingest.verdict import verdict

CANONICAL_NAME = "canonical.jsonl"
PARQUET_NAME = "canonical.parquet"
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
    raw: dict[int, JsonObject] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Parsed:
    """One row after parsing: an object, or the fault that it is not."""

    line: Line
    outcome: JsonObject | RowFault


@dataclass
class _FirstPass:
    """The state of the first pass."""

    tally: Tally
    policy: DatasetPolicy
    pairs: PairSpool
    answers: AnswerSpool
    rejected: BinaryIO
    waiting: list[_Parsed] = field(default_factory=list)
    neighbours: list[Answers] = field(default_factory=list)
    num_grouped: int = 0
    num_grouped_used: int = 0


def ingest(
    source: Path,
    *,
    out_dir: Path,
    dataset_id: str,
    policy: DatasetPolicy,
    limits: DataLimits,
    on_progress: Progress,
    observer: PairObserver | None = None,
) -> IngestResult:
    """Read an upload; write `canonical.jsonl` and `rejected.jsonl` to `out_dir`.

    A file that cannot become a dataset is not an exception: the result is `invalid`, its report
    complete as far as reading went, `failure` says why, and there is no canonical file.
    A dry run differs in its status and in that it writes no canonical file.
    `on_progress(bytes read, bytes in all)` may raise to stop; nothing is left behind then.
    `observer` gets the pairs, of a dry run, too.

    Raises:
        StorageFull: the disk has no room.
    """
    tally = Tally(limits)
    reader = LineReader(source, limits=limits, folder=out_dir, column_mapping=policy.column_mapping)
    with full_disk_as_error(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / CANONICAL_NAME).unlink(missing_ok=True)
        with (
            PairSpool(
                out_dir,
                seed=policy.split.seed,
                max_pairs_per_prompt=policy.max_pairs_per_prompt,
            ) as pairs,
            AnswerSpool(out_dir) as answers,
        ):
            with atomic_writer(out_dir / REJECTED_NAME) as rejected:
                state = _FirstPass(tally, policy, pairs, answers, rejected)
                failure = _first_pass(reader, state, limits=limits, on_progress=on_progress)
            failure = failure or verdict(tally, policy=policy, limits=limits)
            sha256 = _publish(
                pairs,
                out_dir,
                is_usable=failure is None,
                policy=policy,
                tally=tally,
                on_progress=lambda: on_progress(reader.total_bytes, reader.total_bytes),
                observer=observer,
            )
    unread = isinstance(failure, UnsupportedMedia)
    return IngestResult(
        status=status_of(tally, failure, dry_run=policy.dry_run),
        report=build_report(
            tally,
            dataset_id=dataset_id,
            contents=Contents() if unread else reader.contents,
            policy=policy,
            failure=failure,
        ),
        canonical_sha256=sha256,
        num_rows=tally.rows,
        num_rejected=tally.rejected,
        num_pairs=tally.pairs,
        num_prompts=tally.prompts,
        failure=failure,
        raw=tally.raw,
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
    failure = _finished(state, failure)
    if failure is not None:
        state.tally.stopped_early = True
        summary = ErrorDetail(code=failure.code, detail=failure.message, hint=failure.hint)
        failure.errors = (summary, *state.tally.details())
    return failure


def _finished(state: _FirstPass, failure: KdpoError | None) -> KdpoError | None:
    """Handle what still waits; return the failure of reading, else that of handling."""
    try:
        _handle_waiting(state)
        _settle(state)
    except (InvalidInput, TooLarge) as error:
        return failure or error.with_traceback(None)
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
    """Yield the rows of a file; blank lines are none.

    Reports progress each MiB, each ten thousand rows (of which many may be one step of a table) and
    at the end.
    """
    reported = 0
    for line in reader:
        if reader.read_bytes - reported >= _PROGRESS_BYTES or line.number % _PROGRESS_ROWS == 0:
            reported = reader.read_bytes
            on_progress(reported, reader.total_bytes)
        if not line.oversize and line.fault is None and not line.data.strip():
            continue
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


def _handle_waiting(state: _FirstPass) -> bool:
    """Choose how to read and handle the rows that waited; False when no layout fits them."""
    waiting, state.waiting = state.waiting, []
    chosen = choose(
        [p.outcome for p in waiting if not isinstance(p.outcome, RowFault)], state.policy
    )
    state.tally.choice = chosen or state.tally.choice
    for parsed in waiting:
        _handle(parsed, state)
    return chosen is not None and chosen.detection.confidence > 0.0


def _handle(parsed: _Parsed, state: _FirstPass) -> None:
    """Convert one row and spool what it gives, or write it to the rejected rows."""
    tally, number, choice = state.tally, parsed.line.number, state.tally.choice
    try:
        if isinstance(parsed.outcome, RowFault):
            raise parsed.outcome
        if choice is None:
            raise _unknown_layout(parsed.outcome)
        found = choice.convert(parsed.outcome)
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
    tally.ignore(found.ignored)
    tally.keep_raw(number, parsed.outcome)
    if isinstance(found, Pair):
        kept = Kept()
        keep(found, choice.rules, lines=(number, number), into=kept)
        tally.converted += _spool(kept, state) > 0
        return
    group = replace(found, answers=tuple(replace(a, line=number) for a in found.answers))
    match choice.layout.grouping:
        case Grouping.ROW:
            tally.converted += _spool(pairs_of(group, choice.rules), state) > 0
        case Grouping.ADJACENT:
            if state.neighbours and state.neighbours[0].prompt != group.prompt:
                _pair_neighbours(state)
            state.neighbours.append(group)
            state.num_grouped += 1
        case Grouping.PROMPT:
            state.answers.add(group)
            state.num_grouped += 1
        case Grouping.PAIR:
            raise AssertionError(f"layout {choice.layout.name} gives answers and says pairs")
        case _:
            assert_never(choice.layout.grouping)


def _pair_neighbours(state: _FirstPass) -> None:
    """Pair the rows that lie beside each other and share a prompt."""
    if state.neighbours:
        neighbours, state.neighbours = state.neighbours, []
        _pair_group(joined(neighbours), state)


def _pair_group(group: Answers, state: _FirstPass) -> None:
    """Pair answers of several rows."""
    assert state.tally.choice is not None
    kept = pairs_of(group, state.tally.choice.rules)
    _spool(kept, state)
    state.num_grouped_used += len(kept.lines)


def _spool(kept: Kept, state: _FirstPass) -> int:
    """Put pairs on disk; return how many."""
    state.tally.left_out += kept.left_out
    for pair, (line, _) in kept.pairs:
        state.tally.decided += not pair.tie
        state.tally.ties_kept += pair.tie
        state.pairs.add(canonical_row(pair, line=line, split=Split.TRAIN), tie=pair.tie)
    return len(kept.pairs)


def _unknown_layout(row: JsonObject) -> RowFault:
    names = ", ".join(f"`{name[:40]}`" for name in list(row)[:8]) or "no field"
    return RowFault(RowCode.UNKNOWN_LAYOUT, f"the row has {names}; no known layout has these")


def _settle(state: _FirstPass) -> None:
    """Pair what waited for the end of the file, and count what became of all pairs."""
    tally = state.tally
    _pair_neighbours(state)
    for group in state.answers.groups():
        _pair_group(group, state)
    # Each has given two pairs.
    tally.ties_kept //= 2
    tally.unpaired = state.num_grouped - state.num_grouped_used
    tally.converted += state.num_grouped_used
    state.pairs.settle()
    tally.pairs = state.pairs.count(Mark.KEPT, Mark.CONFLICT)
    tally.over_limit = state.pairs.count(Mark.OVER_LIMIT)
    tally.prompts = state.pairs.prompts


def _publish(
    pairs: PairSpool,
    out_dir: Path,
    *,
    is_usable: bool,
    policy: DatasetPolicy,
    tally: Tally,
    on_progress: Callable[[], None],
    observer: PairObserver | None,
) -> str | None:
    """Write the pairs with their splits; in a dry run and of no dataset only count them."""
    with PromptIndex(out_dir) as prompts:
        sha256: str | None = None
        run = partial(_second_pass, pairs, tally=tally, prompts=prompts, observer=observer,
                      on_progress=on_progress)  # fmt: skip
        plan: SplitPlan | None = None
        if is_usable:
            plan = plan_by_place(pairs.prompts, pairs.rank_at, policy.split)
            tally.split_prompts = dict(plan.sizes)
        if is_usable and not policy.dry_run:
            with atomic_writer(out_dir / CANONICAL_NAME) as file:
                sha256 = run(file, plan=plan)
        else:
            run(None, plan=plan)
        tally.overlap = prompts.overlap(keep=tally.limits.examples_per_code)
        return sha256


def _second_pass(
    pairs: PairSpool,
    file: BinaryIO | None,
    *,
    plan: SplitPlan | None,
    tally: Tally,
    prompts: PromptIndex,
    on_progress: Callable[[], None],
    observer: PairObserver | None,
) -> str:
    """Count the pairs, and write them with their splits; return the SHA-256 of what was written."""
    checksum = hashlib.sha256()
    if observer is not None:
        observer.begin(pairs=tally.pairs, size_bytes=pairs.size_bytes)
    for number, (found, mark) in enumerate(pairs, start=1):
        if number % _PROGRESS_ROWS == 0:
            on_progress()
        if mark is Mark.DUPLICATE:
            tally.duplicate(found)
        if mark not in (Mark.KEPT, Mark.CONFLICT):
            continue
        row = found
        if plan is not None:
            row = replace(found, split=plan.split_of(found.group_id))
            tally.split_pairs[row.split] += 1
        tally.accept(row, conflict=mark is Mark.CONFLICT)
        prompts.add(row)
        if observer is not None:
            observer.see(row)
        if file is not None:
            data = to_line(row)
            checksum.update(data)
            file.write(data)
    return checksum.hexdigest()
