"""One large file up and down, through the API and through a plain peer, taking turns.

The peer is nginx where it is installed (PUT by its DAV module, GET by sendfile), else the least
that can be done: a process that writes what it receives to a file, and gives a file to
`sendfile`. Either way an upload counts until its file is on the disk (fsync), as the API promises.
"""

import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

HOST = "127.0.0.1"
BLOCK_BYTES = 1 << 20
TIMEOUT_S = 120.0
_BOUNDARY = "kdpo-bench-boundary"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)

Row = dict[str, Any]


def write_file(path: Path, size_bytes: int) -> None:
    """Write so many bytes of JSON Lines; every MiB is another one."""
    row = {"prompt": "What is 2 + 2?", "chosen": "It is 4." * 8, "rejected": "It is 5, I think."}
    with path.open("wb") as file:
        left = size_bytes
        while left > 0:
            line = orjson.dumps({**row, "id": left}) + b"\n"
            block = (line * (BLOCK_BYTES // len(line) + 1))[: min(left, BLOCK_BYTES)]
            file.write(block)
            left -= len(block)


class Store(Protocol):
    """Something that takes a file and gives it back over HTTP."""

    name: str

    def put(self, path: Path) -> str:
        """Send a file; return when it is stored, with its name there."""

    def get(self, name: str) -> int:
        """Receive a file and count its bytes."""

    def remove(self, name: str) -> None:
        """Make room."""


def measure(stores: list[Store], path: Path, *, rounds: int) -> Iterator[Row]:
    """Send and receive the file with every store in each round; MB/s of each."""
    size = path.stat().st_size
    for number in range(rounds):
        # Whoever is first finds the machine as the one before left it, so they take turns at that.
        for store in stores if number % 2 == 0 else stores[::-1]:
            name, up = _timed(lambda store=store: store.put(path))
            received, down = _timed(lambda store=store, name=name: store.get(name))
            if received != size:
                raise RuntimeError(f"{store.name}: sent {size} bytes and received {received}")
            store.remove(name)
            yield {"store": store.name, "round": number, "bytes": size,
                   "up_mb_s": size / up / 1e6, "down_mb_s": size / down / 1e6}  # fmt: skip


def _timed(do: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    found = do()
    return found, time.perf_counter() - began


# ------------------------------------------------------------------ HTTP, the least of it


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """A connection, closed afterwards."""
    with socket.create_connection((HOST, port), timeout=TIMEOUT_S) as connection:
        yield connection


def send_file(connection: socket.socket, head: bytes, path: Path, tail: bytes = b"") -> bytes:
    """Send a request whose body is the file between a beginning and an end; return the answer."""
    connection.sendall(head)
    with path.open("rb") as file:
        connection.sendfile(file)
    connection.sendall(tail)
    head, body, length = receive_head(connection)
    while len(body) < length:
        body += _received(connection)
    if not head.startswith(b"HTTP/1.1 20"):
        raise RuntimeError(f"upload refused: {head.decode()} {body.decode(errors='replace')}")
    return body


def receive_file(connection: socket.socket, request: bytes) -> int:
    """Send a request and count the bytes of its answer's body."""
    connection.sendall(request)
    head, body, length = receive_head(connection)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"download refused: {head.decode()} {body.decode(errors='replace')}")
    received, block = len(body), bytearray(BLOCK_BYTES)
    while received < length:
        part = connection.recv_into(block)
        if part == 0:
            break
        received += part
    return received


def receive_head(connection: socket.socket) -> tuple[bytes, bytes, int]:
    """Return the head of an answer, what came of its body with it, and the body's length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = _LENGTH.search(head + b"\r\n")
    return head, body, int(length[1]) if length is not None else 0


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(65_536)
    if not data:
        raise RuntimeError("the server closed the connection before its answer was complete")
    return data


@dataclass(frozen=True)
class ApiStore:
    """Files of `/v1/files`: hashed, fsynced, named by their id, with a row in the database."""

    port: int
    secret: str
    name: str = "kdpo"

    def _head(self, method: str, path: str, *lines: str) -> bytes:
        standing = (f"Host: {HOST}", f"Authorization: Bearer {self.secret}")
        return "\r\n".join([f"{method} {path} HTTP/1.1", *standing, *lines, "", ""]).encode()

    def put(self, path: Path) -> str:
        """Upload it as a form, as curl -F and OpenAI's clients do."""
        begin = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n'
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        ).encode()
        end = f"\r\n--{_BOUNDARY}--\r\n".encode()
        length = len(begin) + path.stat().st_size + len(end)
        head = self._head(
            "POST", "/v1/files", f"Content-Length: {length}",
            f"Content-Type: multipart/form-data; boundary={_BOUNDARY}",
        )  # fmt: skip
        with connected(self.port) as connection:
            answer = orjson.loads(send_file(connection, head + begin, path, end))
        return str(answer["id"])

    def get(self, name: str) -> int:
        """Download it."""
        with connected(self.port) as connection:
            return receive_file(connection, self._head("GET", f"/v1/files/{name}/content"))

    def remove(self, name: str) -> None:
        """Delete it."""
        with connected(self.port) as connection:
            connection.sendall(self._head("DELETE", f"/v1/files/{name}"))
            head, body, _ = receive_head(connection)
            if not head.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"{head.decode()} {body.decode(errors='replace')}")


