"""Released Huginn weights: their names and shapes, read into a :class:`~latentcot.recurrent_depth.DepthRecurrence` and
written from one.

====================================================== ========================= ==========================================
name                                                   shape                     here
====================================================== ========================= ==========================================
``freqs_cis``                                          (1, context, 1, d/2, 2)   ignored: rotary angles are computed
``transformer.wte.weight``                             (V, D)                    embedding
``lm_head.weight``                                     (V, D)                    must equal the embedding (tied)
``transformer.adapter.weight``                         (D, 2 D)                  adapter, state first
``transformer.ln_f.weight``                            (D)                       the final norm, used twice
``transformer.{prelude,core_block,coda}.i.``
``attn.Wqkv.weight``                                   (3 D, D)                  split into q, k, v
``attn.qk_bias``                                       (2, 1, H, d)              split into the biases of q and k
``attn.proj.weight``                                   (D, D)                    o
``mlp.fc.weight``                                      (2 m, D)                  split into gate (through SiLU) and up
``mlp.proj.weight``                                    (D, m)                    down
``norm_1.weight`` … ``norm_4.weight``                  (D)                       n_1 … n_4
====================================================== ========================= ==========================================

Sizes are read off the shapes, so that no configuration file is needed. Source: the shard index of ``huginn-0125``.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from latentcot.backbone.checkpoint_config import CheckpointError
from latentcot.backbone.checkpoint_files import open_tensors
from latentcot.backbone.checkpoint_keys import CheckpointMismatchError, Piece
from latentcot.recurrent_depth.depth_recurrence import DepthRecurrence
from latentcot.recurrent_depth.huginn import HuginnShape, build_huginn

IGNORED = "freqs_cis"
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
PARTS = {"prelude": "prelude", "core": "core_block", "coda": "coda"}
NORMS = {"norm_1": "attn_norm", "norm_2": "attn_norm_2", "norm_3": "mlp_norm", "norm_4": "mlp_norm_2"}


@dataclass(frozen=True)
class Source:
    """One stored tensor and the tensors of the model that it holds, one behind the other along the first axis.
    ``names``: in the model; ``shape``: in the file."""

    key: str
    shape: tuple[int, ...]
    names: tuple[str, ...]


def huginn_keys(shape: HuginnShape) -> list[Source]:
    """Every tensor of a released checkpoint of these sizes but the head's duplicate and the rotary buffer."""
    width, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads
    sources = [
        Source(EMBEDDING, (shape.vocab_size, width), ("backbone.model.embeddings.weight",)),
        Source("transformer.adapter.weight", (width, 2 * width), ("adapter.weight",)),
        Source("transformer.ln_f.weight", (width,), ("backbone.model.norm.weight",)),
    ]
    block = 0
    for part, stored in PARTS.items():
        for number in range(getattr(shape, part)):
            there, here = f"transformer.{stored}.{number}", f"backbone.model.layers.{block}"
            attn, mlp = f"{here}.attn", f"{here}.mlp"
            qkv = tuple(f"{attn}.{name}_proj.weight" for name in "qkv")
            biases = tuple(f"{attn}.{name}_proj.bias" for name in "qk")
            gated = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
            sources += [
                Source(f"{there}.attn.Wqkv.weight", (3 * width, width), qkv),
                Source(f"{there}.attn.qk_bias", (2, 1, heads, width // heads), biases),
                Source(f"{there}.attn.proj.weight", (width, width), (f"{attn}.o_proj.weight",)),
                Source(f"{there}.mlp.fc.weight", (2 * inner, width), gated),
                Source(f"{there}.mlp.proj.weight", (width, inner), (f"{mlp}.down_proj.weight",)),
            ]
            sources += [
                Source(f"{there}.{old}.weight", (width,), (f"{here}.{new}.weight",)) for old, new in NORMS.items()
            ]
            block += 1
    return sources


def read_shape(shapes: Mapping[str, tuple[int, ...]], base: HuginnShape | None = None) -> HuginnShape:
    """Sizes of a checkpoint from the shapes of its tensors; what no shape tells (r, k, rotary base, epsilon) is that of
    ``base``.

    Raises:
        CheckpointMismatchError: a tensor that tells a size is missing.
    """
    counts = {
        part: len({m[1] for key in shapes if (m := re.match(rf"transformer\.{stored}\.(\d+)\.", key))})
        for part, stored in PARTS.items()
    }
    first = f"transformer.{PARTS['core']}.0"
    telling = [EMBEDDING, f"{first}.attn.qk_bias", f"{first}.mlp.proj.weight"]
    if missing := [key for key in telling if key not in shapes]:
        raise CheckpointMismatchError(missing, [], {})
    embedding, bias, down = (shapes[key] for key in telling)
    dimensions = {telling[0]: (embedding, 2), telling[1]: (bias, 4), telling[2]: (down, 2)}
    if wrong := [f"{key} {list(given)}" for key, (given, axes) in dimensions.items() if len(given) != axes]:
        raise CheckpointError(f"checkpoint: these tensors are of no Huginn: {', '.join(wrong)}")
    return replace(
        base or HuginnShape(),
        **counts,
        vocab_size=embedding[0],
        hidden_size=embedding[1],
        num_heads=bias[2],
        intermediate_size=down[1],
    )


def load_huginn(
    source: str | Path | Mapping[str, Tensor],
    *,
    shape: HuginnShape | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DepthRecurrence:
    """Released weights as a model, in evaluation mode.

    Args:
        source: folder with ``model.safetensors`` or its shards and index, or a state dict.
        shape: r, k, rotary base and epsilon when they are not those of ``huginn-0125``; its sizes are those of the file.
        dtype: cast on the way (norm weights stay fp32 then); ``None`` = as stored.

    Raises:
        CheckpointMismatchError: tensors are missing, unknown or of other shapes; lists them all.
        CheckpointError: no weights there, or a head that differs from the embedding.
    """
    if isinstance(source, Mapping):
        shapes = {key: tuple(tensor.shape) for key, tensor in source.items()}
        return _load(shapes, lambda key: source[key], shape, dtype, torch.device(device))
    stored = open_tensors(Path(source), "model", ".safetensors") if Path(source).is_dir() else None
    if stored is None:
        raise CheckpointError(f"source: no model.safetensors and no model.safetensors.index.json in {source}")
    with stored:
        return _load(stored.shapes, lambda key: stored.read(Piece(key)), shape, dtype, torch.device(device))


def _load(
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    base: HuginnShape | None,
    dtype: torch.dtype | None,
    device: torch.device,
) -> DepthRecurrence:
    shape = read_shape(shapes, base)
    sources = huginn_keys(shape)
    known = {source.key for source in sources} | {HEAD, IGNORED}
    different = {s.key: (list(shapes[s.key]), list(s.shape)) for s in sources if shapes.get(s.key, s.shape) != s.shape}
    missing = [source.key for source in sources if source.key not in shapes]
    unexpected = [key for key in shapes if key not in known]
    if missing or unexpected or different:
        raise CheckpointMismatchError(missing, unexpected, different)
    if HEAD in shapes and not (shapes[HEAD] == shapes[EMBEDDING] and torch.equal(read(HEAD), read(EMBEDDING))):
        raise CheckpointError(f"checkpoint: {HEAD} and {EMBEDDING} differ, though the model ties them")
    model = build_huginn(shape, device="meta")
    wanted = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for source in sources:
        for name, tensor in _split(source, read(source.key), wanted):
            kept = dtype if dtype is None or "norm" not in name else torch.promote_types(dtype, torch.float32)
            # a clone: pieces of one storage could not be saved apart, and the caller's tensors stay the caller's
            tensors[name] = tensor.to(device, tensor.dtype if kept is None else kept, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)  # strict but for the tied head, compared above
    model.backbone.tie_weights()
    model.backbone.config.dtype = tensors["backbone.model.embeddings.weight"].dtype
    return model.eval()


def _split(source: Source, stored: Tensor, wanted: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    pieces = stored.chunk(len(source.names), 0)
    for name, piece in zip(source.names, pieces, strict=True):
        yield name, piece.reshape(wanted[name].shape)


def shape_of(model: DepthRecurrence) -> HuginnShape:
    """The sizes of a model; ``ValueError`` when it is no Huginn (another mixer, norm placement, rotary layout, ...)."""
    config, blocks = model.backbone.config, [s.stop - s.start for s in (model.prelude, model.core, model.coda)]
    attention = config.attention
    shape = HuginnShape(
        *blocks,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_heads=attention["num_heads"],
        intermediate_size=config.intermediate_size,
        mean_recurrences=model.sampler.typical,
        rope_theta=attention["rope_theta"],
        norm_eps=config.norm_eps,
    )
    wanted = shape.backbone()
    names = ["mixers", "norm_placement", "norm_affine", "tie_word_embeddings", "attention"]
    differing = {n: (getattr(config, n), getattr(wanted, n)) for n in names if getattr(config, n) != getattr(wanted, n)}
    factor = config.embedding_scale * model.embedding_factor
    if abs(factor - wanted.embedding_scale) > 1e-9 * factor:
        differing["embedding_scale"] = (factor, wanted.embedding_scale)
    for name, given, needed in (
        ("injection", model.injection.kind, "linear"),
        ("readout", model.readout.loop_norm, "after_loop"),
    ):
        if given != needed:
            differing[name] = (given, needed)
    if differing:
        lines = ", ".join(f"{name} is {given!r}, expected {needed!r}" for name, (given, needed) in differing.items())
        raise ValueError(f"model: no Huginn: {lines}")
    return shape


def export_huginn(model: DepthRecurrence) -> dict[str, Tensor]:
    """The model under the released names, the head's duplicate included and the rotary buffer left out.

    Raises:
        ValueError: the model is no Huginn; every difference is named.
    """
    here = model.state_dict()
    tensors = {
        source.key: torch.cat([here[name].detach() for name in source.names]).reshape(source.shape)
        for source in huginn_keys(shape_of(model))
    }
    tensors[HEAD] = tensors[EMBEDDING].clone()
    return tensors
