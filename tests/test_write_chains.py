"""Chains for judged train pairs, on real Spark and Delta: what is kept, what is dropped, what never comes in."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyspark.sql import Row, SparkSession

from jobs import ingest, write_chains
from schemas import delta
from tests.test_ingest import counts, jsonl, pair


def chain(n: int, label: int, text: str, **fields: object) -> dict[str, object]:
    return {"query": f"query {n}", "product_id": f"p{n}", "label": label, "chain": text} | fields


def chains(spark: SparkSession, root: str) -> dict[str, Row]:
    """Rows of `chains` by the product of their pair."""
    pairs = delta.read(spark, root, "pairs").select("pair_id", "product_id")
    rows = delta.read(spark, root, "chains").join(pairs, "pair_id", how="inner").collect()
    assert len({r["product_id"] for r in rows}) == len(rows)
    return {r["product_id"]: r for r in rows}


def test_a_chain_is_kept_only_where_its_own_conclusion_is_the_human_label_and_only_of_train_pairs(
    spark: SparkSession, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = [pair(n, label=1 + n % 4, split="train") for n in range(1, 6)]
    judged += [pair(6, label=3, split="dev"), pair(7, label=3, split="test"), pair(8)]
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "pairs.jsonl", *judged))])
    # Two sources that disagree on pair 9, and a second source that calls pair 10 a test pair.
    first = [pair(9, label=4, split="train"), pair(10, label=4, split="train")]
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "a.jsonl", *first))])
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "b.jsonl", pair(9, label=3)))])
    file = jsonl(
        tmp_path / "chains.jsonl",
        chain(1, 2, "Grade 2. Missed: type. So Mismatch."),
        chain(2, 4, "All there. So Excellent."),  # gold says 3
        chain(3, 4, "Missed: colour. So Related."),
        chain(4, 1, "So Irrelevant."),
        chain(5, 2, "Missed: type.", kind="plain"),
        *(chain(n, 3, "Missed: colour. So Related.") for n in (6, 7, 8, 9, 77)),
        chain(10, 4, "All there. So Excellent."),
        {"query": "query 1", "product_id": "p1", "label": 2},
        '{"query": "q',
    )
    assert write_chains.main(["--tables", root, "--chains", str(file)]) == 0
    found = chains(spark, root)
    assert {p: (r["label"], r["kept"], r["reason"]) for p, r in found.items()} == {
        "p1": (2, True, None),
        "p2": (3, False, "other_label"),
        "p3": (4, False, "other_conclusion"),
        "p4": (1, False, "no_conclusion"),
        "p5": (2, False, "no_conclusion"),
        "p10": (4, True, None),
    }
    assert {r["teacher"] for r in found.values()} == {"file"}
    texts = {r["product_id"]: r["content_hash"] for r in delta.read(spark, root, "pairs").collect()}
    assert all(r["content_hash"] == texts[p] for p, r in found.items())
    said = capsys.readouterr().out
    assert "13 rows read · 6 of judged train pairs, 5 left out" in said
    assert "4 Excellent: kept 1, dropped 1 other_conclusion" in said
    assert "fields that mean nothing here were left out: kind" in said
    wanted = {"read": 13, "quarantined": 2, "not_train": 5, "kept": 2, "other_label": 1, "no_conclusion": 2}
    assert counts(spark, root) == wanted | {"other_conclusion": 1}
    stages = {r["stage"] for r in delta.read(spark, root, "quarantine").collect()}
    assert stages == {"write_chains"}

    # The same file again rewrites no chain; a better chain replaces the one that was dropped.
    before = {p: r["run_id"] for p, r in found.items()}
    write_chains.main(["--tables", root, "--chains", str(file)])
    assert {p: r["run_id"] for p, r in chains(spark, root).items()} == before
    better = jsonl(tmp_path / "better.jsonl", chain(2, 3, "Missed: colour. So Related."))
    write_chains.main(["--tables", root, "--chains", str(better)])
    after = chains(spark, root)
    assert {p for p, r in after.items() if r["run_id"] != before[p]} == {"p2"}
    assert after["p2"]["kept"]


def test_two_chains_of_one_pair_contradict_each_other_and_neither_is_taken(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "p.jsonl", pair(1, label=3, split="train")))])
    both = [chain(1, 3, "Missed: colour. So Related."), chain(1, 3, "Missed: size. So Related.")]
    write_chains.main(["--tables", root, "--chains", str(jsonl(tmp_path / "c.jsonl", *both))])
    assert not chains(spark, root)
    (why,) = {r["reason"] for r in delta.read(spark, root, "quarantine").collect()}
    assert why == "two chains of one pair: c.jsonl:1, c.jsonl:2"


def test_a_missing_file_is_an_error_before_spark_does_anything(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--chains .*nowhere\.jsonl: there is no such file"):
        write_chains.main(["--tables", str(tmp_path / "t"), "--chains", str(tmp_path / "nowhere.jsonl")])
