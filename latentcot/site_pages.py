"""Pages of the site that are made from the program itself: API and command-line reference, notebooks, results."""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentcot.site_notebooks import RenderedNotebook

API_PACKAGES = (
    "latentcot.kernels",
    "latentcot.backbone",
    "latentcot.backbone.mixers",
    "latentcot.reasoner",
    "latentcot.recurrent_depth",
    "latentcot.recurrent_depth.latent_thoughts",
    "latentcot.diffusion_reasoning",
    "latentcot.tasks",
    "latentcot.training",
    "latentcot.training.language",
    "latentcot.training.packing",
    "latentcot.training.recipe",
    "latentcot.evaluation",
    "latentcot.compare",
    "latentcot.catalog",
)


def api_page(module: str) -> str:
    """Where the page of a public package lies below the site, without suffix."""
    return f"reference/api/{module.removeprefix('latentcot.')}"


def module_of(path: str) -> str:
    """Import name of a source file: ``kernels/delta_rule/op.py`` -> ``latentcot.kernels.delta_rule.op``; a dotted name stays."""
    name = path.removesuffix(".py").replace("/", ".")
    return name if name.startswith("latentcot") else f"latentcot.{name}"


def documented_package(module: str) -> str | None:
    """The public package whose page covers ``module`` (``latentcot.kernels.delta_rule`` -> ``latentcot.kernels``)."""
    covering = [name for name in API_PACKAGES if module == name or module.startswith((name + ".", name + ":"))]
    return max(covering, key=len, default=None)


def api_pages(root: Path) -> dict[str, str]:
    """One page a public package, and the page that lists them: ``{path: Markdown}``.

    The packages are read, not imported: what a page shows is the ``__all__`` of the package, and where there is none
    its modules. ``root`` is the checkout.
    """
    pages: dict[str, str] = {}
    lines = ["# Reference", "", "- [Command line](cli.md): every command with its options", ""]
    lines += ["## Python packages", ""]
    for name in API_PACKAGES:
        source = _source_of(root, name)
        if source is None:
            continue
        tree = ast.parse(source.read_text(encoding="utf-8"))
        pages[f"{api_page(name)}.md"] = _api_markdown(name, source, tree)
        first = (ast.get_docstring(tree) or "").strip().split("\n\n")[0]
        summary = f": {escape_markdown(' '.join(first.split()).replace('``', ''))}" if first else ""
        lines.append(f"- [`{name}`]({Path(api_page(name)).relative_to('reference').as_posix()}.md){summary}")
    pages["reference/index.md"] = "\n".join(lines) + "\n"
    return pages


