"""From listed sections and titles to leaves and facets.

Three strengths of evidence for a leaf: a section whose meaning is plain (``listed``), a section that is only a hint
(``proposed``), and the title read by rules (``proposed``). The strongest that exists gives the primary leaf; every leaf
of that strength is kept. A hint is added to listed leaves only where it points to another branch. Facets follow from
listed leaves, from badges of a list and from words of the title, and from nothing else.
"""

import re
from functools import cache

from latentcot.catalog.leaves import load_facets, load_taxonomy
from latentcot.catalog.raw import SEEDS, Row
from latentcot.catalog.record import Facets, Link, Taxonomy

# The list that is asked first gives the primary leaf.
LIST_ORDER = (
    "multimodal-art-projection/LatentCoT-Horizon",
    "EIT-NLP/Awesome-Latent-CoT",
    "weigao266/Awesome-Efficient-Arch",
    "huskydoge/Awesome-Loop-Models",
    "VILA-Lab/Awesome-DLMs",
    "YU-deep/Awesome-Latent-Space",
)


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


def section_leaf(source: str, section: tuple[str, ...], rules: dict) -> tuple[str, str] | None:
    """(leaf, status) for the last element of a section path, matched by prefix; ``None`` where no rule speaks."""
    for rule in rules["sections"]:
        if rule["list"] == source and section[-1].startswith(rule["section"]):
            return rule["leaf"], rule["status"]
    return None


def title_leaf(title: str, rules: dict, branch: str = "") -> str | None:
    """The leaf that the first matching title rule names, of all rules or of those whose leaf is in ``branch``."""
    for rule in rules["title_rules"]:
        if rule["leaf"].startswith(branch) and _compiled(rule["pattern"]).search(title):
            return rule["leaf"]
    return None


def classify(key: str, title: str, rows: tuple[Row, ...], rules: dict) -> tuple[Taxonomy, list[str]]:
    """The taxonomy entry of a record, and the leaves that are *listed* (evidence for facets)."""
    listed: list[str] = []
    hinted: list[str] = []
    filings = [(row, listing) for row in rows for listing in row.listings if listing.source != SEEDS]
    rank = {name: place for place, name in enumerate(LIST_ORDER)}
    for _, listing in sorted(filings, key=lambda pair: rank.get(pair[1].source, len(rank))):
        found = section_leaf(listing.source, listing.section, rules)
        if found is None:
            continue
        leaf, status = found
        if listing.section[-1] == "Applications and Future Directions":
            # The mapping sends such a paper to another leaf where its title says so.
            leaf = title_leaf(title, rules, "beyond/multimodal") or leaf
        if listing.section[-1] == "Analysis and Interpretability":
            leaf = title_leaf(title, rules, "mechanisms/") or leaf
        (listed if status == "listed" else hinted).append(leaf)
    seed_leaf = next((rule["leaf"] for rule in rules["seed_leaves"] if rule["key"] == key), None)
    branch = load_taxonomy().branch_of
    if listed:
        branches = {branch(leaf).slug for leaf in listed}
        leaves, status = listed + [leaf for leaf in hinted if branch(leaf).slug not in branches], "listed"
    elif seed_leaf:
        leaves, status = [seed_leaf], "proposed"
    else:
        leaves, status = hinted or [title_leaf(title, rules) or rules["title_default"]], "proposed"
    for rule in rules["extra_leaves"]:
        if rule["key"] == key:
            leaves = leaves + rule["also"]
    leaves = list(dict.fromkeys(leaves))
    taxonomy = Taxonomy.model_validate({"primary": leaves[0], "also": leaves[1:], "status": status})
    return taxonomy, listed


def facets(
    title: str, taxonomy: Taxonomy, listed: list[str], rows: tuple[Row, ...], links: list[Link], rules: dict
) -> Facets:
    """Facet values that follow from evidence, in the order of the vocabulary."""
    found: dict[str, set[str]] = {name: set() for name in Facets.model_fields}
    for leaf in listed:
        if leaf in rules["leaf_mechanisms"]:
            found["mechanism"].add(rules["leaf_mechanisms"][leaf])
        if leaf in rules["leaf_stages"]:
            found["stage"].add(rules["leaf_stages"][leaf])
    if "vertical/feedback" in taxonomy.also or taxonomy.primary == "vertical/feedback":
        found["mechanism"].add("hidden-state-feedback")
    for row in rows:
        for badge in row.badges:
            if badge in rules["badges"]:
                facet, value = rules["badges"][badge]
                found[facet].add(value)
    for rule in rules["title_facets"]:
        if _compiled(rule["pattern"]).search(title):
            found[rule["facet"]].add(rule["value"])
    if any(link.kind == "code" and link.official is not False for link in links):
        found["artifacts"].add("code")
    values = {
        entry.slug: [value.slug for value in entry.values if value.slug in found[entry.slug]]
        for entry in load_facets().facets
    }
    return Facets.model_validate({name: values[name] for name in Facets.model_fields})
