"""Tiers to the index: only what changed, followed from the change feed without Spark; and files for search tools."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs.promote_thresholds import swap
from jobs.publish import document_id, export, main, publish
from schemas import delta
from tests.judged import MODEL, NOW, cuts, fill, pair, pair_key, run, scored

P = [[0.9, 0.05, 0.05, 0.0], [0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.1, 0.9]]


def tables(spark: SparkSession, root: str) -> None:
    fill(spark, root, "pairs", [pair(i, f"q {i // 4}") for i in range(8)])
    fill(spark, root, "label_probs", [scored(i, f"q {i // 4}", P[i % 4]) for i in range(8)])
    fill(spark, root, "runs", [run()])
    fill(spark, root, "thresholds", [*cuts(1, {"": (0.6,) * 3}, "active"), *cuts(2, {"": (0.5,) * 3})])


def feed(root: str, since: int) -> list[tuple[str, str, int]]:
    """What the index team sees after a version: (kind, pair_id, tier), without Spark."""
    table = DeltaTable(f"{root}/published_labels")
    rows: Any = table.load_cdf(starting_version=since, allow_out_of_range=True).read_all()
    kept = [r for r in pa.table(rows).to_pylist() if r["_change_type"] != "update_preimage"]
    return sorted((r["_change_type"], r["pair_id"], r["tier"]) for r in kept)


def test_only_pairs_whose_tier_changed_are_written_and_the_feed_tells_exactly_these(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no version is in force; put one there: promote_thresholds"):
        publish(spark, root)
    tables(spark, root)
    assert publish(spark, root) == {"inserted": 8, "updated": 0, "deleted": 0}
    at = delta.version(spark, root, "published_labels")
    assert publish(spark, root) == {"inserted": 0, "updated": 0, "deleted": 0}
    assert delta.version(spark, root, "published_labels") == at
    swap(spark, root, 1, 2, "a test", None)
    gone = spark.createDataFrame([(pair_key(7),)], "pair_id STRING")
    delta.delete(spark, root, "pairs", gone, ("pair_id",))
    assert publish(spark, root) == {"inserted": 0, "updated": 2, "deleted": 1}
    assert delta.version(spark, root, "published_labels") == at + 1
    # Of the pairs 1 and 5, c4 is 0.5: Related at 0.6, Excellent at 0.5.
    kept = {r["pair_id"]: r for r in delta.read(spark, root, "published_labels").collect()}
    assert {k: r["tier"] for k, r in kept.items()} == {pair_key(i): [4, 4, 2, 1][i % 4] for i in range(7)}
    changed = [k for k, r in kept.items() if r["tier_since_version"] == 2]
    expected = [("delete", pair_key(7), 1), *[("update_postimage", k, kept[k]["tier"]) for k in changed]]
    assert feed(root, at + 1) == sorted(expected)
    assert feed(root, at + 2) == []  # who has applied all asks for what does not exist yet
    assert sorted(changed) == [pair_key(1), pair_key(5)]


@pytest.mark.slow
def test_a_second_publisher_is_refused_and_one_that_slips_through_is_not_undone(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables(spark, root)
    merge = delta.sync

    def meanwhile(*args: Any) -> dict[str, int]:
        """Between the comparison of the first and its commit: a promotion, and another publisher's rows of it."""
        monkeypatch.setattr(delta, "sync", merge)
        with pytest.raises(ValueError, match="of publish is alive"):
            publish(spark, root)
        swap(spark, root, 1, 2, "a test", None)
        row = {"product_id": "p 1", "locale": "en", "tier": 4, "tier_since_version": 2, "tier_since_model_id": MODEL}
        fill(spark, root, "published_labels", [{"pair_id": pair_key(1), "query": "q 0", **row, "published_at": NOW}])
        return merge(*args)

    monkeypatch.setattr(delta, "sync", meanwhile)
    assert publish(spark, root) == {"inserted": 7, "updated": 3, "deleted": 0}
    kept = {r["pair_id"]: r["tier"] for r in delta.read(spark, root, "published_labels").collect()}
    assert kept == {pair_key(i): [4, 4, 2, 1][i % 4] for i in range(8)}
    assert publish(spark, root) == {"inserted": 0, "updated": 0, "deleted": 0}


