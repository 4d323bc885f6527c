"""Keys have the documented form and only their hash is kept."""

import hashlib
import re

from app.keys import hash_key, make_key
from core.logs import scrub


def test_form() -> None:
    key = make_key("live")
    assert re.fullmatch(r"dk-live-[0-9A-Za-z]{22}", key.secret)
    assert key.secret.startswith(key.prefix)
    assert len(key.prefix) == len("dk-live-") + 8
    assert key.sha256 == hash_key(key.secret) == hashlib.sha256(key.secret.encode()).hexdigest()


def test_keys_differ_and_use_the_whole_alphabet() -> None:
    secrets = [make_key("live").secret for _ in range(300)]
    assert len(set(secrets)) == 300
    assert len(set("".join(s.removeprefix("dk-live-") for s in secrets))) == 62


def test_keys_are_taken_out_of_logs() -> None:
    key = make_key("live").secret
    assert key not in scrub(f"Bearer {key}")
