"""One connection to the query API: polite, patient, and loud when patience ends.

Rules of arXiv (API user's manual; terms of use): at most one request every three seconds, one connection at a time, a descriptive
user agent. On top of them: a budget of requests a run, ``Retry-After`` honoured, exponential waits with jitter from 30 s otherwise,
15 s gaps for the rest of the run after a 429, connect and read time-outs and a limit for the whole answer, and no retry where the
server has said no (400, 403, 406, redirects).
"""

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import pairwise
from typing import Any, Protocol
from urllib.parse import urlencode, urlsplit

from latentcot.catalog.store import CatalogError
from latentcot.catalog.update.atom import DamagedFeedError, FeedPage, parse_feed
from latentcot.catalog.update.cache import PageCache
from latentcot.catalog.update.clock import Clock

ARXIV_API = "https://export.arxiv.org/api/query"
GAP = 3.0
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class FeedError(Exception):
    """Reading cannot go on; the message says why in one line."""


class BlockedError(FeedError):
    """The server refuses this client. Asking again would make it worse."""


class RejectedError(FeedError):
    """The server rejects this query; others may work."""


class GaveUpError(FeedError):
    """The page did not come, however long we waited."""


class StoppedError(FeedError):
    """The run has to end here: its budget is spent, or the server is overloaded. A later run goes on."""


@dataclass(frozen=True)
class Politeness:
    """How a run behaves. Times in seconds.

    ``gap`` between the ends of one request and the beginning of the next, at least 3 for anything but this machine; ``slow_gap``
    after a 429; ``budget`` requests a run; ``attempts`` for one page; ``throttles``: answers 429 or 503 after which the run stops;
    ``failures`` requests in a row without a page end the run; ``longest_wait``: a server that asks for more ends it too.
    """

    gap: float = GAP
    slow_gap: float = 15.0
    budget: int = 100
    attempts: int = 5
    throttles: int = 8
    failures: int = 12
    first_wait: float = 30.0
    longest_wait: float = 900.0
    connect_timeout: float = 15.0
    read_timeout: float = 60.0
    answer_timeout: float = 180.0
    max_bytes: int = 32 * 2**20

    def __post_init__(self) -> None:
        for name in ("budget", "attempts", "throttles", "failures", "max_bytes"):
            if getattr(self, name) < 1:
                raise CatalogError(f"{name} expects at least 1, given {getattr(self, name)}")
        for name in ("gap", "slow_gap", "first_wait", "longest_wait"):
            if not getattr(self, name) >= 0:
                raise CatalogError(f"{name} expects a number of seconds, given {getattr(self, name)}")


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str]


class Transport(Protocol):
    """Sends one GET and reads the whole answer. Raises ``OSError`` when there is none."""

    def get(self, url: str, headers: Mapping[str, str], politeness: Politeness, clock: Clock) -> Answer: ...


class RequestsTransport:
    """``requests``, one connection, no redirects, limits on time and length of the answer."""

    def get(self, url: str, headers: Mapping[str, str], politeness: Politeness, clock: Clock) -> Answer:
        import requests

        with requests.Session() as session:
            if is_loopback(url):
                session.trust_env = False  # a proxy knows nothing of this machine's servers
            begun = clock.monotonic()
            # requests' errors are OSErrors already.
            with session.get(
                url,
                headers=dict(headers),
                timeout=(politeness.connect_timeout, politeness.read_timeout),
                allow_redirects=False,
                stream=True,
            ) as answer:
                parts, size = [], 0
                # read1 gives what has arrived: a server that drips must not keep us beyond the limit.
                while part := read_some(answer.raw):
                    size += len(part)
                    if size > politeness.max_bytes:
                        raise OSError(f"the answer is longer than {politeness.max_bytes:,} bytes")
                    if clock.monotonic() - begun > politeness.answer_timeout:
                        raise OSError(f"the answer took longer than {politeness.answer_timeout:g} s")
                    parts.append(part)
                return Answer(answer.status_code, b"".join(parts), answer.headers)


