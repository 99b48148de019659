"""The kernel benchmark: its formulas, its records and its page. Nothing is timed here, the code is only run."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from latentcot.kernels import (
    bench,
    bench_cases,
    bench_measure,
    bench_peers,
    bench_report,
    bench_rows,
    explain_backend,
    launch,
    tune,
    tune_compile,
)
from latentcot.kernels.bench_cases import MIXERS, ROWS, Row, Shape, counted_bytes, counted_flops
from latentcot.kernels.launch import Launch

CPU = torch.device("cpu")
BY_NAME = {row.name: row for row in ROWS}
PLAIN = "retnet,gla,deltanet,gla-bidirectional,gla-block,gla-token-1,deltanet-token-64,gated_deltanet-token-1"


def dry_run(tmp_path, *more, rows=PLAIN):
    out = tmp_path / "results.json"
    settings = bench.parse(["--device", "cpu", "--shape", "tiny", "--rows", rows, "--out", str(out), *more])
    said: list[str] = []
    result = bench.run(settings, say=said.append)
    return result, json.loads(out.read_text()), said


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    return dry_run(tmp_path_factory.mktemp("dry"), "--against", "sdpa")


# --- formulas


def test_bytes_of_gla_at_the_anchor_shape_are_those_counted_by_hand():
    meta = torch.device("meta")
    s = BY_NAME["gla"].shape
    wide = torch.empty(s.B, s.S, s.H, 128, dtype=torch.bfloat16, device=meta)
    tensors = {"q": wide, "k": wide, "v": wide, "log_decay": wide.float()}
    size = 8 * 4096 * 16 * 128 * 2  # one 16-bit tensor: q, k, v, o are one each, the float32 gate two
    forward, both = counted_bytes(BY_NAME["gla"], s, tensors)
    assert forward == 6 * size
    assert both == 6 * size + (5 + 1 + 5) * size  # backward: inputs and the gradient of o read, four gradients written


def test_bytes_leave_out_the_gradient_of_a_constant():
    row, s = BY_NAME["retnet"], Shape(1, 3, 2, 4, 8)
    tensors = MIXERS["retnet"].inputs(s, torch.float32, CPU, 0)
    q, v, decay = 4 * 1 * 3 * 2 * 4, 4 * 1 * 3 * 2 * 8, 4 * 2
    assert counted_bytes(row, s, tensors) == (
        2 * q + v + decay + v,
        (2 * q + v + decay + v) + (2 * q + v + decay + v) + (2 * q + v),
    )


def test_bytes_of_a_step_are_its_inputs_its_output_and_the_state_twice():
    row, s = BY_NAME["gla-token-1"], Shape(1, 1, 2, 4, 8)
    x = bench_cases.token_inputs(row, s, torch.float32, CPU, 0)
    assert {name: tuple(t.shape) for name, t in x.items()}["log_decay"] == (1, 2, 4)
    wanted = 4 * (3 * 2 * 4 + 2 * 8 + 2 * 8 + 2 * 2 * 4 * 8)
    assert counted_bytes(row, s, x) == (wanted, wanted)


@pytest.mark.parametrize(
    ("name", "forward", "both"),
    [
        ("retnet", 4 * 8 * 16, 14 * 8 * 16),
        ("gated_deltanet", 6 * 8 * 16, 20 * 8 * 16),
        ("gla-bidirectional", 8 * 8 * 16, 28 * 8 * 16),
        ("gla-block", 4 * 8 * 16 + 2 * 5 * 24, 14 * 8 * 16 + 7 * 5 * 24),
        ("hgrn", 0, 0),
    ],
)
def test_matrix_products_are_those_of_the_recurrence(name, forward, both):
    heads = 2 * 3 * 4
    assert counted_flops(BY_NAME[name], Shape(2, 3, 4, 8, 16), block=5) == (heads * forward, heads * both)


def test_floor_is_the_larger_of_copying_and_multiplying():
    rates = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e12}
    copied = bench_measure.against_ceilings({"ms": 4.0}, 2_000_000, 1_000_000_000, rates)
    assert copied["floor_ms"] == pytest.approx(2.0)
    assert (copied["copy_fraction"], copied["matmul_fraction"]) == pytest.approx((0.5, 0.25))
    assert bench_measure.against_ceilings({"ms": 4.0}, 1, 3_000_000_000, rates)["floor_ms"] == pytest.approx(3.0)


def test_relative_error():
    one = torch.tensor([3.0, 4.0])
    assert bench_measure.relative_rms(one * 1.5, one) == pytest.approx(0.5)
    assert math.isnan(bench_measure.relative_rms(one * math.nan, one))
    assert bench_measure.relative_rms(one, 0 * one) == math.inf
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        bench_measure.relative_rms(one, torch.zeros(3))


def test_every_row_has_a_mixer_and_a_name_of_its_own():
    assert len(BY_NAME) == len(ROWS)
    assert {row.mixer for row in ROWS} == set(MIXERS)
    assert all(row.group in bench_report.TITLES for row in ROWS)
    assert all(row.bar and row.given for row in ROWS if row.group == "anchor")


# --- the command line


def test_rows_are_chosen_by_name_and_pattern():
    settings = bench.parse(["--device", "cpu", "--rows", "gla-*,hgrn", "--no-backward", "--budget-seconds", "3"])
    assert {row.name for row in settings.rows} == {n for n in BY_NAME if n.startswith("gla-")} | {"hgrn"}
    assert not settings.backward
    assert settings.budget_seconds == 3
    assert settings.dtype == torch.float32
    assert bench.parse(["--device", "cpu", "--dtype", "bfloat16"]).dtype == torch.bfloat16
    assert len(bench.parse(["--device", "cpu"]).rows) == len(ROWS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "cpu", "--rows", "glaa"], "no row matches 'glaa', expected some of retnet"),
        (["--device", "cpu", "--against", "flaa"], "'flaa' is no peer, expected some of fla, transformers, sdpa"),
    ],
)
def test_what_does_not_exist_is_named(arguments, words, capsys):
    with pytest.raises(SystemExit) as left:
        bench.parse(arguments)
    assert left.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


# --- runs


def test_the_file_holds_what_the_run_returned(dry):
    result, written, _ = dry
    assert written["schema"] == bench_report.SCHEMA
    assert [row["name"] for row in written["rows"]] == [row["name"] for row in result["rows"]]
    assert set(written["ceilings"]) == {"copy_bytes_per_s", "matmul_flops_per_s"}
    assert written["machine"]["torch"] == torch.__version__
    assert written["left_out"] == []


def test_a_row_over_a_sequence_is_complete(dry):
    row = {row["name"]: row for row in dry[1]["rows"]}["gla"]
    assert row["shape"] == {"B": 2, "S": 10, "H": 2, "K": 8, "V": 8}
    for name in ("forward", "both"):
        timing = row["ours"][name]
        assert {"ms", "ms_low", "ms_high", "repeats", "host_ms", "bytes", "flops", "floor_ms"} <= set(timing)
        assert timing["ms_low"] <= timing["ms"] <= timing["ms_high"]
        assert timing["peak_bytes"] is None  # not measured on a CPU
    assert row["ours"]["both"]["bytes"] > row["ours"]["forward"]["bytes"]
    assert set(row["ours"]["errors"]) == {"o", "d_q", "d_k", "d_v", "d_log_decay"}
    assert row["ours"]["label"] == str(explain_backend("decay_attention", device="cpu", dtype=torch.float32))


def test_every_plain_row_is_the_definition(dry):
    for row in dry[1]["rows"]:
        assert "error" not in row["ours"], row["ours"]
        for name, error in row["ours"]["errors"].items():
            assert error < 1e-5, (row["name"], name)


def test_another_function_is_timed_but_has_no_floor_and_no_error(dry):
    (peer,) = {row["name"]: row for row in dry[1]["rows"]}["gla"]["peers"]
    assert peer["peer"] == "sdpa"
    assert peer["forward"]["ms"] > 0
    assert "floor_ms" not in peer["forward"]
    assert "errors" not in peer


def test_a_peer_without_the_row_is_named_there(dry):
    (peer,) = {row["name"]: row for row in dry[1]["rows"]}["gla-block"]["peers"]
    assert peer["missing"] == "sdpa has nothing to compare with gla-block"


def test_a_peer_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_peers, "import_module", lambda name: (_ for _ in ()).throw(ImportError(f"no {name}")))
    result, _, _ = dry_run(tmp_path, "--against", "fla,transformers", "--no-check", rows="deltanet")
    missing = [peer["missing"] for peer in result["rows"][0]["peers"]]
    assert "fla.ops.delta_rule.chunk_delta_rule is not available: no fla.ops.delta_rule" in missing
    assert len(missing) == 2


@pytest.mark.parametrize("name", ["deltanet", "gated_deltanet"])
def test_the_chunk_form_of_transformers_computes_the_row(name):
    pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    row = bench_cases.tiny(BY_NAME[name])
    settings = bench.parse(["--device", "cpu", "--shape", "tiny", "--rows", name])
    (peer,) = bench_peers.peers_for("transformers", row)
    contender = bench_rows.Contender(peer.label, peer.run, peer.step)
    for quantity, error in bench_rows.errors_of(row, contender, settings).items():
        assert error < 1e-5, quantity


def test_a_failing_row_is_recorded_and_the_next_one_runs(monkeypatch, tmp_path):
    def broken(tensors, visibility, backend="auto"):
        raise RuntimeError("no kernel today")

    monkeypatch.setitem(
        MIXERS, "gla", bench_cases.Mixer("decay_attention", MIXERS["gla"].inputs, broken, broken, (4, 10))
    )
    _, written, said = dry_run(tmp_path, rows="gla,retnet,deltanet")
    ours = {row["name"]: row["ours"] for row in written["rows"]}
    failed, fine = ours["gla"], ours["deltanet"]
    assert list(ours) == ["retnet", "gla", "deltanet"]  # the order of the table
    assert "RuntimeError: no kernel today" in failed["error"]
    assert "both" in fine
    assert "error" not in fine
    assert any("FAILED" in line for line in said)


def test_a_failing_backward_keeps_the_forward(monkeypatch, tmp_path):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError("no gradient today")

    plain = MIXERS["retnet"]
    monkeypatch.setitem(
        MIXERS,
        "retnet",
        bench_cases.Mixer(
            "decay_attention", plain.inputs, lambda x, seen, backend: Broken.apply(plain.run(x, seen, backend)),
            plain.exact, (4, 10), None, plain.constants,
        ),
    )  # fmt: skip
    entry = dry_run(tmp_path, rows="retnet")[1]["rows"][0]["ours"]
    assert "ms" in entry["forward"]
    assert "both" not in entry
    assert "no gradient today" in entry["error"]


def test_rows_beyond_the_budget_are_named(tmp_path):
    _, written, said = dry_run(tmp_path, "--budget-seconds", "0", rows="gla,retnet")
    assert written["rows"] == []
    assert {left["row"] for left in written["left_out"]} == {"gla", "retnet"}
    assert sum("left out" in line for line in said) == 2


def test_rows_behind_a_lost_device_are_left_out_and_not_blamed(monkeypatch, tmp_path):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand a second line")

    monkeypatch.setattr(bench, "synchronize", lost)
    _, written, _ = dry_run(tmp_path, rows="gla")
    assert written["left_out"] == [
        {"row": "gla", "reason": "the device was lost: CUDA error: an illegal memory access was encountered"}
    ]


def test_values_that_json_lacks_are_written_as_words(tmp_path):
    bench.write(tmp_path / "x.json", {"a": [math.nan, math.inf], "b": 1.5})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": ["nan", "inf"], "b": 1.5}


def test_a_fresh_process_says_how_long_its_first_call_took():
    settings = bench.parse(["--device", "cpu", "--shape", "tiny", "--rows", "retnet"])
    seconds = bench_rows.cold_start(settings.rows[0], settings)
    assert seconds is not None
    assert seconds > 0


# --- the page


def timing(ms, nbytes=3_000_000_000):
    rates = {"copy_bytes_per_s": 3e12, "matmul_flops_per_s": 8e14}
    times = {"ms": ms, "ms_low": ms, "ms_high": ms, "repeats": 9, "host_ms": 0.1, "peak_bytes": 2**30, "launches": 5}
    return bench_measure.against_ceilings(times, nbytes, 10**11, rates)


def run_of(rows, device="Some card", left_out=()):
    return {
        "schema": 1,
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"device": device, "torch": "2.0", "triton": "3.6.0", "cuda": "13.0", "peers": {"fla": "0.6.0"}},
        "shape": "full",
        "dtype": "bfloat16",
        "ceilings": {"copy_bytes_per_s": 3e12, "matmul_flops_per_s": 8e14},
        "rows": rows,
        "left_out": list(left_out),
    }


def entry_of(name, forward, both, peers=(), **ours):
    entry = bench.describe_row(BY_NAME[name])
    entry["ours"] = {"label": "triton", "note": "", "forward": timing(forward), "both": timing(both), **ours}
    entry["peers"] = list(peers)
    return json.loads(json.dumps(entry))


def fla(forward, both, note=""):
    return {"peer": "fla", "label": "chunk", "forward": timing(forward), "both": timing(both), "note": note}


TEMPLATE = (bench_report.FOLDER / "kernels.md.jinja").read_text(encoding="utf-8")


def lines_with(page, start):
    return [line for line in page.splitlines() if line.startswith(start)]


def test_the_page_states_times_bars_ratios_and_what_is_missed():
    rows = [
        entry_of("gla", 0.7, 4.0, [fla(1.4, 2.0, "guard off")], cold_s=12.3, errors={"o": 2e-3, "d_q": "nan"}),
        entry_of("retnet", 0.3, 1.2),
    ]
    page = bench_report.page([run_of(rows, left_out=[{"row": "hgrn", "reason": "no time"}])], TEMPLATE)
    anchor = lines_with(page, "| `gla` | 0")[0]
    assert "| 0.700 | 0.7 | 4.00 | 4.0 | 0.800 / 3.30 | yes / 1.21 × | 1024 | 5 | 12.3 |" in anchor
    assert any(
        "| fla: chunk | 1.40 | 2.00 | 2.00 | 0.50 | 1024 | – | guard off |" in line for line in page.splitlines()
    )
    assert "- `gla`: forward + backward takes 4.00 ms, its bar is 3.30 ms." in page
    assert "- `gla`: forward + backward takes 4.00 ms, fla (chunk; guard off) 2.00 ms." in page
    assert "- Left out: hgrn (no time)." in page
    assert "`retnet`:" not in page  # within its bar, and nothing was faster
    assert "| `gla` | 2.0e-03 | q nan |" in page
    assert "PyTorch 2.0, Triton 3.6.0, CUDA 13.0" in page


def test_a_page_without_misses_says_so():
    page = bench_report.page([run_of([entry_of("retnet", 0.3, 1.2, [fla(0.6, 2.2)])])], TEMPLATE)
    assert "Every bar is met, and no implementation on this page is faster." in page


def test_a_page_without_results_says_that_nothing_was_measured():
    page = bench_report.page([], TEMPLATE)
    assert "Nothing has been measured on a GPU" in page
    assert "|" not in page


def test_later_files_replace_rows_and_peers_keep_the_run_they_were_measured_in():
    old = run_of([entry_of("gla", 1.0, 4.0, [fla(2.0, 8.0)], cold_s=7.0), entry_of("hgrn", 0.2, 0.7)])
    missing = {"peer": "fla", "label": "fla", "missing": "fla is not available"}
    new = run_of([entry_of("gla", 0.5, 2.0, [missing])])
    rows = {row["name"]: row for row in bench_report.merged([old, new])}
    assert list(rows) == ["gla", "hgrn"]
    assert rows["gla"]["ours"]["forward"]["ms"] == 0.5
    assert rows["gla"]["ours"]["cold_s"] == 7.0
    (peer,) = rows["gla"]["peers"]
    assert (peer["forward"]["ms"], peer["beside"]["forward"]["ms"]) == (2.0, 1.0)
    assert "| 2.00 | 2.00 | 8.00 | 2.00 |" in bench_report.peers(list(rows.values()))


def test_runs_of_two_cards_are_told_apart():
    old, new = run_of([entry_of("gla", 1.0, 4.0, cold_s=7.0)], "card A"), run_of([entry_of("gla", 0.5, 2.0)], "card B")
    (row,) = bench_report.merged([old, new])
    assert row["title"] == "`gla` (card B)"
    assert "cold_s" not in row["ours"]


def test_the_page_of_a_dry_run_calls_itself_one(dry):
    page = bench_report.page([dry[1]], TEMPLATE)
    assert "tiny shapes: a dry run" in page
    assert "| `gla-token-1` |" in page


def test_a_file_that_is_no_result_is_named(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json: not a result"):
        bench_report.load([path])


def test_the_command_writes_the_page_and_two_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    source = tmp_path / "results.json"
    source.write_text(json.dumps(run_of([entry_of("gla", 0.7, 3.0, [fla(1.4, 6.0)])])))
    cpu = tmp_path / "cpu.json"
    cpu.write_text(json.dumps({"rows": [{"row": "gla", "ms": {"forward": 12.5}, "list": [1]}]}))
    assert bench_report.main([str(source), "--out", str(tmp_path / "page.md"), "--cpu", str(cpu)]) == 0
    page = (tmp_path / "page.md").read_text()
    assert "](page-light.svg#only-light)" in page
    assert "| row | ms forward |" in page
    for theme in ("light", "dark"):
        assert (tmp_path / f"page-{theme}.svg").read_text().startswith("<?xml")
    assert bench_report.draw([], tmp_path / "none") is False


# --- the tuner


def test_search_walks_to_the_best_by_single_steps():
    kernel = tune.Tunable(("gla",), False, (16, 32, 64), (32, 64), (4, 8), (1, 2))
    judged = []

    def judge(candidate):
        judged.append(candidate)
        if candidate.block == 64 and candidate.chunk == 16:
            return math.inf  # wrong results
        return 0.5 if candidate == Launch(64, 64, 8, 1) else 0.9 - candidate.chunk / 1000 - candidate.warps / 100

    best, score = tune.search(kernel, Launch(16, 32, 4, 1), judge)
    assert (best, score) == (Launch(64, 64, 8, 1), 0.5)
    assert len(judged) == len(set(judged))


def test_candidates_of_a_round_are_prepared_together_and_once():
    kernel = tune.Tunable(("gla",), False, (16, 32), (32,), (4, 8), (1,))
    rounds = []
    tune.search(kernel, Launch(16, 32, 4, 1), lambda candidate: 1 / candidate.chunk, prepare=rounds.append)
    assert rounds == [[Launch(32, 32, 4, 1), Launch(16, 32, 8, 1)], [Launch(32, 32, 8, 1)]]


def test_candidates_are_dealt_out_whole():
    candidates = [Launch(16, 32, 4, n) for n in range(5)]
    dealt = tune_compile.shares(candidates, 2)
    assert [len(share) for share in dealt] == [3, 2]
    assert sorted(one for share in dealt for one in share) == candidates
    assert tune_compile.shares(candidates[:1], 8) == [candidates[:1]]
    assert tune_compile.shares([], 8) == []


def test_a_compiling_process_runs_what_it_is_given():
    """In the interpreter: 1 says that no candidate ran, which a chunk that is no power of two can not."""
    pytest.importorskip("triton")
    codes = []
    for candidate in ("16,32,1,1", "3,32,1,1"):
        command = ["-m", "latentcot.kernels.tune_compile", "gated_scan_forward", "1,5,1,16,16", "float32", "cpu"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run([sys.executable, *command, candidate], env=environment, capture_output=True, timeout=120)
        codes.append(done.returncode)
    assert codes == [0, 1]


def test_search_keeps_the_present_shape_against_noise():
    kernel = tune.KERNELS["decay_values"]
    start = Launch(0, 64, 4, 3)
    assert tune.search(kernel, start, lambda candidate: 0.99) == (start, 1.0)
    assert all(candidate.chunk == 0 for candidate in kernel.neighbours(start))


class FakeWorkload:
    """A kernel whose time is its number of warps and over its stages, and whose results are wrong with four stages."""

    def __init__(self, *_):
        pass

    def results(self):
        self.shape = tune.launch.launch_shape("decay_values", 128, 128, torch.bfloat16, CPU, Launch(0, 64, 8, 3))
        return {"o": torch.full((2,), float("nan") if self.shape.stages == 4 else 1.0)}

    def milliseconds(self):
        return float(self.shape.warps) / self.shape.stages


def test_tuning_takes_the_fastest_candidate_with_the_same_results():
    trials = []
    found = tune.tune(
        "decay_values", Shape(1, 1, 1, 128, 128), torch.bfloat16, CPU, trials, lambda: False, set(), FakeWorkload
    )
    assert found == {"k128-v128-16bit": Launch(0, 64, 2, 3)}
    assert any("o differs by nan" in trial.get("wrong", "") for trial in trials)


def test_a_kernel_that_nothing_looks_up_is_named():
    with pytest.raises(RuntimeError, match=r"delta_left: no call of deltanet, gated_deltanet .* looks it up"):
        tune.tune("delta_left", Shape(1, 1, 1, 8, 8), torch.bfloat16, CPU, [], lambda: False, set(), FakeWorkload)


def test_the_table_keeps_other_entries_and_marks_guesses(tmp_path, monkeypatch):
    old = {
        "sm_90": {"a": {"k16-v16-16bit": [1, 2, 4, 1]}},
        "sm_80": {"old": {"x": [1, 1, 1, 1]}},
        "measured": ["sm_80"],
    }
    new = tune.merge(old, "sm_90", {"b": {"k16-v16-16bit": Launch(64, 32, 4, 3)}})
    assert new["measured"] == ["sm_80", "sm_90"]
    assert new["sm_90"] == {"a": {"k16-v16-16bit": [1, 2, 4, 1]}, "b": {"k16-v16-16bit": [64, 32, 4, 3]}}
    assert new["sm_80"] == {"old": {"x": [1, 1, 1, 1]}}  # measured: not a guess's to replace
    assert new["sm_100"] == new["sm_90"]
    assert tune.merge({}, "sm_90", {"b": {"c": Launch(64, 32, 4, 3)}})["sm_80"] == {"b": {"c": [64, 32, 4, 2]}}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(new))
    monkeypatch.setattr(launch, "TABLE", path)
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    launch._table.cache_clear()
    try:
        found = launch.launch_shape("b", 16, 16, torch.bfloat16, CPU, Launch(1, 1, 1, 1))
    finally:
        launch._table.cache_clear()
    assert found == Launch(64, 32, 4, 3)


@pytest.mark.parametrize(("option", "words"), [("--kernels", "is no kernel"), ("--shapes", "expected KxV")])
def test_the_tuner_names_what_it_does_not_know(option, words, capsys):
    with pytest.raises(SystemExit):
        tune.parse([option, "nonsense"])
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_tiny_row_has_no_bars():
    small = bench_cases.tiny(BY_NAME["gla"])
    assert isinstance(small, Row)
    assert small.bar is None
