"""The importer on small lists made up here: determinism, what survives a second run, what stops it."""

import copy
import json

import pytest

from latentcot.catalog.importer import import_lists, main
from latentcot.catalog.leaves import load_table
from latentcot.catalog.record import dump_record
from latentcot.catalog.store import CatalogError, read_records, write_record

HORIZON = "multimodal-art-projection/LatentCoT-Horizon"


def listed(row: int, title: str, arxiv: str | None, **extra) -> dict:
    return {
        "row": row, "title": title, "arxiv_id": arxiv, "arxiv_id_checked": arxiv, "id_status": "agrees",
        "url": f"https://arxiv.org/abs/{arxiv}", "venue": "arXiv", "date": "2024-02",
        "code_url": None, "project_url": None, "suspect": [],
        "section": ["Latent CoT Reasoning", "Architectural Recurrence"],
    } | extra  # fmt: skip


def neighbour(title: str, arxiv: str | None, **extra) -> dict:
    return {
        "title": title, "arxiv_id": arxiv, "url": f"https://arxiv.org/abs/{arxiv}", "date": "2024-02", "venue": None,
        "code_url": None, "project_url": None, "kind": "paper",
        "lists": [{"list": "hemingkx/Awesome-Efficient-Reasoning", "section": ["Latent Chain-of-Thought"]}],
    } | extra  # fmt: skip


@pytest.fixture
def lists() -> dict[str, dict]:
    def source(name):
        return {"repository": name, "commit": "0" * 40, "commit_date": "2026-01-01"}

    return {
        "horizon": {
            "source": source(HORIZON),
            "papers": [
                listed(1, "Looping all the way down", "2402.00001", code_url="https://github.com/a/loop"),
                listed(2, "Loops in continuous space", "2402.99999", arxiv_id_checked="2402.00002", id_status="wrong",
                       suspect=["arxiv_id is wrong: the paper with this title is 2402.00002"]),
            ],
        },
        "awesome_latent_cot": {
            "source": source("EIT-NLP/Awesome-Latent-CoT"),
            "papers": [
                listed(1, "Looping All the Way Down", "2402.00001", authors=["Ada Okafor", "Bo Lind"],
                       authors_truncated=False, features=["RL"], venue="ICLR2025", section=["Structural CoT"]),
            ],
        },
        "neighbours": {
            "sources": [source("hemingkx/Awesome-Efficient-Reasoning")],
            "papers": [
                neighbour("Loops in Continuous Space", "2402.00002"),
                neighbour("Looping All the Way Down", None, venue="ICLR 2025",
                          url="https://openreview.net/pdf?id=AbCdEfGhIj"),
                neighbour("A library", None, url="https://example.org", kind="other"),
            ],
        },
        "seeds": {"papers": []},
    }  # fmt: skip


@pytest.fixture
def rules() -> dict:
    rules = copy.deepcopy(load_table("import_rules.json"))
    for name in ("ids", "links_left_out", "official_code", "venues_left_out", "venues_completed", "title_unknown"):
        rules[name] = []
    return rules


@pytest.fixture
def run(tmp_path, rules):
    def run(lists: dict[str, dict]):
        folder = tmp_path / "lists"
        folder.mkdir(exist_ok=True)
        for name, data in lists.items():
            text = json.dumps(data | {"count": len(data["papers"])})
            (folder / f"{name}.json").write_text(text, encoding="utf-8")
        return import_lists(folder, tmp_path / "catalog" / "papers", tmp_path / "catalog", rules)

    return run


def snapshot(tmp_path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "catalog").rglob("*") if path.is_file()}


def test_rows_become_records_by_id_then_by_title_and_venue(run, lists, tmp_path):
    report, _ = run(lists)
    records = {record.key: record for record in read_records(tmp_path / "catalog" / "papers")}
    assert set(records) == {"2402.00001", "2402.00002"}
    first = records["2402.00001"]
    assert first.title == "Looping All the Way Down"
    assert first.ids.openreview == "AbCdEfGhIj"
    assert first.citekey == "Okafor2024Looping"
    assert first.venue is not None
    assert (first.venue.name, first.venue.year, first.venue.status) == ("ICLR", 2025, "accepted")
    assert first.facets.stage == ["rl"]
    assert records["2402.00002"].citekey == "arxiv_2402_00002"
    assert [row["outcome"] for row in report.rows] == ["kept", "kept", "merged", "merged", "merged", "left_out"]
    assert [(entry["listed"], entry["right"]) for entry in report.resolved] == [("2402.99999", "2402.00002")]


