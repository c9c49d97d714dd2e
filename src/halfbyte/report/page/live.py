"""The report page while runs go on: a server on this machine alone, which reads the folders again when they change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ...errors import HalfbyteError
from ...lab.record import RecordError, read
from . import as_json, content, going_on, render, require_plotly

__all__ = ["HOST", "Source", "serve", "server"]

HOST = "127.0.0.1"


class Source:
    """What there is to show in some folders, read anew only when a file in them has changed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._lock = threading.Lock()
        self._state = ""
        self._text = ""

    def news(self) -> tuple[str, str]:
        """A name for the present state, and what a page shows of it, as JSON."""
        with self._lock:
            files = self._files()
            state = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
            if state != self._state:
                records = []
                for path, *_ in files:
                    try:
                        records.append(read(Path(path)))
                    except RecordError:
                        continue  # Something else that is JSON; or it is gone already.
                self._text = as_json(content(records, going_on(self._paths)))
                self._state = state
            return self._state, self._text

    def page(self) -> str:
        """The page as it is now."""
        return render(json.loads(self.news()[1]), live=True)

    def _files(self) -> list[tuple[str, int, int]]:
        """Every JSON file with its time and size."""
        found = []
        for path in self._paths:
            for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
                try:
                    stat = file.stat()
                except OSError:
                    continue  # It went away meanwhile.
                found.append((str(file), stat.st_mtime_ns, stat.st_size))
        return found


def server(paths: Sequence[Path], port: int = 0) -> ThreadingHTTPServer:
    """A server that is bound and not yet serving; its ``server_port`` is the port.

    Args:
        paths: records, folders that hold some, or folders in which some will be.
        port: 0 for a free one.

    Raises:
        HalfbyteError: if a path does not exist, the port is taken, or Plotly is not installed.
    """
    require_plotly()
    for path in paths:
        if not path.exists():
            raise HalfbyteError(
                f"--live {path} was asked for, which does not exist. Name a record or a folder of runs."
            )
    source = Source(paths)

    class Handler(BaseHTTPRequestHandler):
        """Answers for the page and its data, and for nothing else."""

        server: ThreadingHTTPServer

        def do_GET(self) -> None:
            """Answers."""
            # A page of another site whose name was made to mean this machine still brings its own name.
            name, _, at = self.headers.get("Host", "").rpartition(":")
            if name not in (HOST, "localhost") or at != str(self.server.server_port):
                self._answer(403, "text/plain", b"This server speaks to its own page only.")
            elif self.path == "/":
                self._answer(200, "text/html; charset=utf-8", source.page().encode())
            elif self.path == "/data.json":
                state, text = source.news()
                if self.headers.get("If-None-Match") == state:
                    self._answer(304, "application/json", b"", state)
                else:
                    self._answer(200, "application/json", text.encode(), state)
            else:
                self._answer(404, "text/plain", b"There is / and /data.json.")

        def _answer(self, status: int, kind: str, body: bytes, state: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            if state:
                self.send_header("ETag", state)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing: the page asks every few seconds."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise HalfbyteError(
            f"--port {port} was asked for and cannot be had ({error}). Leave it out, and a free one is taken."
        ) from error


def serve(paths: Sequence[Path], port: int, say: Callable[[str], None]) -> None:
    """Serves the page until Ctrl-C.

    Args:
        paths: see `server`.
        port: 0 for a free one.
        say: told the page's address, once it answers.

    Raises:
        HalfbyteError: see `server`.
    """
    with server(paths, port) as running:
        say(f"http://{HOST}:{running.server_port}/")
        with contextlib.suppress(KeyboardInterrupt):
            running.serve_forever()
