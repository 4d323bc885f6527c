"""Connections to hosts that people name: resolved once, judged, and made to what was judged."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from core.hosts import HostRule, why_blocked


@dataclass(frozen=True)
class Peer:
    """An address that may be connected to."""

    family: socket.AddressFamily
    address: tuple[str, int] | tuple[str, int, int, int]


def resolve_peers(host: str, port: int, rule: HostRule) -> tuple[list[Peer], str | None]:
    """Return the addresses of a host, or why one of them, and so the host, is refused.

    Raises:
        OSError: the name has no address now.
    """
    peers: dict[str, Peer] = {}
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        text = str(address[0])
        why = why_blocked(text, rule)
        if why is not None:
            return [], why
        peers.setdefault(text, Peer(family, address))  # type: ignore[arg-type]
    return list(peers.values()), None


def connect_first(peers: list[Peer], *, timeout_s: float) -> socket.socket:
    """Connect to the first address that answers.

    Raises:
        OSError: none does.
    """
    failure: OSError = OSError("the name has no address")
    for peer in peers:
        raw = socket.socket(peer.family, socket.SOCK_STREAM)
        raw.settimeout(timeout_s)
        try:
            raw.connect(peer.address)
        except OSError as error:
            raw.close()
            failure = error
            continue
        return raw
    raise failure


@contextmanager
def shut_down_after(seconds: float, connection: socket.socket | ssl.SSLSocket) -> Iterator[None]:
    """Break a connection off when its time is over, whatever it is waiting for."""

    def end() -> None:
        with suppress(OSError):  # the other side was faster
            # Of the plain socket: SSLSocket.shutdown drops the TLS state under the reader.
            socket.socket.shutdown(connection, socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
