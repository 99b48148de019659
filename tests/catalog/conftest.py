"""A feed server, a small catalog to write into, and an updater between them, all on one clock that nobody waits for."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from latentcot.catalog.feed_server import FeedServer
from latentcot.catalog.feed_server.trial import (
    FakeClock,
    PlainScorer,
    busy_papers,
    sample_papers,
    small_catalog,
    small_queries,
    tree,
)
from latentcot.catalog.queue_store import Folders
from latentcot.catalog.update.cache import PageCache
from latentcot.catalog.update.client import FeedClient, Politeness
from latentcot.catalog.update.queries import QueryFile
from latentcot.catalog.update.report import Outcome
from latentcot.catalog.update.updater import Updater


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return small_catalog(tmp_path / "catalog")


@pytest.fixture
def server(clock: FakeClock) -> Iterator[FeedServer]:
    with FeedServer([*busy_papers(), *sample_papers()], clock=clock) as running:
        yield running


MakeClient = Callable[..., FeedClient]
MakeUpdater = Callable[..., Updater]


@pytest.fixture
def make_client(clock: FakeClock, server: FeedServer, folders: Folders) -> MakeClient:
    def make(where: Folders | None = None, *, fresh: bool = False, url: str | None = None, **rest: Any) -> FeedClient:
        politeness = Politeness(**{"read_timeout": 20.0, "connect_timeout": 20.0, **rest})
        cache = PageCache((where or folders).cache, clock, fresh=fresh)
        return FeedClient(url or server.url, clock=clock, cache=cache, politeness=politeness)

    return make


@pytest.fixture
def make_updater(make_client: MakeClient, folders: Folders) -> MakeUpdater:
    def make(
        where: Folders | None = None,
        *,
        queries: QueryFile | None = None,
        dry_run: bool = False,
        fresh: bool = False,
        **rest: Any,
    ) -> Updater:
        # A new Folders every time: a new run knows nothing of the last one but what is on disk.
        place = Folders((where or folders).root)
        return Updater(
            place, make_client(place, fresh=fresh, **rest), queries or small_queries(), PlainScorer(), dry_run=dry_run
        )

    return make


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The catalog after one run that nothing disturbed."""
    clock, folders = FakeClock(), small_catalog(tmp_path_factory.mktemp("expected") / "catalog")
    with FeedServer([*busy_papers(), *sample_papers()], clock=clock) as server:
        client = FeedClient(server.url, clock=clock, cache=PageCache(folders.cache, clock))
        report = Updater(folders, client, small_queries(), PlainScorer()).run()
    assert report.outcome is Outcome.NEW
    assert len(report.new) == 8
    return tree(folders.root)
