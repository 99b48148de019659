import json
import subprocess
import sys

import pytest
from pybtex.database import parse_string
from typer.testing import CliRunner

from latentcot.catalog import load_records
from latentcot.catalog.check import check_catalog
from latentcot.catalog.cli import papers_app

runner = CliRunner()


def run(*arguments: str):
    return runner.invoke(papers_app, list(arguments))


def refused(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_check_is_clean():
    result = run("check")
    assert result.exit_code == 0, result.output
    assert "no problems" in result.stdout
    assert json.loads(run("check", "--json").stdout)["problems"] == []


def test_check_with_problems_ends_with_1(tmp_path, monkeypatch):
    (tmp_path / "2412").mkdir()
    (tmp_path / "2412" / "x.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("latentcot.catalog.cli.check_catalog", lambda: check_catalog(tmp_path))
    result = run("check")
    assert result.exit_code == 1
    assert "2412/x.json: schema" in result.stdout
    assert "1 problem" in result.stdout


def test_search_shows_a_table_and_json_and_bibtex():
    result = run("search", "looped", "transformers", "--limit", "3")
    assert result.exit_code == 0
    assert "Looped Transformers as Programmable Computers" in result.stdout
    assert "papers shown" in result.stdout
    data = json.loads(run("search", "looped transformers", "--json").stdout)
    assert data["total"] >= len(data["hits"]) > 0
    assert data["hits"][0]["record"]["key"]
    entries = parse_string(run("search", "looped transformers", "--bibtex").stdout, "bibtex").entries
    assert len(entries) == len(data["hits"])


def test_search_filters():
    data = json.loads(
        run("search", "--leaf", "vertical/feedback", "--facet", "mechanism=continuous-thought", "--json").stdout
    )
    assert "2412.06769" in [hit["record"]["key"] for hit in data["hits"]]
    data = json.loads(run("search", "diffusion", "--year", "-2021", "--json", "--limit", "1000").stdout)
    assert data["total"]
    assert all(hit["record"]["published"]["value"] < "2022" for hit in data["hits"])
    assert json.loads(run("search", "--year", "2019", "--code", "--sort", "date", "--json").stdout)["match"] in (
        "all",
        "none",
    )


def test_nothing_found_is_no_error():
    result = run("search", "zzzzqx")
    assert result.exit_code == 0
    assert "No paper found" in result.stdout


@pytest.mark.parametrize("text", ['"', "*", "NEAR", "a:b", "C++", "chain-of-thought"])
def test_any_query_is_safe(text):
    assert run("search", "--", text).exit_code == 0


def test_show():
    result = run("show", "https://arxiv.org/abs/2412.06769v3")
    assert result.exit_code == 0
    assert "Training Large Language Models to Reason in a Continuous Latent Space" in result.stdout
    assert "Hao2024Training" in result.stdout
    assert json.loads(run("show", "2412.06769", "--json").stdout)["key"] == "2412.06769"
    assert run("show", "2412.06769", "--bibtex").stdout.startswith("@")
    assert "not fetched yet" in run("show", "1406.1078").stdout


def test_export_to_a_file_and_to_standard_output(tmp_path):
    target = tmp_path / "papers.bib"
    result = run("export", "--format", "bibtex", "--output", str(target))
    assert result.exit_code == 0
    assert result.stdout == ""
    text = run("export").stdout
    assert target.read_text(encoding="utf-8") == text
    assert len(parse_string(text, "bibtex").entries) == len(load_records())
    assert len(json.loads(run("export", "--format", "json").stdout)["records"]) == len(load_records())
    assert [path.name for path in tmp_path.iterdir()] == ["papers.bib"]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    assert "empty" in refused("search", "")
    assert "empty" in refused("search")
    assert "empty" in refused("search", "  ")
    assert "empty" in refused("search", "\x01\udcff")
    assert "2412.06769" in refused("show", "2412.06768")
    assert "no paper is called" in refused("show", "nothing-of-the-kind")
    assert "empty" in refused("show", " ")
    assert "vertical/feedback" in refused("search", "a", "--leaf", "vertical/fedback")
    assert "mechanism" in refused("search", "a", "--facet", "mechansm=loop")
    assert "facet=value" in refused("search", "a", "--facet", "loop")
    assert "2023-2025" in refused("search", "a", "--year", "soon")
    assert "2023-2025" in refused("search", "a", "--year", "-")
    assert "relevance" in refused("search", "a", "--sort", "title")
    assert "at least 1" in refused("search", "a", "--limit", "0")
    assert "bibtex, csl" in refused("export", "--format", "endnote")
    assert "no leaf" in refused("export", "--leaf", "nowhere")
    assert "exclude" in refused("search", "a", "--json", "--bibtex")
    assert "does not exist" in refused("export", "--output", str(tmp_path / "no" / "x.bib"))
    assert "is a folder" in refused("export", "--output", str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "papers.bib"
    target.write_text("old", encoding="utf-8")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("latentcot.catalog.store.os.replace", fail)
    assert "disk full" in refused("export", "--output", str(target))
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("papers.bib", "old")]


def test_a_damaged_record_is_one_line(tmp_path, monkeypatch):
    from latentcot.catalog import store

    (tmp_path / "2412").mkdir()
    (tmp_path / "2412" / "2412.06769.json").write_text('{"key": 1}', encoding="utf-8")

    def broken():
        return store.read_records(tmp_path)

    monkeypatch.setattr("latentcot.catalog.cli_export.load_records", broken)
    assert "2412/2412.06769.json" in refused("export")


def test_help_names_every_command():
    text = run("--help").output
    for name in ("check", "search", "show", "export"):
        assert name in text


def test_the_module_runs_without_torch(tmp_path):
    code = (
        "import runpy, sys; sys.argv = ['papers', 'show', '2412.06769', '--json']\n"
        "try:\n    runpy.run_module('latentcot.catalog', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "bad = {'torch', 'transformers', 'triton'} & set(sys.modules); assert not bad, bad"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["key"] == "2412.06769"
