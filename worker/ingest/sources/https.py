"""A file over https: from the address that was checked, and from no other.

The name is resolved once, every address it has is judged, and the connection is made to one of
these; TLS then proves the name. Proxies of the environment are not used: they would resolve anew.
"""

import http.client
import re
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from urllib.parse import urljoin, urlsplit

from core.errors import InvalidInput, KdpoError, NotPermitted, Unavailable
from core.hosts import HTTPS_PORT
from core.peers import Peer, connect_first, resolve_peers, shut_down_after
from core.settings import Settings
from core.sources import HttpsSource, Location, locate
from worker.ingest.sources.assembly import BLOCK, Checksum, Sink

_MAX_REDIRECTS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class HttpsFile:
    """The file at an address.

    `etag` and `size` are what an earlier attempt was told; `on_told(etag, size)` hears of new ones.
    """

    checksum: Checksum | None = None  # one that the user names is checked when all is there

    def __init__(
        self,
        source: HttpsSource,
        settings: Settings,
        *,
        etag: str | None,
        size: int | None,
        on_told: Callable[[str | None, int | None], None],
    ) -> None:
        self.size = size
        self._settings = settings
        self._location = locate(source.url, settings)
        self._etag = etag
        self._on_told = on_told

    def copy(self, sink: Sink, *, offset: int) -> None:
        """Write the file; goes on from `offset` where the server says that it is the same file.

        Raises:
            NotPermitted: `source_address_blocked`, `source_not_allowed` (a redirect elsewhere).
            InvalidInput: `source_refused`: the server says no.
            Unavailable: `source_unreachable`.
            TooLarge: a limit is passed.
        """
        peers = _resolved(self._location)
        location = self._location
        for _ in range(_MAX_REDIRECTS + 1):
            with self._answer(location, peers, sink, offset) as response:
                if response.status not in _REDIRECTS:
                    self._receive(response, sink, offset)
                    return
                location = self._next(location, response.headers.get("Location", ""))
        raise _refused(location, f"more than {_MAX_REDIRECTS} redirects")

    @contextmanager
    def _answer(
        self, location: Location, peers: list[Peer], sink: Sink, offset: int
    ) -> Iterator[http.client.HTTPResponse]:
        sources = self._settings.sources
        left_s = sink.gauge.left_s
        context = ssl.create_default_context()
        if sources.ca_file is not None:
            context.load_verify_locations(cafile=sources.ca_file)
        with _faults_as_errors(location, sink.gauge.late):
            raw = connect_first(peers, timeout_s=min(sources.timeout_s, left_s))
            # The timeout is for each read; a server that sends a byte now and then has the timer.
            with (
                context.wrap_socket(
                    raw,
                    server_hostname=location.host,
                    do_handshake_on_connect=False,
                    suppress_ragged_eofs=False,
                ) as tls,
                shut_down_after(left_s, tls),
            ):
                tls.do_handshake()
                connection = http.client.HTTPSConnection(
                    location.host, location.port, context=context
                )
                connection.sock = tls
                connection.request("GET", location.target, headers=self._headers(offset))
                with connection.getresponse() as response:
                    yield response

    def _headers(self, offset: int) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "kdpo"}
        if offset and self._etag is not None:
            headers |= {"Range": f"bytes={offset}-", "If-Range": self._etag}
        return headers

    def _next(self, location: Location, target: str) -> Location:
        """Return where a redirect leads, on the same host: it was resolved and judged.

        Raises:
            NotPermitted: `source_not_allowed`: it leads to another host, port or scheme.
            InvalidInput: `source_refused`, `unusable_url`: it is no address, or none to ask.
        """
        try:
            found = urlsplit(urljoin(_url(location), target))
            port = found.port or HTTPS_PORT
        except ValueError as error:
            raise _refused(location, "it redirects to what is no address") from error
        if (found.scheme, found.hostname, port) != ("https", location.host, location.port):
            raise NotPermitted(
                f"the host {location.host} redirects to "
                f"{found.scheme[:10]}://{(found.hostname or '')[:200]}; redirects to another host "
                "are not followed",
                code="source_not_allowed",
                param="source.url",
                hint="give the address that it leads to; its host must be listed, too",
            )
        return locate(found._replace(fragment="").geturl(), self._settings)

    def _receive(self, response: http.client.HTTPResponse, sink: Sink, offset: int) -> None:
        wanted_range = offset > 0 and self._etag is not None
        if response.status == 206 and wanted_range:
            told = response.headers.get("Content-Range", "")
            if not self._is_the_rest(told, offset, response.headers.get("ETag")):
                # Asked for again, the server would say the same: the next attempt asks for all.
                sink.restart()
                raise _unreachable(
                    self._location,
                    f"asked for the bytes from {offset} on of version {self._etag}, it sent "
                    f"{told[:60]!r} of version {response.headers.get('ETag')}",
                    hint="what had arrived is dropped; the next attempt asks for the whole file",
                )
        elif response.status == 200:
            sink.restart()
            offset = 0
        elif response.status == 416 and wanted_range:
            sink.restart()
            raise _unreachable(
                self._location,
                "the file has become shorter",
                hint="what had arrived is dropped; the next attempt asks for the whole file",
            )
        elif response.status in _AGAIN:
            raise _unreachable(self._location, f"it answered {response.status}")
        else:
            raise _refused(self._location, f"{response.status}")
        etag = response.headers.get("ETag")
        length = response.length
        size = None if length is None else offset + length
        if size is not None:
            sink.gauge.expect(size)
        self._on_told(None if etag is None or etag.startswith("W/") else etag, size)
        received = 0
        while block := response.read1(BLOCK):
            received += len(block)
            sink.write(block)
        if length is not None and received != length:
            # A connection that is broken off at the deadline may look like one that has ended.
            raise sink.gauge.late() or _unreachable(
                self._location, f"the answer ended after {received} bytes"
            )

    def _is_the_rest(self, told: str, offset: int, etag: str | None) -> bool:
        """Whether a part is what was asked for: from `offset` to the end of the same version."""
        found = _RANGE.fullmatch(told.strip())
        if found is None or int(found[1]) != offset or (etag or self._etag) != self._etag:
            return False
        sizes = {None if found[3] == "*" else int(found[3]), self.size} - {None}
        return len(sizes) <= 1 and all(int(found[2]) + 1 == size for size in sizes)


