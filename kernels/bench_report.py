"""Turn results of the kernel benchmark into the page of the site: ``python -m latentcot.kernels.bench_report FILE...``.

Several files are put together row by row: a later file replaces the numbers of an earlier one, and every other
implementation is compared with this library's time *in its own file*. Prose lives in a Jinja template beside the page;
this module makes tables, the list of what is not reached, and the picture (``bench_plot.py``).
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latentcot.kernels.bench_plot import draw

SCHEMA = 1
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "benchmarks"
TITLES = {
    "anchor": ("At the anchor shape", "B = 8, S = 4096, 16 heads, K = V = 128 (HGRN: 2048 channels)."),
    "more": (
        "Other gates at the anchor shape",
        "`simple_gate`: decay attention with one gate a head and token; `kda`: the delta rule with one gate a channel.",
    ),
    "visibility": (
        "Bidirectional and block-causal",
        "The anchor shape. Bidirectional rows run both directions; blocks are 64 tokens with softmax attention inside.",
    ),
    "study": ("Shapes of the hybrid study", "B = 8, S = 4096, with the head sizes of its published models."),
    "long": ("One long sequence", "B = 1, S = 32768: nothing but heads, channels and time to work on in parallel."),
    "token": ("One token", "One step of generation at 16 heads, K = V = 128, with a float32 state."),
}
Json = dict[str, Any]


def number(value: Any) -> str:
    """A measured number to three digits, whole numbers and words as they are, a dash for what was not measured."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return str(value)
    if value == 0:
        return "0"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def load(paths: Sequence[Path]) -> list[Json]:
    """Results in the order given; raises ValueError for a file that is none."""
    runs = []
    for path in paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(run, dict) or run.get("schema") != SCHEMA or "rows" not in run:
            raise ValueError(f"{path}: not a result of latentcot.kernels.bench with schema {SCHEMA}")
        runs.append(run)
    return runs


def merged(runs: Sequence[Json]) -> list[Json]:
    """One entry a row, in order of first appearance: the last file's numbers, and every peer with its ``beside``.

    ``beside`` is this library's entry of the run that measured the peer. What only an earlier file of the same card
    holds (a cold start, errors, the backward pass) is taken over. ``title`` names the card where runs are of several.
    """
    several = len({run["machine"]["device"] for run in runs}) > 1
    rows: dict[str, Json] = {}
    for run in runs:
        card = run["machine"]["device"]
        for row in run["rows"]:
            new = {**row, "card": card, "title": f"`{row['name']}`" + (f" ({card})" if several else "")}
            new["peers"] = [{**peer, "beside": row["ours"]} for peer in row["peers"]]
            old = rows.get(row["name"])
            if old is not None:
                new["peers"] = _peers_of_both(old["peers"], new["peers"])
                if old["card"] == card:
                    carried = ("cold_s", "errors", "both") if "forward" in row["ours"] else tuple(old["ours"])
                    new["ours"] = {**{k: v for k, v in old["ours"].items() if k in carried}, **row["ours"]}
            rows[row["name"]] = new
    return list(rows.values())


