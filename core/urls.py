"""URLs that people give: plain ones only, in parts that mean the same to every reader."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

_CHARACTERS = re.compile(r"[!#-;=?-\[\]_a-z~%]+", re.ASCII)
_PORTS = {"https": 443, "http": 80}


@dataclass(frozen=True)
class PlainUrl:
    """A URL without credentials or fragment; `target` is path and query."""

    scheme: str
    host: str
    port: int
    target: str


def parse_url(url: str) -> PlainUrl:
    """Return the parts of an http or https URL, its host in lower case.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence that begins with the URL.
    """
    if not _CHARACTERS.fullmatch(url):
        raise ValueError("it has characters that belong percent-encoded")
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in _PORTS or not host:
        raise ValueError("it does not begin with https:// and a host")
    if "@" in parts.netloc:
        raise ValueError("it has a user name or password before the host")
    if parts.fragment:
        raise ValueError("it has a fragment (#)")
    # The resolver's encoding raises no OSError on these.
    if not all(0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        raise ValueError("a part of its host's name is empty or longer than 63 characters")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return PlainUrl(parts.scheme, host.lower(), parts.port or _PORTS[parts.scheme], target)
