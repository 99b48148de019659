"""The command and its helpers: bad input, missing extras, notebooks, results, command-line reference."""

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from latentcot import site as site_module
from latentcot.site import MARKER, SiteError, build_site
from latentcot.site_notebooks import NotebookError, render_notebooks
from latentcot.site_pages import (
    API_PACKAGES,
    api_page,
    cli_page,
    documented_package,
    home_figure,
    notebook_pages,
    results_pages,
)


def run(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(site_module.site)
    return CliRunner().invoke(app, list(arguments))


def write_notebook(path: Path, *sources: str) -> None:
    cells = [{"cell_type": "markdown", "metadata": {}, "id": "title", "source": ["# A small *notebook*\n", "\nText."]}]
    cells += [
        {"cell_type": "code", "metadata": {}, "id": f"c{i}", "source": [source], "outputs": [], "execution_count": None}
        for i, source in enumerate(sources)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--notebooks", "maybe"], "expected execute, source or none, given 'maybe'"),
        (["--results", "no/such/folder"], "no/such/folder is not a folder"),
        (["--output", "/"], "holds the checkout itself"),
    ],
)
def test_bad_options_are_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_folder_that_is_not_a_site_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = run("--output", str(tmp_path), "--notebooks", "none")
    assert result.exit_code == 2
    assert "was not written by this command" in result.output
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_hand_written_pages_without_a_place_join_the_project_section(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    for name in ("index.md", "design.md", "benchmarks/h100.md"):
        (tmp_path / name).write_text("# x\n")
    nav = [{"Home": "index.md"}, {"Project": [{"Design": "design.md"}]}]
    assert site_module._navigation(nav, tmp_path, {}, []) == [
        {"Home": "index.md"},
        {"Project": [{"Design": "design.md"}, "benchmarks/h100.md"]},
    ]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = site_module.find_spec
    monkeypatch.setattr(site_module, "find_spec", lambda name: None if name == "material" else real(name))
    result = run("--output", str(tmp_path / "site"), "--notebooks", "none")
    assert result.exit_code == 2
    assert "pip install 'latentcot[docs]'" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_outside_a_checkout_the_command_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(site_module, "__file__", str(tmp_path / "latentcot" / "site.py"))
    result = run("--output", str(tmp_path / "site"))
    assert result.exit_code == 2
    assert "built from a checkout" in result.output


def test_a_failed_build_leaves_the_last_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "site"
    output.mkdir()
    (output / MARKER).write_text("")
    (output / "index.html").write_text("the last good one")
    stubs = {f"{api_page(name)}.md": f"# {name}\n" for name in API_PACKAGES} | {"reference/index.md": "# Reference\n"}
    monkeypatch.setattr(site_module.site_pages, "api_pages", lambda root: stubs)
    monkeypatch.setattr(site_module.site_pages, "cli_page", lambda command: "# Command line\n\n[gone](nowhere.md)\n")
    with pytest.raises(SiteError, match=r"nowhere\.md"):
        build_site(output, notebooks="none", work=tmp_path / "work", records=[])
    assert (output / "index.html").read_text() == "the last good one"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_notebook_is_run_once_in_quick_mode_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    write_notebook(
        tmp_path / "notebooks" / "01_small.ipynb",
        "import os, sys\nprint('quick', os.environ['QUICK'])\nprint('pro' + 'gress', file=sys.stderr)",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
    )
    (first,) = render_notebooks(tmp_path / "notebooks", tmp_path / "cache", "execute")
    pages = notebook_pages([first])
    text = pages["learn/01_small/index.md"]
    assert isinstance(text, str)
    assert "quick 1" in text
    assert "progress" not in text
    figures = [name for name in pages if name.endswith(".png")]
    assert len(figures) == 1
    assert f"]({Path(figures[0]).name})" in text
    assert bytes(pages[figures[0]])[:4] == b"\x89PNG"  # type: ignore[arg-type]

    monkeypatch.setattr("latentcot.site_notebooks._execute", lambda *args: pytest.fail("ran again without a change"))
    assert render_notebooks(tmp_path / "notebooks", tmp_path / "cache", "execute") == [first]


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_a_notebook_that_raises_is_named_with_its_error(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    write_notebook(tmp_path / "notebooks" / "bad.ipynb", "raise ValueError('accuracy 0.2 is below 0.9')")
    with pytest.raises(NotebookError, match=r"bad\.ipynb: a cell raised ValueError: accuracy 0\.2 is below 0\.9"):
        render_notebooks(tmp_path / "notebooks", tmp_path / "cache", "execute")
    assert list((tmp_path / "cache").iterdir()) == []


def test_links_of_a_notebook_lead_to_pages_of_the_site(tmp_path: Path) -> None:
    write_notebook(tmp_path / "01_a.ipynb", "1")
    write_notebook(tmp_path / "02_b.ipynb", "2")
    text = (
        (tmp_path / "01_a.ipynb")
        .read_text()
        .replace("Text.", "[how](../docs/how-it-works.md#one-protocol) [b](02_b.ipynb)")
    )
    (tmp_path / "01_a.ipynb").write_text(text)
    page = notebook_pages(render_notebooks(tmp_path, tmp_path / "cache", "source"))["learn/01_a/index.md"]
    assert "[how](../../how-it-works.md#one-protocol) [b](../02_b/index.md)" in str(page)
    assert "[Download this notebook](01_a.ipynb)" in str(page)


def test_formulas_become_mathml_and_bad_ones_stay_as_tex() -> None:
    markdown = pytest.importorskip("markdown")
    extensions = ["pymdownx.arithmatex", "latentcot.site_math"]
    render = markdown.Markdown(
        extensions=extensions, extension_configs={"pymdownx.arithmatex": {"generic": True}}
    ).convert
    text = render("The state $S_t = a_t S_{t-1}$ and `$x$` and\n\n$$o_t < q_t S_t$$\n\nbroken $x^a^b<c$ end")
    assert text.count("<math") == 2
    assert 'display="block"' in text
    assert "<msub><mi>S</mi><mi>t</mi></msub>" in text
    assert "<code>$x$</code>" in text
    assert "<code>x^a^b&lt;c</code>" in text


def test_a_file_that_is_no_notebook_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.ipynb").write_text('{"cells": 3}')
    with pytest.raises(NotebookError, match=r"broken\.ipynb is not a notebook"):
        render_notebooks(tmp_path, tmp_path / "cache", "source")


def test_results_become_a_page_with_plots_report_and_numbers(tmp_path: Path) -> None:
    assert "before a comparison was run" in str(results_pages(None)["results/index.md"])
    assert "before a comparison was run" in str(results_pages(tmp_path / "missing")["results/index.md"])
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "accuracy.png").write_bytes(b"\x89PNG....")
    (tmp_path / "report.html").write_text("<p>report</p>")
    (tmp_path / "results.json").write_text("{}")
    (tmp_path / "table.md").write_text(
        "# Quick comparison\n\n| a |\n| --- |\n| 1 |\n\n## Accuracy by difficulty\n\n.\n"
    )
    pages = results_pages(tmp_path)
    assert {"results/report.html", "results/results.json", "results/plot-01-accuracy.png"} < set(pages)
    text = str(pages["results/index.md"])
    assert "[report.html](report.html)" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Results",
        "## Quick comparison",
        "### Accuracy by difficulty",
    ]
    assert text.index("plot-01-accuracy.png") < text.index("| 1 |")
    assert "(results/plot-01-accuracy.png)" in home_figure(pages)
    assert home_figure(results_pages(None)) == ""


