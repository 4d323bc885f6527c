"""A hub that can be written to, for the real client."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_maywrite"


@dataclass
class WritableHub:
    """A hub that takes all files as parts of the commit, from one token."""

    files: dict[str, bytes] = field(default_factory=dict)
    made: list[dict[str, object]] = field(default_factory=list)
    message: str = ""
    status: int = 200
    card_errors: list[str] = field(default_factory=list)

    def answer(self, path: str, token: str, body: bytes) -> tuple[int, object]:
        if self.status != 200 or token != f"Bearer {TOKEN}":
            return self.status if self.status != 200 else 403, {"error": "no"}
        match path:
            case "/api/repos/create":
                self.made.append(json.loads(body))
                return 200, {"url": f"{constants.ENDPOINT}/acme/aligned"}
            case "/api/validate-yaml":
                errors = [{"message": message} for message in self.card_errors]
                return (400 if errors else 200), {"errors": errors, "warnings": []}
            case "/api/models/acme/aligned/preupload/main":
                named = [file["path"] for file in json.loads(body)["files"]]
                modes = [
                    {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named
                ]
                return 200, {"files": modes}
            case "/api/models/acme/aligned/commit/main":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        self.message = value["summary"]
                    else:
                        self.files[value["path"]] = base64.b64decode(value["content"])
                url = f"{constants.ENDPOINT}/acme/aligned/commit/{COMMIT}"
                return 200, {"commitUrl": url, "commitOid": COMMIT}
        return 404, {"error": path}


@contextmanager
def writable_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """Serve a hub on loopback, which the client then takes for the hub."""
    state = WritableHub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0]
            status, said = state.answer(path, self.headers.get("Authorization", ""), body)
            answer = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield state
    listener.shutdown()
    listener.server_close()
    thread.join()
