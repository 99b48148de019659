"""How the compiled CPU kernels are built: options, and loads and stores that vectorise.

LLVM turns a loop into vector instructions only if it can show that the arrays it writes do not overlap those it reads.
With the eight or ten arrays of a backward step the checks at run time cost more than the loop, so it gives up. The
kernels know that their arrays are distinct, and :data:`load` and :data:`store` say so: each access carries a lane
number, and accesses of different lanes within one loop never meet. That is a promise of the caller, not checked; an
access by plain indexing makes no promise.

Needs Numba; import this file from kernel files only.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

LANES = 16
WIDTH = 16  # key channels are padded to a multiple: no remainder loops
ROWS = 4  # value channels worked on at once, each a row of the state

# Sums may be reordered and products fused, so reductions vectorise. Infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@lru_cache(maxsize=1)
def _stamp() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("cpu_*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def kernel(function: Any) -> Any:
    """Compile with Numba at the first call, keep the result on disk, release the interpreter lock while running.

    Numba's files on disk are renewed when the file of the compiled function changes, but these kernels have parts of
    other files compiled into them: the stamp is taken over all of them instead.
    """
    compiled: Any = numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")(function)
    compiled._cache._cache_file._source_stamp = _stamp()
    return compiled


def _mark(builder: Any, access: Any, lane: int) -> None:
    module = builder.module
    domain = module.add_metadata(["latentcot.kernels"])
    lanes = [module.add_metadata([f"lane {n}", domain]) for n in range(LANES)]
    access.set_metadata("alias.scope", module.add_metadata([lanes[lane]]))
    access.set_metadata("noalias", module.add_metadata([scope for n, scope in enumerate(lanes) if n != lane]))


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _load(typing_context: Any, array: Any, index: Any, lane: Any) -> Any:
    """``array[index]`` of a contiguous 1-D array, without a bounds check; ``lane`` is a literal below ``LANES``."""
    number = lane.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        value = builder.load(address, align=signature.return_type.bitwidth // 8)
        _mark(builder, value, number)
        return value

    return array.dtype(array, types.intp, lane), generate


def _store(typing_context: Any, array: Any, index: Any, value: Any, lane: Any) -> Any:
    """``array[index] = value``, as :data:`load`."""
    number = lane.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        written = builder.store(arguments[2], address, align=signature.args[2].bitwidth // 8)
        _mark(builder, written, number)
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype, lane), generate


load: Any = intrinsic(prefer_literal=True)(_load)
store: Any = intrinsic(prefer_literal=True)(_store)


def _scaled(typing_context: Any, value: Any, shifted: Any) -> Any:
    """``value * 2^n``, n the low bits of ``shifted``: added to the exponent bits of the value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size = signature.return_type.bitwidth
        integer = ir.IntType(size)
        bits, n = (builder.bitcast(argument, integer) for argument in arguments)
        moved = builder.add(bits, builder.shl(n, ir.Constant(integer, 23 if size == 32 else 52)))
        return builder.bitcast(moved, context.get_value_type(signature.return_type))

    return value(value, shifted), generate


_times_power_of_two: Any = intrinsic(_scaled)


def decay(g: Any) -> Any:
    """e^g for g <= 0, within two units in the last place, 0 below -87 (float64: -708): unlike exp it vectorises.

    n = round(g / ln 2) is read off the low bits of g / ln 2 + 1.5 * 2^23 (2^52); e^(g - n ln 2), with ln 2 split in two
    parts so that the difference keeps its digits, is a Taylor polynomial.
    """
    return np.exp(g)


def _decay32(g: Any) -> Any:
    x = g if g >= np.float32(-87.0) else np.float32(-87.0)
    shifted = x * np.float32(1.4426950408889634) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1 / 720) + r * np.float32(1 / 5040)
    p = np.float32(1 / 24) + r * (np.float32(1 / 120) + r * p)
    p = np.float32(1 / 2) + r * (np.float32(1 / 6) + r * p)
    p = np.float32(1) + r * (np.float32(1) + r * p)
    found = _times_power_of_two(p, shifted)
    return found if g >= np.float32(-87.0) else (np.float32(0.0) if g < np.float32(-87.0) else g)


def _decay64(g: Any) -> Any:
    x = g if g >= -708.0 else -708.0
    shifted = x * 1.4426950408889634 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6
    p = 1 / 479001600 + r * (1 / 6227020800)
    p = 1 / 3628800 + r * (1 / 39916800 + r * p)
    p = 1 / 40320 + r * (1 / 362880 + r * p)
    p = 1 / 720 + r * (1 / 5040 + r * p)
    p = 1 / 24 + r * (1 / 120 + r * p)
    p = 1 / 2 + r * (1 / 6 + r * p)
    p = 1.0 + r * (1.0 + r * p)
    found = _times_power_of_two(p, shifted)
    return found if g >= -708.0 else (0.0 if g < -708.0 else g)


# contraction only: reordering would undo the split of ln 2 and the rounding by a large constant
@overload(decay, jit_options={"fastmath": {"contract"}, "error_model": "numpy"})
def _decay_of(g: Any) -> Any:
    return _decay32 if g == types.float32 else _decay64