def _peers_of_both(old: list[Json], new: list[Json]) -> list[Json]:
    """Peers of two runs of one row: a measured one replaces the same peer's older entries, a missing one does not."""
    again = {peer["peer"] for peer in new if "missing" not in peer}
    kept = [peer for peer in old if peer["peer"] not in again]
    have = {peer["peer"] for peer in kept}
    return kept + [peer for peer in new if "missing" not in peer or peer["peer"] not in have]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, columns of numbers to the right; the empty string without rows."""
    cells = list(rows)
    body = ["| " + " | ".join(cell.replace("|", "&#124;").replace("\n", " ") for cell in row) + " |" for row in cells]
    if not body:
        return ""
    rules = ["---:" if all(_is_number(row[n]) for row in cells) else "---" for n in range(len(head))]
    return "\n".join(["| " + " | ".join(head) + " |", "| " + " | ".join(rules) + " |", *body])


def _is_number(cell: str) -> bool:
    return cell == "–" or cell[:1].isdigit()


def _at(entry: Json | None, *path: str) -> Any:
    for key in path:
        entry = entry.get(key) if isinstance(entry, dict) else None
    return entry


def _times_floor(timing: Json | None) -> str:
    ms, floor = _at(timing, "ms"), _at(timing, "floor_ms")
    return "–" if not ms or not floor else f"{ms / floor:.1f}"


def _pair(values: Json | None) -> str:
    return "–" if values is None else f"{number(values['forward'])} / {number(values['both'])}"


def _mib(nbytes: Any) -> str:
    return number(None if nbytes is None else nbytes / 2**20)


def sequences(rows: Sequence[Json], with_bars: bool) -> str:
    """Time, floor, memory, launches and cold start of rows over sequences."""
    head = ["row", "forward, ms", "× floor", "forward + backward, ms", "× floor"]
    head += ["bar, ms", "within the bar"] if with_bars else ["B, S, H, K, V"]
    head += ["peak, MiB", "launches", "cold start, s"]
    body = []
    for row in rows:
        ours, bar = row["ours"], row["bar_ms"]
        line = [row["title"]]
        for name in ("forward", "both"):
            line += [number(_at(ours, name, "ms")), _times_floor(ours.get(name))]
        if with_bars:
            line += [_pair(bar), _within(ours, bar)]
        else:
            line.append(", ".join(str(n) for n in row["shape"].values()))
        both = ours.get("both") or ours.get("forward")
        line += [_mib(_at(both, "peak_bytes")), number(_at(both, "launches")), number(ours.get("cold_s"))]
        body.append(line)
    return table(head, body)


def _within(ours: Json, bar: Json | None) -> str:
    if bar is None:
        return "–"
    words = []
    for name in ("forward", "both"):
        ms = _at(ours, name, "ms")
        words.append("not measured" if ms is None else "yes" if ms <= bar[name] else f"{ms / bar[name]:.2f} ×")
    return " / ".join(words)


def tokens(rows: Sequence[Json]) -> str:
    """Microseconds of one-token steps."""
    head = ["row", "µs a step", "× floor", "share of the copy rate", "launches", "fla 0.6.0, given, µs"]
    return table(
        head,
        (
            [
                row["title"],
                number(None if _at(row, "ours", "forward", "ms") is None else 1e3 * row["ours"]["forward"]["ms"]),
                _times_floor(row["ours"].get("forward")),
                _share(_at(row, "ours", "forward", "copy_fraction")),
                number(_at(row, "ours", "forward", "launches")),
                number(row["given"]["step_us"]),
            ]
            for row in rows
        ),
    )


def _share(value: Any) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def peers(rows: Sequence[Json]) -> str:
    """Every other implementation that was timed, with the ratio of its times to ours in the same run."""
    head = ["row", "implementation", "forward, ms", "ratio", "forward + backward, ms", "ratio", "peak, MiB"]
    head += ["first calls, s", "remark"]
    body = []
    for row in rows:
        for peer in row["peers"]:
            if "missing" in peer:
                continue
            line = [row["title"], f"{peer['peer']}: {peer['label']}"]
            for name in ("forward", "both"):
                line += [number(_at(peer, name, "ms")), _ratio(_at(peer, name, "ms"), _at(peer, "beside", name, "ms"))]
            first = [s for s in (peer.get("first_forward_s"), peer.get("first_both_s")) if s is not None]
            remark = "; ".join(filter(None, (peer.get("note"), peer.get("error") and f"failed: {peer['error']}")))
            line += [_mib(_at(peer.get("both") or peer.get("forward"), "peak_bytes"))]
            line += [number(sum(first) if first else None), remark[:300]]
            body.append(line)
    return table(head, body)


def _ratio(theirs: Any, ours: Any) -> str:
    return "–" if not theirs or not ours else f"{theirs / ours:.2f}"


def given(rows: Sequence[Json]) -> str:
    """The handed-over numbers of fla beside ours."""
    head = ["row", "fla 0.6.0, given, ms", "ratio forward", "ratio forward + backward", "peak, MiB", "ours, MiB"]
    head += ["cold start, s", "ours, s"]
    body = []
    for row in rows:
        handed, ours = row["given"], row["ours"]
        if handed["ms"] is None:
            continue
        body.append(
            [
                row["title"],
                _pair(handed["ms"]),
                *(_ratio(handed["ms"][name], _at(ours, name, "ms")) for name in ("forward", "both")),
                number(handed["peak_mib"]),
                _mib(_at(ours, "both", "peak_bytes")),
                number(handed["cold_s"]),
                number(ours.get("cold_s")),
            ]
        )
    return table(head, body)


def limits(rows: Sequence[Json]) -> str:
    """Bytes, operations and shares of the measured rates; forward / forward + backward."""
    head = ["row", "GB", "TFLOP", "share of the copy rate", "share of the matmul rate", "host, ms"]

    def two(ours: Json, key: str, show: Any, factor: float = 1.0) -> str:
        found = [_at(ours, name, key) for name in ("forward", "both") if name in ours]
        return " / ".join("–" if value is None else show(value * factor) for value in found)

    return table(
        head,
        (
            [
                row["title"],
                two(row["ours"], "bytes", number, 1e-9),
                two(row["ours"], "flops", number, 1e-12),
                two(row["ours"], "copy_fraction", _share),
                two(row["ours"], "matmul_fraction", _share),
                two(row["ours"], "host_ms", number),
            ]
            for row in rows
            if "forward" in row["ours"]
        ),
    )


def errors(rows: Sequence[Json]) -> str:
    """Relative RMS of the output and of each gradient, ours and of peers that were checked."""

    def shown(value: Any) -> str:
        return value if isinstance(value, str) else f"{value:.1e}"

    body = []
    for row in rows:
        for who, entry in (("", row["ours"]), *((f" ({p['peer']})", p) for p in row["peers"])):
            found = entry.get("errors")
            if found:
                rest = ", ".join(f"{n.removeprefix('d_')} {shown(e)}" for n, e in found.items() if n != "o")
                body.append([row["title"] + who, shown(found["o"]), rest or "–"])
    return table(["row", "output", "gradients (one-token rows: state)"], body)


def not_reached(runs: Sequence[Json], rows: Sequence[Json]) -> str:
    """A list of every bar that is missed, every peer that is faster, and everything that failed or was left out."""
    names = {"forward": "forward", "both": "forward + backward"}
    found = []
    for row in rows:
        ours, title = row["ours"], row["title"]
        if "error" in ours:
            found.append(f"{title} failed: {ours['error'][:300]}")
        for name, words in names.items():
            ms, bar = _at(ours, name, "ms"), _at(row, "bar_ms", name)
            if bar is not None and ms is None:
                found.append(f"{title}: {words} was not measured; its bar is {number(bar)} ms.")
            elif bar is not None and ms > bar:
                found.append(f"{title}: {words} takes {number(ms)} ms, its bar is {number(bar)} ms.")
            for peer in row["peers"]:
                theirs, beside = _at(peer, name, "ms"), _at(peer, "beside", name, "ms")
                if theirs and beside and theirs < beside:
                    found.append(
                        f"{title}: {words} takes {number(beside)} ms, {peer['peer']} "
                        f"({'; '.join(filter(None, (peer['label'], peer.get('note'))))}) {number(theirs)} ms."
                    )
    missing = sorted(
        {p["missing"] for row in rows for p in row["peers"] if "missing" in p and "nothing to" not in p["missing"]}
    )
    found += [f"Not compared: {text}" for text in missing]
    measured = {row["name"] for row in rows if "forward" in row["ours"]}
    for run in runs:
        found += [
            f"Left out: {left['row']} ({left['reason']})." for left in run["left_out"] if left["row"] not in measured
        ]
    if not found:
        return "Every bar is met, and no implementation on this page is faster."
    return "\n".join("- " + text.replace("\n", " ").replace("<", "&lt;") for text in dict.fromkeys(found))


def machines(runs: Sequence[Json]) -> str:
    """Card, versions, rates and date of every run."""
    body = []
    for run in runs:
        m, rates = run["machine"], run["ceilings"]
        others = ", ".join(f"{name} {version or 'not installed'}" for name, version in m.get("peers", {}).items())
        body.append(
            [
                f"{run['date'][:10]}",
                m["device"],
                f"PyTorch {m['torch']}, Triton {m.get('triton') or 'not installed'}, CUDA {m.get('cuda') or 'none'}",
                others or "–",
                run["dtype"] + (", tiny shapes: a dry run" if run["shape"] == "tiny" else ""),
                f"{rates['copy_bytes_per_s'] / 1e12:.2f}",
                f"{rates['matmul_flops_per_s'] / 1e12:.0f}",
                str(len(run["rows"])),
            ]
        )
    head = ["date", "card", "versions", "others", "inputs", "copy, TB/s", "matmul, TFLOP/s", "rows"]
    return table(head, body)


def flat_table(result: Json) -> str:
    """Rows of the CPU benchmark: one column a number, nested names joined by a space."""

    def leaves(value: Json, prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, inner in value.items():
            if isinstance(inner, dict):
                found.update(leaves(inner, f"{prefix}{key} "))
            elif not isinstance(inner, list):
                found[f"{prefix}{key}".replace("_", " ")] = inner
        return found

    rows = [leaves(row) for row in result.get("rows", [])]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return table(columns, ([number(row.get(column)) for column in columns] for row in rows))


def page(runs: Sequence[Json], template: str, *, plot: str | None = None, cpu: Json | None = None) -> str:
    """The whole page from a Jinja template."""
    from jinja2 import Environment, StrictUndefined

    rows = merged(runs)
    groups = []
    for group, (title, text) in TITLES.items():
        inside = [row for row in rows if row["group"] == group]
        if inside:
            content = tokens(inside) if group == "token" else sequences(inside, with_bars=group == "anchor")
            groups.append((title, text, content))
    return (
        Environment(undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True)
        .from_string(template)
        .render(
            runs=runs,
            machines=machines(runs),
            plot=plot,
            not_reached=not_reached(runs, rows),
            groups=groups,
            peers=peers(rows),
            given=given(rows),
            limits=limits(rows),
            errors=errors(rows),
            cpu=flat_table(cpu) if cpu else "",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and its two pictures."""
    parser = argparse.ArgumentParser(
        prog="python -m latentcot.kernels.bench_report", description="Results of the kernel benchmark as a page."
    )
    parser.add_argument("files", nargs="*", type=Path, help="results, older ones first; none writes an empty page")
    parser.add_argument("--out", type=Path, default=FOLDER / "kernels.md")
    parser.add_argument("--template", type=Path, default=FOLDER / "kernels.md.jinja")
    parser.add_argument("--cpu", type=Path, help="results of the CPU benchmark")
    given_ = parser.parse_args(arguments)
    try:
        template = given_.template.read_text(encoding="utf-8")
        runs = load(given_.files)
        cpu = json.loads(given_.cpu.read_text(encoding="utf-8")) if given_.cpu else None
    except (OSError, ValueError) as error:
        parser.error(str(error))
    drawn = draw([row for row in merged(runs) if row["group"] == "anchor"], given_.out.with_suffix(""))
    text = page(runs, template, plot=given_.out.stem if drawn else None, cpu=cpu)
    given_.out.write_text(text.rstrip() + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
