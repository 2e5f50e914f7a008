"""A Hugging Face hub on this machine: folders served as repositories, with the real client."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/revision/main")
_TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class FakeHub:
    """What is served, and what was asked for.

    Attributes:
        url: address of the server.
        root: ``root/models/OWNER/NAME`` and ``root/datasets/OWNER/NAME`` are the repositories.
        downloads: files that were sent, in order.
        starts: file and first byte of each of them.
        cut: file -> bytes after which the connection is closed, once.
        torn: files whose last byte arrives changed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.downloads: list[str] = []
        self.starts: list[tuple[str, int]] = []
        self.cut: dict[str, int] = {}
        self.torn: set[str] = set()

    def answer(self, path: str, method: str, first: int = 0) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request for the bytes from ``first`` on."""
        if match := _INFO.fullmatch(path):
            folder = self.root / match[1] / match[2]
            body = {"_id": "0", "id": match[2], "sha": COMMIT, "siblings": [], "private": False}
            return self._json(body) if folder.is_dir() else self._missing("RepoNotFound")
        if match := _TREE.fullmatch(path):
            folder = self.root / match[1] / match[2]
            files = sorted(item for item in folder.rglob("*") if item.is_file())
            entries = [
                {
                    "type": "file",
                    "path": str(item.relative_to(folder)),
                    "size": item.stat().st_size,
                    "oid": checksum(item),
                }
                for item in files
            ]
            return self._json(entries)
        if match := _FILE.fullmatch(path):
            file = self.root / ("datasets" if match[1] else "models") / match[2] / match[3]
            if not file.is_file():
                return self._missing("EntryNotFound")
            body = file.read_bytes()
            headers = {
                "ETag": f'"{checksum(file)}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
            }
            if method == "GET":
                self.downloads.append(match[3])
                self.starts.append((match[3], first))
            if match[3] in self.torn:
                body = body[:-1] + bytes([body[-1] ^ 1])
            if not first:
                return 200, headers, body
            headers["Content-Range"] = f"bytes {first}-{len(body) - 1}/{len(body)}"
            return 206, headers, body[first:]
        return self._missing("RepoNotFound")

    @staticmethod
    def _json(content: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    @staticmethod
    def _missing(code: str) -> tuple[int, dict[str, str], bytes]:
        return 404, {"X-Error-Code": code, "X-Error-Message": "not here"}, b""


def checksum(file: Path) -> str:
    """What the hub calls a file: SHA-256 of archives and weights, git's SHA-1 of small files."""
    body = file.read_bytes()
    if file.suffix in (".tar", ".safetensors"):
        return hashlib.sha256(body).hexdigest()
    head = f"blob {len(body)}\0".encode()
    return hashlib.sha1(head + body, usedforsecurity=False).hexdigest()


@contextmanager
def serve_hub(root: Path) -> Iterator[FakeHub]:
    """Serves the repositories below a folder on 127.0.0.1."""
    hub = FakeHub(root)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            path = unquote(urlsplit(self.path).path)
            first = int(wanted[1]) if wanted else 0
            status, headers, body = hub.answer(path, self.command, first)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                limit = hub.cut.pop(path.rpartition("/")[2], len(body))
                self.wfile.write(body[:limit])
                self.close_connection = limit < len(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
