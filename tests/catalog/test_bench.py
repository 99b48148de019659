"""The benchmark measures what it says, and its synthetic records are records."""

import pytest

from latentcot.catalog import CatalogError, load_records
from latentcot.catalog.bench import main, mixed_queries, spread
from latentcot.catalog.check import check_catalog
from latentcot.catalog.record import dump_fast, dump_record
from latentcot.catalog.synthetic import synthetic_records, write_synthetic


def test_synthetic_records_pass_the_check_and_repeat(tmp_path):
    write_synthetic(tmp_path / "one", 300)
    checked = check_catalog(tmp_path / "one")
    assert checked.problems == []
    assert len(checked.records) == 300
    assert list(synthetic_records(20)) == list(synthetic_records(300))[:20]
    assert list(synthetic_records(20, seed=1)) != list(synthetic_records(20))
    with pytest.raises(CatalogError, match="already"):
        write_synthetic(tmp_path / "one", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    for count in (0, 10**9):
        with pytest.raises(ValueError, match="count"):
            next(synthetic_records(count))


def test_the_fast_writer_gives_the_canonical_text():
    records = [*load_records(), *synthetic_records(50)]
    odd = records[0].model_copy(update={"title": 'a "b" \\ \x7f / é \u2028 🤔 </x>', "note": "\x01\x1f\b\f\n\r\t"})
    for record in [*records, odd]:
        assert dump_fast(record) == dump_record(record).encode()


def test_percentiles():
    assert spread([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 3.0, "max": 3.0}
    assert spread([float(n) for n in range(1, 101)]) == {"p50": 50.5, "p95": 95.0, "max": 100.0}


def test_the_queries_are_mixed_and_the_same_each_time():
    titles = [record.title for record in load_records()]
    queries = mixed_queries(titles)
    assert queries == mixed_queries(titles)
    assert len(queries) > 300
    assert any(title in queries for title in titles)


def test_the_page_is_written(tmp_path):
    page = tmp_path / "catalog.md"
    assert main(["--sizes", "40", "--out", str(page), "--keep", str(tmp_path / "kept")]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| 40 |" in text
    assert "nDCG@10, held-out" in text
    assert (tmp_path / "kept" / "40").is_dir()
    with pytest.raises(SystemExit):
        main(["--sizes", "0"])
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "no" / "page.md")])
