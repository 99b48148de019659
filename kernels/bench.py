"""The kernel benchmark: ``python -m latentcot.kernels.bench``.

Every row of :mod:`latentcot.kernels.bench_cases` is timed forward and forward + backward, set against its bytes and
matrix products at the rates that the same run measures, checked against float64, and written to JSON at once: a run
that is cut short keeps what it has. A row that fails says why in its own entry and the next one runs.

.. code-block:: text

    python -m latentcot.kernels.bench --out results.json                      # all rows, this library alone
    python -m latentcot.kernels.bench --rows 'gla*' --against fla,sdpa        # some rows, beside other implementations
    python -m latentcot.kernels.bench --device cpu --shape tiny --rows gla    # dry run: the numbers say nothing

``python -m latentcot.kernels.bench_report`` makes the page of the site from such files.
"""

import argparse
import fnmatch
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from latentcot.kernels import bench_peers
from latentcot.kernels.bench_cases import MIXERS, ROWS, Row, tiny
from latentcot.kernels.bench_measure import ceilings, synchronize
from latentcot.kernels.bench_rows import Contender, Settings, guarded, measure, ours

SCHEMA = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Settings from the command line; leaves with code 2 and a sentence for what does not fit."""
    parser = argparse.ArgumentParser(
        prog="python -m latentcot.kernels.bench", description="Times of the kernels beside floors, bars and peers."
    )
    parser.add_argument("--rows", default="*", help="names or patterns, separated by commas; --list prints the names")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--against", default="", help=f"peers to time too: {', '.join(bench_peers.NAMES)}")
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, help="JSON file, rewritten after every row")
    parser.add_argument("--budget-seconds", type=float, help="start no row after this time")
    parser.add_argument("--cold", action="store_true", help="first call of a fresh process with an empty kernel cache")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="errors against float64")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the inputs; bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--shape", default="full", choices=("full", "tiny"))
    given = parser.parse_args(arguments)
    if given.list:
        parser.exit(0, "".join(f"{row.name:32} {row.group:10} {tuple(row.shape)}\n" for row in ROWS))
    patterns = [p for p in given.rows.split(",") if p]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(row.name, pattern) for row in ROWS):
            parser.error(f"--rows: no row matches {pattern!r}, expected some of {', '.join(row.name for row in ROWS)}")
    against = tuple(p for p in given.against.split(",") if p)
    for name in against:
        if name not in bench_peers.NAMES:
            parser.error(f"--against: {name!r} is no peer, expected some of {', '.join(bench_peers.NAMES)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device; --device cpu --shape tiny is a dry run")
    rows = tuple(row for row in ROWS if any(fnmatch.fnmatchcase(row.name, p) for p in patterns))
    return Settings(
        rows=tuple(map(tiny, rows)) if given.shape == "tiny" else rows,
        device=torch.device(given.device),
        dtype=DTYPES[given.dtype or ("bfloat16" if given.device == "cuda" else "float32")],
        against=against,
        backward=given.backward,
        tiny=given.shape == "tiny",
        cold=given.cold,
        check=given.check,
        budget_seconds=given.budget_seconds,
        out=given.out,
    )


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure all rows; returns what was written. Only a failure outside of the rows raises."""
    begin = time.monotonic()
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(settings),
        "shape": "tiny" if settings.tiny else "full",
        "dtype": str(settings.dtype).removeprefix("torch."),
        "ceilings": ceilings(settings.device, tiny=settings.tiny),
        "budget_seconds": settings.budget_seconds,
        "rows": [],
        "left_out": [],
    }
    rates = result["ceilings"]
    say(
        f"{result['machine']['device']}: copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"matmul {rates['matmul_flops_per_s'] / 1e12:.0f} TFLOP/s"
    )
    write(settings.out, result)

    for row in settings.rows:
        reason = _why_stop(settings, begin)
        if reason is not None:
            result["left_out"].append({"row": row.name, "reason": reason})
            continue
        entry = describe_row(row)
        result["rows"].append(entry)
        entry["ours"] = guarded(lambda row=row: measure(row, ours(row, settings), settings, rates, cold=settings.cold))
        write(settings.out, result)
        say(one_line(row.name, "ours", entry["ours"]))
        for name in settings.against:
            reason = _why_stop(settings, begin)
            if reason is not None:
                result["left_out"].append({"row": f"{row.name} against {name}", "reason": reason})
                continue
            entry["peers"].extend(measure_peer(row, name, settings, rates))
            write(settings.out, result)
            for peer in entry["peers"]:
                if peer["peer"] == name:
                    say(one_line(row.name, f"{name} {peer['label']}", peer))
    result["seconds"] = time.monotonic() - begin
    for left in result["left_out"]:
        say(f"left out: {left['row']} ({left['reason']})")
    write(settings.out, result)
    return result


