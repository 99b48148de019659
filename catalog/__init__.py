"""The paper catalog: one record a paper, a taxonomy, search and export.

>>> from latentcot.catalog import find, load_records
>>> find("arXiv:2412.06769v2").title
'Training Large Language Models to Reason in a Continuous Latent Space'

Nothing here imports torch. Records are facts about papers; see the README beside this file.
"""

from latentcot.catalog.leaves import Branch, Facet, Leaf, Tree, load_facets, load_taxonomy
from latentcot.catalog.record import Author, Link, Record, Venue, dump_record, record_schema
from latentcot.catalog.store import CatalogError, UnknownPaperError, find, get, load_records

__all__ = [
    "Author",
    "Branch",
    "CatalogError",
    "Facet",
    "Leaf",
    "Link",
    "Record",
    "Tree",
    "UnknownPaperError",
    "Venue",
    "dump_record",
    "find",
    "get",
    "load_facets",
    "load_records",
    "load_taxonomy",
    "record_schema",
]