def _source_of(root: Path, name: str) -> Path | None:
    base = root.joinpath(*name.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def _api_markdown(name: str, source: Path, tree: ast.Module) -> str:
    lines = [f"# {name}", ""]
    exported = _exported(tree)
    if exported:
        homes = _homes(name, source, tree, set(exported))
        lines += _directive(name, members=[])
        for export in exported:
            if export in homes:  # the rest are sub-packages, which have pages or modules of their own
                lines += _directive(f"{homes[export]}.{export}", show_root_heading=True, show_root_full_path=False)
    elif source.name == "__init__.py":
        # A package that exports nothing by name: its own docstring, then its modules one by one.
        lines += _directive(name, members=[])
        for module in sorted(source.parent.glob("*.py")):
            if not module.stem.startswith("_"):
                lines += [f"## {name}.{module.stem}", "", *_directive(f"{name}.{module.stem}", heading_level=3)]
    else:
        lines += _directive(name)
    return "\n".join(lines) + "\n"


def with_papers(pages: Mapping[str, str], papers: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """The API pages with the papers that the modules of each package implement, as a last section.

    ``papers`` is what :func:`latentcot.catalog.runnable.reverse_index` gives; pages without papers stay as they are.
    """
    found = dict(pages)
    for name in API_PACKAGES:
        path = f"{api_page(name)}.md"
        mine = {module: held for module, held in papers.items() if documented_package(module) == name}
        if path not in found or not mine:
            continue
        up = "../" * path.count("/")
        lines = [found[path].rstrip(), "", "## Papers implemented here", ""]
        for module, held in mine.items():
            lines += [f"- `{module}`", ""]
            for entry in held:
                test = f" (test: `{entry.entry.test}`)" if entry.entry.test else ""
                lines.append(f"    - [{escape_markdown(entry.record.title)}]({up}paper/{entry.record.key}.md){test}")
            lines.append("")
        found[path] = "\n".join(lines)
    return found


def _exported(tree: ast.Module) -> list[str]:
    """The literal value of ``__all__``, wherever in the module it is assigned."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return [str(name) for name in ast.literal_eval(node.value)]
            except ValueError:
                return []
    return []


def _homes(name: str, source: Path, tree: ast.Module, wanted: set[str]) -> dict[str, str]:
    """Exported name -> module that defines it, for names that the package imports at once or on first use.

    The package's modules are read only where it does not say itself where all ``wanted`` names come from.
    """
    homes: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            homes |= {alias.asname or alias.name: node.module for alias in node.names}
    homes |= dict.fromkeys(_defined(tree), name)
    inside: dict[str, str] = {}
    if source.name == "__init__.py" and not wanted <= homes.keys():
        for path in sorted(source.parent.glob("*.py")):
            if path != source:
                module = ast.parse(path.read_text(encoding="utf-8"))
                inside |= dict.fromkeys(_defined(module), f"{name}.{path.stem}")
    return inside | homes


def _defined(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _directive(identifier: str, **options: Any) -> list[str]:
    lines = [f"::: {identifier}"]
    if options:
        lines.append("    options:")
        lines += [f"      {key}: {json.dumps(value)}" for key, value in options.items()]
    return [*lines, ""]


def escape_markdown(text: str) -> str:
    """``text`` with every character that Markdown or HTML would read written as an entity; `code` spans are kept."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(
        part if part.startswith("`") and part.endswith("`") and len(part) > 2
        else re.sub(r"[\\`*_{}\[\]#+!|<>&$~^\"=]", lambda match: f"&#{ord(match.group())};", part)
        for part in parts
    )  # fmt: skip


def cli_page(command: Any) -> str:
    """The command-line reference from a click command (``typer.main.get_command(app)``); ``None``: no commands yet."""
    lines = ["# Command line", ""]
    if command is None:
        return "\n".join([*lines, "The command line is not part of this checkout.", ""])
    for path, entry in _walk(command, ("latentcot",)):
        lines += _command_section(path, entry)
    return "\n".join(lines)


def _walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _walk(child, (*path, name))


def _command_section(path: tuple[str, ...], command: Any) -> list[str]:
    lines: list[str] = []
    if len(path) > 1:
        lines += [f"{'#' * min(len(path), 4)} `{' '.join(path)}`", ""]
    arguments = [p for p in command.params if p.param_type_name == "argument" and not getattr(p, "hidden", False)]
    options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
    usage = [*path, *(_metavar(p) for p in arguments)]
    if getattr(command, "commands", None):
        usage.append("COMMAND")
    if options:
        usage.append("[OPTIONS]")
    lines += ["```console", "$ " + " ".join(usage), "```", ""]
    for paragraph in re.split(r"\n\s*\n", (command.help or "").strip()):
        if paragraph:
            lines += [escape_markdown(" ".join(paragraph.replace("\b", "").replace("``", "`").split())), ""]
    if arguments or options:
        lines += ["| option | default | what it does |", "| --- | --- | --- |"]
        lines += [_option_row(param) for param in (*arguments, *options)]
        lines.append("")
    return lines


def _metavar(param: Any) -> str:
    name = (param.metavar or param.name or "").upper()
    return name if param.required else f"[{name}]"


def _option_row(param: Any) -> str:
    if param.param_type_name == "argument":
        names = _metavar(param)
    else:
        names = ", ".join([*param.opts, *param.secondary_opts])
    default = param.default
    shown = "" if default is None or callable(default) or default in ((), [], False) else f"`{default}`"
    if isinstance(getattr(param, "show_default", None), str):
        shown = f"`{param.show_default}`"
    if getattr(param, "required", False):
        shown = "required"
    text = escape_markdown(" ".join((getattr(param, "help", None) or "").replace("``", "`").split()))
    return f"| `{names}` | {shown.replace('|', '&#124;')} | {text} |"


def notebook_pages(notebooks: list[RenderedNotebook]) -> dict[str, str | bytes]:
    """The notebooks and the page that lists them: ``{path: content}``."""
    pages: dict[str, str | bytes] = {}
    lines = [
        "# Learn",
        "",
        "Tutorials are notebooks: they run on a laptop's CPU, and the tests run them from top to bottom.",
        "",
    ]
    names = {notebook.source.name for notebook in notebooks}
    for notebook in notebooks:
        lines.append(f"- [{escape_markdown(notebook.title)}]({notebook.name}/index.md)")
        executed = not notebook.folder.name.endswith("-source")
        how = "run with `QUICK=1`, as the tests do" if executed else "shown without outputs, not run for this copy"
        note = f"[Download this notebook]({notebook.source.name}) · {how}. `make lab` opens it for you to change."
        body = _site_links((notebook.folder / "page.md").read_text(encoding="utf-8"), names)
        pages[f"learn/{notebook.name}/index.md"] = _after_title(body, note)
        pages[f"learn/{notebook.name}/{notebook.source.name}"] = notebook.source.read_bytes()
        for figure in notebook.folder.iterdir():
            if figure.name != "page.md":
                pages[f"learn/{notebook.name}/{figure.name}"] = figure.read_bytes()
    if not notebooks:
        lines.append("This copy of the site was built without notebooks; `make lab` opens those of a checkout.")
    pages["learn/index.md"] = "\n".join(lines) + "\n"
    return pages


def _site_links(body: str, notebooks: set[str]) -> str:
    """A notebook's links to hand-written pages and to other notebooks, as they are on the site."""
    body = re.sub(r"\]\(\.\./docs/([^)\s]+\.md(?:#[^)\s]*)?)\)", r"](../../\1)", body)

    def other(match: re.Match[str]) -> str:
        return f"](../{match[1][:-6]}/index.md)" if match[1] in notebooks else match[0]

    return re.sub(r"\]\((?:\./)?([\w.-]+\.ipynb)\)", other, body)


def _after_title(body: str, note: str) -> str:
    lines = body.strip().splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith("# ")), None)
    if at is None:
        return f"{note}\n\n{body.strip()}\n"
    return "\n".join([*lines[: at + 1], "", note, "", *lines[at + 1 :]]) + "\n"


