"""What the layouts share: the optional fields beside the texts."""

from collections.abc import Sequence

from worker.ingest.canonical import Message, Pair, Role
from worker.ingest.checks import check_completion, check_differs, check_prompt, optional_number
from worker.ingest.rows import JsonObject

_OPTIONAL = frozenset({"margin", "score_chosen", "score_rejected", "source", "meta"})


def user(text: str) -> tuple[Message, ...]:
    """Return a prompt of one user turn."""
    return (Message(Role.USER, text),)


def assistant(text: str) -> tuple[Message, ...]:
    """Return a completion of one assistant turn."""
    return (Message(Role.ASSISTANT, text),)


def common_turns(a: Sequence[Message], b: Sequence[Message]) -> int:
    """Return how many leading turns are the same."""
    same = 0
    for left, right in zip(a, b, strict=False):
        if left != right:
            break
        same += 1
    return same


def build_pair(
    row: JsonObject,
    *,
    prompt: tuple[Message, ...],
    chosen: tuple[Message, ...],
    rejected: tuple[Message, ...],
    used: tuple[str, ...],
    layout: str,
) -> Pair:
    """Return the checked pair with margin, source and meta of the row.

    The margin is the field `margin`, else score_chosen - score_rejected where both are given.

    Raises:
        RowFault: the turns break a rule of `checks`.
    """
    check_prompt(prompt, "/prompt" if "prompt" in used else "/chosen")
    check_completion(chosen, "/chosen")
    check_completion(rejected, "/rejected")
    check_differs(chosen, rejected)
    margin = optional_number(row, "margin")
    better, worse = optional_number(row, "score_chosen"), optional_number(row, "score_rejected")
    if margin is None and better is not None and worse is not None:
        margin = better - worse
    source, meta = row.get("source"), row.get("meta")
    return Pair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        source=source if isinstance(source, str) else layout,
        meta=meta if isinstance(meta, dict) else ({} if meta is None else {"meta": meta}),
        ignored=tuple(name for name in row if name not in used and name not in _OPTIONAL),
    )