def _why_stop(settings: Settings, begin: float) -> str | None:
    """Why nothing more can be measured, None while it can: time is up, or the card no longer answers.

    A kernel that writes where it must not, or a failed device-side assertion, makes every later call of the process
    fail; the rows behind it are left out instead of being blamed.
    """
    if settings.budget_seconds is not None and time.monotonic() - begin > settings.budget_seconds:
        return f"the {settings.budget_seconds:g} s were used up"
    try:
        synchronize(settings.device)
    except RuntimeError as error:
        return f"the device was lost: {str(error).splitlines()[0]}"
    return None


def measure_peer(row: Row, name: str, settings: Settings, rates: dict[str, float]) -> list[dict[str, Any]]:
    """The entries of one peer for a row; one that says so where it is not installed or has nothing to compare."""
    try:
        found = bench_peers.peers_for(name, row)
    except bench_peers.PeerMissing as missing:
        return [{"peer": name, "label": name, "missing": str(missing)}]
    except Exception as error:  # a peer that breaks while it is imported
        return [{"peer": name, "label": name, "error": f"{type(error).__name__}: {error}"}]
    entries = []
    for peer in found:
        contender = Contender(peer.label, peer.run, peer.step, peer.same, peer.note)
        entry = guarded(lambda c=contender: measure(row, c, settings, rates))
        entries.append({"peer": name, "label": peer.label, "version": bench_peers.peer_version(name), **entry})
    return entries


def describe_row(row: Row) -> dict[str, Any]:
    """What a row is, before anything is measured."""
    return {
        "name": row.name,
        "mixer": row.mixer,
        "operator": MIXERS[row.mixer].operator,
        "group": row.group,
        "visibility": row.visibility,
        "shape": row.shape._asdict(),
        "bar_ms": row.bar and row.bar._asdict(),
        "given": {
            "ms": row.given and row.given._asdict(),
            "peak_mib": row.given_peak_mib,
            "cold_s": row.given_cold_s,
            "step_us": row.given_step_us,
        },
        "peers": [],
    }


def describe_machine(settings: Settings) -> dict[str, Any]:
    """The card or processor and every version that a number may depend on."""
    device = settings.device
    found: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,  # pyright: ignore[reportAttributeAccessIssue]
        "peers": {name: bench_peers.peer_version(name) for name in settings.against},
    }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found.update(
            device=card.name,
            capability=f"{card.major}.{card.minor}",
            memory_bytes=card.total_memory,
            multiprocessors=card.multi_processor_count,
        )
    return found


def write(path: Path | None, result: dict[str, Any]) -> None:
    """The whole result so far, written beside its place and renamed; numbers that JSON lacks become null."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _plain(value: Any) -> Any:
    """NaN and infinite numbers as the words for them: JSON has neither, and null would read as not measured."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value


def one_line(row: str, who: str, entry: dict[str, Any]) -> str:
    """The numbers of an entry for the terminal."""
    parts = [f"{row:28} {who[:40]:40}"]
    for name in ("forward", "both"):
        if name in entry:
            t = entry[name]
            floor = f" ({t['ms'] / t['floor_ms']:.1f} x floor)" if "floor_ms" in t else ""
            parts.append(f"{name} {t['ms']:.4g} ms{floor}")
    if entry.get("cold_s") is not None:
        parts.append(f"cold {entry['cold_s']:.1f} s")
    if "errors" in entry:
        parts.append("errors " + " ".join(f"{name} {error:.1e}" for name, error in entry["errors"].items()))
    if "missing" in entry:
        parts.append(f"missing: {entry['missing']}")
    if "error" in entry:
        parts.append(f"FAILED {entry['error'][:300]}")
    return "  ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 when a row of this library failed."""
    result = run(parse(arguments), say=lambda line: print(line, flush=True))
    return int(any("error" in row["ours"] for row in result["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