def read_some(raw: Any) -> bytes:
    """The bytes of an answer that have arrived, at most 64 KiB; empty at its end."""
    from urllib3.exceptions import HTTPError

    try:
        return raw.read1(2**16, decode_content=True)
    except HTTPError as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def is_loopback(url: str) -> bool:
    """Whether the address is a server on this machine."""
    return (urlsplit(url).hostname or "").lower() in LOOPBACK


def user_agent(contact: str | None, base_url: str) -> str:
    """``latentcot/VERSION (catalog updater; mailto:CONTACT)``; a contact is required except for servers on this machine."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("latentcot")
    except PackageNotFoundError:
        release = "unknown"
    if contact is None:
        if not is_loopback(base_url):
            raise CatalogError(
                "arXiv asks for a contact in the user agent: give --contact you@example.org, or set LATENTCOT_CONTACT"
            )
        return f"latentcot/{release} (catalog updater; local test)"
    contact = contact.strip()
    if (
        not contact.isascii()
        or not contact.isprintable()
        or " " in contact
        or not ("@" in contact or contact.startswith("https://"))
    ):
        raise CatalogError(f"--contact expects a mail address or an https address, given {contact[:60]!r}")
    return (
        f"latentcot/{release} (catalog updater; {contact if contact.startswith('https://') else f'mailto:{contact}'})"
    )


@dataclass
class RequestLog:
    """What a run asked: (seconds, address, outcome) of every request; answers from the cache are only counted."""

    requests: list[tuple[float, str, str]] = field(default_factory=list)
    cached: int = 0

    def gaps(self) -> list[float]:
        times = [at for at, _, _ in self.requests]
        return [later - earlier for earlier, later in pairwise(times)]


class FeedClient:
    """Pages of the query API, by parameters. Not for use from several threads: there is one connection."""

    def __init__(
        self,
        base_url: str,
        *,
        clock: Clock,
        cache: PageCache,
        contact: str | None = None,
        politeness: Politeness | None = None,
        transport: Transport | None = None,
        seed: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise CatalogError(f"the address of the feed expects http(s)://host/path, given {base_url[:80]!r}")
        self.base_url, self.clock, self.cache, self.say = base_url, clock, cache, say
        self.politeness = politeness or Politeness()
        if not is_loopback(base_url) and self.politeness.gap < GAP:
            raise CatalogError(f"the gap between requests expects at least {GAP:g} s, given {self.politeness.gap:g}")
        self._headers = {"User-Agent": user_agent(contact, base_url), "Accept": "application/atom+xml"}
        self._transport = transport or RequestsTransport()
        self._random = random.Random(seed)
        self._gap = self.politeness.gap
        self._last: float | None = None
        self._throttles = 0
        self._failures = 0
        self._answered = False
        self.log = RequestLog()

    def url(self, parameters: Mapping[str, str | int]) -> str:
        return f"{self.base_url}?{urlencode(parameters)}"

    def forget(self, parameters: Mapping[str, str | int]) -> None:
        """Ask the server again next time, although the page is in the cache."""
        self.cache.drop(self.url(parameters))

    def page(self, parameters: Mapping[str, str | int], *, attempts: int | None = None) -> FeedPage:
        """One page. Damage on the way is retried; raises a :class:`FeedError` when that does not help."""
        attempts = attempts or self.politeness.attempts
        url = self.url(parameters)
        cached = self.cache.get(url)
        if cached is not None:
            try:
                page = parse_feed(cached)
            except DamagedFeedError:
                self.cache.drop(url)
            else:
                self.log.cached += 1
                return page
        why, asked = "", None
        for attempt in range(attempts):
            if self._failures >= self.politeness.failures:
                raise StoppedError(
                    f"{self._failures} requests in a row brought nothing ({why or 'see above'}); run again later"
                )
            if attempt:
                self.wait(attempt, why, asked)
                asked = None
            self._failures += 1  # until it turns out to be none
            try:
                answer = self._send(url)
            except OSError as error:
                why = f"no answer: {_short(error)}"
                self._note(url, why)
                continue
            self._answered = True
            try:
                page = self._judge(url, answer)
            except DamagedFeedError as error:
                why = str(error)
                self._note(url, why)
                continue
            if page is None:
                why = f"the server answered {answer.status}"
                asked = self._throttled(answer, why)
                continue
            self._failures = 0
            self._note(url, f"{page.arrived} entries of {page.total}")
            if page.arrived:  # an empty page may be a bad hour: it is asked for again
                self.cache.put(url, answer.body)
            return page
        if not self._answered:
            raise StoppedError(f"the server does not answer ({why})")
        raise GaveUpError(f"gave up after {attempts} attempts ({why})")

    def wait(self, attempt: int, why: str, asked: float | None = None) -> None:
        """Wait before attempt number ``attempt`` (1, 2, ...): what the server asked for, else 30 s, 60 s, 120 s ... and jitter."""
        seconds = min(self.politeness.first_wait * 2 ** (attempt - 1), self.politeness.longest_wait)
        seconds *= 1 + self._random.random() / 2
        if asked is not None:
            seconds = asked
        self.say(f"{why}; waiting {seconds:.0f} s{' as the server asks' if asked is not None else ''}")
        self.clock.sleep(seconds)

    def _send(self, url: str) -> Answer:
        if len(self.log.requests) >= self.politeness.budget:
            raise StoppedError(f"the budget of {self.politeness.budget} requests is spent; run again to go on")
        self._keep_gap()
        self.log.requests.append((self.clock.monotonic(), url, "no answer"))
        try:
            return self._transport.get(url, self._headers, self.politeness, self.clock)
        finally:
            self._last = self.clock.monotonic()
            self.cache.note_request()

    def _keep_gap(self) -> None:
        if self._last is None:
            before = self.cache.last_request()  # of an earlier run: restarting must not be a way around the rule
            since = (self.clock.now() - before).total_seconds() if before else self._gap
            left = self._gap - since if since >= 0 else self._gap
        else:
            left = self._gap - (self.clock.monotonic() - self._last)
        if left > 0:
            self.clock.sleep(left)

    def _note(self, url: str, outcome: str) -> None:
        at, _, _ = self.log.requests[-1]
        self.log.requests[-1] = (at, url, outcome)

    def _judge(self, url: str, answer: Answer) -> FeedPage | None:
        """The page in an answer, ``None`` for a status that may pass."""
        status = answer.status
        self._note(url, f"status {status}")
        if status in (403, 406):
            raise BlockedError(
                f"the server refuses this client (status {status}); nothing is tried again. Check the contact, ask again later"
            )
        if 300 <= status < 400:
            where = " ".join(str(answer.headers.get("Location", "nowhere")).split())[:120]
            raise BlockedError(
                f"the server sends us on to {where} (status {status}): the address of the feed has changed"
            )
        if status in (429, 503) or status >= 500:
            return None
        if status >= 400:
            try:
                reason = parse_feed(answer.body).error
            except DamagedFeedError:
                reason = None
            raise RejectedError(f"the server rejects the query (status {status}): {reason or 'no reason given'}")
        page = parse_feed(answer.body)
        if page.error is not None:
            raise RejectedError(f"the server rejects the query: {page.error}")
        return page

    def _throttled(self, answer: Answer, why: str) -> float | None:
        """Slow down; returns the seconds that the server asks for."""
        if answer.status == 429:
            self._gap = max(self._gap, self.politeness.slow_gap)
        if answer.status in (429, 503):
            self._throttles += 1
        if self._throttles >= self.politeness.throttles:
            raise StoppedError(f"the server asked us to slow down {self._throttles} times ({why}); run again later")
        asked = retry_after(answer.headers.get("Retry-After"), self.clock.now())
        if asked is not None and asked > self.politeness.longest_wait:
            raise StoppedError(f"the server asks to wait {asked:.0f} s ({why}); run again after that")
        return asked


def retry_after(text: str | None, now: datetime) -> float | None:
    """Seconds in a ``Retry-After`` header: a number or an HTTP date (RFC 9110, 10.2.3); ``None`` where it is neither."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - now).total_seconds())


def _short(error: Exception) -> str:
    """An error in a few words. Those of requests name the pool, the whole address and every layer below."""
    text = " ".join(str(error).split())
    text = re.sub(r"HTTPS?ConnectionPool\(host='([^']*)', port=(\d+)\): ", r"\1:\2: ", text)
    text = re.sub(r" with url: \S+( \(Caused by .*)?", "", text)
    return f"{type(error).__name__}: {text[:160]}"
