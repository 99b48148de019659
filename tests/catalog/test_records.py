"""The shipped records: schema, checks, loader, and the account of every raw row."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from latentcot.catalog import (
    CatalogError,
    Record,
    UnknownPaperError,
    find,
    get,
    load_facets,
    load_records,
    load_taxonomy,
)
from latentcot.catalog.check import check_catalog
from latentcot.catalog.leaves import load_table
from latentcot.catalog.record import dump_json, dump_record, folder_of, record_schema
from latentcot.catalog.store import CATALOG, PAPERS, parse_record, read_records, write_record

SCHEMA = json.loads((CATALOG / "schema" / "record.schema.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report():
    return json.loads((CATALOG / "import_report.json").read_text(encoding="utf-8"))


@pytest.fixture
def coconut() -> dict:
    return get("2412.06769").model_dump(mode="json")


def test_the_committed_schema_is_the_one_of_the_model():
    assert (CATALOG / "schema" / "record.schema.json").read_text(encoding="utf-8") == dump_json(record_schema())
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_every_file_passes_the_schema_with_an_independent_validator():
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for path in PAPERS.glob("*/*.json"):
        errors = [error.message for error in validator.iter_errors(json.loads(path.read_text(encoding="utf-8")))]
        assert not errors, path.name


def test_the_shipped_catalog_is_clean():
    checked = check_catalog()
    assert [str(problem) for problem in checked.problems] == []
    assert len(checked.records) == len(load_records())


def test_expected_number_of_papers(report):
    assert report["counts"]["records"] == len(load_records()) == 773
    assert report["counts"]["records_before_seeds"] == 764


def test_every_raw_row_is_accounted_for_once(report):
    expected = [f"horizon:{n}" for n in range(1, 162)] + [f"awesome_latent_cot:{n}" for n in range(1, 144)]
    expected += [f"neighbours:{n}" for n in range(691)] + [f"seeds:{n}" for n in range(10)]
    assert [row["row"] for row in report["rows"]] == expected
    outcomes = [row["outcome"] for row in report["rows"]]
    assert set(outcomes) == {"kept", "merged", "left_out"}
    for outcome in ("kept", "merged", "left_out"):
        assert report["counts"][outcome] == outcomes.count(outcome)
        assert sum(file[outcome] for file in report["files"].values()) == outcomes.count(outcome)
    assert sum(file["rows"] for file in report["files"].values()) == len(expected) == report["counts"]["rows"]


def test_rows_and_records_point_at_each_other(report):
    placed = {row["row"]: row["key"] for row in report["rows"] if row["outcome"] != "left_out"}
    named = {source.ref: record.key for record in load_records() for source in record.sources}
    assert placed == named
    assert {record.key for record in load_records()} == set(placed.values())
    assert [row["outcome"] for row in report["rows"]].count("kept") == len(load_records())


def test_only_rows_that_are_no_papers_are_left_out_each_with_a_reason(report):
    left = [row for row in report["rows"] if row["outcome"] == "left_out"]
    assert len(left) == 6
    assert all(row["key"] is None and "kind: other" in row["reason"] for row in left)


def test_wrong_ids_are_resolved_and_gone(report):
    wrong = {entry["row"]: (entry["listed"], entry["right"]) for entry in report["resolved_ids"] if entry["listed"]}
    assert wrong == {
        "horizon:28": ("2406.03149", "2409.19044"),
        "horizon:37": ("2110.11112", "2106.04537"),
        "horizon:38": ("2306.08022", "2301.13196"),
        "horizon:40": ("2402.06634", "2310.05707"),
        "horizon:59": ("2406.01289", "2408.10189"),
        "horizon:127": ("2406.19509", "2406.07524"),
        "horizon:128": ("2406.07524", "2410.18514"),
        "awesome_latent_cot:98": ("2409.14026", "2410.13640"),
        "awesome_latent_cot:135": ("2511.21395", "2511.20639"),
        "neighbours:178": ("2406.01234", "2411.10741"),
    }
    right = {new for _, new in wrong.values()}
    for listed, new in wrong.values():
        assert find(new) is not None
        if listed not in right and listed not in ("2409.14026", "2511.21395"):  # these two are other rows' papers
            assert find(listed) is None
    for ref, (_, new) in wrong.items():
        record = next(r for r in load_records() if any(source.ref == ref for source in r.sources))
        assert record.key == new
        assert all(link.kind != "abs" or link.url == f"https://arxiv.org/abs/{new}" for link in record.links)


@pytest.mark.parametrize(
    ("key", "title", "other"),
    [
        ("2402.07754", "Diffusion of Thoughts", "Diffusion of Thought:"),
        ("2404.08634", "When Attention Collapses", "Inheritune"),
        ("2405.15302", "Understanding the Language Model", "Towards understanding"),
        ("2410.04454", "CopyLens", "Inner-Probe"),
        ("2508.03440", "LLMs are Single-", "LLMs Have a Heart of Stone"),
    ],
)
def test_retitled_papers_keep_both_titles(key, title, other):
    record = get(key)
    assert record.title.startswith(title)
    assert any(text.startswith(other) for text in record.other_titles)


def test_one_paper_one_record():
    assert find("2411.10741") is not None
    assert find("2406.01234") is None
    assert get("https://openreview.net/pdf?id=G0v0TxX01N").key == "2402.07754"
    assert find("openreview-G0v0TxX01N") is None


def test_links_that_belong_to_others_are_left_out(report):
    rows = {entry["row"] for entry in report["links_left_out"]}
    judged = {rule["row"] for rule in load_table("import_rules.json")["links_left_out"]}
    assert rows >= judged
    assert len(judged) == 14
    for entry in report["links_left_out"]:
        assert entry["url"].rstrip("/").lower() not in {link.url.lower() for link in get(entry["key"]).links}


def test_what_nobody_gave_is_null():
    for record in load_records():
        for name in ("authors", "venue", "published", "version", "updated"):
            assert getattr(record, name) is None or name in record.provenance, (record.key, name)


def test_a_date_from_a_list_is_no_more_precise_than_the_list():
    imported = [record for record in load_records() if record.published and not record.version]
    assert {record.published.precision for record in imported if record.published} <= {"month", "year"}


def test_vocabularies_are_complete_and_permanent():
    tree = load_taxonomy()
    assert len(tree.leaves) == 25
    assert [branch.slug for branch in tree.branches] == [
        "vertical",
        "horizontal",
        "mechanisms",
        "unbounded-depth",
        "beyond",
    ]
    assert all(leaf.definition.endswith(".") for leaf in tree.leaves.values())
    assert {facet.slug for facet in load_facets().facets} == set(Record.model_fields["facets"].annotation.model_fields)  # type: ignore[union-attr]


def test_every_mapped_section_fell_under_a_leaf():
    assert get("2412.06769").leaves == [
        "vertical/training-induced",
        "vertical/training-strategies",
        "vertical/feedback",
    ]
    assert get("2406.07524").taxonomy.primary == "unbounded-depth/masked-diffusion"
    assert get("2507.06457").taxonomy.primary == "beyond/hybrid-attention"
    assert get("2407.04620").leaves == ["horizontal/gradient-state", "unbounded-depth/optimizer-network"]
    assert {record.taxonomy.status for record in load_records()} <= {"listed", "proposed", "reviewed"}


@pytest.mark.parametrize(
    "name",
    [
        "2412.06769",
        "arXiv:2412.06769v2",
        "HTTPS://arxiv.org/pdf/2412.06769v1.pdf",
        "hao2024training",
        "10.48550/arXiv.2412.06769",
    ],
)
def test_find_by_any_exact_name(name):
    record = find(name)
    assert record is not None
    assert record.key == "2412.06769"


def test_get_suggests_close_keys():
    with pytest.raises(UnknownPaperError, match=r"2412\.06769"):
        get("2412.06768")


def test_shared_repository_names_no_paper():
    assert find("https://github.com/fla-org/flash-linear-attention") is None


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"title": ""}, "title"),
        ({"title": " padded "}, "title"),
        ({"title": "red \x1b[31m title"}, "title"),
        ({"title": "two\nlines"}, "title"),
        ({"note": "two\nlines"}, "note"),
        ({"version": 0}, "version"),
        ({"version": "2"}, "version"),
        ({"status": "gone"}, "status"),
        ({"status": "superseded"}, "superseded_by"),
        ({"published": {"value": "2024-02", "precision": "day"}}, "precision"),
        ({"published": {"value": "2024-13", "precision": "month"}}, "published"),
        ({"authors": []}, "authors"),
        ({"citekey": "2024x"}, "citekey"),
        (
            {
                "links": [
                    {"kind": "code", "url": "javascript:alert(1)", "official": None, "source": "x", "checked": None}
                ]
            },
            "url",
        ),
        ({"note": "x" * 281}, "note"),
        ({"surprise": 1}, "surprise"),
        ({"taxonomy": {"primary": "a/b", "also": ["a/b"], "status": "listed"}}, "also"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_damaged_record_is_refused(coconut, change, where):
    with pytest.raises(ValidationError, match=where):
        Record.model_validate_json(json.dumps(coconut | change))


def test_the_error_for_a_control_character_is_for_people(coconut):
    text = json.dumps(coconut | {"title": "two\nlines"})
    with pytest.raises(CatalogError, match=r"x.json: title: expected one line without control .*, given 'two.nlines'"):
        parse_record(text, "x.json")


def test_a_missing_field_is_refused(coconut):
    del coconut["venue"]
    with pytest.raises(ValidationError, match="venue"):
        Record.model_validate_json(json.dumps(coconut))


def test_dates_show_their_century():
    assert get("doi-10.1162_neco.1997.9.8.1735").year == 1997
    assert folder_of("hep-th_9901001", None, None) == "9901"
    assert folder_of("x-something", None, None) == "0000"


def test_write_and_read_again_changes_nothing(tmp_path):
    record = get("2412.06769")
    assert write_record(record, tmp_path)
    assert not write_record(record, tmp_path)
    path = tmp_path / "2412" / "2412.06769.json"
    assert path.read_bytes() == (PAPERS / "2412" / "2412.06769.json").read_bytes() == dump_record(record).encode()
    assert read_records(tmp_path) == [record]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    record = get("2412.06769")
    write_record(record, tmp_path)
    before = (tmp_path / "2412" / "2412.06769.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("latentcot.catalog.store.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(record.model_copy(update={"note": "new"}), tmp_path)
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "2412").iterdir()] == [("2412.06769.json", before)]


def damaged(tmp_path, *records: Record) -> list[str]:
    for record in records:
        write_record(record, tmp_path)
    root = Path(__file__).resolve().parents[2]  # what the records say runs here is looked for in the repository
    return [str(problem) for problem in check_catalog(tmp_path, root).problems]


def test_check_sees_dead_slugs_facets_and_paths(tmp_path):
    record = get("2412.06769")
    taxonomy = record.taxonomy.model_copy(update={"primary": "vertical/nothing"})
    facets = record.facets.model_copy(update={"mechanism": ["magic"]})
    runnable = (
        type(record)
        .model_validate_json(
            json.dumps(
                record.model_dump(mode="json")
                | {"runnable": [{"module": "no/such.py", "notebook": None, "test": "../x"}]}
            )
        )
        .runnable
    )
    problems = damaged(
        tmp_path, record.model_copy(update={"taxonomy": taxonomy, "facets": facets, "runnable": runnable})
    )
    assert len([p for p in problems if "vertical/nothing" in p]) == 1
    assert len([p for p in problems if "magic" in p]) == 1
    assert len([p for p in problems if "does not exist" in p]) == 2


def test_check_sees_one_title_on_two_ids(tmp_path):
    record = get("2412.06769")
    twin = record.model_copy(
        update={
            "key": "2412.06770",
            "citekey": "Other2024",
            "ids": record.ids.model_copy(update={"arxiv": "2412.06770", "openreview": None}),
            "title": record.title.upper(),
        }
    )
    problems = damaged(tmp_path, record, twin)
    assert len(problems) == 1
    assert "duplicate title" in problems[0]


def test_check_sees_repeated_citation_keys_and_wrong_places(tmp_path):
    record = get("2412.06769")
    other = get("2406.07524").model_copy(update={"citekey": record.citekey.lower()})
    problems = damaged(tmp_path, record, other)
    assert any("duplicate citation key" in problem for problem in problems)
    path = tmp_path / "2412" / "2412.06769.json"
    (tmp_path / "2411").mkdir()
    path.rename(tmp_path / "2411" / "2412.06768.json")
    problems = damaged(tmp_path)
    assert any("holds the key" in problem for problem in problems)
    assert any("expected 2412, given 2411" in problem for problem in problems)


def test_check_sees_a_file_that_is_not_canonical(tmp_path):
    record = get("2412.06769")
    write_record(record, tmp_path)
    path = tmp_path / "2412" / "2412.06769.json"
    path.write_text(json.dumps(record.model_dump(mode="json")), encoding="utf-8")
    (tmp_path / "2412" / "stray.txt").write_text("x", encoding="utf-8")
    assert {problem.split(": ")[1] for problem in damaged(tmp_path)} == {"format", "place"}


def test_check_lists_damaged_files_and_reading_them_is_one_line(tmp_path):
    (tmp_path / "2412").mkdir()
    (tmp_path / "2412" / "2412.06769.json").write_text("{", encoding="utf-8")
    problems = damaged(tmp_path)
    assert len(problems) == 1
    assert problems[0].startswith("2412/2412.06769.json: schema: ")
    with pytest.raises(CatalogError) as caught:
        read_records(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_catalog_loads_without_torch_and_from_any_folder(tmp_path):
    code = (
        "import sys; from latentcot.catalog import load_records; import latentcot.catalog.cli; "
        "assert len(load_records()) > 700; "
        "bad = {'torch', 'transformers', 'triton', 'jsonschema'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
