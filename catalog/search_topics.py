r"""How probable each topic is for the words of a query, from the titles of the papers filed there.

.. math:: P(l \mid w_1, \dots) \propto \prod_i \frac{n_{il} + c\, n_i / N}{(n_l + c)\, n_i / N}

with :math:`n_{il}` of the :math:`n_l` papers of topic *l* having word :math:`w_i` in their title, :math:`n_i` of all
*N*: naive Bayes with all topics equally frequent, where every topic is given *c* papers of the average beside its own.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

_ADDED = 2.0  # c


class TopicWords:
    """Counts of title stems by topic; ``titles`` and ``topics`` hold the stems and the topic of each paper."""

    def __init__(self, titles: Sequence[Iterable[str]], topics: Sequence[str]) -> None:
        import numpy as np

        self.topics = sorted(set(topics))
        place = {topic: number for number, topic in enumerate(self.topics)}
        width = len(self.topics)
        self._papers = len(topics)
        self._sizes = np.bincount([place[topic] for topic in topics], minlength=width).astype(np.float32)
        self._number: dict[str, int] = {}
        cells = array("q")
        for stems, topic in zip(titles, topics, strict=True):
            for stem in set(stems):
                cells.append(self._number.setdefault(stem, len(self._number)) * width + place[topic])
        counts = np.bincount(np.array(cells, dtype=np.int64), minlength=len(self._number) * width)
        self._counts: Any = counts.reshape(len(self._number), width).astype(np.float32)

    def chances(self, stems: Iterable[str]) -> dict[str, float]:
        """Probability of every topic; empty where no title has any of the stems."""
        import numpy as np

        known = [self._number[stem] for stem in dict.fromkeys(stems) if stem in self._number]
        if not known:
            return {}
        counts = self._counts[known]  # [stems, topics]
        average = counts.sum(axis=1, keepdims=True) / self._papers
        logs = np.log((counts + _ADDED * average) / ((self._sizes + _ADDED) * average)).sum(axis=0)
        found = np.exp(logs - logs.max())
        return dict(zip(self.topics, (found / found.sum()).tolist(), strict=True))
