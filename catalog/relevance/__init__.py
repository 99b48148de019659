"""How likely a title belongs to the catalog, under which leaf, and why.

>>> from latentcot.catalog.relevance import score
>>> score("Looped Transformers for Length Generalization").leaf
'vertical/architecture'

A title is enough; an abstract is read where there is one. Nothing here needs torch, a network or a random number.
"""

from latentcot.catalog.relevance.score import Proposal, Score, score

__all__ = ["Proposal", "Score", "score"]
