"""The numbers of the statistics page, against counts made another way, and the page itself."""

import json
import re

import pytest

from latentcot.catalog import CatalogError, get, load_facets, load_records, load_taxonomy
from latentcot.catalog.pages import paper_pages
from latentcot.catalog.pages_statistics import KIND_NAMES, percent, timeline_figure
from latentcot.catalog.queue_store import Folders
from latentcot.catalog.record import PartialDate
from latentcot.catalog.relevance.concepts import FAMILIES
from latentcot.catalog.relevance.data import KINDS
from latentcot.catalog.statistics import (
    EARLIER,
    coverage,
    growth,
    import_account,
    link_health,
    listing_time,
    overlaps,
    quarter,
    relevance_report,
    statistics,
    timeline,
)


@pytest.fixture(scope="module")
def page():
    pages = paper_pages(load_records()[:40], load_taxonomy(), load_facets())
    return pages["papers/statistics.md"]


def test_coverage_of_the_lists():
    records = load_records()
    found = {entry.source: entry for entry in coverage(records)}
    horizon = "multimodal-art-projection/LatentCoT-Horizon"
    here = [r for r in records if horizon in {s.source for s in r.sources}]
    assert found[horizon].papers == len(here) == 149
    assert found[horizon].alone == sum({s.source for s in r.sources} == {horizon} for r in here)
    assert found[horizon].share == pytest.approx(149 / len(records))
    counts = [entry.papers for entry in coverage(records)]
    assert counts == sorted(counts, reverse=True)


def test_overlaps_are_those_of_the_lists():
    pairs = {(a, b): n for a, b, n in overlaps(load_records(), most=100)}
    assert pairs["EIT-NLP/Awesome-Latent-CoT", "multimodal-art-projection/LatentCoT-Horizon"] == 43
    assert len(overlaps(load_records(), most=3)) == 3


def test_timeline_counts_every_paper_once_and_has_no_gap():
    labels, branches = timeline(load_records(), load_taxonomy())
    assert labels[0] == EARLIER
    assert labels[1] == "2023-1"
    assert len(labels) == len(set(labels))
    assert all(label in labels for year in (2023, 2024, 2025) for label in (f"{year}-{q}" for q in (1, 2, 3, 4)))
    dated = [r for r in load_records() if (r.year or 9999) < 2023 or (r.published and r.published.precision != "year")]
    assert sum(sum(counts) for counts in branches.values()) == len(dated)
    early = get("1603.08983")
    assert quarter(early) == "2016-1"
    assert branches["vertical"][0] >= 1


@pytest.mark.parametrize(
    ("value", "precision", "expected"),
    [("2024-03", "month", "2024-1"), ("2024-04-01", "day", "2024-2"), ("2024-12", "month", "2024-4"), ("2024", "year", None)],
)  # fmt: skip
def test_quarters(value, precision, expected):
    record = get("2412.06769").model_copy(update={"published": PartialDate(value=value, precision=precision)})
    assert quarter(record) == expected


def test_growth_adds_up():
    records = [
        get("2412.06769").model_copy(update={"added": day}) for day in ("2026-11-25", "2026-11-30", "2027-01-02")
    ]
    assert growth(records) == [("2026-11", 2, 2), ("2027-01", 1, 3)]
    assert growth([]) == []
    assert growth(load_records())[-1][2] == len(load_records())


class _Decision:
    def __init__(self, verdict, day, published):
        self.verdict, self.date = verdict, day
        self.candidate = type("Candidate", (), {"published": published})()


def test_listing_time():
    assert listing_time([]).median is None
    one = listing_time([_Decision("accepted", "2026-02-11", "2026-02-01T10:00:00Z")])  # type: ignore[list-item]
    assert (one.papers, one.median, one.ninetieth) == (1, 10.0, 10.0)
    many = [_Decision("accepted", f"2026-02-{day:02d}", "2026-02-01T10:00:00Z") for day in range(1, 12)]
    many.append(_Decision("rejected", "2027-01-01", "2026-02-01T10:00:00Z"))
    found = listing_time(many)  # type: ignore[arg-type]
    assert (found.papers, found.median, found.ninetieth) == (11, 5.0, 9.0)


