"""Bad input raises before any computation and says what was given and expected; back ends explain themselves."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from latentcot import kernels
from latentcot.kernels import (
    Bidirectional,
    BlockCausal,
    cpu_threads,
    decay_attention,
    delta_rule,
    explain_backend,
    gated_scan,
)
from latentcot.kernels.gated_scan import chunked as scan_chunked


def tensors(**changes):
    B, S, H, K, V = 2, 5, 2, 4, 3
    arguments = {"q": torch.randn(B, S, H, K), "k": torch.randn(B, S, H, K), "v": torch.randn(B, S, H, V)}
    return arguments | {"beta": torch.rand(B, S, H)} | changes


def attention(**changes):
    arguments = tensors(**changes)
    arguments.pop("beta")
    return decay_attention(**arguments)


BAD = {
    "q with 3 axes": (attention, {"q": torch.randn(2, 5, 4)}, r"q has shape \(2, 5, 4\), expected \[B,S,H,K\]"),
    "k of other heads": (
        attention,
        {"k": torch.randn(2, 5, 3, 4)},
        r"k has shape \(2, 5, 3, 4\), expected \[B,S,H,K\] = \(2, 5, 2, 4\)",
    ),
    "v of other length": (
        attention,
        {"v": torch.randn(2, 6, 2, 3)},
        r"v has shape \(2, 6, 2, 3\), expected \[B,S,H,V\]",
    ),
    "decay of no known shape": (
        attention,
        {"log_decay": -torch.rand(2, 5)},
        r"log_decay has shape \(2, 5\), expected None, \[H\] = \(2,\), \[B,S,H\] = \(2, 5, 2\)",
    ),
    "growth": (attention, {"log_decay": torch.full((2,), 0.1)}, "log_decay has the value 0.1, expected <= 0"),
    "growth in one place": (
        lambda **c: delta_rule(**tensors(**c)),
        {"log_decay": torch.zeros(2, 5, 2).index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(2.0))},
        "delta_rule: log_decay has the value 2, expected <= 0",
    ),
    "state without heads": (
        attention,
        {"initial_state": torch.zeros(2, 4, 3)},
        r"initial_state has shape \(2, 4, 3\), expected \[N,H,K,V\] = \(2, 2, 4, 3\)",
    ),
    "beta per channel": (
        lambda **c: delta_rule(**tensors(**c)),
        {"beta": torch.rand(2, 5, 2, 4)},
        r"beta has shape \(2, 5, 2, 4\), expected \[B,S,H_v\] = \(2, 5, 2\)",
    ),
    "heads that do not divide": (
        lambda **c: delta_rule(**tensors(**c)),
        {"v": torch.randn(2, 5, 3, 3), "beta": torch.rand(2, 5, 3)},
        "v has 3 heads and q, k have 2",
    ),
    "per-head decay": (
        lambda **c: delta_rule(**tensors(**c)),
        {"log_decay": -torch.rand(2)},
        r"log_decay has shape \(2,\), expected None, \[B,S,H_v\] = \(2, 5, 2\)",
    ),
    "reflections of k only": (
        lambda **c: delta_rule(**tensors(**c)),
        {"k": torch.randn(2, 5, 2, 2, 4)},
        r"v has shape \(2, 5, 2, 3\), expected \[B,S,R,H_v,V\]",
    ),
    "unknown back end": (attention, {"backend": "fast"}, "backend is 'fast', expected one of"),
    "two rows packed": (attention, {"cu_seqlens": torch.tensor([0, 5])}, "B must be 1; it is 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_raise(case):
    function, changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        function(**changes)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], "starts at 1, expected 0"),
        ([0, 4], "ends at 4, expected S = 5"),
        ([0, 3, 2, 5], r"cu_seqlens\[1\] = 3 and cu_seqlens\[2\] = 2, expected increasing"),
        ([0, 3, 3, 5], r"cu_seqlens\[1\] = 3 and cu_seqlens\[2\] = 3, expected increasing"),
        ([0], "expected N\\+1 offsets"),
    ],
)
def test_bad_offsets_raise(offsets, message):
    one_row = {n: t[:1] for n, t in tensors().items()}
    for function in (delta_rule, lambda q, k, v, beta, cu_seqlens: decay_attention(q, k, v, cu_seqlens=cu_seqlens)):
        with pytest.raises(ValueError, match=message):
            function(**one_row, cu_seqlens=torch.tensor(offsets))
    with pytest.raises(ValueError, match=message):
        gated_scan(torch.randn(1, 5, 3), -torch.rand(1, 5, 3), cu_seqlens=torch.tensor(offsets))


def test_bad_types_raise():
    with pytest.raises(TypeError, match=r"decay_attention: k has dtype torch.int64, expected a floating dtype"):
        attention(k=torch.ones(2, 5, 2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"delta_rule: beta is a float, expected a torch\.Tensor"):
        delta_rule(**tensors(beta=0.5))
    with pytest.raises(ValueError, match=r"cu_seqlens is torch\.float32 of shape"):
        attention(cu_seqlens=torch.tensor([0.0, 5.0]))
    with pytest.raises(ValueError, match=r"decay_attention: v is on meta but q is on cpu"):
        attention(v=torch.randn(2, 5, 2, 3, device="meta"))
    with pytest.raises(
        ValueError, match=r"gated_scan: log_decay has shape \(2, 5, 3\), expected \[B,S,D\] = \(2, 5, 4\)"
    ):
        gated_scan(torch.randn(2, 5, 4), -torch.rand(2, 5, 3))


@pytest.mark.parametrize("backend", ["auto", "compiled", "chunked", "reference"])
def test_an_empty_sequence_keeps_the_state(backend, random_inputs):
    for function in (gated_scan, decay_attention, delta_rule):
        arguments = random_inputs(function.__name__, 2, 0, 2, 4, 3)
        state = arguments["initial_state"]
        o, last = function(**arguments, output_state=True, backend=backend)
        assert o.shape == ((2, 0, 4) if function is gated_scan else (2, 0, 2, 3))
        assert torch.equal(last, state)
        assert last.data_ptr() != state.data_ptr()
        arguments["initial_state"] = None
        assert not function(**arguments, output_state=True, backend=backend)[1].any()
        assert function(**arguments, backend=backend)[1] is None


@pytest.mark.parametrize("S", [1, 3])
def test_a_returned_state_is_never_an_input_or_output_in_disguise(S, random_inputs):
    """The caller may change what it got in place."""
    for function in (gated_scan, decay_attention, delta_rule):
        arguments = random_inputs(function.__name__, 2, S, 2, 4, 3)
        before = {n: t.clone() for n, t in arguments.items()}
        with torch.no_grad():
            o, state = function(**arguments, output_state=True)
            kept = o.clone()
            state.fill_(7.0)
        assert torch.equal(o, kept)
        assert all(torch.equal(arguments[n], before[n]) for n in before)


@pytest.fixture(params=[True, False], ids=["with-numba", "without-numba"])
def numba(request, monkeypatch):
    """Whether Numba is installed, as far as the choice of a back end can tell."""
    monkeypatch.setattr(cpu_threads, "_numba_installed", lambda: request.param)
    return request.param


def test_explanations_on_a_cpu(numba):
    short = {"decay_attention": ", where fewer than 64 tokens", "delta_rule": ", where fewer than 32 tokens"}
    for name in ("gated_scan", "decay_attention", "delta_rule"):
        choice = explain_backend(name, device="cpu", dtype=torch.float32)
        if numba:
            batched = f"{short[name]} take batched products" if name in short else ""
            because = f"compiled back end because the tensors are on cpu and Numba is installed{batched}."
        else:
            because = (
                "chunked back end because the tensors are on cpu, and Numba is not installed "
                "(pip install 'latentcot[cpu]')."
            )
        assert choice.chosen == because.split()[0]
        assert str(choice) == f"{name} runs on the {because}"
        assert explain_backend(name, device="cpu", dtype=torch.float32, backend="reference").chosen == "reference"
    assert explain_backend(delta_rule, device=torch.device("cpu"), dtype=torch.float64).operator == "delta_rule"
    with pytest.raises(AttributeError):
        choice.chosen = "triton"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_choice_on_a_cpu_runs(numba, random_inputs, monkeypatch):
    """Compiled where Numba is, else chunked, which is told by counting the calls; the numbers are the definition's."""
    calls = []

    def counted(module, form):
        run = module.gated_scan

        def call(*arguments):
            calls.append(form)
            return run(*arguments)

        monkeypatch.setattr(module, "gated_scan", call)

    counted(scan_chunked, "chunked")
    if numba:
        counted(pytest.importorskip("latentcot.kernels.cpu_gated_scan"), "compiled")
    arguments = random_inputs("gated_scan", 2, 9, 1, 4, 4)
    o, _ = gated_scan(**arguments)
    assert calls == ["compiled" if numba else "chunked"]
    torch.testing.assert_close(o, gated_scan(**arguments, backend="reference")[0])


