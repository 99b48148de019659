"""The diffusion study: a tiny one runs, goes on and writes its page; what the page claims follows from the figures."""

import json
from dataclasses import replace

import pytest

from latentcot.compare.diffusion import (
    DiffusionStudy,
    Part,
    default_diffusion,
    quick_diffusion,
    run_diffusion_study,
    select,
)
from latentcot.compare.diffusion_arms import ARMS, SAMPLERS, Sizes
from latentcot.compare.diffusion_report import (
    Cell,
    best,
    cells,
    claim_lines,
    diffusion_page,
    diffusion_table,
    grids9_lines,
    machines,
    order_line,
    stack_line,
    write_diffusion_report,
)
from latentcot.training import TrainConfig

TRAIN = TrainConfig(steps=2, learning_rate=2e-3, warmup_steps=1)
TINY = DiffusionStudy(
    (
        Part(
            "classes4",
            "Sudoku 4x4",
            "sudoku",
            {
                "task": {"size": 4, "blanks": 8, "fewest_blanks": 4, "split_by": "grid"},
                "puzzles": 20,
                "test": 5,
                "test_blanks": (4, 8),
            },
            TRAIN,
            4,
            arms=("autoregressive-softmax", "masked-softmax"),
            sizes=Sizes(layers=2, width=16, heads=2, mlp_width=32),
            claim="None.",
        ),
    )
)


def test_a_tiny_study_runs_goes_on_and_writes_its_page(tmp_path):
    found = run_diffusion_study(TINY, tmp_path / "out", jobs=1)
    result = tmp_path / "out/runs/classes4-masked-softmax-seed0/result.json"
    stamp = result.stat().st_mtime_ns
    assert run_diffusion_study(TINY, tmp_path / "out", jobs=1)["runs"] == found["runs"]
    assert result.stat().st_mtime_ns == stamp
    assert found["parts"][0]["baselines"].keys() == {"4 blanks", "8 blanks"}
    grids9 = {
        **found["runs"][1],
        "machine": {"device": "a GPU", "torch": "2"},
        "written": "2026-01-01 00:00:00",
        "solved": {"54 blanks": found["runs"][1]["solved"]["4 blanks"]},
        "baselines": {"54 blanks": {"look-up": 0.25}},
    }
    (tmp_path / "diffusion").mkdir()
    (tmp_path / "diffusion/grids9-masked-softmax.json").write_text(json.dumps(grids9))
    text = write_diffusion_report(found, tmp_path).read_text()
    assert "| masked-softmax | confidence | 6.0 |" in text  # 4 and 8 passes
    assert "| masked-softmax | all at once | 1.0 |" in text
    assert "*look-up*" in text
    assert "look-up baseline solves 0.250" in text
    for name in ("classes4", "grids9"):
        assert (tmp_path / f"diffusion/{name}.png").stat().st_size > 1000
    assert diffusion_table(found).row_count == 2
    with pytest.raises(ValueError, match="another configuration"):
        run_diffusion_study(DiffusionStudy((replace(TINY.parts[0], rows=5),)), tmp_path / "out", jobs=1)


def run_of(arm, exact, nfe=4.0, seed=0, steps=100):
    samplers = ("left to right",) if arm.startswith("auto") else tuple(SAMPLERS)
    row = {"exact": exact, "nfe": nfe, "items": 100}
    solved = {"a": dict.fromkeys(samplers, row)}
    return {"part": "p", "arm": arm, "seed": seed, "solved": solved, "training": {"steps": steps}}


@pytest.mark.parametrize(
    ("causal", "masked", "verdict"),
    [
        (0.2, 0.9, "any order wins by 70.0 points"),
        (0.9, 0.2, "left to right wins by 70.0 points"),
        (0.5, 0.55, "no difference beyond twice its standard error of 0.071"),
    ],
)
def test_whoever_wins_is_named(causal, masked, verdict):
    runs = [run_of("autoregressive-softmax", causal), run_of("masked-softmax", masked)]
    results: dict = {"runs": runs, "seeds": 1}
    results["parts"] = [{"name": "p", "title": "P", "baselines": {"a": {"x": 0.1, "y": 0.4}, "b": {"x": 0.2}}}]
    line = claim_lines(results)[0]
    assert verdict in line
    assert line.endswith("; without training 0.300."), "the best of each test set, averaged"
    assert order_line(cells({"runs": runs[:1]}, "p"), "P") is None


