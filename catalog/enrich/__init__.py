"""Values that a record did not come with: venues, code, link health. Every value carries source, date and confidence.

One module a source. What a person wrote always wins, a weaker source never overwrites a stronger one, and an enricher that fails is
reported and never stops an update (:mod:`latentcot.catalog.enrich.runner`).
"""
