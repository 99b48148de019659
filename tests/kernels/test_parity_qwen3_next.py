"""The gated delta rule against an independent implementation: the plain-torch one of transformers' Qwen3-Next."""

# Operators are called with ** dictionaries of tensors, which a type checker cannot match with their parameters.
# pyright: reportArgumentType=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import pytest
import torch

from latentcot.kernels import delta_rule, l2_norm

qwen3_next = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
FORMS = ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("with_state", [False, True], ids=["zero", "state"])
@pytest.mark.parametrize("S", [1, 20, 64, 130])
def test_same_outputs_state_and_gradients(form, with_state, S):
    """Their scale is K ** -0.5 too, applied after the optional L2 norm; their state has our layout [B,H,K,V]."""
    if not hasattr(qwen3_next, form):
        pytest.skip(f"this version of transformers has no {form}")
    generator = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(2, S, 2, 16, generator=generator) for _ in range(3))
    beta, gate = torch.rand(2, S, 2, generator=generator), -torch.rand(2, S, 2, generator=generator)
    state = torch.randn(2, 2, 16, 16, generator=generator) if with_state else None
    leaves = [t.requires_grad_() for t in (q, k, v, beta, gate) if t is not None]
    ours, last = delta_rule(l2_norm(q), l2_norm(k), v, beta, gate, initial_state=state, output_state=True)
    theirs, their_last = getattr(qwen3_next, form)(
        q, k, v, g=gate, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    upstream = torch.randn(ours.shape, generator=generator)
    pairs = [(ours, theirs), (last, their_last)]
    pairs += zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    )
    for actual, expected in pairs:
        error = (actual - expected).norm() / expected.norm().clamp_min(1e-6)
        assert error < 1e-5
