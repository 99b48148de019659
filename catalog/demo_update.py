"""``make demo-update``: the whole loop of a curator against the bundled feed server, in about a minute and without a network.

A copy of the catalog loses its papers of January 2026; the server shows them, and others of that month which do not belong, and
misbehaves on the way. The updater has to find them again. Then decisions, a withdrawal, a retitle, and the check.
"""

import shutil
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from latentcot.catalog.acceptance import writing
from latentcot.catalog.check import check_catalog
from latentcot.catalog.feed_server import Fault, FeedServer, Version, load_papers, paper
from latentcot.catalog.feed_server.trial import tree
from latentcot.catalog.queue_store import Folders, read_queue
from latentcot.catalog.refresh import chosen, refresh
from latentcot.catalog.review import accept, ordered_queue, reject, undo
from latentcot.catalog.store import PAPERS
from latentcot.catalog.update.cache import PageCache, one_run
from latentcot.catalog.update.client import FeedClient, Politeness
from latentcot.catalog.update.clock import SystemClock
from latentcot.catalog.update.queries import load_queries
from latentcot.catalog.update.report import UpdateReport
from latentcot.catalog.update.scoring import default_scorer
from latentcot.catalog.update.summary import markdown
from latentcot.catalog.update.updater import Updater

MONTH = "2601"
DAY = "2026-02-03"


class DemoClock(SystemClock):
    """Real time that began on 3 February 2026, and in which a second of waiting takes a fiftieth."""

    SPEED = 50.0

    def __init__(self) -> None:
        self._shift = datetime(2026, 2, 3, 6, 37, tzinfo=UTC) - super().now()
        self._begun = super().monotonic()

    def now(self) -> datetime:
        return super().now() + self._shift + timedelta(seconds=(super().monotonic() - self._begun) * (self.SPEED - 1))

    def monotonic(self) -> float:
        return super().monotonic() * self.SPEED

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds / self.SPEED)


def make_catalog(root: Path) -> list[str]:
    """The copy without the papers of the month; returns their arXiv ids."""
    if root.exists():
        if not (root / ".demo").is_file():
            raise SystemExit(f"error: {root} exists and was not made by this demonstration")
        shutil.rmtree(root)
    (root / "papers").mkdir(parents=True)
    (root / ".demo").touch()
    hidden = []
    for folder in sorted(PAPERS.iterdir()):
        for path in sorted(folder.glob("*.json")):
            if folder.name == MONTH and path.name[0].isdigit():
                hidden.append(path.stem)
                continue
            (root / "papers" / folder.name).mkdir(exist_ok=True)
            shutil.copyfile(path, root / "papers" / folder.name / path.name)
    return hidden


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration in the folder that is given, ``out/demo-update`` by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    root = Path(arguments[0] if arguments else "out/demo-update") / "catalog"
    console = Console(highlight=False)
    hidden = make_catalog(root)
    clock = DemoClock()
    config = load_queries().model_copy(update={"first_day": "2026-01-15"})
    scorer, note = default_scorer(config.phrases)
    # What is changed further down belongs to nobody.
    invented = [
        paper("2601.99998", "An Invented Looped Transformer for a Demonstration", "2026-01-30", categories=("cs.LG",)),
        paper(
            "2601.99999",
            "An Invented Diffusion Language Model for a Demonstration",
            "2026-01-30",
            categories=("cs.CL",),
        ),
    ]
    with FeedServer([*load_papers(), *invented], clock=clock) as server, one_run(root / ".cache"):

        def client() -> FeedClient:
            cache = PageCache(root / ".cache", clock)
            told = lambda text: console.print(f"  … {text}", style="dim", markup=False)  # noqa: E731
            return FeedClient(server.url, clock=clock, cache=cache, politeness=Politeness(), say=told)

        def update() -> UpdateReport:
            one = client()
            report = Updater(Folders(root), one, config, scorer).run()
            gaps = one.log.gaps()
            gap = f", smallest gap {min(gaps):.1f} s of the demonstration's time" if gaps else ""
            console.print(
                f"  {report.headline}; {len(one.log.requests)} requests, {one.log.cached} from the cache{gap}",
                markup=False,
            )
            return report

        console.rule(
            f"1. Update: {len(hidden)} papers of January 2026 were taken out, the server shows {len(server.corpus.papers)}"
        )
        if note:
            console.print(note, style="yellow", markup=False)
        server.play(
            Fault("status", at=(1,), status=429, retry_after="20"),
            Fault("empty", at=(3,)),
            Fault("short", at=(5,), count=1),
            Fault("damaged", at=(7,)),
        )
        report = update()
        console.print(Markdown(markdown(report)))
        queue = read_queue(Folders(root))
        matching = {p.base for p in server.corpus.papers if p.base in hidden}
        found = set(hidden) & set(queue)
        strange = set(queue) - set(hidden) - {paper.base for paper in invented}
        console.print(
            f"Of {len(matching)} papers taken out, {len(found)} came back as candidates, and {len(strange)} papers that the catalog never "
            "had. This feed has no abstracts, in which the queries look too: with them more would have come."
        )
        if not queue:
            console.print("error: nothing was found", style="red")
            return 1

        console.rule("2. The same again: nothing is asked twice, no byte changes")
        before = tree(root)
        update()
        console.print(f"  {sum(1 for name, digest in tree(root).items() if before.get(name) != digest)} files changed")

        console.rule("3. Review: accept, reject, undo")
        folders = Folders(root)
        for candidate in [queue[paper.base] for paper in invented]:
            leaf = candidate.score.leaves[0].leaf if candidate.score.leaves else "vertical/architecture"
            accept(folders, candidate, leaf=leaf, by="demonstration", date=DAY)
            console.print(f"  accepted {candidate.key} under {leaf}: {candidate.title}", markup=False)
        other = ordered_queue(folders)[0]
        reject(folders, other, reason="off-topic", by="demonstration", date=DAY)
        undo(folders, other.key)
        console.print(f"  rejected {other.key} and took that back: {other.title}", markup=False)

        console.rule("4. Refresh: a new title, a venue, a withdrawal")
        later = datetime(2026, 2, 2, tzinfo=UTC)
        one, two = invented
        server.add(
            one.revised(
                Version(later, f"{one.versions[0].title}, With a Second Title", comment="Accepted to ICLR 2026 (oral)")
            ),
            two.revised(Version(later, two.versions[0].title, comment="This paper has been withdrawn by the authors")),
        )
        refreshed = refresh(folders, client(), chosen(folders, [item.base for item in invented]))
        for key, name, old, new in refreshed.changes:
            console.print(f"  {key} {name}: {old} -> {new}", markup=False)

        console.rule("5. Check")
        with writing(folders):
            pass
        problems = check_catalog(root / "papers").problems
        for problem in problems:
            console.print(str(problem), style="red", markup=False)
        console.print(f"  {len(problems)} problems")
    console.print(
        f"\nNow you: [bold]latentcot papers review --catalog {root}[/bold] judges the rest of the queue, one key a paper."
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
