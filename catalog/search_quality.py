r"""How good a ranking is: nDCG and reciprocal rank against graded judgements.

.. math:: \mathrm{DCG@}k = \sum_{i=1}^{k} \frac{2^{g_i} - 1}{\log_2(i + 1)}, \qquad
          \mathrm{nDCG@}k = \frac{\mathrm{DCG@}k}{\mathrm{DCG@}k \text{ of the best order}}

with :math:`g_i` the grade of the paper at rank *i*, 0 for a paper that was not judged (Järvelin and Kekäläinen 2002,
with the exponential gain of Burges et al. 2005).
"""

import math
from collections.abc import Mapping, Sequence


def ndcg(ranking: Sequence[str], grades: Mapping[str, int], k: int = 10) -> float:
    """nDCG@k of ``ranking`` (keys, best first). Raises ``ValueError`` where no paper has a grade above zero."""
    best = _dcg(sorted(grades.values(), reverse=True)[:k])
    if best <= 0:
        raise ValueError("grades: at least one paper must have a grade above 0")
    return _dcg([grades.get(key, 0) for key in ranking[:k]]) / best


def reciprocal_rank(ranking: Sequence[str], wanted: str) -> float:
    """1 / rank of ``wanted``, 0 where it is not in the ranking."""
    return 1 / (ranking.index(wanted) + 1) if wanted in ranking else 0.0


def _dcg(grades: Sequence[int]) -> float:
    return sum((2**grade - 1) / math.log2(place + 2) for place, grade in enumerate(grades))
