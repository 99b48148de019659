"""The benchmark of early exits runs, counts FLOPs as the formula says, and writes its page from its numbers."""

import json

import pytest

from latentcot.recurrent_depth.bench import Sizes, cases, main, parse
from latentcot.recurrent_depth.bench_page import page

TINY = [
    "--rows",
    "4",
    "--prompt",
    "6",
    "--width",
    "32",
    "--vocab",
    "32",
    "--recurrences",
    "6",
    "--tokens",
    "1",
    "--repeats",
    "1",
]


def test_a_dry_run_writes_numbers_and_page(tmp_path):
    main([*TINY, "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["depth.json", "depth.md"]
    result = json.loads((tmp_path / "depth.json").read_text())
    assert list(result["rows"]) == list(cases(Sizes()))
    for name, row in result["rows"].items():
        assert 1 < row["mean_depth"] < 6, name
        # filling gaps of linear mixers is no part of the formula, but all in all it still saves
        assert row["flops"] < 1 if "copy" in name else row["flops"] <= 1.15 * row["formula"], name
        assert row["of_formula"] == pytest.approx(row["exits"] / row["formula"])
        assert sum(row["depths"]) == 4
    written = (tmp_path / "depth.md").read_text()
    assert written == page(result)
    main([*TINY, "--case", "sequences, looped", "--out", str(tmp_path)])  # the other rows stay
    again = json.loads((tmp_path / "depth.json").read_text())["rows"]
    assert list(again) == list(result["rows"])
    assert again["decoding, KL every 4"] == result["rows"]["decoding, KL every 4"]
    main(
        ["--rows", "3", *TINY[2:], "--case", "sequences, looped", "--out", str(tmp_path)]
    )  # those of other sizes do not
    assert list(json.loads((tmp_path / "depth.json").read_text())["rows"]) == ["sequences, looped stack"]
    for row in result["rows"].values():
        row["of_formula"] = 1.0
    assert "What is not reached" not in page(result)


def test_bad_arguments_end_with_a_sentence(capsys, tmp_path):
    for arguments, words in (
        (["--rows", "0"], "positive integer"),
        (["--width", "30"], "multiple of 8"),
        (["--out", str(tmp_path / "none")], "no folder"),
        (["--case", "nothing"], "no name holds"),
    ):
        with pytest.raises(SystemExit) as left:
            parse(arguments)
        assert left.value.code == 2
        assert words in capsys.readouterr().err
