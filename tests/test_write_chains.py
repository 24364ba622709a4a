"""Chains for judged train pairs, on real Spark and Delta: what is kept, what is dropped, what never comes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import Row, SparkSession

from jobs import ingest, write_chains
from schemas import delta, runs
from schemas.canonical import normalised
from schemas.gold import judged
from tests.conftest import REPO
from tests.engines import answer_form
from tests.pairs import QUERIES, put, scoring
from tests.test_ingest import counts, jsonl, pair
from tests.test_sample import judge
from udfs import teacher
from udfs.answer import conclusion
from udfs.engine import Sampling
from udfs.prompt import Segment


def chain(n: int, label: int, text: str, **fields: object) -> dict[str, object]:
    return {"query": f"query {n}", "product_id": f"p{n}", "label": label, "chain": text} | fields


def chains(spark: SparkSession, root: str, by: str = "product_id") -> dict[str, Row]:
    """Rows of `chains` by the product of their pair, or another column that tells them apart."""
    pairs = delta.read(spark, root, "pairs").select("pair_id", "product_id")
    rows = delta.read(spark, root, "chains").join(pairs, "pair_id", how="inner").collect()
    assert len({r[by] for r in rows}) == len(rows)
    return {r[by]: r for r in rows}


@pytest.mark.slow
def test_a_chain_is_kept_only_where_its_own_conclusion_is_the_human_label_and_only_of_train_pairs(
    spark: SparkSession, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [pair(n, label=1 + n % 4, split="train") for n in range(1, 6)]
    rows += [pair(6, label=3, split="dev"), pair(7, label=3, split="test"), pair(8)]
    ingest.main(["--tables", root, "--pairs", str(jsonl(tmp_path / "pairs.jsonl", *rows))])
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
    wanted = {
        "read": 13,
        "refused_files": 0,
        "quarantined": 2,
        "not_train": 5,
        "kept": 2,
        "other_label": 1,
        "no_conclusion": 2,
    }
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


@pytest.mark.slow
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


class Teaching:
    """A tiny teacher without a model, its prompt, and how it is asked."""

    def __init__(self) -> None:
        self.what = scoring(max_model_len=1500)
        self.prompt = teacher.load(REPO / "demo" / "teacher.json", self.what.model.tokenizer_json, 512)
        self.asked = Sampling(60, answer_form().end_ids, n=2, seed=1)

    def write(self, spark: SparkSession, root: str, **more: Any) -> runs.Run:
        return write_chains.from_teacher(spark, root, self.what, self.prompt, self.asked, **more)


@pytest.mark.slow
def test_a_teachers_chains_are_kept_where_they_conclude_the_human_label(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, None) for i in range(12)])
    judge(spark, root)
    teaching = Teaching()
    run = teaching.write(spark, root)
    rows = chains(spark, root, "pair_id")
    gold = {r["pair_id"]: r for r in delta.read(spark, root, "gold").collect()}
    assert set(rows) == {pair for pair, row in gold.items() if row["split"] == "train"}
    assert len(rows) == 36
    for pair_id, row in rows.items():
        assert row["label"] == gold[pair_id]["label"]
        assert row["teacher"] == teaching.what.model.model_id
        assert row["kept"] == (conclusion(row["chain"]) == row["label"])
        assert row["reason"] in (None, "no_conclusion", "other_conclusion")
    kept = sum(r["kept"] for r in rows.values())
    assert 0 < kept < 36
    assert (run.counts["kept"], run.counts["seen"], run.counts["sampled"]) == (kept, 36, 36)
    assert f"kept {sum(r['kept'] and r['label'] == 4 for r in rows.values())}," in capsys.readouterr().out


@pytest.mark.slow
def test_a_teacher_is_asked_once_and_again_only_for_what_was_dropped(spark: SparkSession, root: str) -> None:
    """With --again, another seed mends some of the dropped chains, and no kept one is touched."""
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, None) for i in range(12)])
    judge(spark, root)
    teaching = Teaching()
    run = teaching.write(spark, root)
    rows = chains(spark, root, "pair_id")
    kept = sum(r["kept"] for r in rows.values())
    assert teaching.write(spark, root).counts["skipped"] == 36
    teaching.asked = Sampling(60, answer_form().end_ids, n=2, seed=2)
    more = teaching.write(spark, root, again=True)
    assert (more.counts["skipped"], more.counts["sampled"]) == (kept, 36 - kept)
    after = chains(spark, root, "pair_id")
    assert all(after[p]["run_id"] == run.run_id for p, r in rows.items() if r["kept"])
    assert more.counts["kept"] == sum(r["kept"] for r in after.values()) > kept
    assert teaching.write(spark, root, limit=5).counts["seen"] == 5
    some = "SELECT pair_id FROM gold WHERE label = 3"
    assert teaching.write(spark, root, pairs=some).counts["seen"] == sum(r["label"] == 3 for r in rows.values())
    with pytest.raises(ValueError, match="none of the selected pairs is a judged one of split train"):
        teaching.write(spark, root, pairs="SELECT pair_id FROM gold WHERE split = 'test'")


def test_no_pair_of_its_own_query_and_none_that_is_held_out_is_shown_to_the_teacher(
    spark: SparkSession, root: str
) -> None:
    steel = {"material": "steel"}
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", steel, None) for i in range(6)], [*QUERIES, "Cheap  KETTLE"])
    judge(spark, root)
    pool = judged(spark, root, "train").localCheckpoint()
    prompt = Teaching().prompt
    prompt = replace(prompt, neighbours=4, neighbour=(*prompt.neighbour, Segment("attributes", (), (), 20)))
    shown = write_chains.with_neighbours(pool, pool, prompt).select("query", "label", "neighbours").collect()
    assert len(shown) == 24
    labels = {(r["query"], r["title"]): r["label"] for r in pool.collect()}
    for row in shown:
        assert len(row["neighbours"]) == 4
        for near in row["neighbours"]:
            assert normalised(near["query"]) not in (normalised(row["query"]), "blue towel")
            assert near["label"] == labels[near["query"], near["title"]]
            assert near["attributes"] == {"material": "steel"}  # all that the prompt shows of a neighbour


@pytest.mark.slow
def test_a_teachers_prompt_that_is_too_long_is_a_dropped_chain_with_its_reason(spark: SparkSession, root: str) -> None:
    put(spark, root, [("k1", "Steel kettle", {}, "xyzzy qwert " * 90)], QUERIES[:1])
    judge(spark, root, "'train'")
    teaching = Teaching()
    teaching.what = scoring(max_model_len=200)
    teaching.write(spark, root)
    (row,) = chains(spark, root).values()
    assert (row["kept"], row["reason"], row["chain"]) == (False, "too_long", "")


def test_a_file_of_chains_has_no_use_for_what_a_teacher_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no use for --limit, --pairs|no use for --pairs, --limit"):
        write_chains.main(
            ["--tables", "t", "--chains", "c.jsonl", "--limit", "5", "--pairs", "SELECT pair_id FROM pairs"]
        )


def test_chains_come_from_one_place(tmp_path: Path) -> None:
    for flags in ([], ["--chains", "c.jsonl", "--model", "demo"]):
        with pytest.raises(ValueError, match=r"either from --chains FILE or from a teacher"):
            write_chains.main(["--tables", str(tmp_path / "t"), *flags])