def _resolved(location: Location) -> list[Peer]:
    """Return the addresses of a host, all of which must be allowed.

    Raises:
        NotPermitted: code `source_address_blocked`.
        Unavailable: the name has no address now.
    """
    try:
        peers, why = resolve_peers(location.host, location.port, location.rule)
    except OSError as error:
        raise _unreachable(location, f"its name cannot be resolved ({error.strerror})") from error
    if why is not None:
        raise NotPermitted(
            f"the host {location.host} has an address that this server may not connect to: it "
            f"{why}",
            code="source_address_blocked",
            param="source.url",
            hint="the administrator can permit a network for this host: "
            f"KDPO_SOURCES__HTTPS_HOSTS={location.host}=<network>; or upload the file",
        )
    return peers


@contextmanager
def _faults_as_errors(location: Location, late: Callable[[], KdpoError | None]) -> Iterator[None]:
    """Turn what sockets, TLS and HTTP raise into errors of ours.

    Raises:
        InvalidInput: code `source_refused`, of a certificate that does not prove the name.
        Unavailable: code `source_unreachable`, of all others.
    """
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise InvalidInput(
            f"the certificate of {location.host} is not trusted: {error.verify_message}",
            code="source_refused",
            param="source.url",
            hint="the administrator names further authorities in KDPO_SOURCES__CA_FILE",
        ) from error
    except (OSError, http.client.error) as error:
        too_late = late()
        if too_late is not None:
            raise too_late from error
        raise _unreachable(location, type(error).__name__) from error


def _url(location: Location) -> str:
    return f"https://{location.host}:{location.port}{location.target}"


def _unreachable(
    location: Location,
    why: str,
    *,
    hint: str = "what has arrived is kept; the next attempt goes on from there where it can",
) -> Unavailable:
    return Unavailable(
        f"the transfer from {location.host} failed: {why}",
        code="source_unreachable",
        param="source.url",
        hint=hint,
    )


def _refused(location: Location, status: str) -> InvalidInput:
    return InvalidInput(
        f"the host {location.host} refuses the file: {status}",
        code="source_refused",
        param="source.url",
        hint="expected an address that answers 200 without a login",
    )