@pytest.mark.parametrize(
    ("hybrid", "softmax", "verdict"),
    [
        ((0.8, 0.9), (0.3, 0.4), "the hybrid stack wins by 50.0 points"),
        ((0.05, 0.1), (0.3, 0.4), "the softmax stack wins by 27.5 points"),
        ((0.05, 0.28), (0.3, 0.4), "not told apart by their seeds"),
        ((0.2, 0.9), (0.3, 0.4), "not told apart by their seeds"),
        ((0.35, 0.41), (0.3, 0.4), "no difference beyond twice its standard error of 0.048"),
    ],
    ids=["hybrid", "softmax", "close", "overlap", "noise"],
)
def test_the_stacks_of_block_diffusion_are_told_apart_by_all_seeds(hybrid, softmax, verdict):
    runs = [
        run_of(arm, exact, seed=seed, steps=steps)
        for arm, pair, steps in (("block-softmax", softmax, 300), ("block-hybrid", hybrid, 200))
        for seed, exact in enumerate(pair)
    ]
    causal = [run_of("autoregressive-softmax", exact, seed=seed) for seed, exact in enumerate((0.6, 0.7))]
    results: dict = {"runs": [*runs, *causal], "seeds": 2}
    results["parts"] = [{"name": "p", "title": "P", "baselines": {"a": {"x": 0.25}}}]
    (line,) = claim_lines(results)
    assert line.startswith(f"P, block diffusion by confidence: {verdict}: hybrid ")
    assert f"softmax {sum(softmax) / 2:.3f} (seeds {softmax[0]:.3f}, {softmax[1]:.3f}) after 300 steps" in line
    assert "after 200 steps" in line
    assert line.endswith("; autoregression: softmax 0.650 (seeds 0.600, 0.700); without training 0.250.")
    assert stack_line(runs[:2], cells({"runs": runs[:2]}, "p"), "P") is None


def test_orders_are_not_told_apart_where_seeds_overlap():
    pairs = (("autoregressive-softmax", (0.1, 0.6)), ("masked-softmax", (0.5, 0.9)))
    runs = [run_of(arm, exact, seed=seed) for arm, pair in pairs for seed, exact in enumerate(pair)]
    line = order_line(cells({"runs": runs}, "p"), "P")
    assert line is not None
    assert "not told apart by their seeds" in line
    assert "masked diffusion 0.700 (seeds 0.500, 0.900)" in line


def test_the_page_says_which_part_ran_where():
    one, other = {"system": "Linux", "torch": "2"}, {"system": "Linux", "torch": "3"}
    runs = [{"part": "p"}, {"part": "p", "machine": one}]
    assert machines({"machine": one, "runs": runs}) == "Linux, torch 2"
    runs.append({"part": "q", "machine": other})
    assert machines({"machine": one, "runs": runs}) == "p: Linux, torch 2; q: Linux, torch 3"


def test_the_best_sampler_is_the_most_right_and_then_the_cheapest():
    made = [
        Cell("p", "masked-softmax", name, {"a": exact}, nfe, 10, 1)
        for name, exact, nfe in (("x", 0.5, 1), ("y", 0.7, 9), ("z", 0.7, 3))
    ]
    found = best(made, "masked")
    assert found is not None
    assert found.sampler == "z"
    assert best(made, "block") is None


def test_the_default_study_has_every_arm_where_it_belongs():
    study = default_diffusion()
    arms = {part.name: part.arms for part in study.parts}
    assert list(arms) == ["sanity4", "classes4", "countdown", "chain", "addition", "addition-reverse", "mqar", "copy"]
    assert all(arms[name] == ARMS for name in ("classes4", "countdown", "chain"))
    orders = ("autoregressive-softmax", "autoregressive-hybrid", "masked-softmax", "masked-hybrid")
    stacks = ("autoregressive-softmax", "autoregressive-hybrid", "block-softmax", "block-hybrid")
    assert arms["addition"] == orders
    assert arms["addition-reverse"] == orders[::2]
    assert arms["mqar"] == arms["copy"] == stacks
    assert sum(map(len, arms.values())) == 33, "the number that docstrings and pages name"
    assert len({part.seconds for part in study.parts[1:]}) == 1
    assert len(quick_diffusion().parts) == 2
    assert [p.arms for p in select(study, None, ["masked-softmax"]).parts] == [("masked-softmax",)] * 6
    assert [p.name for p in select(study, ["chain", "sanity4"], ["block-hybrid"]).parts] == ["chain"]
    with pytest.raises(ValueError, match="arm: 'masked' given"):
        select(study, None, ["masked"])
    with pytest.raises(ValueError, match=r"parts: \['maze'\] unknown; the study has sanity4"):
        select(study, ["maze"], None)


def test_without_a_gpu_the_page_says_how_to_run_it():
    assert any("Not run here" in line for line in grids9_lines([], "diffusion"))
    results = {
        "parts": [], "runs": [], "seeds": 1, "finished": "2026-01-01",
        "machine": {"system": "Linux", "torch": "2"},
    }  # fmt: skip
    assert "diffusion_sudoku --preset grids9" in diffusion_page(results, [])


def test_studies_that_can_not_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="seeds: at least 1"):
        run_diffusion_study(TINY, tmp_path, seeds=0)
    with pytest.raises(ValueError, match="parts"):
        run_diffusion_study(DiffusionStudy(()), tmp_path)
    with pytest.raises(ValueError, match="arms: part 'classes4' has none"):
        run_diffusion_study(DiffusionStudy((replace(TINY.parts[0], arms=()),)), tmp_path)
