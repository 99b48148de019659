"""The capacity study: what a batch is, which run counts, and the page."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from latentcot.backbone import HybridForCausalLM
from latentcot.compare.mqar_capacity import Mixture, default_capacity, quick_capacity, run_capacity_study
from latentcot.compare.mqar_capacity_report import capacity_cells, capacity_page, write_capacity_report
from latentcot.tasks.mqar import PROTOCOL_B_TRAIN, MQARSetting


def test_settings_take_turns_by_their_share_of_the_examples():
    turns = [setting for setting, _ in Mixture(PROTOCOL_B_TRAIN, 256).turns]
    assert sorted(turns) == [0] * 5 + [1, 2, 3, 4]
    assert turns == [0, 0, 0, 1, 2, 3, 4, 0, 0]


def test_a_batch_depends_on_its_number_alone_and_examples_come_in_order():
    data = Mixture((MQARSetting(64, 4, 40, 0), MQARSetting(64, 8, 20, 0)), 8)
    whole = [batch.ids for batch in islice(data.stream(0), 9)]
    for start in (1, 4, 8):
        assert torch.equal(next(iter(data.stream(start))).ids, whole[start])
    first = [whole[n] for n in range(9) if data.turns[n % 3][0] == 0]  # six batches: the first 40 examples, then again
    assert torch.equal(first[5], first[0])
    assert not any(torch.equal(first[n], first[0]) for n in range(1, 5))


def test_the_study_ends_at_twice_the_pairs_it_trains_on():
    study = default_capacity()
    assert (study.tested[-1].length, study.tested[-1].pairs) == (1024, 256)
    assert len(study.mixers) * len(study.widths) * len(study.rates) == 42


def test_every_mixer_that_can_has_a_short_convolution():
    study = default_capacity()
    for mixer in study.mixers:
        names = [name for name, _ in HybridForCausalLM(study.backbone(mixer, 32, 16)).named_parameters()]
        assert any("conv1d" in name for name in names) == (mixer not in ("retnet", "attention"))
    plain = replace(study, short_convolution=False)
    names = [name for name, _ in HybridForCausalLM(plain.backbone("gla", 32, 16)).named_parameters()]
    assert not any("conv1d" in name for name in names)


def results(seeds):
    runs = [
        {
            "mixer": "hgrn", "width": 32, "rate": rate, "seed": seed, "test": test, "validation": validation,
            "state_bytes": [128, 128], "parameters": 10,
        }
        for seed in range(seeds)
        for rate, test, validation in ((3e-3, [0.9, 0.1], [0.4, 0.4]), (1e-2, [0.5 + 0.1 * seed, 0.2], [0.5, 0.4]))
    ]  # fmt: skip
    setting = {"length": 64, "pairs": 4, "train": 100, "test": 10}
    study = {
        "mixers": ["hgrn"], "widths": [32], "rates": [3e-3, 1e-2], "seeds": seeds, "layers": 2, "mlp_ratio": 2, "items": 10,
        "short_convolution": True,
        "train": {"steps": 4}, "batch_size": 50, "trained": [setting], "tested": [setting, {**setting, "length": 128}],
    }  # fmt: skip
    return {"study": study, "machine": {"device": "cpu", "torch": "2"}, "finished": "2026-01-01T00:00", "runs": runs}


def test_the_rate_is_chosen_on_validation_and_not_on_the_test():
    (cell,) = capacity_cells(results(2))
    assert cell.rates == (1e-2, 1e-2)
    assert cell.accuracy == pytest.approx((0.55, 0.2))
    assert cell.spread == pytest.approx((0.0707107, 0.0), abs=1e-6)
    assert "0.550 ± 0.071" in capacity_page(results(2))
    assert "2.0 passes" in capacity_page(results(2))


def test_a_page_of_a_part_says_that_it_is_one():
    whole = results(1)
    assert "stacks were run" not in capacity_page(whole)
    whole["study"]["widths"].append(64)
    assert "1 of the study's 2 stacks were run." in capacity_page(whole)


def test_a_tiny_study_runs_goes_on_and_writes_its_page(tmp_path):
    study = replace(
        quick_capacity(), mixers=("hgrn",), train=replace(quick_capacity().train, steps=3, warmup_steps=1), batch_size=4
    )
    study = replace(study, items=4, trained=study.trained[:1], tested=study.tested[:1])
    found = run_capacity_study(study, tmp_path / "out", jobs=1)
    stamp = (tmp_path / "out/runs/hgrn-32-lr0.01-seed0/result.json").stat().st_mtime_ns
    assert run_capacity_study(study, tmp_path / "out", jobs=1)["runs"] == found["runs"]
    assert (tmp_path / "out/runs/hgrn-32-lr0.01-seed0/result.json").stat().st_mtime_ns == stamp
    page = write_capacity_report(found, tmp_path)
    assert "| hgrn | 32 |" in page.read_text()
    assert (tmp_path / "mqar-capacity/capacity.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["mixers", "widths", "rates", "tested"])
def test_an_empty_study_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=name):
        run_capacity_study(replace(quick_capacity(), **{name: ()}), tmp_path)
