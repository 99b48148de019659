r"""Who sees whom in a two-stream pass, written out: the table that attention layers must agree with.

Of 2L tokens the first L are noisy, the others clean; :math:`\mathrm{blk}(i) = \lfloor (i \bmod L) / b \rfloor` (arXiv:2503.09573).

=======  =======  ========================
query    key      visible if and only if
=======  =======  ========================
noisy    noisy    blk(key) = blk(query)
noisy    clean    blk(key) < blk(query)
clean    clean    blk(key) <= blk(query)
clean    noisy    never
=======  =======  ========================

b = L is masked diffusion over the whole sequence; b = 1 is autoregression with a mask as the query.
"""

import torch
from torch import Tensor


def two_stream_mask(length: int, block_length: int) -> Tensor:
    """``[2L, 2L]`` bool, rows are queries, noisy tokens first; the last block may be shorter."""
    for name, value in (("length", length), ("block_length", block_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    block = torch.arange(length) // block_length
    query, key = block[:, None], block[None, :]
    nothing = torch.zeros(length, length, dtype=torch.bool)
    of_noisy, of_clean = torch.cat([key == query, key < query], 1), torch.cat([nothing, key <= query], 1)
    return torch.cat([of_noisy, of_clean])
