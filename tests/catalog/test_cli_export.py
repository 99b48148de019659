"""The commands export, cite and from-bib, as a user calls them."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import rispy
from pybtex.database import parse_string
from typer.testing import CliRunner

from latentcot.catalog import get, load_records
from latentcot.catalog.cli import papers_app
from latentcot.catalog.export import FORMATS, lists, render
from latentcot.catalog.selection import select
from latentcot.catalog.store import CatalogError, write_atomic

runner = CliRunner()


def run(*arguments: str):
    return runner.invoke(papers_app, list(arguments))


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("atom", "rss")])
def test_export_writes_every_format_as_it_is(format, tmp_path):
    result = run("export", "--format", format, "--select", "leaf=vertical/feedback")
    assert result.exit_code == 0, result.stderr
    expected = render(format, select(["leaf=vertical/feedback"]))
    assert result.stdout_bytes.decode() == expected
    file = tmp_path / "out"
    assert run("export", "--format", format, "--leaf", "vertical/feedback", "--output", str(file)).exit_code == 0
    assert file.read_bytes().decode() == expected


def test_a_feed_has_a_limit_and_an_address():
    text = run("export", "--format", "rss", "--limit", "3", "--site-url", "https://example.org/x/").stdout
    assert text.count("<item>") == 3
    assert "https://example.org/x/paper/" in text
    assert run("export", "--format", "atom").stdout.count("<entry>") == min(50, len(load_records()))
    assert "--limit" in refused("export", "--limit", "3")
    assert "absolute" in refused("export", "--format", "atom", "--site-url", "example.org")
    assert "at least 1" in refused("export", "--format", "atom", "--limit", "0")


def test_the_list_goes_into_a_file_between_its_markers(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(f"# A\n{lists.BEGIN}\n{lists.END}\nz\n", encoding="utf-8")
    arguments = ("export", "--format", "markdown", "--select", "key=2412.06769", "--into", str(file))
    assert run(*arguments).exit_code == 0
    text = file.read_text(encoding="utf-8")
    assert get("2412.06769").title in text
    assert text.startswith("# A\n")
    assert text.endswith("\nz\n")
    assert run(*arguments).exit_code == 0
    assert file.read_text(encoding="utf-8") == text
    file.write_text("no markers", encoding="utf-8")
    assert "marker" in refused(*arguments)
    assert file.read_text(encoding="utf-8") == "no markers"
    assert "--into" in refused("export", "--into", str(file))


def test_a_selection_holds_in_all_its_parts():
    found = select(["mechanism=loop", "year=2025-", "code=yes"])
    assert found
    assert all("loop" in r.facets.mechanism and (r.year or 0) >= 2025 and r.has_code for r in found)
    assert select(["key=2412.06769", "key=2502.05171"]) == [get("2412.06769"), get("2502.05171")]
    assert get("2412.06769") in select(["words=continuous latent space"])
    assert select(["runnable=yes"]) == [record for record in load_records() if record.runnable]


@pytest.mark.parametrize(
    ("expression", "hint"),
    [
        ("yer=2024", "year"), ("leaf", "field=value"), ("leaf=", "field=value"), ("code=maybe", "yes or no"),
        ("year=x", "2023-2025"), ("leaf=vertical/feedbak", "vertical/feedback"), ("mechanism=lop", "loop"),
        ("key=nothing", "no paper"), ("venue=ICRL", "no venue"),
    ],
)  # fmt: skip
def test_a_wrong_selection_is_one_line_that_helps(expression, hint):
    assert hint in refused("export", "--select", expression)


def test_cite_prints_one_or_more_papers():
    assert run("cite", "2412.06769").stdout.startswith("@inproceedings{Hao2024Training,")
    both = run("cite", "arXiv:2412.06769v2", "Geiping2025Scaling", "2412.06769", "--format", "ris").stdout
    assert len(rispy.loads(both)) == 2
    assert len(json.loads(run("cite", "2412.06769", "--format", "csl").stdout)) == 1
    assert "COLM 2025" in run("cite", "2412.06769", "--format", "text").stdout
    assert "no paper" in refused("cite", "nothing-like-it")
    assert "--format" in refused("cite", "2412.06769", "--format", "csv")
    assert "empty" in refused("cite", " ")


def test_an_output_that_is_a_pipe_a_device_or_a_link_stays_one(tmp_path):
    text = run("export", "--format", "json").stdout
    pipe, link, target = tmp_path / "pipe", tmp_path / "link.json", tmp_path / "target.json"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text, encoding="utf-8")
        assert run("export", "--format", "json", "--output", str(pipe)).exit_code == 0
        assert read.result(timeout=30) == text
    assert pipe.is_fifo()
    target.write_text("old")
    link.symlink_to(target)
    assert run("export", "--format", "json", "--output", str(link)).exit_code == 0
    assert link.is_symlink()
    assert target.read_text(encoding="utf-8") == text
    with pytest.raises(CatalogError, match="pipe, expected a file"):
        write_atomic(pipe, "x")
    assert pipe.is_fifo()


def test_from_bib_tells_known_and_missing(tmp_path):
    file = tmp_path / "my.bib"
    file.write_text(
        render("bibtex", [get("2412.06769")]) + "@misc{wrong, title={Another}, eprint={2502.05171}}\n"
        "@misc{b, title={Nothing of the kind}}\n@misc{b, title={Twice}}\n",
        encoding="utf-8",
    )
    result = run("from-bib", str(file), "--no-score")
    assert result.exit_code == 0
    assert "2 known, 0 likely, 1 missing" in result.stdout
    assert "title is another" in result.stdout
    assert "repeated" in result.stderr
    data = json.loads(run("from-bib", str(file), "--no-score", "--json").stdout)
    assert data["counts"] == {"known": 2, "likely": 0, "missing": 1}
    assert [entry["key"] for entry in data["entries"]] == ["2412.06769", "2502.05171", None]
    assert "not there" in refused("from-bib", str(tmp_path / "no.bib"))
    file.write_bytes(b"\xff@{@(")
    assert "no entry could be read: not UTF-8 from byte 0 on: read as Latin-1 (and " in refused("from-bib", str(file))
    file.write_text("")
    assert run("from-bib", str(file)).exit_code == 0


def test_search_counts_all_found_papers():
    data = json.loads(run("search", "looped transformers", "--limit", "2", "--json", "--counts").stdout)
    assert len(data["hits"]) == 2
    assert sum(data["counts"]["year"].values()) == data["total"] > 2
    assert "leaf: " in run("search", "looped", "--counts").stdout
    assert "--counts" in refused("search", "looped", "--counts", "--bibtex")


def test_exported_bibtex_is_read_back():
    assert len(parse_string(run("export").stdout, "bibtex").entries) == len(load_records())
