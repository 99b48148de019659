"""Runnable links: every path is right, the way back from modules to papers, and modules that no record links."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from latentcot.catalog import get, load_records
from latentcot.catalog.check import check_catalog, repository_root
from latentcot.catalog.cli import papers_app
from latentcot.catalog.record import Runnable
from latentcot.catalog.runnable import module_name, papers_of, reverse_index, runnable_problems, unlinked
from latentcot.catalog.store import write_record
from latentcot.site_pages import API_PACKAGES, api_page, documented_package, with_papers

ROOT = repository_root()
needs_checkout = pytest.mark.skipif(ROOT is None, reason="an installed copy has no tests and notebooks beside it")

# Methods of the library and the module that a reader should be sent to first.
METHODS = {
    "1603.08983": "recurrent_depth/act.py",
    "1807.03819": "recurrent_depth/act.py",
    "2006.16236": "kernels/decay_attention/op.py",
    "2307.08621": "latentcot/backbone/mixers/retnet.py",
    "2310.10845": "recurrent_depth/cotformer.py",
    "2311.04823": "latentcot/backbone/mixers/hgrn.py",
    "2312.06635": "latentcot/backbone/mixers/gla.py",
    "2404.07904": "latentcot/backbone/mixers/hgrn2.py",
    "2406.06484": "latentcot/backbone/mixers/deltanet.py",
    "2406.07524": "diffusion_reasoning/objective.py",
    "2409.02908": "diffusion_reasoning/named_samplers.py",
    "2410.14157": "diffusion_reasoning/recipes.py",
    "2410.17891": "diffusion_reasoning/convert.py",
    "2412.06464": "latentcot/backbone/mixers/gated_deltanet.py",
    "2412.06769": "recurrent_depth/latent_thoughts/coconut.py",
    "2501.16085": "kernels/blocks.py",
    "2502.05171": "recurrent_depth/depth_recurrence.py",
    "2502.09992": "diffusion_reasoning/recipes.py",
    "2502.17416": "latentcot/tasks/p_hop.py",
    "2503.00307": "diffusion_reasoning/remasking.py",
    "2503.09573": "diffusion_reasoning/block_diffusion/model.py",
    "2504.12216": "diffusion_reasoning/policy.py",
    "2505.12514": "latentcot/tasks/prosqa.py",
    "2505.20674": "recurrent_depth/ponder_lm.py",
    "2505.22618": "diffusion_reasoning/named_samplers.py",
    "2506.21734": "recurrent_depth/recursive_solvers/solver.py",
    "2507.06457": "latentcot/backbone/presets.py",
    "2507.10524": "recurrent_depth/mixture_of_recursions.py",
    "2508.15487": "diffusion_reasoning/recipes.py",
    "2510.04871": "recurrent_depth/recursive_solvers/solver.py",
    "2510.17206": "diffusion_reasoning/carry.py",
    "2510.25741": "recurrent_depth/ouro.py",
    "2511.07384": "recurrent_depth/retrofit.py",
}


@needs_checkout
def test_every_path_of_every_record_is_right():
    assert ROOT is not None
    problems = [
        f"{record.key}: {message}"
        for record in load_records()
        for entry in record.runnable
        for message in runnable_problems(entry, ROOT)
    ]
    assert problems == []


@pytest.mark.parametrize(("key", "module"), METHODS.items())
def test_a_method_of_the_library_is_linked_from_its_paper(key, module):
    assert get(key).runnable[0].module == module


def test_modules_that_are_linked_can_be_found_by_their_import_name():
    for name in reverse_index(load_records()):
        first, second, *rest = name.split(".")
        spec = find_spec(f"{first}.{second}")  # imports the parent only, which is light
        assert spec is not None, name
        folder = Path((spec.submodule_search_locations or [""])[0])
        assert folder.joinpath(*rest).with_suffix(".py").is_file(), name


@needs_checkout
def test_a_linked_test_names_the_package_that_it_is_said_to_test():
    assert ROOT is not None
    for record in load_records():
        for entry in record.runnable:
            if entry.test:
                package = ".".join(module_name(entry.module).split(".")[:2])
                text = (ROOT / entry.test).read_text(encoding="utf-8")
                assert package in text, (record.key, entry.test, package)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("kernels/delta_rule/op.py", "latentcot.kernels.delta_rule.op"),
        ("latentcot/tasks/mano.py", "latentcot.tasks.mano"),
        ("recurrent_depth/__init__.py", "latentcot.recurrent_depth"),
    ],
)
def test_module_names(path, name):
    assert module_name(path) == name


@pytest.mark.parametrize("path", ["docs/index.md", "kernels", "../kernels/op.py", "setup.py", ""])
def test_paths_that_are_no_module(path):
    with pytest.raises(ValueError, match=r"expected a \.py file below"):
        module_name(path)


def _entry(module, notebook=None, test=None):
    return Runnable(module=module, notebook=notebook, test=test)


@pytest.fixture
def tree(tmp_path):
    for path in ("kernels/op.py", "notebooks/01.ipynb", "tests/kernels/test_op.py", "tests/kernels/helper.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text('"""Nothing."""\n')
    return tmp_path


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (_entry("kernels/op.py", "notebooks/01.ipynb", "tests/kernels/test_op.py"), None),
        (_entry("kernels/op.py"), None),
        (_entry("kernels/none.py"), "module: the file 'kernels/none.py' does not exist"),
        (_entry("kernels"), "module: the file 'kernels' does not exist"),
        (_entry("../kernels/op.py"), "module: the file '../kernels/op.py' does not exist"),
        (_entry("/etc/passwd"), "module: the file '/etc/passwd' does not exist"),
        (_entry("tests/kernels/test_op.py"), "module: expected a .py file below"),
        (_entry("kernels/op.py", "kernels/op.py"), "notebook: expected a .ipynb file"),
        (_entry("kernels/op.py", None, "kernels/op.py"), "test: expected a .py file below tests/"),
        (_entry("kernels/op.py", None, "tests/kernels/helper.py"), "test: expected a file that pytest collects"),
        (_entry("kernels/op.py", None, "tests/none.py"), "test: the file 'tests/none.py' does not exist"),
    ],
)
def test_the_check_tells_what_is_wrong(tree, entry, said):
    problems = list(runnable_problems(entry, tree))
    if said is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert problems[0].startswith(said)


def test_papers_check_reports_dangling_paths(tree):
    record = get("2412.06769").model_copy(update={"runnable": [_entry("kernels/gone.py")]})
    write_record(record, tree / "papers")
    found = [problem for problem in check_catalog(tree / "papers", tree).problems if problem.rule == "runnable"]
    assert len(found) == 1
    assert "kernels/gone.py" in str(found[0])


def test_reverse_index_and_its_parts():
    index = reverse_index(load_records())
    assert list(index) == sorted(index)
    keys = [held.record.key for held in index["latentcot.recurrent_depth.act"]]
    assert keys == ["1603.08983", "1807.03819"]
    part = papers_of(index, "latentcot.kernels")
    assert part
    assert all(name.startswith("latentcot.kernels.") for name in part)
    assert papers_of(index, "latentcot.kernel") == {}
    assert sum(len(held) for held in index.values()) == sum(len(record.runnable) for record in load_records())


def test_api_pages_show_the_papers_of_their_modules():
    pages = {f"{api_page(name)}.md": f"# {name}\n" for name in API_PACKAGES}
    index = reverse_index(load_records())
    shown = with_papers(pages, index)
    assert list(shown) == list(pages)
    for module, held in index.items():
        name = documented_package(module)
        assert name is not None, f"{module} has no API page"
        page = shown[f"{api_page(name)}.md"]
        assert f"`{module}`" in page
        for entry in held:
            assert f"](../../paper/{entry.record.key}.md)" in page
    assert shown[f"{api_page('latentcot.catalog')}.md"] == pages[f"{api_page('latentcot.catalog')}.md"]
    assert with_papers(pages, {}) == pages


def test_modules_that_name_a_paper_without_a_link_are_found(tree):
    (tree / "kernels" / "new.py").write_text('r"""A method (arXiv:2412.06769), and arXiv:9999.99999."""\n')
    (tree / "kernels" / "broken.py").write_text("def (:\n")
    record = get("2412.06769")
    assert ("kernels/new.py", "2412.06769") in unlinked([record], tree)
    linked = record.model_copy(update={"runnable": [_entry("kernels/new.py")]})
    assert unlinked([linked], tree) == []


@needs_checkout
def test_every_paper_that_a_module_of_methods_is_named_after_is_linked():
    """A module whose first line gives one paper as its source implements it; its record says so."""
    assert ROOT is not None
    known = {record.key: record for record in load_records()}
    missing = []
    for path, key in unlinked(load_records(), ROOT):
        first = Path(ROOT, path).read_text(encoding="utf-8").lstrip('r"').splitlines()[0]
        if f"arXiv:{key}" in first and not known[key].runnable:
            missing.append(f"{path} implements {key}")
    assert missing == []


def test_the_command_lists_modules_and_refuses_what_it_does_not_know():
    runner = CliRunner()
    found = runner.invoke(papers_app, ["runnable", "latentcot.recurrent_depth.act"])
    assert found.exit_code == 0
    assert "1807.03819  Universal Transformers  (tests/recurrent_depth/test_act.py)" in found.output
    data = json.loads(runner.invoke(papers_app, ["runnable", "--json"]).output)
    assert [entry["key"] for entry in data["latentcot.recurrent_depth.act"]] == ["1603.08983", "1807.03819"]
    nothing = runner.invoke(papers_app, ["runnable", "latentcot.nothing"])
    assert nothing.exit_code == 2
    assert "latentcot.nothing" in nothing.output