def test_asking_for_compiled_names_the_missing_part(numba):
    x = torch.randn(1, 4, 3)
    if numba:
        choice = explain_backend("gated_scan", device="cpu", dtype=torch.float32, backend="compiled")
        assert (choice.chosen, choice.reason) == ("compiled", "it was asked for by name")
    else:
        for call in (gated_scan, lambda x, g, **options: delta_rule(**tensors(), **options)):
            with pytest.raises(ValueError, match="backend='compiled' cannot run: Numba is not installed"):
                call(x, -x.abs(), backend="compiled")
    with pytest.raises(ValueError, match="backend='compiled' cannot run: the tensors are on cuda, not on cpu"):
        explain_backend("gated_scan", device="cuda", dtype=torch.float32, backend="compiled")


@pytest.mark.parametrize("name", ["gated_scan", "decay_attention", "delta_rule"])
def test_explanations_on_a_gpu_that_need_none(name, monkeypatch):
    """explain_backend answers for a device without touching it."""
    newest = types.ModuleType("triton")
    newest.__version__ = "3.9.0"  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "triton", newest)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        choice = explain_backend(name, device="cuda", dtype=dtype)
        assert choice.chosen == "triton"
        assert str(choice) == (
            f"{name} runs on the triton back end because the tensors are on a CUDA device and the operator has a "
            "Triton kernel."
        )
    wide = explain_backend(name, device="cuda", dtype=torch.float64)
    assert wide.chosen == "chunked"
    assert "torch.float64" in wide.reason
    newest.__version__ = "3.5.1"  # pyright: ignore[reportAttributeAccessIssue]
    old = explain_backend(name, device="cuda", dtype=torch.float32)
    assert (old.chosen, old.reason) == ("chunked", "Triton 3.5.1 is older than 3.6")
    monkeypatch.setitem(sys.modules, "triton", None)
    missing = explain_backend(name, device="cuda", dtype=torch.float32)
    assert missing.chosen == "chunked"
    assert "Triton is not installed" in missing.reason
    assert not torch.cuda.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing on a machine without CUDA")
