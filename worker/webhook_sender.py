"""One POST to a webhook: to the address that was checked, no redirects, nothing read but a status.

Proxies of the environment are not used: they would resolve the name anew.
"""

import http.client
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version

from core.errors import KdpoError
from core.peers import connect_first, resolve_peers, shut_down_after
from core.settings import WebhookSettings
from core.webhook_targets import WebhookTarget, webhook_target
from models.repositories.webhooks import Attempt

_GONE = 410
_MAX_REASON = 300


def post(url: str, body: bytes, headers: Mapping[str, str], settings: WebhookSettings) -> Attempt:
    """Send a body and return what came of it; only a 2xx is a success."""
    began = time.monotonic()
    status: int | None = None
    error: str | None = None
    try:
        status = _status(webhook_target(url, settings), body, headers, settings)
        if not 200 <= status < 300:
            error = "redirects are not followed" if 300 <= status < 400 else f"answered {status}"
    except KdpoError as refused:
        error = refused.message
    except ssl.SSLCertVerificationError as failure:
        error = f"the certificate is not trusted: {failure.verify_message}"
    except (OSError, http.client.error) as failure:
        # A connection that is broken off when its time is over fails in several ways.
        slow = isinstance(failure, TimeoutError) or time.monotonic() - began >= settings.timeout_s
        error = f"no answer within {settings.timeout_s:g} s" if slow else _said(failure)
    took = int((time.monotonic() - began) * 1000)
    return Attempt(
        ok=error is None,
        status=status,
        error=None if error is None else error[:_MAX_REASON],
        duration_ms=took,
        gone=status == _GONE,
    )


def _status(
    target: WebhookTarget,
    body: bytes,
    headers: Mapping[str, str],
    settings: WebhookSettings,
) -> int:
    """Return the status of the answer.

    Raises:
        OSError, http.client.error: there was none.
    """
    url = target.url
    peers, why = resolve_peers(url.host, url.port, target.rule)
    if why is not None:
        raise ConnectionRefusedError(f"the host has an address that is not connected to: it {why}")
    began = time.monotonic()
    raw = connect_first(peers, timeout_s=settings.timeout_s)
    left_s = max(0.0, settings.timeout_s - (time.monotonic() - began))
    with ExitStack() as stack:
        connection: socket.socket | ssl.SSLSocket = stack.enter_context(raw)
        if url.scheme == "https":
            context = ssl.create_default_context()
            if settings.ca_file is not None:
                context.load_verify_locations(cafile=settings.ca_file)
            tls = context.wrap_socket(raw, server_hostname=url.host, do_handshake_on_connect=False)
            connection = stack.enter_context(tls)
            stack.enter_context(shut_down_after(left_s, tls))
            tls.do_handshake()
        else:
            stack.enter_context(shut_down_after(left_s, raw))
        asked = http.client.HTTPConnection(url.host, url.port)
        asked.sock = connection
        default = 443 if url.scheme == "https" else 80
        host = url.host if url.port == default else f"{url.host}:{url.port}"
        asked.request("POST", url.target, body=body, headers={
            "Host": host, "Content-Type": "application/json", "Connection": "close",
            "User-Agent": f"kdpo/{version('kdpo')}", **headers,
        })  # fmt: skip
        with asked.getresponse() as response:
            return response.status


def _said(failure: Exception) -> str:
    text = str(getattr(failure, "strerror", None) or failure)
    return f"{type(failure).__name__}: {text}" if text else type(failure).__name__
