"""A stand-in for the hub on loopback: enough of its protocol for a pull, and faults to order."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, which faults it shows, and what it was asked."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    # Bytes of a file after which its connection is cut, one number a request.
    cuts: dict[str, list[int]] = field(default_factory=dict)
    # Bytes of a file after which the server goes silent until `release` is set.
    holds: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    ignore_range: bool = False
    release: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    tokens: list[str | None] = field(default_factory=list)
    url: str = ""

    def ranges(self, name: str) -> list[str | None]:
        """Return the Range header of each request for a file."""
        return [sent for method, path, sent in self.requests if method == "GET" and path.endswith("/" + name)]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(("GET", path, self.headers.get("Range")))
            hub.tokens.append(self.headers.get("Authorization"))
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                self.listing("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
            else:
                self.file("/".join(parts[:2]), "/".join(parts[4:]))

        def refuse(self, status: int, code: str) -> None:
            body = json.dumps({"error": code}).encode()
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def listing(self, repo: str, revision: str) -> None:
            if repo in hub.gated:
                return self.refuse(401, "GatedRepo")
            if repo not in hub.repos:
                return self.refuse(404, "RepoNotFound")
            if revision not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            siblings = []
            for name, content in hub.repos[repo].items():
                item: dict[str, object] = {"rfilename": name, "size": len(content)}
                if name.endswith((".safetensors", ".gguf", ".bin")):
                    digest = hashlib.sha256(content).hexdigest()
                    item |= {"blobId": "f" * 40, "lfs": {"sha256": digest, "size": len(content), "pointerSize": 130}}
                else:
                    item["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                siblings.append(item)
            body = json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return None

        def file(self, repo: str, name: str) -> None:
            content = hub.repos.get(repo, {}).get(name)
            if content is None:
                return self.refuse(404, "EntryNotFound")
            if name in hub.corrupt:
                content = bytes(len(content) - 1) + b"!"
            start, asked = 0, self.headers.get("Range")
            whole = len(content)
            if asked and not hub.ignore_range:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start = int(first)
                content = content[: int(last) + 1] if last else content
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{whole}")
            else:
                self.send_response(200)
            self.send_header("ETag", '"etag"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            end = len(content)
            if hub.cuts.get(name):
                end = min(end, start + hub.cuts[name].pop(0))
            held = hub.holds.pop(name, None)
            stops = [end] if held is None else [min(end, start + held), end]
            try:
                for stop in stops:
                    self.wfile.write(content[start:stop])
                    self.wfile.flush()
                    hub.sent[name] = hub.sent.get(name, 0) + stop - start
                    start = stop
                    if stop != end:
                        # Longer than any test waits for what it is held for.
                        hub.release.wait(120)
            except OSError:
                self.close_connection = True
            if end < len(content):
                self.close_connection = True
            return None

    return Handler


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve `hub` on a free loopback port; its address is in `hub.url`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()


@contextmanager
def silent_server() -> Iterator[str]:
    """Yield the address of a server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=8) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def dead_address() -> str:
    """Return an address on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}"
