import pytest

from latentcot.catalog.identifiers import (
    Identifier,
    IdentifierError,
    identify,
    parse_acl,
    parse_arxiv,
    parse_doi,
    parse_openreview,
    record_key,
)


@pytest.mark.parametrize(
    "text",
    [
        "2412.06769",
        "arXiv:2412.06769v3",
        "http://arxiv.org/abs/2412.06769v1",
        "https://www.arxiv.org/pdf/2412.06769.pdf",
        "https://export.arxiv.org/abs/2412.06769?context=cs",
        "https://browse.arxiv.org/html/2412.06769v2#S3",
        "https://alphaxiv.org/abs/2412.06769",
        "https://www.alphaxiv.org/overview/2412.06769v2",
        "arxiv.org/abs/2412.06769/",
        "10.48550/arXiv.2412.06769",
        "https://doi.org/10.48550/ARXIV.2412.06769",
        "arXiv:2412.06769v2 [cs.CL]",
        "  2412.06769 ",
    ],
)
def test_every_spelling_of_one_arxiv_id_is_one_paper(text):
    assert parse_arxiv(text).base == "2412.06769"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("https://example.org/abs/2412.06769", "not of arXiv"),
        ("https://arxiv.org.evil.com/abs/2412.06769", "not of arXiv"),
        ("https://arxiv.org/list/cs.CL/recent", "names no paper"),
        ("foo/9901001", "not an archive"),
        ("cs/990100", "7 digits"),
        ("cs/9913001", "no month"),
        ("cs/0801001", "9107 to 0703"),
        ("0703.1234", "begin with 0704"),
        ("2501.00000", "begin with 1"),
        ("hep-th/9901000", "begin with 1"),
        ("", "not an arXiv identifier"),
        ("2412.06769v" + "9" * 5000, "not an arXiv identifier"),
        ("٢٤١٢.٠٦٧٦٩", "not an arXiv identifier"),
    ],
)
def test_what_is_no_arxiv_id_is_refused_with_a_reason(text, why):
    with pytest.raises(IdentifierError, match=why):
        parse_arxiv(text)


@pytest.mark.parametrize(
    ("text", "month"), [("2412.06769", "2024-12"), ("hep-th/9901001", "1999-01"), ("cs/0112019", "2001-12")]
)
def test_month_of_an_id(text, month):
    assert parse_arxiv(text).month == month


def test_doi_is_lower_case_and_free_of_its_resolver():
    for text in (
        "10.1162/NECO.1997.9.8.1735",
        "https://doi.org/10.1162/neco.1997.9.8.1735",
        "doi: 10.1162/neco.1997.9.8.1735",
    ):
        assert parse_doi(text) == "10.1162/neco.1997.9.8.1735"
    assert parse_doi("https://dl.acm.org/doi/abs/10.1145/3583780.3614820") == "10.1145/3583780.3614820"
    with pytest.raises(IdentifierError):
        parse_doi("https://example.org/10.1145/1")


def test_openreview_and_acl_addresses():
    assert parse_openreview("https://openreview.net/pdf?id=G0v0TxX01N") == "G0v0TxX01N"
    assert parse_acl("https://aclanthology.org/2025.findings-emnlp.669.pdf") == "2025.findings-emnlp.669"
    assert parse_acl("https://www.aclweb.org/anthology/P19-1001/") == "P19-1001"
    with pytest.raises(IdentifierError):
        parse_openreview("https://openreview.net/group?id=ICLR.cc/2025")
    with pytest.raises(IdentifierError):
        parse_acl("https://aclanthology.org/venues/acl/")


def test_identify_prefers_arxiv_and_gives_none_for_words():
    assert identify("https://doi.org/10.48550/arXiv.2412.06769") == Identifier("arxiv", "2412.06769")
    assert identify("10.1162/neco.1997.9.8.1735") == Identifier("doi", "10.1162/neco.1997.9.8.1735")
    for text in ("latent reasoning", "http://[", "a:b", "", "https://openreview.net/forum"):
        assert identify(text) is None


def test_keys_are_file_names():
    assert record_key(Identifier("arxiv", "math/0309136")) == "math_0309136"
    assert record_key(Identifier("doi", "10.1000/a<b>(c)")) == "doi-10.1000_a_b__c_"
    assert record_key(Identifier("openreview", "G0v0TxX01N")) == "openreview-G0v0TxX01N"
