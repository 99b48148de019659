"""Attention of two streams in tiles: the pairs of the dense masks, and when it is taken."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from latentcot.backbone import SequenceContext
from latentcot.backbone.mixers import stream_attention
from latentcot.backbone.mixers.stream_attention import attend_in_streams, stream_block_mask, takes_flex
from latentcot.kernels import BlockCausal


@pytest.mark.parametrize(("length", "block"), [(16, 4), (37, 5), (130, 32), (12, 12), (9, 1)])
def test_the_pairs_of_the_tiles_are_those_of_the_masks(length, block):
    context = SequenceContext.build(1, length, visibility=BlockCausal(block), streams=2)
    clean, noisy = (mask[0, 0] for mask in context.stream_masks)
    seen = stream_block_mask(length, block, "cpu").mask_mod
    index = torch.arange(2 * length)
    none = torch.zeros((), dtype=torch.long)
    found = seen(none, none, index[:, None], index[None, :])
    assert torch.equal(found[:length, :length], clean)
    assert not found[:length, length:].any()
    assert torch.equal(found[length:], noisy)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads_of_keys", [4, 2])
def test_both_ways_attend_alike(heads_of_keys, monkeypatch):
    torch.manual_seed(0)
    q = torch.randn(4, 4, 70, 16)
    k, v = (torch.randn(4, heads_of_keys, 70, 16) for _ in range(2))
    context = SequenceContext.build(2, 70, visibility=BlockCausal(8), streams=2)
    dense = attend_in_streams(q, k, v, context)
    assert not takes_flex(q, context, None)  # on a CPU, where FlexAttention has no backward pass
    monkeypatch.setattr(stream_attention, "takes_flex", lambda *_: True)
    monkeypatch.setattr(stream_attention, "_compiled", lambda: flex_attention)  # as it is written, which is slow
    torch.testing.assert_close(attend_in_streams(q, k, v, context), dense, atol=2e-6, rtol=0)


def test_rows_without_padding_share_one_mask():
    context = SequenceContext.build(3, 12, visibility=BlockCausal(4), streams=2)
    assert [list(mask.shape) for mask in context.stream_masks] == [[1, 1, 12, 12], [1, 1, 12, 24]]
    real = torch.ones(3, 12, dtype=torch.bool)
    real[1, :4] = False
    context = SequenceContext.build(3, 12, visibility=BlockCausal(4), streams=2, attention_mask=real)
    assert context.stream_masks[0].shape[0] == 3


def test_what_takes_dense_masks(monkeypatch):
    """Whatever the device: short sequences, padding, windows, fp64, other widths, and more kinds of sequences than are compiled for."""
    monkeypatch.setattr(stream_attention, "_compiled_for", set())

    class OnGpu:
        """What a decision looks at."""

        def __init__(self, length=2048, width=64, dtype=torch.bfloat16):
            self.device, self.shape, self.dtype = torch.device("cuda"), (4, 4, length, width), dtype

    context = SequenceContext.build(2, 2048, visibility=BlockCausal(8), streams=2)
    real = torch.ones(2, 2048, dtype=torch.bool)
    real[0, 0] = False
    padded = SequenceContext.build(2, 2048, visibility=BlockCausal(8), streams=2, attention_mask=real)

    def taken(q=None, where=context, window=None) -> bool:
        return takes_flex(q or OnGpu(), where, window)  # type: ignore[arg-type]

    assert taken()
    assert not taken(OnGpu(length=512))
    assert not taken(OnGpu(width=96))
    assert not taken(OnGpu(width=8))
    assert not taken(OnGpu(dtype=torch.float64))
    assert not taken(where=padded)
    assert not taken(window=64)
    for length in range(2049, 2048 + stream_attention.MOST):
        assert taken(OnGpu(length=length))
    assert not taken(OnGpu(length=4096))
    assert taken()  # those that are compiled stay
