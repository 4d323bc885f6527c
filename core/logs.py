"""One line of JSON per log record, with secrets taken out."""

import json
import logging
import re
import sys
from datetime import UTC, datetime

LOG_NAME = "log.txt"
"""The file in an attempt's folder that its process writes to."""

_PATTERN = r"(dk-[a-z]+-)[0-9A-Za-z]{6,}|(hf_)[0-9A-Za-z]{6,}|(://[^:/@\s]+:)[^@\s]+(?=@)"
_SECRETS = re.compile(_PATTERN)
_SECRET_BYTES = re.compile(_PATTERN.encode())


def scrub(text: str) -> str:
    """Replace API keys, hub tokens and URL passwords by `…`."""
    return _SECRETS.sub(lambda m: f"{m.group(1) or m.group(2) or m.group(3)}…", text)


def mask(data: bytes) -> bytes:
    """Replace the bytes of the same secrets by `*`, so that the length stays."""

    def stars(match: re.Match[bytes]) -> bytes:
        known: bytes = match.group(1) or match.group(2) or match.group(3)
        return known + b"*" * (len(match.group()) - len(known))

    return _SECRET_BYTES.sub(stars, data)


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object; `extra={"kdpo": {...}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the JSON line."""
        entry = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": scrub(record.getMessage()),
        }
        fields = getattr(record, "kdpo", None)
        if isinstance(fields, dict):
            entry.update(fields)
        if record.exc_info:
            entry["traceback"] = scrub(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(level: str = "INFO") -> None:
    """Send all logs of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # It logs whole URLs, and their queries can be signatures.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
