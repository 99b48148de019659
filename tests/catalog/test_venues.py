import pytest

from latentcot.catalog.venues import Parsed, VenueClaim, parse_venue, settle


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NIPS2025", ("NeurIPS", 2025, None, "conference")),
        ("NeurIPS 2025", ("NeurIPS", 2025, None, "conference")),
        ("NeurIPS'25", ("NeurIPS", 2025, None, "conference")),
        ("ACL 2024 (Finding)", ("ACL", 2024, "findings", "conference")),
        ("ACL2025Findings", ("ACL", 2025, "findings", "conference")),
        ("ACL Findings 2024", ("ACL", 2024, "findings", "conference")),
        ("ACL 2025 Outstanding Paper", ("ACL", 2025, "outstanding", "conference")),
        ("ICML 2025 (oral)", ("ICML", 2025, "oral", "conference")),
        ("ICLR Workshop 2025", ("ICLR", 2025, "workshop", "workshop")),
        ("ICLR2025Workshop", ("ICLR", 2025, "workshop", "workshop")),
        ("CoLM 2024", ("COLM", 2024, None, "conference")),
        ("LREC-COLING2024", ("LREC-COLING", 2024, None, "conference")),
        ("CSAI 23", ("CSAI", 2023, None, "conference")),
        ("TMLR", ("TMLR", None, None, "journal")),
        ("IJCV 2025", ("International Journal of Computer Vision", 2025, None, "journal")),
    ],
)
def test_one_form_for_all_spellings(text, expected):
    parsed = parse_venue(text)
    assert (parsed.name, parsed.year, parsed.track, parsed.type) == expected


@pytest.mark.parametrize(
    "text", ["arXiv", "Arxiv", "BLOG", "SSRN 2024 Apr", "GitHub 2024.01", "IEEE 2024", "Technical Report"]
)
def test_what_is_no_venue_says_why(text):
    parsed = parse_venue(text)
    assert parsed.name is None
    assert parsed.reason


def test_an_unknown_venue_is_an_error():
    with pytest.raises(ValueError, match="does not know"):
        parse_venue("Conference on Nothing 2024")


def claim(text: str, source: str, status: str | None = "accepted") -> VenueClaim:
    return VenueClaim(parse_venue(text), source, f"{source}:1", text, status)


def test_details_are_put_together():
    verdict = settle([claim("ACL 2024", "a"), claim("ACL", "b"), claim("ACL2024Findings", "c")])
    assert verdict.venue is not None
    assert (verdict.venue.name, verdict.venue.year, verdict.venue.track) == ("ACL", 2024, "findings")
    assert verdict.conflict is None
    assert verdict.confidence == "high"


def test_more_lists_win_and_a_tie_is_unknown():
    verdict = settle(
        [claim("ICLR 2024", "a"), claim("ICLR 2024", "a"), claim("NIPS2024", "b"), claim("NeurIPS 2024", "c")]
    )
    assert verdict.venue is not None
    assert verdict.venue.name == "NeurIPS"
    assert verdict.conflict
    tie = settle([claim("ICML 2024", "a"), claim("NeurIPS 2024", "b")])
    assert tie.venue is None
    assert tie.conflict


def test_a_possible_submission_is_not_called_accepted():
    verdict = settle([claim("ICLR2026", "a", status=None)])
    assert verdict.venue is not None
    assert verdict.venue.status is None
    assert verdict.confidence == "low"
    assert settle([]).venue is None
    assert Parsed(None).name is None
