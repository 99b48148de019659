"""How likely a title belongs to the catalog, under which leaf, and why.

>>> from latentcot.catalog.relevance import score
>>> score("Looped Transformers for Length Generalization").leaf
'vertical/architecture'

A title is enough; an abstract is read where there is one. Scoring is plain Python and always gives the same numbers;
training needs numpy, which is imported only then.
"""

from latentcot.catalog.relevance.score import Near, Proposal, Score, score

VERSION = 1

__all__ = ["VERSION", "Near", "Proposal", "Score", "score"]