def test_asking_for_triton_names_the_missing_part(monkeypatch):
    x = torch.randn(1, 4, 3)
    calls = {
        "gated_scan": lambda: gated_scan(x, -x.abs(), backend="triton"),
        "decay_attention": lambda: attention(backend="triton"),
        "delta_rule": lambda: delta_rule(**tensors(), backend="triton"),
    }
    for name, call in calls.items():
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match=f"{name}: backend='triton' cannot run: there is no CUDA device"):
            call()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setitem(sys.modules, "triton", None)
        with pytest.raises(ValueError, match=f"{name}: backend='triton' cannot run: Triton is not installed"):
            call()


def test_explanations_refuse_what_the_call_would():
    with pytest.raises(ValueError, match="operator is 'softmax', expected one of"):
        explain_backend("softmax", device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        explain_backend("delta_rule", device="cpu", dtype=torch.float32, backend="fast")
    with pytest.raises(ValueError, match="gated_scan: BlockCausal is not defined"):
        explain_backend("gated_scan", device="cpu", dtype=torch.float32, visibility=BlockCausal(4))
    with pytest.raises(ValueError, match="gated_scan: Bidirectional is not defined"):
        explain_backend("gated_scan", device="cpu", dtype=torch.float32, visibility=Bidirectional())


def test_block_forms_run_on_every_back_end_of_their_operators():
    for operator in (decay_attention, delta_rule):
        for backend in ("compiled", "chunked", "reference"):
            choice = explain_backend(
                operator, device="cpu", dtype=torch.float32, backend=backend, visibility=BlockCausal(4)
            )
            assert choice.chosen == backend


def test_the_public_face():
    assert kernels.__all__ == sorted(kernels.__all__)
    for name in kernels.__all__:
        assert getattr(kernels, name).__doc__, f"{name} has no docstring"


def test_the_example_of_the_readme_runs(numba, capsys):
    readme = (Path(__file__).parents[2] / "kernels" / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    whole, _ = delta_rule(names["q"], names["k"], names["v"], names["beta"])
    torch.testing.assert_close(torch.cat([names["o"], names["rest"]], 1), whole, rtol=1e-4, atol=1e-5)
    chosen = "compiled" if numba else "chunked"
    assert f"delta_rule runs on the {chosen} back end" in capsys.readouterr().out