def results_pages(results: Path | None) -> dict[str, str | bytes]:
    """The page of the last comparison with its table and plots, and its report beside it: ``{path: content}``.

    ``results`` is the folder that ``latentcot compare`` wrote: ``table.md``, ``plots/*.png``, ``report.html``,
    ``results.json``. What is missing is left out; without table and plots the page says how to get them.
    """
    lines = ["---", "hide: [navigation]", "---", "", "# Results", ""]
    table = results / "table.md" if results else None
    plots = sorted((results / "plots").glob("*.png")) if results else []
    if results is None or table is None or not (table.is_file() or plots):
        return {"results/index.md": "\n".join([*lines, _NO_RESULTS, ""])}
    pages: dict[str, str | bytes] = {}
    for name in ("report.html", "results.json"):
        if (results / name).is_file():
            pages[f"results/{name}"] = (results / name).read_bytes()
    lines += ["The comparison last run in this checkout.", ""]
    if pages:
        lines += ["Its files: " + " · ".join(f"[{name}]({name})" for name in map(_base, pages)), ""]
    figures = []
    for number, plot in enumerate(plots, start=1):
        name = f"plot-{number:02d}-{re.sub(r'[^A-Za-z0-9]+', '-', plot.stem)}.png"
        pages[f"results/{name}"] = plot.read_bytes()
        figures += [f"![{_plot_text(plot.stem)}]({name})", ""]
    if table.is_file():
        # Its headings move one level down, below the title of this page.
        body = re.sub(r"^(#+ )", r"#\1", table.read_text(encoding="utf-8"), flags=re.MULTILINE)
        title, _, rest = body.strip().partition("\n")
        lines += [title, "", *figures, rest.strip(), ""]
    else:
        lines += figures
    pages["results/index.md"] = "\n".join(lines)
    return pages


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _plot_text(stem: str) -> str:
    known = {
        "accuracy": "Accuracy of each method by difficulty; the numbers are in the table",
        "cost": "Accuracy of each method against what an answer costs; the numbers are in the table",
        "loss": "Training loss of each method by optimiser step",
    }
    return known.get(stem) or escape_markdown(f"Plot: {stem}")


def home_figure(pages: dict[str, str | bytes]) -> str:
    """The one plot of the results for the home page, as Markdown; empty where there is none."""
    plots = sorted(name for name in pages if name.startswith("results/plot-"))
    if not plots:
        return ""
    text = "Plot of the last comparison; its numbers are on the results page"
    return f"## The last comparison\n\n[![{text}]({plots[0]})](results/index.md)\n"


_NO_RESULTS = (
    "This copy of the site was built before a comparison was run. `make quickstart` runs the quick one on a CPU, "
    "or `latentcot compare quickstart` by itself; then `make site` shows its table and plots here."
)