def test_a_second_run_changes_no_byte(run, lists, tmp_path):
    run(lists)
    before = snapshot(tmp_path)
    _, changed = run(lists)
    assert changed == 0
    assert snapshot(tmp_path) == before


def test_what_a_person_wrote_survives(run, lists, tmp_path):
    run(lists)
    papers = tmp_path / "catalog" / "papers"
    record = next(r for r in read_records(papers) if r.key == "2402.00001")
    data = record.model_dump(mode="json")
    data["note"] = "Ours."
    data["runnable"] = [{"module": "recurrent_depth", "notebook": None, "test": None}]
    data["taxonomy"] = {"primary": "vertical/feedback", "also": [], "status": "reviewed"}
    data["title"] = "Looping, retitled"
    data["provenance"]["title"] = {"source": "arXiv", "date": "2026-02-01", "confidence": "high"}
    data["version"] = 3
    data["ids"]["dblp"] = "x"
    data["links"].append(
        {"kind": "video", "url": "https://example.org/talk", "official": None, "source": "person", "checked": None}
    )
    edited = type(record).model_validate_json(json.dumps(data))
    write_record(edited, papers)
    run(lists)
    assert next(r for r in read_records(papers) if r.key == "2402.00001") == edited
    lists["awesome_latent_cot"]["papers"][0]["authors"] = ["Cy Zed"]
    run(lists)
    again = next(r for r in read_records(papers) if r.key == "2402.00001")
    assert again.author_names == ["Cy Zed"]
    assert again.citekey == "Okafor2024Looping"  # given once, never changed
    assert (again.note, again.title, again.taxonomy.status) == ("Ours.", "Looping, retitled", "reviewed")


def test_a_record_added_by_hand_is_not_touched(run, lists, tmp_path):
    run(lists)
    papers = tmp_path / "catalog" / "papers"
    record = read_records(papers)[0]
    mine = record.model_copy(update={
        "key": "x-by-hand", "citekey": "byhand", "title": "By hand", "other_titles": [],
        "ids": record.ids.model_copy(update={"arxiv": None, "openreview": None}),
    })  # fmt: skip
    write_record(mine, papers)
    run(lists)
    assert dump_record(next(r for r in read_records(papers) if r.key == "x-by-hand")) == dump_record(mine)


def test_same_title_on_two_ids_goes_to_review(run, lists):
    lists["neighbours"]["papers"].append(neighbour("Loops in continuous space", "2403.00003"))
    report, _ = run(lists)
    assert any("two arXiv ids" in entry["rule"] for entry in report.reviews)
    assert report.records == 3


def test_an_unjudged_doubt_stops_the_import(run, lists, tmp_path):
    lists["horizon"]["papers"][0]["suspect"] = ["code link is somebody else's"]
    with pytest.raises(CatalogError, match="horizon:1"):
        run(lists)
    assert not (tmp_path / "catalog").exists()


def test_a_judged_link_is_left_out(run, lists, rules, tmp_path):
    lists["horizon"]["papers"][0]["suspect"] = ["code link is somebody else's"]
    rules["links_left_out"] = [{"row": "horizon:1", "field": "code_url", "reason": "somebody else's"}]
    report, _ = run(lists)
    record = next(r for r in read_records(tmp_path / "catalog" / "papers") if r.key == "2402.00001")
    assert not record.has_code
    assert record.facets.artifacts == []
    assert [entry["url"] for entry in report.links] == ["https://github.com/a/loop"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lists: lists["horizon"]["papers"][0].update(arxiv_id_checked="2402.0001"), "5 digits"),
        (lambda lists: lists["horizon"]["papers"][0].update(venue="Unheard Of 2024"), "does not know"),
        (lambda lists: lists["awesome_latent_cot"]["papers"][0].update(authors_truncated=True), "cut short"),
    ],
)
def test_bad_values_stop_the_import(run, lists, tmp_path, damage, message):
    damage(lists)
    with pytest.raises(ValueError, match=message):
        run(lists)
    assert not (tmp_path / "catalog").exists()


def test_bad_calls_are_one_line(tmp_path, capsys):
    assert main([]) == 2
    assert main([str(tmp_path)]) == 2
    (tmp_path / "horizon.json").write_text('{"count": 2, "papers": []}', encoding="utf-8")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 3
    assert "Traceback" not in error
