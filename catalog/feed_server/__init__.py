"""A local stand-in for arXiv's query API: it replays papers, and misbehaves when asked to.

>>> from latentcot.catalog.feed_server import Fault, FeedServer, paper
>>> with FeedServer([paper("2602.00001", "Latent reasoning in loops", "2026-02-02")]) as server:
...     server.play(Fault("status", status=429, retry_after="5"))
...     server.url.startswith("http://127.0.0.1:")
True

It serves the tests, the demonstration (``make demo-update``) and notebooks; nothing of the project asks arXiv while it is tested.
``python -m latentcot.catalog.feed_server`` runs it by itself with the bundled papers.
"""

from latentcot.catalog.feed_server.corpus import Corpus, Paper, QueryError, Version, load_papers, paper
from latentcot.catalog.feed_server.faults import KINDS, Fault, parse_fault
from latentcot.catalog.feed_server.server import FeedServer, Page, Seen

__all__ = [
    "KINDS",
    "Corpus",
    "Fault",
    "FeedServer",
    "Page",
    "Paper",
    "QueryError",
    "Seen",
    "Version",
    "load_papers",
    "paper",
    "parse_fault",
]
