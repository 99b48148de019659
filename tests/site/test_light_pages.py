"""Marked HTML, pages as the search index gets them, navigation that is drawn once."""

from types import SimpleNamespace
from typing import Any

import markdown
import pytest
from material.plugins.search.plugin import Parser

from latentcot.site_index import LightPages, for_the_index

EXTENSIONS = ["md_in_html", "attr_list", "toc", "pymdownx.superfences", "pymdownx.inlinehilite"]
HTML = """<div class="lc-paper" markdown="1">
<p>*stars* and `ticks` &#42; $x$ {#id}</p>
<pre id="lc-ris">TY  - CPAPER
```python
  two  blanks</pre>
</div>"""


def convert(text: str) -> str:
    return markdown.Markdown(extensions=[*EXTENSIONS, "latentcot.site_raw"]).convert(text)


def test_marked_html_goes_through_as_it_is() -> None:
    assert convert(f"# A *title*\n\n<!--raw-->\n{HTML}\n<!--/raw-->\n\n*behind*") == (
        f'<h1 id="a-title">A <em>title</em></h1>\n{HTML}\n<p><em>behind</em></p>'
    )


def test_two_marked_parts_are_two_parts() -> None:
    found = convert("<!--raw-->\n<p>*1*</p>\n<!--/raw-->\n*between*\n<!--raw-->\n<p>*2*</p>\n<!--/raw-->")
    assert found.replace("\n", "") == "<p>*1*</p><p><em>between</em></p><p>*2*</p>"


@pytest.mark.parametrize("text", ["<!--raw-->\n*open*", "text <!--raw--> *x* <!--/raw-->", "<!--/raw-->\n*x*"])
def test_marks_that_are_no_pair_mark_nothing(text: str) -> None:
    assert "<em>" in convert(text)


def indexed(content: str) -> list[tuple[str | None, str, str]]:
    parser = Parser()
    parser.feed(content)
    parser.close()
    return [
        (section.id, "".join(section.title), "".join(section.text).strip())
        for section in parser.data
        if not section.is_excluded()
    ]


CODE = """<h1 id="a">Top</h1><p>in <code>plain</code> <span>text</span></p>
<section class="lc-cite" data-search-exclude><h2>Cite</h2><pre>@misc{x}</pre></section>
<h2 id="f"><code>f</code><a class="headerlink" href="#f">¶</a></h2>
<details class="mkdocstrings-source"><summary>Source code in <code>f.py</code></summary>
<div class="highlight"><table class="highlighttable"><tr><td class="linenos"><div class="linenodiv"><pre><span></span>
<span class="normal">10</span>
<span class="normal">11</span></pre></div></td><td class="code"><div><pre><span></span><code><span class="k">def</span> \
<span class="nf">f</span><span class="p">(</span><a href="#T">T</a><span class="p">)</span>:
    <span class="k">return</span> <span class="s2">&quot;&lt;pre&gt; &amp;amp;&quot;</span>
</code></pre></div></td></tr></table></div></details><p>behind</p>"""


def test_the_index_of_a_lighter_page_is_the_same() -> None:
    light = for_the_index(CODE)
    assert indexed(light) == indexed(CODE)
    assert "<span class=" not in light
    assert "@misc" not in light
    assert ("f", "<code>f</code>") in [entry[:2] for entry in indexed(light)]
    assert "return" in indexed(light)[1][2]


def page(uri: str = "paper/1.md", children: tuple[Any, ...] = (), hide: tuple[str, ...] = ("toc",)) -> Any:
    class Toc(list[Any]):
        items = property(list)

    return SimpleNamespace(
        file=SimpleNamespace(src_uri=uri),
        toc=Toc([SimpleNamespace(children=children)]),
        meta={"hide": list(hide)},
        content="<pre><span>x</span></pre>",
    )


def test_a_page_gets_its_content_back() -> None:
    plugin, shown = LightPages(), page()
    before, after = type(plugin).on_page_context.methods
    before(plugin, {}, page=shown, config=None, nav=None)
    assert shown.content == "<pre>x</pre>"
    after(plugin, {}, page=shown, config=None, nav=None)
    assert shown.content == "<pre><span>x</span></pre>"


def test_navigation_is_drawn_anew_wherever_it_can_differ() -> None:
    plugin = LightPages()
    plugin.on_nav(SimpleNamespace(pages=[page("index.md")]), config=None, files=None)
    drawn: list[str] = []

    def draw(shown: Any, base: str = "..", part: str = "nav") -> str:
        def caller() -> str:
            drawn.append(part)
            return f"{part} {len(drawn)}"

        return plugin.drawn_once(part, shown, base, caller)

    assert [draw(page("paper/1.md")), draw(page("paper/2.md"))] == ["nav 1", "nav 1"]
    assert draw(page("topic/a/b.md"), "../..") == "nav 2"
    assert draw(page("paper/3.md", hide=())) == "nav 3"
    assert draw(page("paper/3.md"), part="tabs") == "tabs 4"
    for shown in (page("index.md"), page("paper/4.md", children=("a heading",))):
        assert draw(shown) != draw(shown)
    assert plugin.drawn_once("nav", None, ".", lambda: "404") == "404"
