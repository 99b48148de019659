"""The site in a real browser: facets, text filter, address, keyboard, cite button, phone, no JavaScript."""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import rispy

from latentcot.catalog import get, load_records
from latentcot.catalog.export import render

pytestmark = [pytest.mark.browser, pytest.mark.allow_hosts(["127.0.0.1"])]

TOTAL = len(load_records())


@pytest.fixture
def page(chromium: Any, site_url: str) -> Iterator[Any]:
    """A fresh page that fails the test on console errors, uncaught exceptions and requests to other hosts."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=site_url)
    opened = context.new_page()
    opened.set_default_timeout(30_000)
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: problems.append(str(error)))
    own = (site_url, "data:", "blob:")
    opened.on("request", lambda request: None if request.url.startswith(own) else problems.append(request.url))
    yield opened
    context.close()
    assert problems == []


def visible_papers(page: Any) -> list[str]:
    return page.eval_on_selector_all("#lc-papers > li:not([hidden]) > .lc-title", "a => a.map(x => x.textContent)")


def shown(page: Any) -> int:
    text = page.locator("#lc-count").inner_text()
    match = re.match(r"(\d+)(?: of \d+)? papers?", text)
    assert match, text
    return int(match[1])


def box(page: Any, facet: str, value: str) -> Any:
    found = page.locator(f'#lc-form input[name="{facet}"][value="{value}"]')
    details = found.locator("xpath=ancestor::details[contains(@class,'lc-facet')]")
    if not details.evaluate("d => d.open"):
        details.locator("summary").first.click()
    return found


def query(page: Any) -> dict[str, list[str]]:
    return parse_qs(urlsplit(page.url).query)


def with_leaf(leaf: str) -> int:
    return sum(leaf in record.leaves for record in load_records())


def test_a_facet_changes_list_count_and_address(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/papers/index.html")
    assert shown(page) == TOTAL
    box(page, "leaf", "vertical/architecture").check()
    assert shown(page) == with_leaf("vertical/architecture") == len(visible_papers(page))
    assert query(page) == {"leaf": ["vertical/architecture"]}
    box(page, "leaf", "vertical/feedback").check()
    either = sum(not {"vertical/architecture", "vertical/feedback"}.isdisjoint(r.leaves) for r in load_records())
    assert shown(page) == either
    box(page, "has", "code").check()
    with_code = sum(
        r.has_code and not {"vertical/architecture", "vertical/feedback"}.isdisjoint(r.leaves) for r in load_records()
    )
    assert shown(page) == with_code
    page.go_back()
    assert shown(page) == either
    page.get_by_role("button", name="Clear all filters").click()
    assert shown(page) == TOTAL
    assert query(page) == {}


def test_counts_beside_a_value_say_what_choosing_it_would_show(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/papers/index.html?status=listed")
    choices = (("leaf", "horizontal"), ("leaf", "vertical/training-induced"), ("year", "2024"), ("has", "code"))
    for facet, value in choices:
        target = box(page, facet, value)
        promised = int(target.locator("xpath=..").locator("output").inner_text())
        target.check()
        assert shown(page) == promised, (facet, value)
        target.uncheck()


def test_text_filter_finds_words_in_any_order_and_without_accents(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/papers/index.html")
    page.get_by_label("Text in title, authors or identifier").fill("LATENT continuous reason")
    page.wait_for_function(f"document.querySelectorAll('#lc-papers > li:not([hidden])').length < {TOTAL}")
    titles = visible_papers(page)
    assert "Training Large Language Models to Reason in a Continuous Latent Space" in titles
    page.wait_for_function("location.search.includes('q=')")
    assert query(page) == {"q": ["LATENT continuous reason"]}
    page.get_by_label("Text in title, authors or identifier").fill("no such paper <b>\"'*")
    page.get_by_text("No paper matches").wait_for()
    assert visible_papers(page) == []
    assert shown(page) == 0


def test_a_shared_address_gives_the_same_view_after_a_reload(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/papers/index.html?q=diffusion&leaf=unbounded-depth&year=2025&sort=title")
    before = visible_papers(page)
    assert 0 < len(before) < TOTAL
    assert page.locator("#lc-sort").input_value() == "title"
    assert page.locator('input[name="leaf"][value="unbounded-depth"]').is_checked()
    page.reload()
    assert visible_papers(page) == before
    page.goto(f"{site_url}/papers/index.html?leaf=no-such-leaf&sort=constructor&q=")
    assert shown(page) == TOTAL


@pytest.mark.parametrize(("order", "reverse"), [("newest", True), ("oldest", False)])
def test_sorting_by_date(page: Any, site_url: str, order: str, reverse: bool) -> None:
    page.goto(f"{site_url}/papers/index.html")
    page.get_by_label("Sort by").select_option(order)
    dates = page.eval_on_selector_all("#lc-papers > li", "items => items.map(i => i.dataset.date).filter(Boolean)")
    assert dates == sorted(dates, reverse=reverse)


def test_facets_work_from_the_keyboard_and_the_focus_is_visible(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/papers/index.html")
    page.get_by_label("Text in title, authors or identifier").focus()
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type === 'checkbox'"):
            break
    focused = page.evaluate("({name: document.activeElement.name, value: document.activeElement.value})")
    assert focused == {"name": "leaf", "value": "vertical"}
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.keyboard.press("Space")
    page.wait_for_function("location.search !== ''")
    assert query(page) == {"leaf": ["vertical"]}
    assert shown(page) < TOTAL
    mechanism = page.locator(".lc-facet > summary", has_text="Mechanism")
    mechanism.focus()
    page.keyboard.press("Enter")
    assert mechanism.evaluate("s => s.parentElement.open")


def test_the_count_is_a_polite_live_region(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/papers/index.html")
    region = page.locator("#lc-count")
    assert (region.get_attribute("role"), region.get_attribute("aria-live")) == ("status", "polite")


def test_the_cite_button_copies_and_says_so(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/paper/2412.06769.html")
    page.get_by_role("button", name="Copy BibTeX").click()
    page.locator("#lc-said", has_text="BibTeX copied to the clipboard").wait_for()
    assert page.locator("#lc-said").get_attribute("aria-live") == "polite"
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.strip().startswith("@")
    assert "2412.06769" in copied
    assert copied == page.locator("#lc-bibtex").text_content()


@pytest.mark.parametrize(("name", "slug"), [("RIS", "ris"), ("CSL-JSON", "csl")])
def test_other_formats_are_copied_as_their_programs_read_them(page: Any, site_url: str, name: str, slug: str) -> None:
    page.goto(f"{site_url}/paper/2412.06769.html")
    page.get_by_role("button", name=f"Copy {name}").click()
    page.locator("#lc-said", has_text=f"{name} copied to the clipboard").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    if slug == "ris":
        assert copied.splitlines() == render("ris", [get("2412.06769")]).splitlines()
        assert rispy.loads(copied)[0]["title"] == get("2412.06769").title
    else:
        assert json.loads(copied) == json.loads(render(slug, [get("2412.06769")]))


def test_a_related_paper_is_one_click_away(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/paper/1807.03819.html")
    page.get_by_role("link", name="MoEUT: Mixture-of-Experts Universal Transformers").click()
    assert page.locator("h1").inner_text().startswith("MoEUT")


@pytest.mark.parametrize(
    "path",
    [
        "index", "papers/index", "paper/2412.06769", "topic/vertical/architecture", "reference/api/kernels",
        "how-it-works", "papers/statistics", "papers/taxonomy",
    ],
)  # fmt: skip
def test_a_phone_needs_no_horizontal_scrolling(page: Any, site_url: str, path: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{site_url}/{path}.html")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_on_a_phone_the_filters_are_folded_and_open_by_touch(page: Any, site_url: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{site_url}/papers/index.html")
    assert page.locator("#lc-papers > li").first.is_visible()
    assert not page.locator(".lc-facet").first.is_visible()
    page.locator(".lc-all-facets > summary").click()
    assert page.locator(".lc-facet").first.is_visible()


def test_without_javascript_the_page_is_a_plain_list(chromium: Any, site_url: str) -> None:
    context = chromium.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto(f"{site_url}/papers/index.html")
    assert plain.locator("#lc-papers > li").count() == TOTAL
    assert plain.locator("#lc-papers > li").last.is_visible()
    assert not plain.locator("#lc-form").is_visible()
    plain.goto(f"{site_url}/paper/2412.06769.html")
    assert not plain.get_by_role("button", name="Copy BibTeX").is_visible()
    context.close()


def test_dark_mode_can_be_switched(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/index.html")
    before = page.evaluate("document.body.getAttribute('data-md-color-scheme')")
    page.locator("label[title='Switch to dark mode']").click()
    page.wait_for_function(f"document.body.getAttribute('data-md-color-scheme') !== '{before}'")


def test_the_search_of_the_site_finds_a_paper(page: Any, site_url: str) -> None:
    page.goto(f"{site_url}/index.html")
    title = "Training Large Language Models to Reason in a Continuous Latent Space"
    page.locator(".md-search__input").fill(title)
    # The index is read in the browser first, which a busy machine takes its time for.
    page.locator(".md-search-result__link", has_text=title).first.wait_for(timeout=60_000)


def test_the_index_works_from_disk(chromium: Any, site_folder: Any) -> None:
    context = chromium.new_context()
    opened = context.new_page()
    opened.goto((site_folder / "papers" / "index.html").as_uri())
    box(opened, "leaf", "vertical/architecture").check()
    assert shown(opened) == with_leaf("vertical/architecture")
    context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_no_violation_of_level_a_or_aa(chromium: Any, site_url: str, width: int, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    # The index with a filter: the same form, and not 773 entries of one kind to look at.
    paths = [
        "index.html", "how-it-works.html", "getting-started.html", "papers/index.html?leaf=horizontal/conversion",
        "papers/taxonomy.html", "papers/statistics.html", "papers/new.html", "paper/2412.06769.html", "topic/vertical.html",
        "topic/horizontal/conversion.html", "reference/cli.html", "reference/api/reasoner.html",
    ]  # fmt: skip
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    found = []
    for path in paths:
        opened.goto(f"{site_url}/{path}", wait_until="load")
        result = Axe().run(opened, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]})
        found += [(path, rule["id"], rule["nodes"][0]["target"]) for rule in result.response["violations"]]
    context.close()
    assert found == []
