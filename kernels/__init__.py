"""Operators: gated scan, decay attention, delta rule, and the short convolution and norms around them.

Three families serve the linear token mixers of the library: :func:`gated_scan`, :func:`decay_attention` and
:func:`delta_rule`. Each exists step by step (the definition), chunk-parallel in PyTorch, compiled for CPUs and in
Triton; equations and a table of the back ends are in ``README.md`` beside this file. Shape letters: B batch, S sequence,
D width, H heads, K key width, V value width, C chunk, R reflections, W window, N sequences (= B unless ``cu_seqlens``
packs them into one row).
"""

if __name__ == "kernels":  # found under its bare name from a checkout's root: that name belongs to another distribution
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _this = sys.modules[__name__]
    _here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        _spec = PathFinder.find_spec("kernels", [p for p in sys.path if os.path.abspath(p or os.getcwd()) != _here])
        if _spec is not None and _spec.loader is not None:
            _other = module_from_spec(_spec)
            sys.modules["kernels"] = _other
            _spec.loader.exec_module(_other)
    except Exception as _error:  # raising here would take down programs that only look whether `kernels` exists
        import warnings

        sys.modules["kernels"] = _this
        warnings.warn(f"the other distribution named 'kernels' could not be imported: {_error!r}", stacklevel=2)
else:
    from latentcot.kernels.blocks import Stream
    from latentcot.kernels.convolution import short_convolution, short_convolution_qkv
    from latentcot.kernels.decay_attention.fused import hgrn2_attention
    from latentcot.kernels.decay_attention.op import decay_attention
    from latentcot.kernels.delta_rule.fused import gated_delta_net
    from latentcot.kernels.delta_rule.op import delta_rule
    from latentcot.kernels.dispatch import explain_backend
    from latentcot.kernels.gated_scan.fused import hgrn_scan
    from latentcot.kernels.gated_scan.op import gated_scan
    from latentcot.kernels.normalisation import gated_rms_norm, l2_norm
    from latentcot.kernels.two_stream import block_two_stream
    from latentcot.kernels.visibility import Bidirectional, BlockCausal, Causal

    __all__ = [
        "Bidirectional",
        "BlockCausal",
        "Causal",
        "Stream",
        "block_two_stream",
        "decay_attention",
        "delta_rule",
        "explain_backend",
        "gated_delta_net",
        "gated_rms_norm",
        "gated_scan",
        "hgrn2_attention",
        "hgrn_scan",
        "l2_norm",
        "short_convolution",
        "short_convolution_qkv",
    ]
