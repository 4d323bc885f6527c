"""What both drivers share: settings, headers, and requests in httpx's terms."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, BinaryIO

import httpx

from kdpo.errors import ConnectionFailed, InvalidArgument
from kdpo.flows import FilePart, Reply, Request
from kdpo.sending import Policy

DEFAULT_URL = "http://127.0.0.1:8321"
URL_VARIABLE = "KDPO_BASE_URL"
KEY_VARIABLE = "KDPO_API_KEY"
CONNECT_S = 10.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Address:
    """Where the server is and who asks."""

    base_url: str
    api_key: str | None = field(repr=False)
    timeout_s: float
    policy: Policy


def address(
    base_url: str | None, api_key: str | None, *, timeout_s: float, max_retries: int
) -> Address:
    """Return where the server is: arguments first, then `KDPO_BASE_URL` and `KDPO_API_KEY`.

    Raises:
        InvalidArgument: the address is none.
    """
    url = (base_url or os.environ.get(URL_VARIABLE) or DEFAULT_URL).rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise InvalidArgument(
            f"received the address {url!r}, expected one such as {DEFAULT_URL}",
            hint=f"set base_url or {URL_VARIABLE}",
        )
    if timeout_s <= 0 or max_retries < 0:
        raise InvalidArgument(
            f"received timeout_s={timeout_s} and max_retries={max_retries}; expected more than 0 "
            "seconds and 0 or more retries"
        )
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    return Address(url, key, timeout_s, Policy(max_retries))


def httpx_options(to: Address) -> dict[str, Any]:
    """Return what makes an httpx client for an address."""
    headers = {"User-Agent": f"kdpo-python/{_version()}", "Accept": "application/json"}
    if to.api_key is not None:
        headers["Authorization"] = f"Bearer {to.api_key}"
    # A proxy of the environment cannot reach this machine's loopback.
    is_here = httpx.URL(to.base_url).host in LOOPBACK
    return {"base_url": to.base_url, "headers": headers, "trust_env": not is_here}


def httpx_request(to: Address, request: Request, file: BinaryIO | None) -> dict[str, Any]:
    """Return a request in httpx's terms; the file is open already."""
    read = request.read_timeout_s or to.timeout_s
    return {
        "method": request.method,
        "url": request.path,
        "params": {n: _text(v) for n, v in request.query.items() if v is not None},
        "json": request.json,
        "data": dict(request.form) or None,
        "files": None
        if file is None or request.file is None
        else {"file": (request.file.path.name, file)},
        "headers": dict(request.headers),
        "timeout": httpx.Timeout(to.timeout_s, read=read, connect=min(CONNECT_S, to.timeout_s)),
    }


def reply_of(response: httpx.Response) -> Reply:
    """Return an answer that has been read."""
    return Reply(response.status_code, headers_of(response), response.content)


def headers_of(response: httpx.Response) -> Mapping[str, str]:
    """Return headers by their lower-case names."""
    return {name.lower(): value for name, value in response.headers.items()}


def broken(to: Address, error: httpx.TransportError) -> ConnectionFailed:
    """Return what a fault of the connection is for a caller."""
    never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    what = "cannot reach" if never_sent else "lost the connection to"
    if isinstance(error, httpx.ReadTimeout):
        what = "waited in vain for"
    return ConnectionFailed(
        f"{what} the server at {to.base_url}: {str(error) or type(error).__name__}",
        sent=not never_sent,
        hint=f"is it running (`kdpo serve`), and is that its address ({URL_VARIABLE})?",
    )


class CountedFile:
    """A file that says how much of it has been read; httpx reads it as it sends it."""

    def __init__(self, file: BinaryIO, size: int, tell: Callable[[int, int], None]) -> None:
        self._file = file
        self._size = size
        self._tell = tell

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        chunk = self._file.read(size)
        self._tell(self._file.tell(), self._size)
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place; httpx does so to learn the size."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the place."""
        return self._file.tell()

    def fileno(self) -> int:
        """Return the descriptor; httpx asks it for the size."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_file(part: FilePart) -> Any:
    """Open the file of a form.

    Raises:
        InvalidArgument: it cannot be read.
    """
    try:
        file = part.path.open("rb")
    except OSError as error:
        raise InvalidArgument(f"cannot read {part.path}: {error.strerror}") from error
    if part.on_bytes is None:
        return file
    return CountedFile(file, part.path.stat().st_size, part.on_bytes)


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _version() -> str:
    try:
        return version("kdpo")
    except PackageNotFoundError:
        return "0"