def test_link_health(tmp_path):
    found = link_health(load_records(), Folders(tmp_path))
    assert found.links == sum(len(record.links) for record in load_records())
    assert (found.failing, found.dead) == (0, 0)
    state = {
        "https://example.org/a": {"failed": ["2026-01-01", "2026-01-02"], "reason": "404", "archived": None},
        "https://example.org/b": {"failed": ["2026-01-02"], "reason": "timeout", "archived": None},
    }
    Folders(tmp_path).health.write_text(json.dumps(state))
    found = link_health(load_records(), Folders(tmp_path))
    assert (found.failing, found.dead) == (2, 1)


def test_import_account(tmp_path):
    account = import_account()
    assert account is not None
    assert {name: counts["rows"] for name, counts in account.items()} == {
        "horizon": 161, "awesome_latent_cot": 143, "neighbours": 691, "seeds": 10,
    }  # fmt: skip
    for counts in account.values():
        assert counts["rows"] == counts["kept"] + counts["merged"] + counts["left_out"]
    assert import_account(tmp_path / "none.json") is None
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(CatalogError, match=r"bad\.json"):
        import_account(tmp_path / "bad.json")


def test_relevance_report(tmp_path):
    report = relevance_report()
    assert report is not None
    assert [cut["from"] for cut in report["cuts"]] == sorted(cut["from"] for cut in report["cuts"])
    assert "latent" in report["cuts"][-1]["families"]
    assert relevance_report(tmp_path / "none.json") is None
    for text in ("{", "{}", '{"cuts": [], "about": {}}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(CatalogError, match=r"bad\.json"):
            relevance_report(tmp_path / "bad.json")


def test_everything_at_once_of_an_empty_catalog(tmp_path):
    found = statistics([], load_taxonomy(), tmp_path)
    assert found["growth"] == []
    assert found["account"] is None
    assert found["relevance"] is None
    assert found["modules"] == {}
    assert (found["queue"], found["accepted"], found["rejected"]) == (0, 0, 0)
    assert all(sum(counts) == 0 for counts in found["branches"].values())


def test_every_family_and_kind_has_a_name(page):
    from latentcot.catalog.pages_statistics import FAMILY_NAMES

    assert set(FAMILY_NAMES) == set(FAMILIES)
    assert set(KIND_NAMES) == set(KINDS)


def test_the_page_shows_the_reports_numbers(page):
    report = relevance_report()
    assert report is not None
    last = report["cuts"][-1]
    row = re.search(r"Latent reasoning</th>(.*?)</tr>", page)
    assert row is not None
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", row[1])
    latent = last["families"]["latent"]
    assert cells[:3] == [
        str(latent["papers"]),
        f"{latent['scorer_auroc']:.3f}",
        percent(latent["scorer_recall"]),
    ]
    assert percent(last["at_chosen"]["precision"]) in page
    assert "With a trap word" in page


def test_the_page_has_the_figure_and_its_numbers(page):
    assert page.count("<svg") == page.count("</svg>") == 1
    labels, branches = timeline(load_records()[:40], load_taxonomy())
    for slug, counts in branches.items():
        name = next(branch.name for branch in load_taxonomy().branches if branch.slug == slug)
        for label, count in zip(labels, counts, strict=True):
            assert f"{label}: {count}</title>" in page, (name, label)
    assert 'role="img"' in page
    assert "The numbers of the figure" in page


def test_the_figure_of_nothing_and_of_hostile_names():
    assert "<rect" in timeline_figure([EARLIER, "2023-1"], {"a": [0, 0]}, {"a": "A"})
    figure = timeline_figure([EARLIER], {"a": [3]}, {"a": "<script>alert(1)</script>"})
    assert "<script" not in figure


@pytest.mark.parametrize(("share", "shown"), [(None, "–"), (0.9057, "91 %"), (0.0, "0 %"), (1.0, "100 %")])
def test_percent(share, shown):
    assert percent(share) == shown


def test_percent_with_digits():
    assert percent(0.01442, 1) == "1.4 %"
