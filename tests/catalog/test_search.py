import pytest

from latentcot.catalog import CatalogError, get, load_records
from latentcot.catalog.filters import Filters
from latentcot.catalog.search import SearchIndex, default_index, search


def keys(query: str, **options) -> list[str]:
    return [hit.record.key for hit in search(query, **options).hits]


def variant(key: str, **update):
    record = get("2412.06769")
    values = {"key": key, "citekey": f"k{key.replace('.', '_')}", "other_titles": [], "links": [], "authors": None}
    values["ids"] = record.ids.model_copy(update={"arxiv": key, "openreview": None})
    return record.model_copy(update=values | update)


AWKWARD = [
    "", " ", "chain-of-thought", "C++", '"', '""', "*", "NEAR", "NEAR(a b)", "a:b", "title:latent", "(", ")", "^", "-",
    "AND", "OR NOT", "latent AND", "{", "+", "'", "'; DROP TABLE papers; --", "\\", "\x00", "lat\x00ent",
    "🤔", "🤔 latent",
    "x" * 100_000, "a " * 5_000, "\ud800", "٣", "王", "é", "%", "_", "latent*", "...", "http://[", "10.1/",
    "１２３４.５６７８９",
]  # fmt: skip


@pytest.mark.parametrize("query", AWKWARD, ids=lambda text: ascii(text[:20]))
def test_any_text_is_safe(query):
    for sort in ("relevance", "date", "added"):
        result = search(query, sort=sort, limit=5)
        assert result.total >= len(result.hits)


@pytest.mark.parametrize("query", ['"', "*", "(", "...", "🤔", "\x01 -"])
def test_mere_punctuation_finds_nothing_or_everything_by_date(query):
    assert search(query).match in ("none", "all")
    assert not search('"').hits


@pytest.mark.parametrize(
    "query",
    [
        "2412.06769", "arXiv:2412.06769v2", "https://arxiv.org/pdf/2412.06769v1.pdf", "Hao2024Training",
        "10.48550/arXiv.2412.06769", "https://openreview.net/forum?id=Itxz7S4Ip3", "https://github.com/facebookresearch/coconut/",
    ],
)  # fmt: skip
def test_an_identifier_is_an_exact_look_up(query):
    result = search(query)
    assert result.match == "exact"
    assert [hit.record.key for hit in result.hits] == ["2412.06769"]


def test_an_id_that_is_not_there_finds_nothing():
    assert search("2301.99999").match == "none"


def test_a_title_finds_its_paper_first():
    for record in load_records()[::37]:
        result = search(record.title)
        assert result.hits[0].record.key == record.key, record.title
        assert result.match == "all"


@pytest.mark.parametrize(
    ("name", "key"),
    [("soft thinking", "2505.15778"), ("codi", "2502.21074"), ("Mamba", "2312.00752"), ("TITANS", "2501.00663")],
)
def test_the_name_of_a_method_finds_its_paper_first(name, key):
    assert keys(name)[0] == key


def test_an_earlier_title_finds_the_paper():
    assert keys("Inheritune smaller yet more attentive")[0] == "2404.08634"


def test_titles_are_stemmed_and_names_are_not():
    index = SearchIndex(
        [
            variant("2401.00001", title="Looping of thoughts", authors=None),
            variant("2401.00002", title="Other", authors=get("2402.07754").authors),
        ]
    )
    assert [hit.record.key for hit in index.search("loops thought").hits] == ["2401.00001"]
    assert [hit.record.key for hit in index.search("Jiacheng").hits] == ["2401.00002"]
    assert index.search("gongs x").match == "none"  # "Gong" is a name: no stem makes it a plural


def test_accents_do_not_matter():
    assert "2505.13898" in keys("csordas")
    assert keys("csordas") == keys("Csordás")


def test_the_last_word_may_be_unfinished():
    assert get("2412.06769").key in keys("continuous latent spa", limit=None)


def test_a_part_of_a_word_or_a_method_name_is_found():
    assert "2502.12134" in keys("oftco")
    assert keys("dllm-cach")[0] == "2506.06295"


def test_words_may_be_spread_over_title_author_and_venue():
    assert keys("goyal pause")[0] == "2310.02226"
    assert "2406.07524" in keys("masked diffusion neurips 2024", limit=None)


