"""The short convolution against a loop over tokens and taps: outputs, states, gradients, packing, padding, both
sides.
"""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from latentcot.kernels import Bidirectional, l2_norm, short_convolution


def by_loop(x, weight, state=None, *, activation="silu", both_sides=False):
    """One sequence ``[S,D]``, state ``[D,W-1]`` -> (y, last W-1 inputs)."""
    S, D = x.shape
    W = weight.shape[1]
    past = x.new_zeros(D, W - 1) if state is None else state
    inputs = torch.cat([past.T, x])  # row W-1+t is x_t
    rows = []
    for t in range(S):
        y = x.new_zeros(D)
        for distance in range(W):
            tap = weight[:, W - 1 - distance]
            y = y + tap * inputs[W - 1 + t - distance]
            if both_sides and distance > 0 and t + distance < S:
                y = y + tap * x[t + distance]
        rows.append(F.silu(y) if activation else y)
    return torch.stack(rows), inputs[len(inputs) - (W - 1) :].T


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("W", [1, 2, 4])
@pytest.mark.parametrize("S", [1, 2, 3, 4, 9])
def test_is_the_definition(S, W, activation, data):
    x, weight, state = data(2, S, 5), data(5, W), data(2, 5, W - 1)
    y, last = short_convolution(x, weight, activation=activation, initial_state=state, output_state=True)
    for b in range(2):
        expected, expected_last = by_loop(x[b], weight, state[b], activation=activation)
        torch.testing.assert_close(y[b], expected, rtol=1e-13, atol=1e-13)
        assert torch.equal(last[b], expected_last)
    y, none = short_convolution(x, weight, activation=activation)
    assert none is None
    torch.testing.assert_close(y[0], by_loop(x[0], weight, activation=activation)[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("S", [1, 2, 3, 9])
def test_centred_kernel_shares_its_taps(S, data):
    x, weight = data(2, S, 5), data(5, 4)
    y, state = short_convolution(x, weight, visibility=Bidirectional())
    assert state is None
    for b in range(2):
        torch.testing.assert_close(y[b], by_loop(x[b], weight, both_sides=True)[0], rtol=1e-13, atol=1e-13)
    turned, _ = short_convolution(x.flip(1), weight, visibility=Bidirectional())
    torch.testing.assert_close(turned.flip(1), y, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("visibility", ["causal", "both"])
def test_packed_rows_never_see_each_other(visibility, data):
    cuts = [0, 1, 3, 9, 14]
    x, weight, state = data(1, 14, 5), data(5, 4), data(4, 5, 3)
    options = (
        {"initial_state": state, "output_state": True} if visibility == "causal" else {"visibility": Bidirectional()}
    )
    y, last = short_convolution(x, weight, cu_seqlens=torch.tensor(cuts), **options)
    for n, (a, b) in enumerate(pairwise(cuts)):
        both = visibility == "both"
        expected, expected_last = by_loop(x[0, a:b], weight, None if both else state[n], both_sides=both)
        torch.testing.assert_close(y[0, a:b], expected, rtol=1e-13, atol=1e-13)
        if last is not None:
            assert torch.equal(last[n], expected_last)


@pytest.mark.parametrize("visibility", ["causal", "both"])
def test_right_padding_enters_nothing(visibility, data):
    lengths = [0, 1, 2, 6]
    x, weight, state = data(4, 6, 5), data(5, 4), data(4, 5, 3)
    for b, length in enumerate(lengths):
        x[b, length:] = float("nan")
    options = (
        {"initial_state": state, "output_state": True} if visibility == "causal" else {"visibility": Bidirectional()}
    )
    y, last = short_convolution(x, weight, lengths=torch.tensor(lengths), **options)
    for b, length in enumerate(lengths):
        assert torch.equal(y[b, length:], torch.zeros(6 - length, 5, dtype=torch.float64))
        both = visibility == "both"
        if length:
            expected, expected_last = by_loop(x[b, :length], weight, None if both else state[b], both_sides=both)
            torch.testing.assert_close(y[b, :length], expected, rtol=1e-13, atol=1e-13)
        else:
            expected_last = state[b]
        if last is not None:
            assert torch.equal(last[b], expected_last)


def test_gradients_with_lengths_and_packing(data):
    x, weight, state = (t.requires_grad_() for t in (data(3, 4, 2), data(2, 3), data(3, 2, 2)))
    lengths = torch.tensor([0, 1, 4])

    def padded(x, weight, state):
        return short_convolution(x, weight, initial_state=state, output_state=True, lengths=lengths)

    assert torch.autograd.gradcheck(padded, (x, weight, state))
    row = data(1, 7, 2).requires_grad_()

    def packed(x, weight, state):
        cu = torch.tensor([0, 1, 3, 7])
        return short_convolution(x, weight, initial_state=state, output_state=True, cu_seqlens=cu)

    assert torch.autograd.gradcheck(packed, (row, weight, state))


def test_narrow_inputs_and_empty_sequences(data):
    x, weight = data(2, 5, 3).bfloat16(), data(3, 4).bfloat16()
    y, state = short_convolution(x, weight, output_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, short_convolution(x.float(), weight.float())[0].bfloat16())
    before = torch.randn(2, 3, 3)
    y, after = short_convolution(x[:, :0], weight, initial_state=before, output_state=True)
    assert y.shape == (2, 0, 3)
    assert torch.equal(after, before)
    assert after.data_ptr() != before.data_ptr()


def test_bad_arguments(data):
    x, weight = data(2, 5, 3), data(3, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4\), expected \[D,W\] = \(3, 4\)"):
        short_convolution(x, data(4, 4))
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 3, 4\), expected \[N,D,W-1\] = \(2, 3, 3\)"):
        short_convolution(x, weight, initial_state=data(2, 3, 4))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        short_convolution(x, weight, activation="relu")
    with pytest.raises(ValueError, match="lengths range from 2 to 6, expected 0 … S = 5"):
        short_convolution(x, weight, lengths=torch.tensor([2, 6]))
    with pytest.raises(TypeError, match=r"lengths is torch\.float32"):
        short_convolution(x, weight, lengths=torch.ones(2))
    with pytest.raises(ValueError, match="give one"):
        short_convolution(x[:1], weight, lengths=torch.tensor([5]), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="expected > 0"):
        l2_norm(x, eps=0.0)


def test_l2_norm_is_taken_in_float32_and_is_a_direction(data):
    x = data(4, 7)
    torch.testing.assert_close(l2_norm(x).norm(dim=-1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
    narrow = (1e3 * x).half()  # squares overflow 16 bits
    assert torch.equal(l2_norm(narrow), l2_norm(narrow.float()).half())
    assert torch.autograd.gradgradcheck(l2_norm, (x.requires_grad_(),))
