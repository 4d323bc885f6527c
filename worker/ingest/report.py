"""What was found in an upload, as JSON."""

from core.errors import KdpoError
from core.lifecycle import DatasetStatus
from core.run_spec import DatasetPolicy
from worker.ingest.canonical import Split
from worker.ingest.containers import Contents
from worker.ingest.faults import HINTS
from worker.ingest.lint import lint
from worker.ingest.preview import canonical_preview
from worker.ingest.tally import Tally

_MAX_MEMBERS = 100


def status_of(tally: Tally, failure: KdpoError | None, *, dry_run: bool) -> DatasetStatus:
    """Return the state of a dataset: warnings come from rejected rows and from lint."""
    if failure is not None:
        return DatasetStatus.INVALID
    if dry_run:
        return DatasetStatus.CHECKED
    if tally.rejected or any(check["level"] == "warn" for check in lint(tally)):
        return DatasetStatus.READY_WITH_WARNINGS
    return DatasetStatus.READY


def build_report(
    tally: Tally,
    *,
    dataset_id: str,
    contents: Contents,
    policy: DatasetPolicy,
    failure: KdpoError | None,
) -> dict[str, object]:
    """Return the report as JSON values; `complete` is false when reading stopped."""
    found = None if tally.choice is None else tally.choice.detection
    return {
        "object": "dataset.report",
        "dataset_id": dataset_id,
        "status": status_of(tally, failure, dry_run=policy.dry_run).value,
        "complete": not tally.stopped_early,
        "detected": {
            "layout": None if found is None else found.layout.name.value,
            "confidence": 0.0 if found is None else found.confidence,
            "container": contents.container,
            "alternatives": [
                {"layout": name, "confidence": confidence}
                for name, confidence in (() if found is None else found.alternatives)
            ],
            **_archive(contents),
        },
        "mapping": {} if tally.choice is None else tally.choice.mapping(),
        "ignored_fields": {name[:100]: count for name, count in tally.ignored.most_common()},
        "counts": _counts(tally),
        "split": {
            "by": "prompt",
            "seed": policy.split.seed,
            "prompts": {split.value: count for split, count in tally.split_prompts.items()},
        },
        "errors": [
            {
                "code": code.value,
                "count": counted.count,
                "hint": HINTS[code],
                "examples": [
                    {"line": p.line, "pointer": p.pointer, "detail": p.detail}
                    for p in counted.places
                ],
            }
            for code, counted in tally.errors()
        ],
        "lint": lint(tally),
        "failure": None
        if failure is None
        else {"code": failure.code, "message": failure.message, "hint": failure.hint},
        "preview": [
            {
                "why": "first",
                "raw": tally.raw.get(row.line),
                "canonical": canonical_preview(row),
                "rendered": None,
            }
            for row in tally.preview
        ],
    }


def _counts(tally: Tally) -> dict[str, int]:
    """Return what became of the rows, and the pairs by split."""
    return {
        "rows": tally.rows,
        "converted": tally.converted,
        "rejected": tally.rejected,
        "without_pair": tally.rows - tally.rejected - tally.converted,
        "ties_dropped": tally.left_out.ties,
        "below_margin": tally.left_out.below_margin,
        "identical_answers": tally.left_out.identical,
        "unpaired": tally.unpaired,
        "over_limit": tally.over_limit,
        "duplicates": tally.duplicates.count,
        "pairs": tally.pairs,
        "prompts": tally.prompts,
        **{split.value: tally.split_pairs[split] for split in Split},
    }


def _archive(contents: Contents) -> dict[str, object]:
    """Return what was read of an archive and what was left aside; nothing for other files."""
    if not contents.members:
        return {}
    return {
        "members": [
            {"name": m.name[:200], "container": m.container, "first_line": m.first_line}
            for m in contents.members[:_MAX_MEMBERS]
        ],
        "ignored_members": [name[:200] for name in contents.ignored[:_MAX_MEMBERS]],
    }
