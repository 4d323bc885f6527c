"""Servers that datasets are fetched from: https with an authority of its own, and a hub."""

import hashlib
import json
import re
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "76543210fedcba9876543210fedcba9876543210"
REPO = "acme/prefs"
TOKEN = "hf_secretsecretsecret"


@dataclass(frozen=True)
class Asked:
    """One request: its path with query, and its headers in lower case."""

    path: str
    headers: dict[str, str]


@dataclass
class Reply:
    """What a server says; `cut_at` breaks the body off there, `pause` is called before it."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    pause: Callable[[], None] | None = None


@dataclass
class Server:
    """A server on loopback whose answers a test decides."""

    port: int = 0
    answer: Callable[[Asked], Reply] = lambda _asked: Reply(404)
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def running(server: Server, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """Serve until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = Asked(self.path, {k.lower(): v for k, v in self.headers.items()})
            server.asked.append(asked)
            reply = server.answer(asked)
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if "Transfer-Encoding" not in reply.headers:
                self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if reply.pause is not None:
                self.wfile.write(reply.body[:1])
                reply.pause()
                self.wfile.write(reply.body[1:])
            else:
                self.wfile.write(reply.body[: reply.cut_at])
            if reply.cut_at is not None:
                self.close_connection = True

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    class Listener(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that hangs up is what some tests are about."""

    listener = Listener(("127.0.0.1", 0), Handler)
    if tls is not None:
        listener.socket = tls.wrap_socket(
            listener.socket, server_side=True, do_handshake_on_connect=False
        )
    server.port = listener.server_port
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()


def file_reply(asked: Asked, data: bytes, *, etag: str | None = '"one"') -> Reply:
    """Return a file, or the part of it that is asked for of the same version."""
    headers = {} if etag is None else {"ETag": etag}
    wanted = re.fullmatch(r"bytes=(\d+)-", asked.headers.get("range", ""))
    condition = asked.headers.get("if-range")
    if wanted is None or (condition is not None and condition != etag):
        return Reply(body=data, headers=headers)
    start = int(wanted[1])
    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return Reply(206, data[start:], headers)


def make_authority(folder: Path, names: str) -> tuple[ssl.SSLContext, Path]:
    """Return a server context for these names and the certificate of the authority behind it."""
    ca, key, request = folder / "ca.pem", folder / "ca.key", folder / "server.csr"
    server, server_key, extra = folder / "server.pem", folder / "server.key", folder / "extra.cnf"
    extra.write_text(f"subjectAltName={names}\nbasicConstraints=CA:FALSE\n")
    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for command in (
        ("req", "-x509", *new, "-keyout", key, "-out", ca, "-subj", "/CN=kdpo test", "-days", "2",
         "-addext", "keyUsage=critical,keyCertSign"),
        ("req", "-new", *new, "-keyout", server_key, "-out", request, "-subj", "/CN=server"),
        ("x509", "-req", "-in", request, "-CA", ca, "-CAkey", key, "-CAcreateserial",
         "-days", "2", "-extfile", extra, "-out", server),
    ):  # fmt: skip
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)  # noqa: S607
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server, server_key)
    return context, ca


@dataclass
class Hub:
    """A hub with one dataset repository, whose `main` may move."""

    files: dict[str, bytes]
    commit: str = COMMIT
    private: bool = False
    gated: bool = False
    down: bool = False
    damaged: set[str] = field(default_factory=set)
    cut_at: int | None = None
    server: Server = field(default_factory=Server)

    def answer(self, asked: Asked) -> Reply:
        path = asked.path.partition("?")[0]
        allowed = asked.headers.get("authorization") == f"Bearer {TOKEN}"
        if self.down:
            return Reply(503)
        if self.private and not allowed:
            return Reply(401, headers={"X-Error-Code": "RepoNotFound"})
        if self.gated and not allowed and "/resolve/" in path:
            return Reply(403, headers={"X-Error-Code": "GatedRepo"})
        if path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/main"):
            return self._info()
        if path.startswith(f"/api/datasets/{REPO}/revision/"):
            if path.endswith(self.commit):
                return self._info()
            return Reply(404, headers={"X-Error-Code": "RevisionNotFound"})
        if path.startswith(f"/api/datasets/{REPO}/tree/{self.commit}"):
            return _json([self._entry(name) for name in self.files])
        prefix = f"/datasets/{REPO}/resolve/{self.commit}/"
        name = path.removeprefix(prefix)
        if path.startswith(prefix) and name in self.files:
            return self._file(asked, name)
        return Reply(404, headers={"X-Error-Code": "RepoNotFound"})

    def _file(self, asked: Asked, name: str) -> Reply:
        data = self.files[name]
        if name in self.damaged:
            self.damaged.remove(name)
            data = data[:-1] + b"?"
        reply = file_reply(asked, data, etag=None)
        if self.cut_at is not None and name != "README.md":
            reply.cut_at, self.cut_at = self.cut_at, None
        return reply

    def _info(self) -> Reply:
        siblings = [{"rfilename": name} for name in self.files]
        return _json({
            "_id": "1", "id": REPO, "sha": self.commit, "private": self.private, "gated": False,
            "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "disabled": False,
        })  # fmt: skip

    def _entry(self, name: str) -> dict[str, object]:
        data = self.files[name]
        blob = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()  # noqa: S324
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": blob}
        if name.endswith(".parquet"):
            sha256 = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return entry


def _json(value: object) -> Reply:
    return Reply(body=json.dumps(value).encode(), headers={"Content-Type": "application/json"})
