"""Dry runs of the benchmarks on a CPU: what they print, count and refuse. The times say nothing here."""

import json

import pytest

from latentcot.backbone import bench_decode, bench_train
from latentcot.backbone.engine import DecodeEngine

DRY = ["--device", "cpu", "--dtype", "float32", "--layers", "2", "--vocab", "64"]


def rows(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_decoding_prints_a_row_for_every_batch_and_context(capsys):
    bench_decode.main([*DRY, "--preset", "gla-340m-3-1", "--batch", "1", "2", "--context", "8", "--tokens", "2"])
    found = rows(capsys)
    assert [(row["batch"], row["context"]) for row in found] == [(1, 8), (2, 8)]
    for row in found:
        assert "error" not in row
        assert row["tokens_a_second"] == pytest.approx(1e3 * row["batch"] / row["ms_a_token"])
        assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / row["ms_a_token"])


def test_training_prints_a_row_and_a_failure_says_why(capsys):
    bench_train.main([*DRY, "--batch", "1", "--length", "8", "1", "--steps", "1"])
    good, bad = rows(capsys)
    assert good["tokens_a_second"] == pytest.approx(8e3 / good["ms"])
    assert good["first_step_seconds"] > 0
    assert "no position is left to score" in bad["error"]  # one token has no next one


def test_bytes_are_the_weights_and_the_states_of_the_specification():
    settings = bench_decode.parse([*DRY, "--batch", "1"])
    model = bench_decode.build("gated_deltanet-340m-pure", settings)
    least = bench_decode.bytes_a_token(DecodeEngine(model, 3, 100), 50)
    matrix, ring = 2**20, 4 * 3 * 1024 * 4  # 1 MiB a layer and row; four rows of q, k and v in fp32
    assert least["states"] == 3 * 2 * 2 * (matrix + ring)
    assert least["keys_and_values"] == 0
    assert least["weights"] == 4 * (sum(p.numel() for p in model.parameters()) - 64 * 1024)
    hybrid = bench_decode.build("gla-340m-3-1", settings)
    least = bench_decode.bytes_a_token(DecodeEngine(hybrid, 3, 96), 48)
    assert least["keys_and_values"] == 3 * 48 * 2 * 1024 * 4


@pytest.mark.parametrize("bench", [bench_decode, bench_train])
@pytest.mark.parametrize("arguments", [["--preset", "glaa"], ["--batch", "0"], ["--device", "tpu"]])
def test_impossible_settings_leave_with_code_2(bench, arguments, capsys):
    with pytest.raises(SystemExit) as left:
        bench.parse([*DRY, *arguments])
    assert left.value.code == 2
    assert arguments[0] in capsys.readouterr().err