@pytest.mark.slow
def test_qrels_are_read_by_ir_measures_and_ranx_which_agree_on_ndcg(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    ir_measures: Any = pytest.importorskip("ir_measures", reason="ir-measures is not installed")
    ranx: Any = pytest.importorskip("ranx", reason="ranx is not installed")
    tables(spark, root)
    odd = [("p\t9\u2003x", "q 0"), ("p 10/ü", "ein\tQuery\u2028mehr"), ("", "q 0")]
    fill(spark, root, "pairs", [pair(20 + i, q, product_id=p or "-", locale="de") for i, (p, q) in enumerate(odd)])
    fill(spark, root, "label_probs", [
        scored(20 + i, q, P[i], product_id=p or "-", locale="de") for i, (p, q) in enumerate(odd)
    ])  # fmt: skip
    out = tmp_path / "judgements.qrels"
    assert main(["--tables", root, "--format", "qrels", "--out", str(out)]) == 0
    lines = [line.split() for line in out.read_text().splitlines()]
    assert {len(line) for line in lines} == {4}
    assert len(lines) == 11
    topics = dict(line.split("\t") for line in (tmp_path / "judgements.qrels.topics.tsv").read_text().splitlines())
    assert set(topics) == {line[0] for line in lines}
    assert sorted(topics.values()) == ["ein Query mehr", "q 0", "q 0", "q 1"]
    run_of = {(q, d): 1.0 / (i + 1) for i, (q, _, d, _) in enumerate(lines)}
    by_ir = ir_measures.calc_aggregate(
        [ir_measures.nDCG(dcg="log2") @ 10],
        list(ir_measures.read_trec_qrels(str(out))),
        [ir_measures.ScoredDoc(q, d, s) for (q, d), s in run_of.items()],
    )
    scores: dict[str, dict[str, float]] = {}
    for (q, d), s in run_of.items():
        scores.setdefault(q, {})[d] = s
    by_ranx = ranx.evaluate(ranx.Qrels.from_file(str(out), kind="trec"), ranx.Run(scores), "ndcg@10")
    assert float(next(iter(by_ir.values()))) == pytest.approx(float(by_ranx), abs=1e-6)
    assert 0 < float(by_ranx) < 1


def test_ids_hold_no_white_space_and_come_back() -> None:
    from urllib.parse import unquote

    for text in ("a b", "a\u00a0b", "a\u2028b", "100%", "ü/ö", "a\tb", "-"):
        assert len(document_id(text).split()) == 1
        assert unquote(document_id(text)) == text


@pytest.mark.slow
def test_quepid_gets_its_csv_and_no_formula(spark: SparkSession, root: str, tmp_path: Path) -> None:
    tables(spark, root)
    bad = '=HYPERLINK("http://x","y")'
    fill(spark, root, "pairs", [pair(30, bad, product_id="@1"), pair(31, 'say "hi", twice', product_id="+2")])
    fill(spark, root, "label_probs", [
        scored(30, bad, P[0], product_id="@1"), scored(31, 'say "hi", twice', P[3], product_id="+2")
    ])  # fmt: skip
    out = tmp_path / "quepid.csv"
    assert export(spark, root, "quepid", str(out)) == 10
    with out.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["query", "docid", "rating"]
    assert ["'" + bad, "'@1", "3"] in rows
    assert ['say "hi", twice', "'+2", "0"] in rows
    assert not any(cell.startswith(("=", "+", "-", "@")) for row in rows[1:] for cell in row[:2])
    assert list(tmp_path.glob("*.part")) == []
    # The same query in two locales is two queries.
    fill(spark, root, "pairs", [pair(32, bad, product_id="@1", locale="de")])
    fill(spark, root, "label_probs", [scored(32, bad, P[3], product_id="@1", locale="de")])
    with pytest.raises(ValueError, match=r"cannot tell the query of one locale .* and there are de, en;"):
        export(spark, root, "quepid", str(out))
    assert export(spark, root, "quepid", str(out), "de") == 1
    assert out.read_text().splitlines()[1].endswith(",'@1,0")
    with pytest.raises(ValueError, match=r"--locale fr: no pair with a tier is of it \(there are: de, en\)"):
        export(spark, root, "qrels", str(out), "fr")


@pytest.mark.slow
def test_an_index_is_not_emptied_because_pairs_are_gone(spark: SparkSession, root: str) -> None:
    tables(spark, root)
    publish(spark, root)
    before = delta.version(spark, root, "published_labels")
    delta.delete(spark, root, "pairs", delta.read(spark, root, "pairs"), ("pair_id",))
    with pytest.raises(ValueError, match="all of published_labels would be withdrawn"):
        publish(spark, root)
    assert delta.version(spark, root, "published_labels") == before


def test_format_and_out_belong_together() -> None:
    for flags in (
        ["--format", "qrels"],
        ["--out", "x"],
        ["--locale", "de"],
        ["--format", "qrels", "--out", "/no/such/folder/x"],
    ):
        with pytest.raises(ValueError, match="--out"):
            main(["--tables", "/tmp/t", *flags])


@pytest.mark.slow
def test_a_failed_judgement_takes_the_pair_out_and_the_run_is_kept(spark: SparkSession, root: str) -> None:
    tables(spark, root)
    publish(spark, root)
    row = delta.read(spark, root, "label_probs").where(F.col("pair_id") == pair_key(0))
    nothing = F.lit(None).cast("double")
    names = ("p_excellent", "p_related", "p_mismatch", "p_irrelevant", "p_outside")
    failed = row.withColumns({**{n: nothing for n in names}, "outcome": F.lit("engine_failed")}).localCheckpoint()
    delta.upsert(spark, root, "label_probs", failed)
    assert publish(spark, root) == {"inserted": 0, "updated": 0, "deleted": 1}
    runs = delta.read(spark, root, "runs").where("job = 'publish' AND status = 'done'").select("counts").collect()
    assert sorted(sum(r["counts"].values()) for r in runs) == [1, 8]
