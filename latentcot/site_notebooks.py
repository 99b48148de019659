"""Notebooks as pages: executed once in quick mode, turned into Markdown with PNG figures, kept by content.

A rendered notebook is cached under a key made of its cells, the version of the package and the mode, so that a second
build of the site runs nothing. Executing needs the extra ``docs`` (nbconvert, ipykernel).
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentcot import __version__

NotebookMode = Literal["execute", "source", "none"]
TIMEOUT_S = 1200
_FIGURE = "Figure of this notebook; the text around it says what it shows"


class NotebookError(RuntimeError):
    """A notebook that could not be read or did not run to its end. One line."""


@dataclass(frozen=True)
class RenderedNotebook:
    """A notebook as the site shows it: its title, and a folder that holds ``page.md`` and its figures."""

    source: Path
    title: str
    folder: Path

    @property
    def name(self) -> str:
        return self.source.stem


def render_notebooks(folder: Path, cache: Path, mode: NotebookMode) -> list[RenderedNotebook]:
    """Every notebook of ``folder``, in the order of their names, rendered into ``cache``.

    Args:
        folder: where the ``.ipynb`` files lie; it may be missing.
        cache: folder of rendered notebooks; what no notebook needs any more is removed.
        mode: ``"execute"`` runs them with ``QUICK=1``, ``"source"`` shows code and text without running,
            ``"none"`` leaves them out.

    Raises:
        NotebookError: a file is no notebook, or a cell raised.
        ValueError: an unknown mode.
    """
    if mode not in ("execute", "source", "none"):
        raise ValueError(f"notebooks: expected 'execute', 'source' or 'none', given {mode!r}")
    if mode == "none" or not folder.is_dir():
        return []
    rendered = [_render(path, cache, mode) for path in sorted(folder.glob("*.ipynb"))]
    if mode == "execute" and cache.is_dir():
        kept = {notebook.folder.name for notebook in rendered}
        for old in cache.iterdir():
            if old.is_dir() and old.name not in kept and not old.name.endswith("-source"):
                shutil.rmtree(old)
    return rendered


def _render(path: Path, cache: Path, mode: NotebookMode) -> RenderedNotebook:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in content["cells"]]
    except (ValueError, KeyError, TypeError) as error:
        raise NotebookError(f"{path.name} is not a notebook: {error}") from None
    digest = hashlib.sha256(json.dumps([cells, __version__, mode]).encode()).hexdigest()[:16]
    folder = cache / f"{path.stem}-{digest}{'-source' if mode == 'source' else ''}"
    notebook = RenderedNotebook(path, _title(cells, path.stem), folder)
    if (folder / "page.md").is_file():
        return notebook
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=cache, prefix=".new-"))
    try:
        body, figures = _convert(path, mode)
        for name, data in figures.items():
            (work / name).write_bytes(data)
        (work / "page.md").write_text(body, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return notebook


def _title(cells: list[tuple[str, str]], fallback: str) -> str:
    for kind, text in cells:
        if kind == "markdown":
            for line in text.splitlines():
                if line.startswith("# "):
                    return line[2:].strip()
    return fallback.replace("_", " ")


def _convert(path: Path, mode: NotebookMode) -> tuple[str, dict[str, bytes]]:
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    notebook: Any = nbformat.read(path, as_version=4)
    if mode == "execute":
        _execute(notebook, path)
    else:
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = []
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress bars and warnings go to stderr: nothing a reader of the page needs
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    config = Config()
    config.NbConvertBase.display_data_priority = ["image/png", "text/markdown", "text/plain"]
    exporter = MarkdownExporter(config=config)
    body, resources = exporter.from_notebook_node(
        notebook, resources={"unique_key": path.stem, "output_files_dir": "."}
    )
    figures = {Path(name).name: data for name, data in resources.get("outputs", {}).items()}
    for name in figures:  # the exporter calls every figure "png"; a reader who cannot see it is told where to look
        for path_written in (f"./{name}", name):
            body = body.replace(f"![png]({path_written})", f"![{_FIGURE}]({name})")
    return body, figures


def _execute(notebook: Any, path: Path) -> None:
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        startup_timeout=180,
        kernel_name="python3",
        resources=where,
        coalesce_streams=True,  # lines printed one by one are one output, not one paragraph each
    )
    # The kernel of this interpreter, whatever a kernel specification of the user says.
    client.create_kernel_manager()
    assert client.km is not None
    assert client.km.kernel_spec is not None
    client.km.kernel_spec.argv[0] = sys.executable
    sockets = tempfile.mkdtemp(prefix="latentcot-")
    if os.name == "posix":  # sockets in the file system: no port is opened that another user of the machine could read
        client.km.transport = "ipc"
        client.km.ip = os.path.join(sockets, "k")
    try:
        client.execute(env={**os.environ, "QUICK": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    except CellExecutionError as error:
        message = (str(error.evalue).splitlines() or [""])[0]
        raise NotebookError(f"{path.name}: a cell raised {error.ename}: {message}") from None
    except (CellTimeoutError, DeadKernelError, RuntimeError) as error:  # RuntimeError: the kernel never answered
        raise NotebookError(f"{path.name}: {str(error).splitlines()[0]}") from None
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
