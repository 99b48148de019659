"""The benchmark of what comes on top of the network runs dry, keeps other machines' runs and says what it measured."""

import json

import pytest
import torch

from latentcot.diffusion_reasoning import bench_shares

TINY = [
    "--device",
    "cpu",
    "--width",
    "64",
    "--layers",
    "4",
    "--length",
    "40",
    "--train-rows",
    "1",
    "--block-length",
    "8",
    "--rows",
    "2",
]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_dry_run_writes_figures_and_page_and_keeps_other_machines(tmp_path, one_thread):
    files = ["--json", str(tmp_path / "shares.json"), "--page", str(tmp_path / "shares.md")]
    arguments = [*TINY, "--vocab", "64", "--repeats", "2", *files]
    bench_shares.main(arguments)
    run = json.loads((tmp_path / "shares.json").read_text(encoding="utf-8"))["runs"][0]
    other = {**run, "machine": "another"}
    (tmp_path / "shares.json").write_text(json.dumps({"runs": [other, run]}), encoding="utf-8")
    bench_shares.main(arguments)
    runs = json.loads((tmp_path / "shares.json").read_text(encoding="utf-8"))["runs"]
    assert [r["machine"] for r in runs] == ["another", run["machine"]]
    found = runs[1]["found"]
    assert set(found["samplers"]) == set(bench_shares.SAMPLERS)
    assert found["kept"] > 1.5, "two streams keep more than one"
    assert found["peak"] is None
    page = (tmp_path / "shares.md").read_text(encoding="utf-8")
    assert f"{found['time']:.2f} times (aim 2.4)" in page
    for name, row in found["samplers"].items():
        assert f"| {name} | {row['sampler_ms']:.2f} | {row['sampler']:.1%} |" in page


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--width", "100"], "multiples of 64 and 4"),
        (["--page", "nowhere/page.md"], "there is no folder"),
        (["--rows", "0"], "positive"),
    ],
)
def test_bad_settings_are_one_line(given, message, capsys):
    with pytest.raises(SystemExit) as left:
        bench_shares.parse(["--device", "cpu", *given])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_refused_before_anything_is_measured(tmp_path, capsys, one_thread):
    (tmp_path / "shares.json").write_text("[]", encoding="utf-8")
    files = ["--json", str(tmp_path / "shares.json"), "--page", str(tmp_path / "shares.md")]
    with pytest.raises(SystemExit) as left:
        bench_shares.main([*TINY, *files])
    assert left.value.code == 2
    assert "holds no runs of this benchmark" in capsys.readouterr().err
    assert not (tmp_path / "shares.md").exists()
