"""The layout that lets four root folders be sub-packages: what is in the wheel, and what happens by the bare name."""

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPING = PROJECT["tool"]["setuptools"]["package-dir"]


def tracked() -> list[str]:
    """Files under version control; a build from an unpacked source archive has none to compare with."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout: there is no list of files under version control to compare with")
    return [f for f in done.stdout.splitlines() if (ROOT / f).is_file() and not (ROOT / f).is_symlink()]


def installed_name(file: str) -> str | None:
    """Path inside the wheel of a file of the tree, or ``None`` when it does not belong there."""
    top, _, rest = file.partition("/")
    if top == "latentcot" and rest:
        return file
    package = next((name for name, folder in MAPPING.items() if folder == top), None)
    return f"{package.replace('.', '/')}/{rest}" if package and rest else None


def expected_files() -> set[str]:
    return {n for n in map(installed_name, tracked()) if n is not None}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Source archive, then the wheel made from that archive."""
    folder = tmp_path_factory.mktemp("dist")
    # No isolation: the build back end is installed already and no socket is needed.
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        assert any(name.endswith("/LICENSE") for name in archive.getnames())
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_data_file_of_the_tree(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {n for n in archive.namelist() if ".dist-info/" not in n}
    expected = expected_files()
    assert sorted(expected - inside) == []
    assert sorted(inside - expected) == []


def test_W_2_the_wheel_works_alone_in_an_empty_folder(wheel, tmp_path):
    """Installed beside nothing of the tree: search, export and a model forward, from a folder that holds nothing."""
    target, empty = tmp_path / "env", tmp_path / "empty"
    empty.mkdir()
    venv.create(target, system_site_packages=False, with_pip=False)
    python = target / "bin" / "python"
    site = next(target.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The dependencies come from the environment of the tests, behind the new one on the path; this project's editable finder, which
    # would lead back to the tree, lives in .pth files and those are not read there.
    deps = next(p for p in sys.path if p.endswith("site-packages"))
    code = f"""
import sys
sys.path.append({deps!r})
import latentcot, latentcot.catalog, latentcot.kernels
assert {str(ROOT)!r} not in latentcot.__file__ and {str(ROOT)!r} not in latentcot.catalog.__file__
from latentcot.cli import app
from typer.testing import CliRunner
for arguments in (["papers", "search", "coconut"], ["papers", "export", "--format", "bibtex"], ["papers", "check"]):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output[-500:])
import torch
from latentcot.backbone import HybridConfig, HybridForCausalLM
sizes = dict(vocab_size=11, hidden_size=16, num_hidden_layers=1, gated_deltanet={{"num_heads": 1, "head_dim": 8}})
model = HybridForCausalLM(HybridConfig(**sizes))
assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 11)
from importlib.resources import files
assert [f for f in files("latentcot.notebooks").iterdir() if f.name.endswith(".ipynb")]
print("fine")
"""
    done = subprocess.run([python, "-I", "-c", code], cwd=empty, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("fine")


def test_packages_are_listed_as_they_stand_in_the_tree():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    inits = [installed_name(f) for f in tracked() if f.endswith("__init__.py")]
    assert listed == {str(Path(n).parent).replace("/", ".") for n in inits if n is not None}


@pytest.mark.parametrize("name", ["kernels", "recurrent_depth", "diffusion_reasoning", "catalog"])
def test_links_let_tools_see_the_packages(name):
    link = ROOT / "latentcot" / name
    if not link.exists():
        pytest.skip(
            "links are missing here (a zip download, or a system without them); imports work through the mapping"
        )
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def run(code: str, *, cwd: Path = ROOT, path: str = "") -> subprocess.CompletedProcess[str]:
    import os

    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=env)


def test_bare_kernels_from_the_root_hands_over_to_the_distribution_of_that_name(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("WHOSE = 'the other one'\n")
    done = run("import kernels; print(kernels.WHOSE)", path=str(tmp_path))
    assert done.stdout.strip() == "the other one", done.stderr


def test_bare_kernels_from_the_root_without_another_distribution_does_nothing():
    done = run(
        "import sys, importlib.util, importlib.machinery as m\n"
        "others = [p for p in sys.path if p not in ('', '.')]\n"
        "assert m.PathFinder.find_spec('kernels', others) is None, 'a distribution called kernels is installed here'\n"
        "import kernels; print(hasattr(kernels, 'delta_rule'), 'torch' in sys.modules)"
    )
    assert done.stdout.strip() == "False False", done.stderr


def test_transformers_imports_a_model_from_the_root():
    done = run(
        "import transformers; transformers.AutoModelForCausalLM; from transformers import LlamaForCausalLM; print('fine')"
    )
    assert done.stdout.strip() == "fine", done.stderr[-2000:]
