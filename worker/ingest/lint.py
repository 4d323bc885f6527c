"""Checks of the data as a whole, each `ok` or `warn`."""

from worker.ingest.faults import RowCode
from worker.ingest.similar import MOST_PROMPTS
from worker.ingest.tally import CodeTally, Tally

LENGTH_BIAS_LIMIT = 0.5
# Below this part of all, the count is shown without a warning.
NEAR_DUPLICATE_LIMIT = 0.01
EVAL_SIMILAR_LIMIT = 0.01
PROMPT_LEAK_LIMIT = 0.01
TIE_LIMIT = 0.5

Check = dict[str, object]


def lint(tally: Tally) -> list[Check]:
    """Return all checks, in the order in which the report shows them."""
    identical = tally.by_code.get(RowCode.IDENTICAL_PAIR, CodeTally())
    overlap = tally.overlap
    return [
        _length_bias(tally),
        _tallied("identical_pair", identical, "rows with equal sides were rejected"),
        _tallied("duplicate_pair", tally.duplicates, "repeated pairs were dropped"),
        _tallied("label_conflict", tally.conflicts, "pairs contradict an earlier one; kept"),
        _ties(tally),
        _part(
            _counted(
                "near_duplicate",
                overlap.prompts,
                overlap.lines,
                "prompts differ from another in case, white space and punctuation only",
            ),
            of=tally.prompts,
            limit=NEAR_DUPLICATE_LIMIT,
        ),
        _counted(
            "eval_overlap",
            overlap.across,
            overlap.lines_across,
            "of these prompts lie in another split than their twin: held-out scores flatter",
        ),
        _part(
            _counted(
                "eval_similar",
                overlap.similar.prompts,
                overlap.similar.lines,
                "held-out prompts have nearly the wording of a prompt in another split"
                + ("" if overlap.similar.complete else f"; of the first {MOST_PROMPTS:,} prompts"),
            ),
            of=overlap.similar.compared,
            limit=EVAL_SIMILAR_LIMIT,
        ),
        _part(
            _tallied(
                "prompt_leak", tally.repeats, "pairs have an answer that begins with the prompt"
            ),
            of=tally.pairs,
            limit=PROMPT_LEAK_LIMIT,
        ),
        *_layout(tally),
    ]


def _layout(tally: Tally) -> list[Check]:
    layout = None if tally.choice is None else tally.choice.layout
    if layout is None or not tally.pairs:
        return []
    found: list[Check] = []
    if layout.warning is not None:
        found.append(
            {"check": "layout", "level": "warn", "count": tally.pairs, "detail": layout.warning}
        )
    if layout.implicit_prompt:
        found.append(
            {
                "check": "implicit_prompt",
                "level": "warn",
                "count": tally.pairs,
                "detail": "the prompt was taken from the common beginning of both texts; "
                "look at the preview, or give a `prompt` field",
            }
        )
    return found


def _ties(tally: Tally) -> Check:
    """Comparisons without a winner, kept or not; most of them may be too many to learn from."""
    count = tally.left_out.ties + tally.ties_kept
    of = count + tally.decided
    return {
        "check": "tie",
        "level": "warn" if count > TIE_LIMIT * of else "ok",
        "count": count,
        "of": of,
        "threshold": TIE_LIMIT,
        "detail": f"comparisons have no winner; {tally.ties_kept} of them are kept in both orders",
    }


def _length_bias(tally: Tally) -> Check:
    value = tally.lengths.cohens_d()
    biased = value is None if tally.pairs > 1 else False
    if value is not None:
        biased = abs(value) > LENGTH_BIAS_LIMIT
    detail = "no pairs"
    if tally.pairs:
        chosen, rejected = tally.lengths.means()
        detail = f"chosen has {chosen:.0f} characters on average, rejected {rejected:.0f}"
    return {
        "check": "length_bias",
        "level": "warn" if biased else "ok",
        "value": None if value is None else round(value, 4),
        "threshold": LENGTH_BIAS_LIMIT,
        "unit": "cohens_d",
        "detail": detail,
    }


def _tallied(check: str, tally: CodeTally, detail: str) -> Check:
    return _counted(check, tally.count, [place.line for place in tally.places], detail)


def _part(check: Check, *, of: int, limit: float) -> Check:
    """Warn only beyond a part of all."""
    count = check["count"]
    assert isinstance(count, int)
    level = "warn" if count > limit * of else "ok"
    return {**check, "level": level, "threshold": limit, "of": of}


def _counted(check: str, count: int, lines: list[int], detail: str) -> Check:
    if not count:
        return {"check": check, "level": "ok", "count": 0}
    return {"check": check, "level": "warn", "count": count, "detail": detail, "lines": lines}
