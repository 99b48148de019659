"""Memory-saving training: the same losses and gradients, fewer tensors kept for backward."""

import pytest
import torch

from latentcot.backbone import HybridConfig, HybridForCausalLM
from latentcot.backbone.loss import summed_cross_entropy
from latentcot.reasoner import StepContext
from latentcot.training.language import LanguageModel, TokenBatch

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "mixers": "gated_deltanet,hgrn2,attention",
    "attention": {"num_heads": 2},
    "gated_deltanet": {"num_heads": 2, "head_dim": 16},
    "hgrn2": {"expand_ratio": 16},
}


def model(**changes):
    torch.manual_seed(0)
    return HybridForCausalLM(HybridConfig(**{**SMALL, **changes})).double().train()


def tokens(B=3, S=21):
    return torch.randint(3, 97, (B, S), generator=torch.Generator().manual_seed(1))


def kept_bytes(run):
    """Bytes of different tensors that autograd keeps while ``run`` builds its graph."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # holds it, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("placement", ["pre", "sandwich_pre_residual", "sandwich_post_residual", "post"])
@pytest.mark.parametrize(
    "saving", [{"recompute_mlp": True}, {"loss_chunk": 7}, {"recompute_mlp": True, "loss_chunk": 64}]
)
def test_saving_memory_changes_no_gradient(saving, placement):
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    results = []
    for changes in ({}, saving):
        net = model(norm_placement=placement, **changes)
        loss = net(ids, attention_mask=mask, labels=ids).loss
        results.append((loss, torch.autograd.grad(loss, list(net.parameters()))))
    (plain, expected), (saved, actual) = results
    torch.testing.assert_close(saved, plain, rtol=1e-13, atol=1e-13)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_packed_rows_score_the_same_positions_in_chunks():
    ids = tokens(1, 30)
    cuts = torch.tensor([0, 11, 30])
    plain, saved = (model(**c)(ids, labels=ids, cu_seqlens=cuts).loss for c in ({}, {"loss_chunk": 4}))
    torch.testing.assert_close(saved, plain, rtol=1e-13, atol=1e-13)


def test_logits_are_missing_only_where_they_are_never_whole():
    net, ids = model(loss_chunk=8), tokens()
    assert net(ids, labels=ids).logits is None
    assert net(ids).logits.shape == (3, 21, 97)
    assert net.eval()(ids, labels=ids).logits.shape == (3, 21, 97)


def test_fewer_bytes_are_kept():
    ids = tokens(4, 64)
    wide = {"intermediate_size": 512, "vocab_size": 2048}
    plain, mlp, both = (
        kept_bytes(lambda c=c: model(**wide, **c)(ids, labels=ids))
        for c in ({}, {"recompute_mlp": True}, {"recompute_mlp": True, "loss_chunk": 32})
    )
    # gate, up, silu(gate) and their product: four tensors [4,64,512] a block; logits twice: [4,63,2048]
    assert plain - mlp > 3 * 3.9 * 4 * 64 * 512 * 8
    assert mlp - both > 0.9 * 4 * 63 * 2048 * 8


def test_the_language_model_scores_in_chunks():
    ids = tokens(2, 20)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    losses = []
    for changes in ({}, {"loss_chunk": 5}):
        reasoner = LanguageModel(model(**changes))
        losses.append(
            reasoner.loss(TokenBatch(ids, labels), StepContext(0, 1, reasoner.phases()[0], torch.Generator())).loss
        )
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-13, atol=1e-13)


def test_no_gradient_and_one_token_run_as_ever():
    net, ids = model(recompute_mlp=True).eval(), tokens()
    with torch.no_grad():
        torch.testing.assert_close(net(ids).logits, model().eval()(ids).logits)
    assert net.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (3, 24)


@pytest.mark.parametrize("chunk", [0, -3, 1.5])
def test_a_chunk_that_is_no_count_is_refused(chunk):
    with pytest.raises(ValueError, match=r"loss_chunk: .* given, expected a positive number"):
        HybridConfig(**SMALL, loss_chunk=chunk)


def test_a_chunk_below_one_is_refused_at_the_call():
    with pytest.raises(ValueError, match="loss_chunk: 0 positions given"):
        summed_cross_entropy(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), torch.nn.Linear(4, 5), 0)


def test_labels_of_another_shape_are_refused():
    ids = tokens()
    with pytest.raises(ValueError, match=r"labels: shape \[3, 20\] given, expected \[3, 21\]"):
        model(loss_chunk=8)(ids, labels=ids[:, 1:])


def test_the_options_travel_with_the_configuration(tmp_path):
    model(recompute_mlp=True, loss_chunk=9).save_pretrained(tmp_path)
    config = HybridForCausalLM.from_pretrained(tmp_path).config
    assert (config.recompute_mlp, config.loss_chunk) == (True, 9)