def test_most_words_are_better_than_nothing_and_it_is_said():
    result = search("zzzzqx soft thinking concept space")
    assert result.match == "some"
    assert result.hits[0].record.key == "2505.15778"
    assert search("zzzzqx qqqqzx soft").match == "none"


def test_highlights_are_places_in_the_title():
    hit = search("looped transformers programmable").hits[0]
    assert hit.record.key == "2301.13196"
    assert hit.marked("[", "]") == "[Looped] [Transformers] as [Programmable] Computers"
    assert search("oftco").hits[0].marked("[", "]").startswith("S[oftCo]T")
    assert all(0 <= a < b <= len(h.record.title) for h in search("e", limit=50).hits for a, b in h.spans)


def test_ties_go_by_date_then_key_and_do_not_depend_on_input_order():
    records = [
        variant(key, title="Same words here", published=get("2412.06769").published.model_copy(update={"value": value}))  # type: ignore[union-attr]
        for key, value in (("2401.00003", "2024-01"), ("2401.00001", "2024-01"), ("2402.00001", "2024-02"))
    ]
    expected = ["2402.00001", "2401.00001", "2401.00003"]
    for order in (records, records[::-1]):
        assert [hit.record.key for hit in SearchIndex(order).search("same words").hits] == expected


def test_sorting_by_date():
    dates = [
        hit.record.published.value for hit in search("diffusion", sort="date", limit=None).hits if hit.record.published
    ]
    assert dates == sorted(dates, reverse=True)


def test_filters_on_leaf_branch_facet_year_venue_and_code():
    everything = len(load_records())
    leaf = search("", filters=Filters(leaf="vertical/feedback"), limit=None)
    assert {hit.record.key for hit in leaf.hits} == {r.key for r in load_records() if "vertical/feedback" in r.leaves}
    branch = search("", filters=Filters(leaf="vertical"), limit=None)
    assert leaf.total < branch.total < everything
    loops = search("", filters=Filters(facets=(("mechanism", "loop"), ("stage", "theory"))), limit=None)
    assert loops.total
    assert all("loop" in h.record.facets.mechanism and "theory" in h.record.facets.stage for h in loops.hits)
    years = search("", filters=Filters(year_from=2019, year_to=2020), limit=None)
    assert {hit.record.year for hit in years.hits} == {2019, 2020}
    venue = search("", filters=Filters(venue="NIPS2024"), limit=None)
    assert venue.total
    assert all(h.record.venue and (h.record.venue.name, h.record.venue.year) == ("NeurIPS", 2024) for h in venue.hits)
    code = search("", filters=Filters(has_code=True)).total
    assert code + search("", filters=Filters(has_code=False)).total == everything
    assert search("", filters=Filters(runnable=True)).total == sum(bool(r.runnable) for r in load_records())
    assert search("", filters=Filters(status="withdrawn")).total == 0
    assert search("", filters=Filters(filed="listed")).total == sum(
        r.taxonomy.status == "listed" for r in load_records()
    )


def test_filters_hold_for_an_exact_look_up_too():
    assert search("2412.06769", filters=Filters(year_to=2020)).match == "none"


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (Filters(leaf="vertical/feedbak"), "vertical/feedback"),
        (Filters(leaf="feedback"), "vertical/feedback"),
        (Filters(facets=(("mechanisms", "loop"),)), "mechanism"),
        (Filters(facets=(("mechanism", "lop"),)), "loop"),
        (Filters(venue="ICRL"), "no venue"),
        (Filters(venue="arXiv"), "preprint server"),
        (Filters(status="gone"), "active"),
        (Filters(filed="guessed"), "listed"),
        (Filters(year_from=2025, year_to=2024), "after"),
    ],
)
def test_an_unknown_filter_is_an_error_that_helps(filters, message):
    with pytest.raises(CatalogError, match=message):
        search("latent", filters=filters)


def test_wrong_arguments_raise():
    with pytest.raises(TypeError, match="int"):
        search(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sort"):
        search("a", sort="title")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit"):
        search("a", limit=0)


def test_the_index_is_built_once():
    assert default_index() is default_index()
