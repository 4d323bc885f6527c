"""Links that work without a key for a while: HMAC-SHA256 over the object, the path and the end."""

import base64
import hashlib
import hmac
import os
import secrets
import time
from contextlib import suppress

from core.errors import NotPermitted
from core.settings import Settings

_KEY_NAME = "downloads.key"
_KEY_BYTES = 32


def sign(settings: Settings, target: str, *, expires: int) -> str:
    """Return the signature of a link to `target` that ends at a unix time."""
    message = f"kdpo download 1\n{expires}\n{target}".encode()
    digest = hmac.new(_key(settings), message, hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def check_signature(settings: Settings, target: str, *, expires: int, signature: str) -> None:
    """Refuse a link that this server has not signed, or whose time is over.

    Raises:
        NotPermitted: codes `link_invalid`, `link_expired`.
    """
    expected = sign(settings, target, expires=expires)
    if not hmac.compare_digest(expected.encode(), signature.encode()):
        raise NotPermitted(
            "the signature of the link does not fit: it was changed, or another server made it",
            code="link_invalid",
            hint="ask for another one: POST /v1/checkpoints/{id}/download_url",
        )
    if expires <= time.time():
        raise NotPermitted(
            "the link has expired",
            code="link_expired",
            hint="ask for another one: POST /v1/checkpoints/{id}/download_url",
        )


def _key(settings: Settings) -> bytes:
    """Return the server's secret: a setting, or a file that the first process makes."""
    if settings.downloads.secret is not None:
        return settings.downloads.secret.get_secret_value().encode()
    path = settings.root / "secrets" / _KEY_NAME
    with suppress(FileNotFoundError):
        return path.read_bytes()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{_KEY_NAME}.{secrets.token_hex(8)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):  # another process was faster; its key counts
            os.link(temporary, path)
    finally:
        temporary.unlink()
    return path.read_bytes()
