"""Whether what was read is a dataset."""

from core.errors import InvalidInput, KdpoError, TooLarge
from core.run_spec import DatasetPolicy
from core.settings import DataLimits
from worker.ingest.faults import RowCode
from worker.ingest.tally import Tally


def verdict(tally: Tally, *, policy: DatasetPolicy, limits: DataLimits) -> KdpoError | None:
    """Return why the rows are not a dataset, or None when they are."""
    if tally.rows == 0:
        return InvalidInput(
            "the file has no rows",
            code="empty_file",
            hint="upload preference data, for example JSON Lines with one pair a line",
            param="file",
        )
    return _too_many_rejected(tally, policy=policy, limits=limits) or _too_few(tally, limits)


def _too_many_rejected(
    tally: Tally, *, policy: DatasetPolicy, limits: DataLimits
) -> KdpoError | None:
    details = tally.details()
    if set(tally.by_code) == {RowCode.LINE_TOO_LONG} and tally.rejected == tally.rows:
        return TooLarge(
            f"all {tally.rows} lines are longer than {limits.max_line_bytes} bytes",
            code="line_too_long",
            hint="write one JSON object a line; " + str(details[0].hint),
            param="file",
            errors=details,
        )
    if details and (
        tally.rejected == tally.rows
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
    return None


def _too_few(tally: Tally, limits: DataLimits) -> KdpoError | None:
    left_out = ", ".join(
        f"{count} {reason}"
        for count, reason in (
            (tally.left_out.ties, "ties were dropped (on_tie)"),
            (tally.left_out.below_margin, "had a margin below min_margin or none"),
            (tally.left_out.identical, "compared equal texts"),
            (tally.unpaired, "rows are answers without a counterpart to their prompt"),
        )
        if count
    )
    for what, count, least in (
        ("pairs", tally.pairs, limits.min_pairs),
        ("prompts", tally.prompts, limits.min_prompts),
    ):
        if count < least:
            return InvalidInput(
                f"the file has {count} distinct {what}; at least {least} are needed"
                + (f"; of the comparisons {left_out}" if left_out else ""),
                code=f"too_few_{what}",
                hint=f"add more preference pairs over at least {limits.min_prompts} prompts",
                param="file",
                errors=tally.details(),
            )
    return None
