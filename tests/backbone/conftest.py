"""Shared by the mixer tests: small layers of every kind with random weights, and one way to call them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from latentcot.backbone import ModelState, SequenceContext
from latentcot.backbone.mixers import Mixer, find_mixer, make_options
from latentcot.backbone.mixers.base import LOWER_BOUNDS
from latentcot.backbone.mixers.bounds import stacked_bounds
from latentcot.backbone.state import LayerState

WIDTH = 24
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("attention", {"num_heads": 4}),
    "attention-grouped-window": (
        "attention",
        {"num_heads": 4, "num_kv_heads": 2, "window_size": 5, "rotary_layout": "interleaved", "bias": "qkv"},
    ),
    "hgrn": ("hgrn", {}),
    "hgrn-wide-conv": ("hgrn", {"expand_ratio": 1.5, "use_short_conv": True, "elementwise_affine": False}),
    "retnet": ("retnet", {"num_heads": 2}),
    "retnet-grouped-elu": (
        "retnet",
        {"num_heads": 4, "num_kv_heads": 2, "expand_v": 0.5, "feature_map": "elu", "use_output_gate": False},
    ),
    "gla": ("gla", {"num_heads": 2}),
    "gla-grouped-elu-conv": (
        "gla",
        {
            "num_heads": 3,
            "num_kv_heads": 1,
            "expand_k": 1.0,
            "feature_map": "elu",
            "clamp_min": -0.04,
            "use_output_gate": False,
            "use_short_conv": True,
        },
    ),
    "hgrn2": ("hgrn2", {"num_heads": 2, "expand_ratio": None}),
    "hgrn2-conv-unbounded": (
        "hgrn2",
        {"num_heads": 2, "expand_ratio": 5, "use_short_conv": True, "conv_size": 3, "use_lower_bound": False},
    ),
    "deltanet": ("deltanet", {"num_heads": 2}),
    "deltanet-elu-sum-gate-negative": (
        "deltanet",
        {"num_heads": 1, "qk_activation": "elu", "qk_norm": "sum", "use_gate": True, "allow_neg_eigval": True},
    ),
    "deltanet-bare": (
        "deltanet",
        {
            "num_heads": 2,
            "expand_k": 0.5,
            "use_beta": False,
            "use_output_norm": False,
            "use_gate": True,
            "qk_activation": "identity",
            "use_short_conv": False,
            "combine": "gate",
        },
    ),
    "gated_deltanet": ("gated_deltanet", {"num_heads": 2, "head_dim": 12}),
    "gated_deltanet-grouped-negative": (
        "gated_deltanet",
        {
            "num_heads": 1,
            "num_v_heads": 2,
            "head_dim": 10,
            "expand_v": 1.5,
            "use_gate": False,
            "allow_neg_eigval": True,
            "combine": "gate",
        },
    ),
    "gated_deltanet-plain": ("gated_deltanet", {"num_heads": 2, "head_dim": 6, "use_short_conv": False}),
}


@dataclass
class Layer:
    """A mixer outside a model. ``bounds`` is what a model would lay into each context, ``[L, width]``, or ``None``."""

    mixer: Mixer
    bounds: Tensor | None

    @property
    def bound(self) -> Tensor | None:
        return None if self.bounds is None else self.bounds[self.mixer.layer_index]

    def context(self, x: Tensor, past: ModelState | None = None, **options: Any) -> SequenceContext:
        context = SequenceContext.build(x.shape[0], x.shape[1], state=past, **options)
        if self.bounds is not None:
            context.tables[LOWER_BOUNDS] = self.bounds
        return context

    def __call__(self, x: Tensor, state: LayerState | None = None, **options: Any) -> tuple[Tensor, LayerState | None]:
        return self.mixer(x, self.context(x, **options), state)

    def to(self, dtype: torch.dtype) -> "Layer":
        wide = torch.promote_types(dtype, torch.float32)  # a model computes its bounds in no less
        return Layer(self.mixer.to(dtype), None if self.bounds is None else self.bounds.to(wide))


def _make_layer(name: str) -> Layer:
    kind, values = LAYERS[name]
    torch.manual_seed(sorted(LAYERS).index(name))
    mixer = find_mixer(kind)[0](WIDTH, make_options(kind, values)).double()  # type: ignore[call-arg]
    mixer.init_weights(0.3, "uniform")
    for key, parameter in mixer.named_parameters():
        if "norm" in key:
            parameter.data.normal_(1.0, 0.2)
        elif "conv1d" not in key and key not in ("A_log", "dt_bias"):
            parameter.data.normal_(0.0, 0.3)
    bounds = None
    if mixer.bound_width:
        mixer.layer_index = 2
        bounds = stacked_bounds(torch.randn(4, mixer.bound_width, dtype=torch.float64))
    return Layer(mixer, bounds)


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Layer:
    """Every kind of layer in turn, in fp64."""
    return _make_layer(request.param)


@pytest.fixture
def make_layer() -> Callable[[str], Layer]:
    return _make_layer


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """Random hidden states ``[batch, length, WIDTH]``."""

    def make(batch: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=generator)

    return make


@pytest.fixture(params=["reference", "chunked", "compiled"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each back end of a CPU in turn, where ``auto`` would choose."""
    from latentcot.kernels.cpu_threads import missing_for_compiled
    from latentcot.kernels.decay_attention import fused as decay_fused
    from latentcot.kernels.decay_attention import op as decay
    from latentcot.kernels.delta_rule import fused as delta_fused
    from latentcot.kernels.delta_rule import op as delta
    from latentcot.kernels.gated_scan import fused as scan_fused
    from latentcot.kernels.gated_scan import op as scan

    if request.param == "compiled" and (missing := missing_for_compiled()) is not None:
        pytest.skip(f"the compiled back end can not run here: {missing}")
    for module in (decay, decay_fused, delta, delta_fused, scan, scan_fused):
        original = module.choose_backend

        def choose(operator, device, dtype, backend, original=original):
            return original(operator, device, dtype, request.param if backend == "auto" else backend)

        monkeypatch.setattr(module, "choose_backend", choose)
    return request.param
