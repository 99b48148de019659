"""``python -m latentcot.catalog.bench``: how fast search, check and index are, and how good the ranking is.

Synthetic records (:mod:`latentcot.catalog.synthetic`) are written to a temporary folder and read back from there. Every
measurement runs in a process of its own, so that its peak of memory is its own too. Wall time is what counts; the time
of the processor stands beside it, because on a machine that others use as well the two differ. The page
``docs/benchmarks/catalog.md`` is written by this command.
"""

import argparse
import json
import os
import platform
import random
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from latentcot.catalog.store import CATALOG, CatalogError, write_atomic

QUERIES = CATALOG.parent / "tests" / "catalog" / "graded_queries.json"
PAGE = CATALOG.parent / "docs" / "benchmarks" / "catalog.md"
SIZES = (10_000, 100_000)


def measure_check(folder: Path) -> dict[str, Any]:
    """Seconds that the check of all records takes."""
    from latentcot.catalog.check import check_catalog

    wall, processor = time.perf_counter(), time.process_time()
    checked = check_catalog(folder)
    times = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    return times | {"records": len(checked.records), "problems": len(checked.problems)}


def measure_search(folder: Path) -> dict[str, Any]:
    """Seconds to read and to index the records, and milliseconds of single searches."""
    from latentcot.catalog.search import SearchIndex
    from latentcot.catalog.store import read_records

    start = time.perf_counter()
    records = read_records(folder)
    read = time.perf_counter() - start
    wall, processor = time.perf_counter(), time.process_time()
    index = SearchIndex(records)
    built = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    queries = mixed_queries([record.title for record in records])
    index.search(queries[0])  # imports
    walls, processors = [], []
    for query in queries:
        wall, processor = time.perf_counter(), time.process_time()
        index.search(query)
        walls.append((time.perf_counter() - wall) * 1e3)
        processors.append((time.process_time() - processor) * 1e3)
    return {"read": read, "index": built, "queries": len(queries), "search": {"wall": spread(walls),
            "processor": spread(processors)}, "records": len(records)}  # fmt: skip


def mixed_queries(titles: Sequence[str], each: int = 60, seed: int = 1) -> list[str]:
    """Graded queries, and from titles: whole ones, their first words, two words of them, unfinished words, nonsense."""
    draw = random.Random(seed)
    queries = [entry["query"] for name in ("topics", "items", "names") for entry in graded()[name]]
    for title in draw.sample(list(titles), min(each, len(titles))):
        words = title.split()
        queries += [title, " ".join(words[:3]), " ".join(draw.sample(words, min(2, len(words)))), words[0][:4]]
    queries += ["C++ NEAR(a b)", "zzzzqx language", "the of and", '"', "language model", "a " * 500]
    draw.shuffle(queries)
    return queries


def graded() -> dict[str, Any]:
    if not QUERIES.is_file():
        raise CatalogError(f"the benchmark needs a checkout: {QUERIES} is not there")
    return json.loads(QUERIES.read_text(encoding="utf-8"))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p95": ordered[-(-95 * len(ordered) // 100) - 1], "max": ordered[-1]}


def measure_quality() -> dict[str, float]:
    """nDCG@10 of the graded queries and mean reciprocal rank of known items, by part."""
    from latentcot.catalog.search import search
    from latentcot.catalog.search_quality import ndcg, reciprocal_rank

    def keys(query: str) -> list[str]:
        return [hit.record.key for hit in search(query, limit=50).hits]

    found = graded()
    result = {}
    for part in ("tune", "held-out"):
        topics = [topic for topic in found["topics"] if topic["part"] == part]
        result[f"nDCG@10, {part}"] = statistics.fmean(ndcg(keys(t["query"]), t["grades"]) for t in topics)
    result["nDCG@10, all"] = statistics.fmean(ndcg(keys(t["query"]), t["grades"]) for t in found["topics"])
    for name, label in (("items", "known items"), ("names", "names that titles lack")):
        result[f"MRR, {label}"] = statistics.fmean(reciprocal_rank(keys(t["query"]), t["key"]) for t in found[name])
    return result


_MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {"check": measure_check, "search": measure_search}