def test_modules_are_found_on_the_page_of_their_package() -> None:
    assert documented_package("latentcot.kernels.delta_rule.chunked") == "latentcot.kernels"
    latent = "latentcot.recurrent_depth.latent_thoughts"
    assert documented_package(f"{latent}.coconut") == latent
    assert documented_package("latentcot.kernelsmith") is None


def test_the_command_line_reference_names_every_command_and_option() -> None:
    app = typer.Typer(help="The whole <program>.")
    papers = typer.Typer(help="Papers.")
    app.add_typer(papers, name="papers")

    @app.command()
    def compare(preset: str, seeds: Annotated[int, typer.Option(help="How many *seeds* | runs.")] = 1) -> None:
        """Compare methods."""

    @papers.command()
    def search(words: list[str], limit: Annotated[int, typer.Option("--limit", "-n")] = 20) -> None:
        """Search papers, `--limit` of them."""

    @app.command(hidden=True)
    def secret() -> None:
        """Not shown."""

    text = cli_page(typer.main.get_command(app))
    headings = ("## `latentcot compare`", "### `latentcot papers search`")
    for part in (*headings, "`--seeds`", "`1`", "--limit", "PRESET", "Compare methods."):
        assert part in text
    assert "&#60;program&#62;" in text
    assert "&#42;seeds&#42; &#124; runs." in text
    assert "secret" not in text
    assert "not part of this checkout" in cli_page(None)
