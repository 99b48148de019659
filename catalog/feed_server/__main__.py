"""``python -m latentcot.catalog.feed_server``: the server by itself, until Ctrl-C."""

import argparse
import sys
import time
from pathlib import Path

from latentcot.catalog.feed_server import KINDS, FeedServer, load_papers, parse_fault
from latentcot.catalog.feed_server.corpus import DEMO


def main(arguments: list[str] | None = None) -> int:
    """0 when stopped by the user, 2 for a bad call."""
    told = "; ".join(f"{kind}: {text}" for kind, text in KINDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m latentcot.catalog.feed_server", description=__doc__, epilog=f"Kinds of faults: {told}."
    )
    parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1 (default 8765, 0 takes a free one)")
    parser.add_argument("--papers", type=Path, default=DEMO, help="JSON file of papers (default: the bundled ones)")
    parser.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="KIND,NAME=VALUE,...",
        help="for instance status,status=429,at=2",
    )
    options = parser.parse_args(arguments)
    try:
        faults = [parse_fault(text) for text in options.fault]
        server = FeedServer(load_papers(options.papers), port=options.port)
    except (ValueError, OSError, KeyError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with server:
        server.play(*faults)
        print(f"{len(server.corpus.papers)} papers at {server.url}; Ctrl-C stops", flush=True)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
