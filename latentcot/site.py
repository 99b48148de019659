"""``latentcot site``: the documentation site, built from plain Markdown that this module writes first.

The source tree ``build/site-src`` is put together from the hand-written pages of ``docs/``, the paper pages made from
the records, the reference, the notebooks and the results; then MkDocs builds it strictly. Both the source tree and the
site are written beside their place and renamed, so a failed build leaves the last good site untouched.

The site is a feature of a checkout: the installed package has neither ``docs/`` nor ``mkdocs.yml``.
"""

import gc
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from latentcot import site_pages
from latentcot.site_notebooks import NotebookError, NotebookMode, RenderedNotebook, render_notebooks

MARKER = ".latentcot-site"
DEFAULT_RESULTS = Path("out/quickstart")
_RESULTS_MARK = "<!-- results -->"  # in docs/index.md: the figure of the last comparison goes here
_HAND_WRITTEN = ("*.md", "*.css", "*.js", "*.svg", "*.png", "*.json", "*.csv")


class SiteError(RuntimeError):
    """The site cannot be built; the text says why on one line and, where it can, what to do."""


@dataclass(frozen=True)
class SiteReport:
    """What a build wrote and what it cost."""

    output: Path
    pages: int
    seconds: float
    warnings: tuple[str, ...]


def checkout_root() -> Path:
    """The checkout this package is imported from; raises :class:`SiteError` for an installed package."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "mkdocs.yml").is_file() or not (root / "docs" / "index.md").is_file():
        raise SiteError(f"the site is built from a checkout of the project; {root} has no mkdocs.yml and docs/")
    return root


def build_site(
    output: Path,
    *,
    notebooks: NotebookMode = "execute",
    results: Path | None = None,
    strict: bool = True,
    work: Path | None = None,
    records: Sequence[Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> SiteReport:
    """Build the whole site into ``output``.

    Args:
        output: folder of the finished site. It is replaced when an earlier build wrote it; any other non-empty folder
            is refused.
        notebooks: ``"execute"`` runs them (kept by content under ``work``), ``"source"`` shows them without outputs,
            ``"none"`` leaves them out.
        results: folder that a comparison wrote, shown on the results page; default ``out/quickstart`` of the checkout.
        strict: a warning of MkDocs or of a plugin is an error.
        work: folder for the source tree and the rendered notebooks; default ``build`` of the checkout.
        records: the papers to show; default the records of the catalog.
        say: receives one line for each step.

    Raises:
        SiteError: not in a checkout, an extra is missing, the output folder is not ours, a notebook failed, or MkDocs
            found something to complain about.
    """
    # The parsed packages are a million objects that stay: looking through them again and again takes a tenth of the time.
    resting = gc.isenabled()
    gc.disable()
    try:
        return _build_site(output.resolve(), notebooks, results, strict, work, records, say)
    finally:
        if resting:
            gc.enable()


def _build_site(
    output: Path,
    notebooks: NotebookMode,
    results: Path | None,
    strict: bool,
    work: Path | None,
    records: Sequence[Any] | None,
    say: Callable[[str], None],
) -> SiteReport:
    started = time.monotonic()
    root = checkout_root()
    _check_output(output, root)
    _need_extras(root, notebooks)
    work = (work or root / "build").resolve()
    say("notebooks: running what is new or changed" if notebooks == "execute" else f"notebooks: {notebooks}")
    try:
        rendered = render_notebooks(root / "notebooks", work / "notebooks", notebooks)
    except NotebookError as error:
        raise SiteError(str(error)) from None
    say("writing pages")
    settings = _settings(root)
    pages = _collect(root, settings, rendered, root / DEFAULT_RESULTS if results is None else results, records)
    source = work / "site-src"
    _write_tree(root / "docs", pages, source)
    say(f"building {sum(name.endswith('.md') for name in pages)} pages")
    warnings = _run_mkdocs(
        root, source, output, _navigation(settings["nav"], root / "docs", pages, rendered), strict, say
    )
    count = sum(1 for _ in output.rglob("*.html"))
    return SiteReport(output, count, time.monotonic() - started, tuple(warnings))


def _check_output(output: Path, root: Path) -> None:
    if output == root or output in root.parents:
        raise SiteError(f"--output: {output} holds the checkout itself")
    if output.exists() and not output.is_dir():
        raise SiteError(f"--output: {output} is a file, expected a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise SiteError(f"--output: {output} is not empty and was not written by this command; name another folder")


def _need_extras(root: Path, notebooks: NotebookMode) -> None:
    needed = ["mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers.python", "latex2mathml"]
    if notebooks != "none" and any((root / "notebooks").glob("*.ipynb")):
        needed += ["nbconvert", "nbclient", "ipykernel"]
    for name in needed:
        try:
            found = find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise SiteError(f"the site needs {name}, which is not installed: pip install 'latentcot[docs]'")


def _settings(root: Path) -> dict[str, Any]:
    from mkdocs.utils.yaml import yaml_load

    with open(root / "mkdocs.yml", encoding="utf-8") as file:
        return yaml_load(file)


def _collect(
    root: Path, settings: dict[str, Any], rendered: list[RenderedNotebook], results: Path, records: Sequence[Any] | None
) -> dict[str, str | bytes]:
    """Every generated page: ``{path below the source tree: content}``."""
    from latentcot.catalog.leaves import load_facets, load_taxonomy
    from latentcot.catalog.pages import SiteLinks, paper_pages
    from latentcot.catalog.runnable import reverse_index
    from latentcot.catalog.store import CatalogError, load_records

    pages: dict[str, str | bytes] = {}
    reference = site_pages.api_pages(root)
    pages.update(reference)
    pages["reference/cli.md"] = site_pages.cli_page(_command())
    pages.update(site_pages.notebook_pages(rendered))
    pages.update(site_pages.results_pages(results))

    def module_page(path: str) -> str | None:
        package = site_pages.documented_package(site_pages.module_of(path))
        page = site_pages.api_page(package) if package else None
        return f"{page}.html" if page and f"{page}.md" in pages else None

    def notebook_page(path: str) -> str | None:
        page = f"learn/{Path(path).stem}/index"
        return f"{page}.html" if f"{page}.md" in pages else None

    corrections = (settings.get("extra") or {}).get("corrections_url")
    links = SiteLinks(_bibtex(), module_page, notebook_page, corrections, settings.get("site_url"))
    try:
        records = load_records() if records is None else records
        pages.update(paper_pages(records, load_taxonomy(), load_facets(), links))
        pages.update(site_pages.with_papers(reference, reverse_index(records)))
    except (CatalogError, ValueError) as error:
        raise SiteError(f"catalog: {error}") from None
    return pages


def _bibtex() -> Callable[[Any], str] | None:
    if find_spec("latentcot.catalog.bibtex") is None:
        return None
    from importlib import import_module

    return getattr(import_module("latentcot.catalog.bibtex"), "entry", None)


def _command() -> Any:
    """The command line as a click command, or ``None`` where there is no ``latentcot.cli``."""
    if find_spec("latentcot.cli") is None:
        return None
    from importlib import import_module

    app = getattr(import_module("latentcot.cli"), "app", None)
    return typer.main.get_command(app) if isinstance(app, typer.Typer) else None


def _write_tree(docs: Path, pages: dict[str, str | bytes], source: Path) -> None:
    """The source tree of MkDocs, written beside its place and renamed."""
    figure = site_pages.home_figure(pages)
    source.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=source.parent, prefix=f".{source.name}-"))
    try:
        for pattern in _HAND_WRITTEN:
            for path in docs.rglob(pattern):
                inside = path.relative_to(docs)
                if inside.parts[0] != "theme":
                    (new / inside).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, new / inside)
        home = new / "index.md"
        home.write_text(home.read_text(encoding="utf-8").replace(_RESULTS_MARK, figure), encoding="utf-8")
        for name, content in pages.items():
            target = new / name
            if target.exists():
                raise SiteError(f"docs/{name} stands where a generated page belongs; remove it")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        _swap(new, source)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(new: Path, place: Path) -> None:
    """Put the folder ``new`` in the place of ``place``. The old one is out of the way only between two renames."""
    os.chmod(new, 0o755)
    old = place.with_name(f".{place.name}-old-{os.getpid()}")
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _navigation(
    nav: list[Any], docs: Path, pages: dict[str, str | bytes], rendered: list[RenderedNotebook]
) -> list[Any]:
    """The navigation of ``mkdocs.yml`` with notebooks, API pages and further hand-written pages in their sections."""
    written = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]
    placed = str(nav)
    more: dict[str, list[Any]] = {
        "Learn": [{notebook.title: f"learn/{notebook.name}/index.md"} for notebook in rendered],
        "Reference": [
            {name: f"{site_pages.api_page(name)}.md"}
            for name in site_pages.API_PACKAGES
            if f"{site_pages.api_page(name)}.md" in pages
        ],
        "Project": [path for path in written if f"'{path}'" not in placed and not path.startswith("theme/")],
    }
    result = []
    for entry in nav:
        ((title, value),) = entry.items()
        result.append({title: [*value, *more.get(title, [])] if isinstance(value, list) else value})
    return result


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(" ".join(record.getMessage().split()))


def _run_mkdocs(
    root: Path, source: Path, output: Path, nav: list[Any], strict: bool, say: Callable[[str], None]
) -> list[str]:
    # Material prints an announcement about MkDocs 2 on import; this project pins MkDocs below 2.
    os.environ.setdefault("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import MkDocsException

    from latentcot.site_index import LightPages

    logger = logging.getLogger("mkdocs")
    collector = _Collector()
    output.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-"))
    logger.addHandler(collector)
    try:
        config = load_config(str(root / "mkdocs.yml"), docs_dir=str(source), site_dir=str(new), nav=nav, strict=strict)
        config.plugins["latentcot/light-pages"] = LightPages()  # no part of mkdocs.yml: the site is the same without it
        config.plugins.run_event("startup", command="build", dirty=False)
        try:
            build(config)
        finally:
            config.plugins.run_event("shutdown")
    except (MkDocsException, SystemExit) as error:
        found = collector.lines or [" ".join(str(error).split())]
        for line in found[1:]:
            say(line)
        shutil.rmtree(new, ignore_errors=True)
        raise SiteError(f"mkdocs: {len(found)} problem(s), the first: {found[0]}") from None
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    finally:
        logger.removeHandler(collector)
    if strict and collector.lines:
        shutil.rmtree(new, ignore_errors=True)
        raise SiteError(f"mkdocs: {len(collector.lines)} warning(s), the first: {collector.lines[0]}")
    (new / MARKER).write_text("Written by `latentcot site`; the next build replaces this folder.\n", encoding="utf-8")
    _swap(new, output)
    return collector.lines


def serve(folder: Path, port: int) -> None:
    """Serve a built site on this machine only, until interrupted."""
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise SiteError(f"--port: cannot listen on {port}: {error.strerror}; name another with --port") from None
    with server:
        typer.echo(f"serving http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")


def site(
    output: Annotated[Path, typer.Option("--output", help="Folder of the finished site.")] = Path("site"),
    notebooks: Annotated[
        str, typer.Option("--notebooks", help="execute (kept until they change), source (shown unrun) or none.")
    ] = "execute",
    results: Annotated[
        Path | None, typer.Option(help="Folder that `latentcot compare` wrote.", show_default="out/quickstart")
    ] = None,
    serve_: Annotated[bool, typer.Option("--serve", help="Serve the site on this machine when it is built.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port for --serve.")] = 8000,
) -> None:
    """Build the documentation site: guides, notebooks, reference, results and the paper catalog."""
    try:
        if notebooks not in ("execute", "source", "none"):
            raise SiteError(f"--notebooks: expected execute, source or none, given {notebooks!r}")
        if results is not None and not results.is_dir():
            raise SiteError(f"--results: {results} is not a folder")
        report = build_site(output, notebooks=notebooks, results=results, say=lambda line: typer.echo(line, err=True))
        typer.echo(f"{report.pages} pages in {report.seconds:.0f} s: {report.output / 'index.html'}")
        if serve_:
            serve(report.output, port)
    except SiteError as error:
        typer.echo(f"latentcot site: {error}", err=True)
        raise typer.Exit(2) from None


if __name__ == "__main__":
    typer.run(site)
    sys.exit(0)
