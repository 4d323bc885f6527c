"""Sortable ids: a readable prefix and a 26-character ULID in lower-case Crockford base32."""

import secrets
import time
from enum import StrEnum

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
ULID_LENGTH = 26


class IdPrefix(StrEnum):
    """The prefix of every public id."""

    OWNER = "own_"
    API_KEY = "key_"
    DATASET = "ds_"
    RECOMMENDATION = "rec_"
    FINE_TUNING_JOB = "ftjob-"
    JOB = "job_"
    STUDY = "study_"
    TRIAL = "trial_"
    TASK = "task_"
    CHECKPOINT = "ckpt_"
    EVALUATION = "eval_"
    FILE = "file-"
    UPLOAD = "upload_"
    PART = "part_"
    WEBHOOK = "wh_"
    DELIVERY = "whd_"
    EVENT = "evt_"
    REQUEST = "req_"
    REPLAY = "rpl_"
    WORKER = "wrk_"
    AUDIT = "aud_"


def ulid(unix_ms: int | None = None) -> str:
    """Return 48 bits of milliseconds and 80 random bits; ids of later milliseconds sort later."""
    value = ((time.time_ns() // 1_000_000) if unix_ms is None else unix_ms) << 80
    value |= secrets.randbits(80)
    return "".join(_ALPHABET[(value >> shift) & 31] for shift in range(125, -1, -5))


def new_id(prefix: IdPrefix) -> str:
    """Return a fresh id such as `ds_01j…`."""
    return f"{prefix.value}{ulid()}"


def made_at(public_id: str) -> float:
    """Return the unix seconds that an id says it was made at; 0 where it says none."""
    digits = public_id[-ULID_LENGTH:].lower()
    if len(digits) < ULID_LENGTH or not set(digits) <= set(_ALPHABET):
        return 0.0
    value = 0
    for digit in digits:
        value = value << 5 | _ALPHABET.index(digit)
    return float(value >> 80) / 1000.0
