"""The studies of ``latentcot compare`` (``hybrid-ratio``, ``mqar``, ``mqar-capacity``, ``depth``, ``diffusion``): run one, print its table,
write its page."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from latentcot.compare import depth_report
from latentcot.compare.depth import default_depth, quick_depth, run_depth_study, select_tasks, sudoku9_depth
from latentcot.compare.diffusion import default_diffusion, quick_diffusion, run_diffusion_study, select
from latentcot.compare.diffusion_report import claim_lines as diffusion_claims
from latentcot.compare.diffusion_report import diffusion_table, write_diffusion_report
from latentcot.compare.hybrid_ratio import default_study, quick_study, run_ratio_study
from latentcot.compare.hybrid_ratio_report import claim_lines, terminal_table, write_ratio_report
from latentcot.compare.mqar import default_mqar, mqar_table, quick_mqar, run_mqar_study
from latentcot.compare.mqar_capacity import default_capacity, quick_capacity, run_capacity_study
from latentcot.compare.mqar_capacity_report import capacity_table, write_capacity_report


def run_study(
    name: str,
    out: Path,
    console: Console,
    quick: bool = False,
    seeds: int | None = None,
    jobs: int | None = None,
    mixers: list[str] | None = None,
    page: Path | None = None,
    tasks: list[str] | None = None,
) -> None:
    """Run a study into ``out``; started again with the same folder, it goes on.

    Args:
        quick: the variant of about two minutes.
        seeds: default 2 for ``hybrid-ratio`` and ``depth``, 1 for the others.
        mixers: instead of the study's; for ``depth`` and ``depth-sudoku9`` the tasks to run, for ``diffusion`` the arms.
        page: folder for the page and its plots; default ``out``. ``mqar`` has none.
        tasks: of ``diffusion``, its parts to run.

    Raises:
        ValueError: whatever is wrong with the study, before anything runs.
    """
    if name == "mqar":
        if page is not None:
            raise ValueError("--page belongs to hybrid-ratio and mqar-capacity, not to 'mqar'")
        study = quick_mqar() if quick else default_mqar()
        study = study if mixers is None else replace(study, mixers=tuple(mixers))
        results = run_mqar_study(study, out, 1 if seeds is None else seeds, jobs, console)
        console.print(mqar_table(results))
        console.print(f"Results: {(out / 'results.json').resolve()}", soft_wrap=True, highlight=False)
        return
    if name == "mqar-capacity":
        capacity = quick_capacity() if quick else default_capacity()
        capacity = capacity if mixers is None else replace(capacity, mixers=tuple(mixers))
        results = run_capacity_study(capacity, out, 1 if seeds is None else seeds, jobs, console)
        written = write_capacity_report(results, page or out)
        console.print(capacity_table(results))
        console.print(f"Page: {written.resolve()}", soft_wrap=True, highlight=False)
        return
    if name == "diffusion":
        diffusion = quick_diffusion() if quick else default_diffusion()
        diffusion = select(diffusion, tasks, mixers)
        results = run_diffusion_study(diffusion, out, 1 if seeds is None else seeds, jobs, console)
        written = write_diffusion_report(results, page or out)
        console.print(diffusion_table(results))
        for line in diffusion_claims(results):
            console.print("• " + escape(line), highlight=False)
        console.print(f"Page: {written.resolve()}", soft_wrap=True, highlight=False)
        return
    if name in ("depth", "depth-sudoku9"):
        if quick and name != "depth":
            raise ValueError("--quick belongs to other studies, not to 'depth-sudoku9'")
        depth = sudoku9_depth() if name == "depth-sudoku9" else quick_depth() if quick else default_depth()
        depth = select_tasks(depth, mixers)
        results = run_depth_study(depth, out, (2 if name == "depth" else 1) if seeds is None else seeds, jobs, console)
        written = depth_report.write_depth_report(results, page or out)
        console.print(depth_report.terminal_table(results))
        for line in depth_report.claim_lines(results):
            console.print("• " + escape(line), highlight=False)
        console.print(f"Page: {written.resolve()}", soft_wrap=True, highlight=False)
        return
    ratio = quick_study() if quick else default_study()
    ratio = ratio if mixers is None else replace(ratio, mixers=tuple(mixers))
    results = run_ratio_study(ratio, out, None, 2 if seeds is None else seeds, jobs, console)
    written = write_ratio_report(results, page or out)
    console.print(terminal_table(results))
    for line in claim_lines(results):
        console.print("• " + escape(line), highlight=False)
    console.print(f"Page: {written.resolve()}", soft_wrap=True, highlight=False)
