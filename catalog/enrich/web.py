"""Requests to other hosts than arXiv: a gap a host, a budget, time-outs, and no address inside this or the local network.

Addresses come from strangers (comments, abstracts, lists), so a host is looked up first, and private, loopback and link-local ones
are refused, also behind a redirect.
"""

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

from latentcot.catalog.update.client import Answer, Politeness
from latentcot.catalog.update.clock import Clock

REDIRECTS = 5


class WebError(Exception):
    """There is no answer, or the address may not be asked."""


class SpentError(WebError):
    """The budget is spent; the next run goes on."""


def public_host(host: str) -> bool:
    """Whether every address of ``host`` is one of the public internet."""
    try:
        found = {item[4][0] for item in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        raise WebError(f"the host {host[:80]!r} is not known") from None
    return bool(found) and all(ipaddress.ip_address(str(address).partition("%")[0]).is_global for address in found)


@dataclass
class Web:
    """GET and HEAD with redirects. ``may_ask`` is :func:`public_host`; tests let the local server through."""

    agent: str
    clock: Clock
    budget: int = 200
    gap: float = 1.0
    may_ask: Callable[[str], bool] = public_host
    politeness: Politeness = field(
        default_factory=lambda: Politeness(max_bytes=4 * 2**20, read_timeout=30, answer_timeout=60)
    )
    asked: int = 0
    _last: dict[str, float] = field(default_factory=dict)

    def get(self, url: str) -> Answer:
        return self._follow("GET", url)

    def head(self, url: str) -> Answer:
        return self._follow("HEAD", url)

    def _follow(self, method: str, url: str) -> Answer:
        for _ in range(REDIRECTS + 1):
            answer = self._send(method, url)
            if answer.status not in (301, 302, 303, 307, 308):
                return answer
            url = urljoin(url, str(answer.headers.get("Location", "")))
        raise WebError(f"more than {REDIRECTS} redirects")

    def _send(self, method: str, url: str) -> Answer:
        import requests

        parts = urlsplit(url)
        host = (parts.hostname or "").lower()
        if parts.scheme not in ("http", "https") or not host:
            raise WebError(f"{url[:80]!r} is no address of the web")
        if not self.may_ask(host):
            raise WebError(f"the host {host[:80]!r} is not on the public internet")
        if self.asked >= self.budget:
            raise SpentError(f"the budget of {self.budget} requests is spent")
        if (last := self._last.get(host)) is not None and (left := self.gap - (self.clock.monotonic() - last)) > 0:
            self.clock.sleep(left)
        self.asked += 1
        try:
            with requests.request(
                method,
                url,
                headers={"User-Agent": self.agent},
                timeout=(self.politeness.connect_timeout, self.politeness.read_timeout),
                allow_redirects=False,
                stream=True,
            ) as answer:
                body = b"" if method == "HEAD" else self._body(answer)
                return Answer(answer.status_code, body, answer.headers)
        except OSError as error:  # requests' errors are OSErrors
            raise WebError(f"{type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
        finally:
            self._last[host] = self.clock.monotonic()

    def _body(self, answer: object) -> bytes:
        from latentcot.catalog.update.client import read_some

        parts, size, begun = [], 0, self.clock.monotonic()
        while part := read_some(answer.raw):  # type: ignore[attr-defined]
            size += len(part)
            if size > self.politeness.max_bytes or self.clock.monotonic() - begun > self.politeness.answer_timeout:
                raise WebError("the answer is too long")
            parts.append(part)
        return b"".join(parts)
