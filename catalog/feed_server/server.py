"""The server: arXiv's query API on 127.0.0.1, with a log of what was asked and trouble on request."""

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from latentcot.catalog.feed_server import feed
from latentcot.catalog.feed_server.corpus import Corpus, Paper, QueryError
from latentcot.catalog.feed_server.faults import Fault
from latentcot.catalog.update.clock import Clock, SystemClock

PATH = "/api/query"


@dataclass(frozen=True)
class Seen:
    """One request: its number, when it came on the server's clock, path, parameters, headers, and the answer's status."""

    number: int
    at: float
    path: str
    parameters: dict[str, str]
    headers: dict[str, str]
    status: int


@dataclass(frozen=True)
class Page:
    """A fixed answer of another path (a repository, a tracker, a link to be checked)."""

    status: int = 200
    body: bytes = b""
    type: str = "text/plain; charset=utf-8"
    head_status: int | None = None  # what HEAD answers, where that differs


class FeedServer:
    """``with FeedServer(papers) as server: ... server.url``. Everything may be changed while it runs.

    ``clock`` decides what has been announced and times the log; tests give the same clock to the updater.
    """

    def __init__(self, papers: Iterable[Paper] = (), *, clock: Clock | None = None, port: int = 0) -> None:
        self.corpus = Corpus(list(papers))
        self.clock = clock or SystemClock()
        self.faults: list[tuple[Fault, list[int]]] = []
        self.pages: dict[str, Page] = {}
        self.log: list[Seen] = []
        self.most_at_once = 0
        self._now_open: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server._answer(self, body=True)

            def do_HEAD(self) -> None:
                server._answer(self, body=False)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hangs up is no news here

        self._http = Quiet(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def url(self) -> str:
        """Address of the query API."""
        return f"{self.root}{PATH}"

    def __enter__(self) -> "FeedServer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def play(self, *faults: Fault) -> None:
        """Add trouble. The first fault that meets a request is played."""
        self.faults += [(fault, [0]) for fault in faults]

    def clear(self) -> None:
        """No more trouble, and an empty log."""
        self.faults, self.log, self.most_at_once = [], [], 0

    def add(self, *papers: Paper) -> None:
        """More papers, or new versions of known ones."""
        self.corpus.add(papers)

    def _fault(self, number: int, start: int, size: int) -> Fault | None:
        for fault, played in self.faults:
            if fault.meets(number, start, size) and (fault.times is None or played[0] < fault.times):
                played[0] += 1
                return fault
        return None

    def _answer(self, handler: BaseHTTPRequestHandler, *, body: bool) -> None:
        parts = urlsplit(handler.path)
        parameters = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        with self._lock:
            number = sum(1 for seen in self.log if seen.path == PATH)
            self._now_open["all"] += 1
            self.most_at_once = max(self.most_at_once, self._now_open["all"])
            place = len(self.log)
            self.log.append(
                Seen(number, self.clock.monotonic(), parts.path, parameters, dict(handler.headers.items()), 0)
            )
        status = 0
        try:
            if parts.path == PATH:
                status = self._query(handler, number, parameters)
            else:
                page = self.pages.get(parts.path, Page(404, b"not here"))
                status = page.status if body or page.head_status is None else page.head_status
                _send(handler, status, page.body if body else b"", {"Content-Type": page.type})
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has gone; that is what some faults are about
        finally:
            with self._lock:
                self._now_open["all"] -= 1
                old = self.log[place]
                self.log[place] = Seen(old.number, old.at, old.path, old.parameters, old.headers, status)

    def _query(self, handler: BaseHTTPRequestHandler, number: int, parameters: dict[str, str]) -> int:
        now = self.clock.now()
        start, size = (
            _whole(parameters.get(name, default)) for name, default in (("start", "0"), ("max_results", "10"))
        )
        fault = self._fault(number, start or 0, size or 0)
        headers = {"Content-Type": "application/atom+xml; charset=utf-8"}
        if fault is not None and fault.kind in ("status", "redirect", "close", "hang"):
            return self._refuse(handler, fault)
        try:
            if start is None or size is None or size > 2000:
                raise QueryError("start and max_results must be non-negative integers, max_results at most 2000")
            if start + size > 30000:
                raise QueryError("no more than 30000 results of one query")
            entries, total = self._entries(parameters, start, size, fault)
        except QueryError as error:
            _send(handler, 400, feed.render_error(str(error), now).encode(), headers)
            return 400
        if fault is not None and fault.kind == "error":
            _send(handler, fault.status, feed.render_error("the server has had enough", now).encode(), headers)
            return fault.status
        if fault is not None and fault.kind == "total":
            total = max(0, total + fault.count)
        title = parameters.get("search_query") or parameters.get("id_list", "")
        data = feed.render(entries, title=title, total=total, start=start, size=size, now=now).encode()
        if fault is not None and fault.kind == "body":
            data = fault.body
        elif fault is not None and fault.kind == "damaged":
            data = data[: len(data) * 2 // 3]
        if fault is not None and fault.kind in ("cut", "drip"):
            return self._badly(handler, fault, data)
        _send(handler, 200, data, headers)
        return 200

    def _entries(self, parameters: dict[str, str], start: int, size: int, fault: Fault | None) -> tuple[list[str], int]:
        now = self.clock.now()
        if ids := parameters.get("id_list"):
            found = self.corpus.by_ids([text for text in ids.split(",") if text], now)
        elif query := parameters.get("search_query"):
            found = [(item, len(item.versions)) for item in self.corpus.search(query, now)]
        else:
            raise QueryError("neither search_query nor id_list")
        if parameters.get("sortOrder") == "descending":
            found = found[::-1]
        shown = found[start : start + size]
        if fault is not None and fault.kind == "empty":
            shown = []
        elif fault is not None and fault.kind == "short":
            shown = shown[: fault.count]
        return [feed.render_entry(item, version) for item, version in shown], len(found)

    def _refuse(self, handler: BaseHTTPRequestHandler, fault: Fault) -> int:
        if fault.kind == "redirect":
            _send(handler, 301, b"", {"Location": f"{self.root}/elsewhere"})
            return 301
        if fault.kind == "status":
            _send(handler, fault.status, b"no", {"Retry-After": fault.retry_after} if fault.retry_after else {})
            return fault.status
        if fault.kind == "hang":
            self._stop.wait(fault.seconds)
        handler.close_connection = True
        return 0

    def _badly(self, handler: BaseHTTPRequestHandler, fault: Fault, data: bytes) -> int:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if fault.kind == "cut":
            handler.wfile.write(data[: len(data) // 2])
        else:
            for byte in data:
                handler.wfile.write(bytes([byte]))
                handler.wfile.flush()
                if self._stop.is_set():
                    break
                time.sleep(fault.seconds)
        handler.close_connection = True
        return 200


def _whole(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _send(handler: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)