# ------------------------------------------------------------------ peers


@dataclass(frozen=True)
class FolderStore:
    """A peer that keeps files in a folder of this machine under the path of the request."""

    name: str
    port: int
    folder: Path
    syncs: bool

    def put(self, path: Path) -> str:
        """Send it by PUT; fsync it here where the peer does not."""
        target = "received.jsonl"
        head = (
            f"PUT /{target} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {path.stat().st_size}"
            "\r\n\r\n"
        )
        with connected(self.port) as connection:
            send_file(connection, head.encode(), path)
        if not self.syncs:
            with (self.folder / target).open("rb") as file:
                os.fsync(file.fileno())
        return target

    def get(self, name: str) -> int:
        """Download it."""
        with connected(self.port) as connection:
            request = f"GET /{name} HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n"
            return receive_file(connection, request.encode())

    def remove(self, name: str) -> None:
        """Delete it."""
        (self.folder / name).unlink()


@contextmanager
def peer(folder: Path) -> Iterator[Store]:
    """nginx if there is one, else the plain peer; its files are below `folder`."""
    folder.mkdir()
    found = shutil.which("nginx")
    with nginx(found, folder) if found is not None else plain(folder) as store:
        yield store


@contextmanager
def plain(folder: Path) -> Iterator[Store]:
    """A process that does nothing but move bytes between a socket and a file."""
    with socket.create_server((HOST, 0)) as listener:
        process = multiprocessing.get_context("fork").Process(
            target=_serve_plainly, args=(listener, folder), daemon=True
        )
        process.start()
        try:
            yield FolderStore("plain process", listener.getsockname()[1], folder, syncs=True)
        finally:
            process.terminate()
            process.join()


def _serve_plainly(listener: socket.socket, folder: Path) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            head, body, length = receive_head(connection)
            method, target, _ = head.split(b" ", 2)
            path = folder / target.decode().lstrip("/")
            if method == b"PUT":
                _take(connection, path, body, length)
                connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
            else:
                with path.open("rb") as file:
                    size = path.stat().st_size
                    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n"
                    connection.sendall(answer.encode())
                    connection.sendfile(file)


def _take(connection: socket.socket, path: Path, begun: bytes, length: int) -> None:
    block = bytearray(BLOCK_BYTES)
    with path.open("wb", buffering=0) as file:
        file.write(begun)
        received = len(begun)
        while received < length:
            part = connection.recv_into(block)
            if part == 0:
                raise RuntimeError("the client went away")
            file.write(memoryview(block)[:part])
            received += part
        os.fsync(file.fileno())


@contextmanager
def nginx(binary: str, folder: Path) -> Iterator[Store]:
    """One nginx process of our own, on loopback, with DAV for PUT."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    served = folder / "served"
    for path in (served, folder / "temporary"):
        path.mkdir()
    told = folder / "nginx.conf"
    # It makes the folders of all its modules, used or not.
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f" {kind}_temp_path {folder}/temporary/{kind};\n" for kind in kinds)
    user = "user root;\n" if os.geteuid() == 0 else ""
    told.write_text(
        f"{user}daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\nerror_log stderr;\n"
        "events {}\nhttp {\n access_log off;\n sendfile on;\n sendfile_max_chunk 2m;\n"
        f" client_max_body_size 0;\n{temporary}"
        f" server {{\n  listen {HOST}:{port};\n  root {served};\n  dav_methods PUT;\n }}\n}}\n",
        encoding="utf-8",
    )
    with (folder / "nginx.log").open("wb") as log:
        process = subprocess.Popen([binary, "-c", str(told)], stdout=log, stderr=log)
    try:
        _until_it_listens(port, process, folder / "nginx.log")
        yield FolderStore("nginx", port, served, syncs=False)
    finally:
        process.terminate()
        process.wait(10)


def _until_it_listens(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((HOST, port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nginx does not listen: {log.read_text(errors='replace')[-2000:]}")
