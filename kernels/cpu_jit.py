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
from numba import types
from numba.extending import intrinsic

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
