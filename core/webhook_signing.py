"""Signatures of webhooks after Standard Webhooks 1.0 (standardwebhooks.com), symmetric scheme."""

import base64
import hashlib
import hmac
import secrets
from collections.abc import Sequence

PREFIX = "whsec_"
_SECRET_BYTES = 32


def new_secret() -> str:
    """Return a secret as receivers are given it: `whsec_` and base64 of 256 random bits."""
    return PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def signed_headers(
    secrets_: Sequence[str], body: bytes, *, event_id: str, timestamp: int
) -> dict[str, str]:
    """Return the three headers; each secret signs, so that a receiver may have any of them.

    v1 = base64(HMAC-SHA256(secret, "{id}.{timestamp}.{body}")), Standard Webhooks, "Signature
    scheme"; several signatures are separated by spaces.
    """
    message = f"{event_id}.{timestamp}.".encode() + body
    signatures = []
    for secret in secrets_:
        key = base64.b64decode(secret.removeprefix(PREFIX))
        digest = hmac.new(key, message, hashlib.sha256).digest()
        signatures.append(f"v1,{base64.b64encode(digest).decode()}")
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(signatures),
    }