def in_own_process(measure: str, folder: Path) -> dict[str, Any]:
    """Run one of the measurements in a new process; adds ``memory``, its peak in MiB."""
    command = [sys.executable, "-m", "latentcot.catalog.bench", "--only", measure, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CatalogError(f"{measure} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def run(sizes: Sequence[int], console: Console, keep: Path | None = None) -> dict[str, Any]:
    """Every measurement at every size. Synthetic records are written to ``keep``, or found there from an earlier run."""
    from latentcot.catalog.synthetic import write_synthetic

    result: dict[str, Any] = {"quality": measure_quality(), "sizes": {}, "load": os.getloadavg()[0]}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory(prefix="papers-") as temporary:
        for size in sizes:
            folder = (keep or Path(temporary)) / str(size)
            task = progress.add_task(f"{size:,} records: writing", total=None)
            if not folder.is_dir():
                write_synthetic(folder, size)
            found = {}
            for name in _MEASURES:
                progress.update(task, description=f"{size:,} records: {name}")
                found[name] = in_own_process(name, folder)
            progress.update(task, description=f"{size:,} records: done", total=1, completed=1)
            result["sizes"][size] = found
    return result


def page(result: dict[str, Any], today: str) -> str:
    """The results as a page."""
    import numpy

    lines = [
        "---",
        "description: How fast search, check and index are, and how good the ranking is",
        "---",
        "",
        "# Catalog",
        "",
        f"Measured on {today} by `python -m latentcot.catalog.bench`: {machine()}; Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}, NumPy {numpy.__version__}. Load of the machine at the start: "
        f"{result['load']:.1f} on {os.cpu_count()} cores. Wall time, and the processor's time in brackets: "
        "where the load is above the number of cores, wall time holds waiting for others.",
        "",
        "## Speed",
        "",
        "| records | search, median | search, 95 % | search, most | index | check | memory, search | memory, check |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size, found in result["sizes"].items():
        search, check = found["search"], found["check"]
        wall, processor = search["search"]["wall"], search["search"]["processor"]
        cells = [f"{size:,}"]
        cells += [f"{wall[name]:.1f} ms ({processor[name]:.1f})" for name in ("p50", "p95", "max")]
        cells.append(f"{search['index']['wall']:.1f} s ({search['index']['processor']:.1f})")
        cells.append(f"{check['wall']:.1f} s ({check['processor']:.1f})")
        cells += [f"{search['memory']:.0f} MiB", f"{check['memory']:.0f} MiB"]
        lines.append(f"| {' | '.join(cells)} |")
    queries = next(iter(result["sizes"].values()))["search"]["queries"] if result["sizes"] else 0
    lines += [
        "",
        f"{queries} queries each: the graded ones, whole titles, first words, pairs of words, unfinished words, nonsense. "
        "The records are synthetic: titles joined from the words of the real ones, so that common words are as common. "
        "Memory is the peak of a process that reads the records from files.",
        "",
        "## Quality",
        "",
        "| what | value |",
        "| --- | --- |",
        *(f"| {name} | {value:.3f} |" for name, value in result["quality"].items()),
        "",
        "On the shipped records. The queries were written and graded by reading the records before any ranking was looked "
        "at; the ranking was worked on with the part *tune* alone. Grades and tables of words of one meaning are by the "
        "same hand, so the held-out part is not a stranger's.",
        "",
    ]
    return "\n".join(lines)


def machine() -> str:
    """The processor's name, and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores"


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m latentcot.catalog.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="numbers of synthetic records")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write")
    parser.add_argument("--keep", type=Path, help="folder to keep the synthetic records in for another run")
    parser.add_argument("--only", choices=sorted(_MEASURES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.only:
        found = _MEASURES[options.only](options.folder)
        found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return 0
    if any(size < 1 for size in options.sizes):
        parser.error(f"--sizes expects numbers of at least 1, given {options.sizes}")
    if not options.out.parent.is_dir():
        parser.error(f"--out: the folder {options.out.parent} does not exist")
    console = Console(stderr=True)
    try:
        result = run(options.sizes, console, options.keep)
    except CatalogError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_atomic(options.out, page(result, date.today().isoformat()))
    console.print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
