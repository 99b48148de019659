"""The review as an interface: one paper at a time, one key a decision, nothing but the keyboard."""

import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from latentcot.catalog.leaves import load_taxonomy
from latentcot.catalog.queue_store import REASONS, Candidate, Decision, Folders
from latentcot.catalog.review import accept, ordered_queue, reject, undo
from latentcot.catalog.store import CatalogError

KEYS = (
    ("a", "accept under the first proposal"),
    ("1 2 3", "accept under that proposal"),
    ("l", "accept under another leaf (number, slug or part of it)"),
    ("m", "the same paper as a known record: merge"),
    ("r", "reject, with a reason"),
    ("o", "open the abstract page in the browser"),
    ("n p", "next, previous paper (arrows do the same)"),
    ("u", "undo the last decision"),
    ("v", "list the whole queue"),
    ("?", "these keys"),
    ("q", "end"),
)


def summary_table(queue: list[Candidate]) -> Table:
    """The queue as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("paper", "date", "score", "title", "proposed leaf", "queries"):
        table.add_column(name, no_wrap=name != "title", ratio=1 if name == "title" else None)
    for item in queue:
        leaf = item.score.leaves[0].leaf if item.score.leaves else ""
        mark = " ≈" if item.near else ""
        score = f"{item.score.probability:.2f}"
        table.add_row(item.key, item.published[:10], score, Text(item.title + mark), leaf, ", ".join(item.queries))
    return table


def panel(candidate: Candidate, place: str = "") -> Panel:
    """Everything that helps to judge a paper."""
    leaves = load_taxonomy().leaves
    rows = Table.grid(padding=(0, 1))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    authors = ", ".join(candidate.authors[:12]) + (
        f" and {len(candidate.authors) - 12} more" if len(candidate.authors) > 12 else ""
    )
    facts = [
        ("authors", authors or "not given"),
        ("submitted", f"{candidate.published[:10]}, version {candidate.version} of {candidate.updated[:10]}"),
        ("categories", ", ".join(candidate.categories)),
        ("comment", candidate.comment),
        ("journal", candidate.journal_ref),
        ("page", f"https://arxiv.org/abs/{candidate.arxiv}"),
        (
            "relevance",
            f"{candidate.score.probability:.2f} by {candidate.score.scorer}, found by {', '.join(candidate.queries)}",
        ),
        ("because", "; ".join(candidate.score.reasons)),
    ]
    for name, value in facts:
        if value:
            rows.add_row(name, Text(value))
    for number, proposal in enumerate(candidate.score.leaves, 1):
        share = "" if proposal.probability is None else f" ({proposal.probability:.2f})"
        rows.add_row(
            str(number),
            Text(f"{proposal.leaf}{share}: {leaves[proposal.leaf].definition if proposal.leaf in leaves else ''}"),
        )
    for near in candidate.near:
        rows.add_row("known?", Text(f"{near.key}: {near.rule}", style="bold"))
    if candidate.again:
        rows.add_row("again", Text(candidate.again, style="bold"))
    if candidate.prefilled:
        rows.add_row("proposed", Text("accept under 1; Enter confirms", style="bold"))
    abstract = Text(candidate.abstract or "No abstract.", style="" if candidate.abstract else "dim")
    body = Group(
        Text(candidate.title, style="bold"), Text(), rows, Text(), abstract
    )  # a title in the frame would be cut
    return Panel(
        body,
        title=candidate.arxiv,
        title_align="left",
        subtitle=place or None,
        subtitle_align="right",
    )


@dataclass
class Session:
    """One sitting. Keys and lines (of a :class:`~latentcot.catalog.terminal.Keyboard`) and the browser are given in, so that a test can
    sit here too."""

    folders: Folders
    by: str
    date: str
    console: Console
    key: Callable[[], str]
    line: Callable[[str], str]
    browse: Callable[[str], object] = webbrowser.open
    decided: list[Decision] = field(default_factory=list)
    place: int = 0

    def run(self) -> int:
        """Until the queue is empty or the curator ends it; returns the number of decisions that stand."""
        shown = None
        while True:
            queue = ordered_queue(self.folders)
            if not queue and not self.decided:
                self.console.print("The queue is empty.")
                return 0
            if not queue:
                self.console.print("The queue is empty now. u undoes the last decision, any other key ends.")
                if self.key() != "u":
                    break
                self._guarded(self._undo)
                continue
            self.place = min(max(self.place, 0), len(queue) - 1)
            candidate = queue[self.place]
            if candidate.key != shown:
                self.console.print(panel(candidate, f"{self.place + 1} of {len(queue)}"))
                self.console.print(
                    "a accept  l leaf  r reject  o open  n next  p previous  u undo  ? keys  q end", style="dim"
                )
                shown = candidate.key
            pressed = self.key()
            if pressed in ("q", "end"):
                break
            before = len(self.decided)
            self._guarded(lambda candidate=candidate, pressed=pressed: self._do(pressed, candidate))
            if len(self.decided) != before:
                shown = None
        done = len(self.decided)
        self.console.print(
            f"{done} decision{'' if done == 1 else 's'}, {len(ordered_queue(self.folders))} papers left."
        )
        return done

    def _guarded(self, action: Callable[[], None]) -> None:
        """What cannot be done is said, and the session goes on."""
        try:
            action()
        except (CatalogError, OSError) as error:
            self.console.print(Text(f"not done: {error}", style="red"))

    def _do(self, pressed: str, candidate: Candidate) -> None:
        if pressed == "enter" and candidate.prefilled:
            pressed = "a"
        proposals = [item.leaf for item in candidate.score.leaves]
        if pressed in ("a", "1", "2", "3"):
            number = 1 if pressed == "a" else int(pressed)
            if number > len(proposals):
                raise CatalogError(f"there is no proposal {number}; l chooses a leaf")
            self._accept(candidate, proposals[number - 1])
        elif pressed == "l":
            if leaf := self._choose_leaf():
                self._accept(candidate, leaf)
        elif pressed == "m":
            self._merge(candidate)
        elif pressed == "r":
            self._reject(candidate)
        elif pressed == "o":
            address = f"https://arxiv.org/abs/{candidate.arxiv}"
            if not self.browse(address):
                self.console.print(f"no browser could be opened: {address}")
        elif pressed in ("n", "right", "down", " "):
            self._move(1)
        elif pressed in ("p", "left", "up"):
            self._move(-1)
        elif pressed == "u":
            self._undo()
        elif pressed == "v":
            self.console.print(summary_table(ordered_queue(self.folders)))
        else:
            for key, meaning in KEYS:
                self.console.print(f"{key:>6}  {meaning}", markup=False)

    def _move(self, step: int) -> None:
        number = len(ordered_queue(self.folders))
        wanted = self.place + step
        if not 0 <= wanted < number:
            self.console.print("this is the last one" if step > 0 else "this is the first one", style="dim")
        self.place = min(max(wanted, 0), number - 1)

    def _accept(self, candidate: Candidate, leaf: str, into: str | None = None) -> None:
        decision = accept(self.folders, candidate, leaf=leaf, by=self.by, date=self.date, into=into)
        self.decided.append(decision)
        told = f"accepted under {leaf}" if into is None else f"merged into {decision.record}"
        self.console.print(Text(f"{candidate.key} {told}", style="green"))

    def _merge(self, candidate: Candidate) -> None:
        offered = ", ".join(near.key for near in candidate.near)
        hint = f" ({offered})" if offered else ""
        name = self.line(f"key of the record{hint}, empty cancels: ").strip()
        if name:
            leaf = candidate.score.leaves[0].leaf if candidate.score.leaves else next(iter(load_taxonomy().leaves))
            self._accept(candidate, leaf, into=name)

    def _choose_leaf(self) -> str | None:
        slugs = list(load_taxonomy().leaves)
        for number, slug in enumerate(slugs, 1):
            self.console.print(f"{number:>3}  {slug}  {load_taxonomy().leaves[slug].name}", markup=False)
        text = self.line("leaf (number, slug or part of it, empty cancels): ").strip().lower()
        if not text:
            return None
        if text.isascii() and text.isdigit() and 1 <= int(text) <= len(slugs):
            return slugs[int(text) - 1]
        found = [slug for slug in slugs if text == slug] or [slug for slug in slugs if text in slug]
        if len(found) == 1:
            return found[0]
        near = found or get_close_matches(text, slugs, n=3, cutoff=0.4)
        raise CatalogError(f"{text[:60]!r} names no one leaf{'; close: ' + ', '.join(near) if near else ''}")

    def _reject(self, candidate: Candidate) -> None:
        names = list(REASONS)
        for number, name in enumerate(names, 1):
            self.console.print(f"{number:>3}  {name}: {REASONS[name]}", markup=False)
        pressed = self.key()
        if not (pressed.isascii() and pressed.isdigit() and 1 <= int(pressed) <= len(names)):
            self.console.print("not rejected", style="dim")
            return
        reason = names[int(pressed) - 1]
        original = None
        if reason == "duplicate":
            original = self.line("of which record (empty: not known here): ").strip() or None
        note = self.line("note: ").strip() if reason == "other" else ""
        decision = reject(
            self.folders, candidate, reason=reason, by=self.by, date=self.date, note=note or None, duplicate_of=original
        )
        self.decided.append(decision)
        self.console.print(Text(f"{candidate.key} rejected: {reason}", style="yellow"))

    def _undo(self) -> None:
        if not self.decided:
            raise CatalogError(
                "nothing was decided in this session; `latentcot papers review undo KEY` takes back older decisions"
            )
        undo(self.folders, self.decided[-1].key)
        decision = self.decided.pop()
        keys = [item.key for item in ordered_queue(self.folders)]
        self.place = keys.index(decision.key) if decision.key in keys else 0
        self.console.print(f"{decision.key} stands in the queue again")
