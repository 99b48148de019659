"""What importing loads, and that it works on a poor machine."""

import pkgutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

import latentcot

PUBLIC = [
    "latentcot.backbone",
    "latentcot.baselines",
    "latentcot.catalog",
    "latentcot.catalog.cli",
    "latentcot.cli",
    "latentcot.compare",
    "latentcot.diffusion_reasoning",
    "latentcot.evaluation",
    "latentcot.kernels",
    "latentcot.notebooks",
    "latentcot.reasoner",
    "latentcot.recurrent_depth",
    "latentcot.recurrent_depth.latent_thoughts",
    "latentcot.sequences",
    "latentcot.site",
    "latentcot.tasks",
    "latentcot.training",
]

NO_TRITON = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'triton':
            raise ImportError('no triton here')
sys.meta_path.insert(0, Nothing())
"""


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


def test_W_1_every_public_module_imports_without_triton_and_without_a_gpu():
    code = NO_TRITON + "import warnings; warnings.simplefilter('error', category=UserWarning)\nimport importlib\n"
    code += f"for name in {PUBLIC!r}: importlib.import_module(name)\n"
    code += "import torch; assert not torch.cuda.is_initialized(); print('fine')"
    done = run(code)
    assert done.stdout.strip() == "fine", done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr


def test_W_1_operators_say_what_they_chose_and_refuse_by_name():
    code = NO_TRITON + (
        "import torch\nfrom latentcot.kernels import explain_backend, gated_scan\n"
        "print(explain_backend('gated_scan', device=torch.device('cpu'), dtype=torch.float32))\n"
        "x = torch.ones(1, 2, 3)\n"
        "try:\n    gated_scan(x, -x, backend='triton')\n"
        "except Exception as error:\n    print(type(error).__name__, error)\n"
    )
    no_numba = "import sys\nsys.modules['numba'] = None\n"
    for before, expected in ((no_numba, "chunked"), ("", "compiled" if find_spec("numba") else "chunked")):
        done = run(before + code)
        lines = done.stdout.strip().splitlines()
        assert f"runs on the {expected} back end" in lines[0], done.stdout + done.stderr
        assert "triton" in lines[1].lower(), done.stdout


def test_public_modules_are_all_listed():
    """A new sub-package has to be added to the list above, or these tests would never see it."""
    found = {f"latentcot.{m.name}" for m in pkgutil.iter_modules(latentcot.__path__) if m.ispkg}
    assert found <= set(PUBLIC)
    assert {f"latentcot.{name}" for name in latentcot.__all__} <= set(PUBLIC)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["papers", "--help"],
        ["papers", "search", "coconut"],
        ["papers", "show", "2412.06769"],
        ["papers", "check"],
        ["papers", "stats"],
        ["papers", "review", "list"],
        ["papers", "update", "--help"],
        ["papers", "export", "--format", "bibtex"],
        ["site", "--help"],
        ["compare", "--help"],
    ],
    ids=" ".join,
)
def test_W_1_the_command_line_loads_no_heavy_library(arguments):
    code = (
        "import sys\nsys.argv = ['latentcot', *" + repr(arguments) + "]\n"
        "from latentcot.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = [m for m in ('torch', 'transformers', 'triton', 'matplotlib') if m in sys.modules]\n"
        "print('HEAVY', heavy, code, file=sys.stderr)"
    )
    done = run(code)
    assert "HEAVY [] 0" in done.stderr, done.stderr[-1500:]


def test_importing_the_package_loads_nothing_heavy_and_attributes_load_on_access():
    code = (
        "import sys, latentcot\n"
        "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)\n"
        "latentcot.kernels.delta_rule\n"
        "assert 'torch' in sys.modules\n"
        "try:\n    latentcot.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    done = run(code)
    assert "public sub-modules" in done.stdout, done.stderr


def test_exported_names_exist():
    import importlib

    for name in PUBLIC:
        module = importlib.import_module(name)
        for exported in getattr(module, "__all__", []):
            assert hasattr(module, exported), f"{name}.{exported}"
