"""API keys: `dk-<environment>-<22 base62>`, 131 random bits; stored as a hash, shown once."""

import hashlib
import secrets
import string
from dataclasses import dataclass
from enum import StrEnum

_ALPHABET = string.digits + string.ascii_letters
_SECRET_LENGTH = 22
_SHOWN_LENGTH = 8


class Scope(StrEnum):
    """What a key may do; `admin` includes the others."""

    DATASETS_READ = "datasets:read"
    DATASETS_WRITE = "datasets:write"
    JOBS_READ = "jobs:read"
    JOBS_WRITE = "jobs:write"
    ARTIFACTS_READ = "artifacts:read"
    ARTIFACTS_WRITE = "artifacts:write"
    ADMIN = "admin"


@dataclass(frozen=True)
class NewKey:
    """A key that has just been made; `secret` is kept nowhere else."""

    secret: str
    prefix: str
    sha256: str


def make_key(environment: str) -> NewKey:
    """Return a fresh key of an environment such as `live`."""
    random = "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_LENGTH))
    start = f"dk-{environment}-"
    secret = start + random
    return NewKey(secret=secret, prefix=start + random[:_SHOWN_LENGTH], sha256=hash_key(secret))


def hash_key(secret: str) -> str:
    """Return what is stored; a random key of 131 bits needs no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()
