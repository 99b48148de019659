"""Layer norm, the GELU MLP and modulation: what masked-diffusion transformers have in a block."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latentcot.backbone import DecodeEngine, HybridConfig, HybridForCausalLM, SequenceContext
from latentcot.backbone.block import CONDITION
from latentcot.backbone.checkpoint_config import CheckpointError, config_to_published
from latentcot.kernels import Bidirectional

D, W, H = 16, 6, 2


def model(**changes) -> HybridForCausalLM:
    options = {
        "vocab_size": 13,
        "hidden_size": D,
        "num_hidden_layers": 2,
        "mixer": "attention",
        "attention": {"num_heads": H},
        "norm": "layer",
        "norm_eps": 1e-5,
        "mlp": "gelu",
        "modulation": W,
        "head_bias": True,
    }
    torch.manual_seed(0)
    built = HybridForCausalLM(HybridConfig(**(options | changes))).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():  # zero gates would hide everything
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return built


def by_hand(net: HybridForCausalLM, ids: Tensor, c: Tensor) -> Tensor:
    """The modulated transformer from its equations: x + g f(n(x)(1 + s) + b), rotary attention seen from both sides."""
    w = dict(net.state_dict())
    x = w["model.embeddings.weight"][ids]
    batch, length = ids.shape

    def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:  # [B, S, H, K], pairs (j, j + K/2)
        half = x.shape[-1] // 2
        angle = torch.arange(length).double()[:, None] * 10000.0 ** -(torch.arange(half).double() / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)

    for i in range(net.config.num_hidden_layers):
        p = f"model.layers.{i}."
        six = (c @ w[p + "modulation.weight"].T + w[p + "modulation.bias"])[:, None].chunk(6, -1)
        h = layer_norm(x, w[p + "attn_norm.weight"]) * (1 + six[1]) + six[0]
        q, k, v = ((h @ w[f"{p}attn.{name}_proj.weight"].T).view(batch, length, H, D // H) for name in ("q", "k", "v"))
        scores = torch.einsum("bihd,bjhd->bhij", rotate(q), rotate(k)) / (D // H) ** 0.5
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + six[2] * (mixed @ w[p + "attn.o_proj.weight"].T)
        h = layer_norm(x, w[p + "mlp_norm.weight"]) * (1 + six[4]) + six[3]
        inner = F.gelu(h @ w[p + "mlp.up_proj.weight"].T + w[p + "mlp.up_proj.bias"], approximate="tanh")
        x = x + six[5] * (inner @ w[p + "mlp.down_proj.weight"].T + w[p + "mlp.down_proj.bias"])
    shift, scale = (c @ w["model.norm_modulation.weight"].T + w["model.norm_modulation.bias"])[:, None].chunk(2, -1)
    x = layer_norm(x, w["model.norm.weight"]) * (1 + scale) + shift
    return x @ w["lm_head.weight"].T + w["lm_head.bias"]


def test_modulated_transformer_equals_its_equations():
    net = model()
    ids, c = torch.randint(0, 13, (3, 7)), torch.randn(3, W, dtype=torch.float64)
    out = net(ids, condition=c, visibility=Bidirectional()).logits
    torch.testing.assert_close(out, by_hand(net, ids, c), rtol=0, atol=1e-12)
    a_token_each = net(ids, condition=c[:, None].expand(3, 7, W), visibility=Bidirectional()).logits
    torch.testing.assert_close(a_token_each, out, rtol=0, atol=1e-12)


def test_a_block_is_the_identity_at_first():
    torch.manual_seed(0)
    net = HybridForCausalLM(
        HybridConfig(vocab_size=13, hidden_size=D, num_hidden_layers=2, attention={"num_heads": H}, mixer="attention",
                     modulation=W)
    )  # fmt: skip
    hidden, c = torch.randn(2, 5, D), torch.randn(2, W)
    context = SequenceContext.build(2, 5, visibility=Bidirectional())
    context.tables[CONDITION] = c
    assert torch.equal(net.run(hidden, context)[0], hidden)


def test_recomputing_the_second_half_gives_the_same_gradients():
    ids, c = torch.randint(0, 13, (2, 5)), torch.randn(2, W, dtype=torch.float64)
    grads = []
    for recompute in (False, True):
        net = model(recompute_mlp=recompute).train()
        net(ids, condition=c, visibility=Bidirectional()).logits.square().sum().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(net.parameters()))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_saved_and_loaded_bit_for_bit(tmp_path):
    net = model()
    net.save_pretrained(tmp_path)
    again = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.modulation == W
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: HybridConfig(norm="batch"), "norm: 'batch' given"),
        (lambda: HybridConfig(mlp="relu"), "mlp: 'relu' given"),
        (lambda: HybridConfig(modulation=0), "modulation: expected a positive integer"),
        (lambda: HybridConfig(modulation=4, norm_placement="post"), "norm_placement 'pre'"),
        (lambda: model()(torch.zeros(1, 2).long()), "condition: none given"),
        (lambda: model(modulation=None)(torch.zeros(1, 2).long(), condition=torch.zeros(1, W)), "condition: one given"),
        (lambda: model()(torch.zeros(1, 2).long(), condition=torch.zeros(1, 3)), "expected .B, 6."),
        (lambda: model().head(torch.zeros(1, 2, D)), "conditioning"),
        (lambda: DecodeEngine(model(modulation=None), 1, 4), "the engine knows norm"),
    ],
)
def test_bad_input_says_what_was_expected(call, says: str):
    with pytest.raises(ValueError, match=says):
        call()


def test_the_published_format_has_no_modulation():
    with pytest.raises(CheckpointError, match="modulation"):
        config_to_published(HybridConfig(mixer="attention", modulation=4))
