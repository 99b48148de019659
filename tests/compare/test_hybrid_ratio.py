"""The ratio study: which cells there are, that runs resume, and that verdicts follow from figures and their spread."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from latentcot.backbone import HybridForCausalLM
from latentcot.compare.hybrid_ratio import (
    MIXERS,
    RatioJob,
    byte_corpus,
    check_study,
    default_study,
    plan,
    quick_study,
    ratio_name,
    run_ratio_study,
    state_bytes,
    text_rows,
)
from latentcot.compare.hybrid_ratio_report import page, table_rows, write_ratio_report
from latentcot.compare.hybrid_ratio_summary import (
    UNTESTABLE,
    Figure,
    best_rate,
    difference,
    study_claims,
    summarise_cells,
)
from latentcot.training.language import LanguageModel

STUDY = replace(
    quick_study(),
    mixers=("gla",),
    mqar={"length": 32, "min_difficulty": 2, "max_difficulty": 4, "vocabulary": 64, "filler": "zero"},
    pairs=(2, 4),
    mqar_train=replace(quick_study().mqar_train, steps=4, checkpoint_every=2),
    text_train=replace(quick_study().text_train, steps=4, checkpoint_every=2),
    items=20,
    text_items=4,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("ratio")
    text = out / "some.txt"
    text.write_text("some text of its own, over and over. " * 600)
    results = run_ratio_study(STUDY, out / "study", [text], seeds=2, jobs=2)
    return out, results


def test_six_layers_hold_two_of_the_studys_ratios_as_they_are():
    study = default_study()
    assert study.mixers == MIXERS
    assert study.periods == (None, 6, 3)
    assert replace(study, layers=24).periods == (None, 24, 12, 6, 3)
    assert replace(study, layers=12).periods == (None, 12, 6, 3)
    assert [ratio_name(p) for p in (None, 6, 1)] == ["pure", "6-1", "full"]
    assert len(study.cells) == 6 * 3 + 1
    full = {(m, p): study.backbone(m, p, 64).mixers.count("attention") for m, p in study.cells}
    assert [full["gla", p] for p in study.periods] == [0, 1, 2]
    assert full["transformer", 1] == 6
    assert study.backbone("gla", 3, 64).mixers == ["gla", "gla", "attention"] * 2
    check_study(study)


def test_every_run_is_planned_once_and_its_identity_leaves_other_cells_out():
    jobs = plan(replace(default_study(), mqar_rates=(1e-2, 3e-3)), Path("out"), 2)
    assert len(jobs) == len({job.name for job in jobs}) == 2 * 19 * 3
    one = next(job for job in jobs if job.part == "mqar" and job.mixer == "hgrn")
    assert (
        one.identity()
        == replace(one, study=replace(one.study, mixers=("hgrn",), text_batch=3, text_items=9)).identity()
    )
    assert one.identity() != replace(one, study=replace(one.study, items=9)).identity()
    assert one.identity() != replace(one, seed=5).identity()


def test_state_bytes_are_those_of_the_section_on_memory():
    """fp32: GLA keeps D²/(2 H)... as H matrices of K = D/(2H) by V = D/H; attention 2 D numbers a token."""
    study = default_study()
    width, heads = study.width, study.heads
    matrix = heads * (width // 2 // heads) * (width // heads) * 4

    def measured(mixer: str, period: int | None) -> int:
        return state_bytes(LanguageModel(HybridForCausalLM(study.backbone(mixer, period, 64))), 32)

    assert measured("gla", None) == 6 * matrix
    assert measured("transformer", 1) == 6 * 32 * 2 * width * 4
    assert measured("gla", 3) == 4 * matrix + 2 * 32 * 2 * width * 4
    assert measured("hgrn", None) == 6 * width * 4


def test_training_and_validation_text_share_no_byte(done):
    out, _ = done
    corpus = byte_corpus(out / "study" / "text", None)
    data, held = text_rows(STUDY, corpus)
    assert data.last is not None
    assert held.min() >= data.last
    assert len(held) == STUDY.text_items
    assert held.max() < (len(corpus) - 1) // STUDY.text_length


def test_results_hold_every_run(done):
    out, results = done
    assert results == json.loads((out / "study" / "results.json").read_text())
    assert len(results["runs"]) == 4 * 2 * 2
    for run in results["runs"]:
        assert run["training"]["steps"] == 4
        if run["part"] == "mqar":
            assert set(run["measured"]["recall"]) == {"2", "4"}
            assert all(0 <= value <= 1 for value in run["measured"]["recall"].values())
        else:
            assert 0 < run["measured"]["loss"] < 8
    assert not list((out / "study").rglob("checkpoint.safetensors"))
    stamps = {p: p.stat().st_mtime_ns for p in (out / "study" / "runs").rglob("result.json")}
    again = run_ratio_study(STUDY, out / "study", None, seeds=2, jobs=2)
    assert again["runs"] == results["runs"]
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


def test_a_killed_run_goes_on_from_its_checkpoint(done, tmp_path):
    from latentcot.compare import hybrid_ratio

    out, results = done
    name = next(run["name"] for run in results["runs"] if run["part"] == "mqar" and run["seed"] == 1)
    job = next(j for j in plan(STUDY, out / "study", 2) if j.name == name)
    cut: RatioJob = replace(job, folder=tmp_path / name)

    def stop(run: str, step: int, of: int, what: str) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hybrid_ratio.run_ratio_job(cut, stop)
    assert (cut.folder / "checkpoint.safetensors").is_file()
    threads = torch.get_num_threads()
    resumed = hybrid_ratio.run_ratio_job(cut)
    torch.set_num_threads(threads)
    whole = next(run for run in results["runs"] if run["name"] == name)
    assert resumed["training"]["history"] == whole["training"]["history"]
    assert resumed["measured"]["recall"] == whole["measured"]["recall"]
    (cut.folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        hybrid_ratio.run_ratio_job(cut)


def test_another_configuration_or_text_is_refused(done, tmp_path):
    out, _ = done
    with pytest.raises(ValueError, match="another configuration"):
        run_ratio_study(replace(STUDY, items=21), out / "study", None, seeds=2)
    other = tmp_path / "other.txt"
    other.write_text("other text " * 2000)
    with pytest.raises(ValueError, match="holds other text"):
        run_ratio_study(STUDY, out / "study", [other], seeds=2)
    for study, message in (
        (replace(STUDY, mixers=()), "at least one"),
        (replace(STUDY, mixers=("gla", "gla")), "named twice"),
        (replace(STUDY, mixers=("glaa",)), "did you mean 'gla'"),
        (replace(STUDY, pairs=(2, 9)), r"pairs: \[9\] are not trained on"),
        (replace(STUDY, pairs=(4, 2)), "pairs: expected rising numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            run_ratio_study(study, tmp_path / "none", [other])
    assert not (tmp_path / "none").exists()


def test_the_page_has_the_figures_the_plots_and_five_verdicts(done, tmp_path):
    _, results = done
    written = write_ratio_report(results, tmp_path)
    text = written.read_text()
    assert text == page(results)
    assert sorted(p.name for p in (tmp_path / "hybrid-ratio").iterdir()) == ["loss.png", "recall.png", "state.png"]
    header, body = table_rows(results)
    assert len(body) == 4
    assert all(len(row) == len(header) for row in body)
    for row in body:
        assert "| " + " | ".join(row) + " |" in text
    assert text.count("](hybrid-ratio/") == 3
    assert sum(line.startswith(f"| {n}. ") for line in text.splitlines() for n in range(1, 6)) == 5


def made_up(done, recall, loss, mixers=("hgrn", "retnet", "gla", "hgrn2", "deltanet", "gated_deltanet")) -> dict:
    """Results of a study of these mixers, two seeds ± 0.002 apart; ``recall(mixer, full)`` and ``loss(mixer, full)``."""
    results = copy.deepcopy(done[1])
    study = replace(STUDY, mixers=mixers)
    results["study"]["mixers"] = list(mixers)
    mqar, text = (next(r for r in results["runs"] if r["part"] == part) for part in ("mqar", "text"))
    runs = []
    for mixer, period in study.cells:
        full = 0 if period is None else 6 // period
        for seed in (0, 1):
            for template in (mqar, text):
                run = copy.deepcopy(template) | {"mixer": mixer, "period": period, "seed": seed}
                noise = 0.0005 * (1 - 2 * seed)
                if run["part"] == "mqar":
                    values = {"2": recall(mixer, full) + noise, "4": recall(mixer, full) + noise}
                    run["measured"] |= {"recall": values, "validation": values}
                else:
                    run["measured"] |= {"loss": loss(mixer, full) + noise}
                runs.append(run)
    results["runs"] = runs
    return results


def verdicts(results: dict) -> list[str]:
    return [claim.verdict for claim in study_claims(results)]


def as_published(mixer: str, full: int) -> float:
    if mixer == "transformer":
        return 0.99
    if mixer in ("hgrn", "retnet"):
        return [0.1, 0.2, 0.5][full]
    return [0.6, 0.9, 0.98][full]


def test_figures_as_published_are_seen_and_others_are_not(done):
    def swapped(mixer: str, full: int) -> float:
        crossing = {"hgrn2": [1.008, 1.0, 1.0], "gated_deltanet": [1.0, 1.006, 1.006]}
        return 1.004 if mixer not in crossing else crossing[mixer][full]

    assert verdicts(made_up(done, as_published, swapped)) == ["seen", "seen", "seen", "seen", UNTESTABLE]
    steep = made_up(
        done,
        lambda m, n: 0.99 if m in ("transformer", "hgrn", "retnet") else 0.7,
        lambda m, n: 1.0 if m == "transformer" else 2.0 - 0.2 * n + 0.05 * MIXERS.index(m),
    )
    assert verdicts(steep) == ["not seen", UNTESTABLE, "not seen", "not seen", UNTESTABLE]
    falling = made_up(done, lambda m, n: 0.99 if m == "transformer" else 0.9 - 0.2 * n, lambda m, n: 1.0)
    assert verdicts(falling)[1] == "not seen"
    late = made_up(done, lambda m, n: 0.99 if m == "transformer" else [0.2, 0.25, 0.9][n], lambda m, n: 1.0)
    assert verdicts(late)[1] == "not seen", "a rise that comes with the last step alone does not saturate"


def test_what_the_runs_can_not_answer_stays_open(done):
    nothing_learned = made_up(done, lambda m, n: 0.1, lambda m, n: 1.0)
    found = study_claims(nothing_learned)
    assert [c.verdict for c in found[1:2] + found[3:]] == [UNTESTABLE] * 3
    assert "did not learn recall" in found[1].because
    one_seed = made_up(done, as_published, lambda m, n: 1.0)
    one_seed["runs"] = [run for run in one_seed["runs"] if run["seed"] == 0]
    assert set(verdicts(one_seed)) == {UNTESTABLE}
    assert "one seed" in study_claims(one_seed)[0].because
    noisy = made_up(done, as_published, lambda m, n: 1.0)
    for run in noisy["runs"]:
        sign = 1 - 2 * run["seed"]
        if run["part"] == "text":
            run["measured"]["loss"] += 0.2 * sign
        else:
            run["measured"]["recall"] = {k: v + 0.3 * sign for k, v in run["measured"]["recall"].items()}
    assert verdicts(noisy)[0] == verdicts(noisy)[2] == verdicts(noisy)[3] == UNTESTABLE


def test_the_rate_is_chosen_on_validation_sequences():
    runs = [
        {"rate": 1e-2, "measured": {"validation": {"4": 0.5}, "recall": {"4": 0.9}}},
        {"rate": 1e-3, "measured": {"validation": {"4": 0.6}, "recall": {"4": 0.2}}},
    ]
    assert best_rate(runs)["rate"] == 1e-3


def test_differences_are_measured_in_their_own_errors():
    gap, needed = difference(Figure(0.5, 0.02, 3), Figure(0.4, 0.01, 3))
    assert gap == pytest.approx(0.1)
    assert needed == pytest.approx(2.78 * ((0.02**2 + 0.01**2) / 3) ** 0.5)
    assert difference(Figure(0.5, None, 1), Figure(0.4, 0.01, 2))[1] == float("inf")


def test_the_summary_is_means_over_seeds(done):
    cells = summarise_cells(made_up(done, as_published, lambda m, n: 1.0))
    assert [c.name for c in cells[:3]] == ["hgrn pure", "hgrn 6-1", "hgrn 3-1"]
    assert cells[-1].name == "transformer"
    assert [c.full_layers for c in cells[:3]] == [0, 1, 2]
    assert cells[0].recall[4].mean == pytest.approx(0.1)
    assert cells[0].recall[4].spread == pytest.approx(0.0005 * 2**0.5)
    assert cells[0].loss.seeds == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hybrid-ratio", "--methods", "glaa"], "did you mean 'gla'"),
        (["hybrid-ratio", "--steps", "3"], "--steps belongs to other comparisons"),
        (["mqar", "--methods", "delta"], "did you mean 'deltanet'"),
        (["quickstart", "--quick"], "--quick and --page belong to studies"),
        (["slowstart"], "quickstart, hybrid-ratio, mqar"),
    ],
)
def test_bad_commands_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    from latentcot.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["latentcot", "compare", *arguments, "--out", "out"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "out").exists()
