"""Samples on real Spark and Delta with an engine that needs no model; pass@k against counting all subsets."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from math import comb
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs import sample
from partitioner import waves
from schemas import delta
from tests.conftest import REPO
from tests.engines import answer_form, logprobs, written
from tests.pairs import PRODUCTS, QUERIES, put, scoring
from tests.test_faults import poisoned
from udfs import adapter
from udfs.answer import conclusion
from udfs.engine import Sampling
from udfs.prompt import Renderer

FORM = answer_form()
ASKED = Sampling(40, FORM.end_ids, n=6, seed=3)


def judge(
    spark: SparkSession, root: str, split: str = "CASE WHEN query = 'blue towel' THEN 'test' ELSE 'train' END"
) -> None:
    """A human label for every pair, from its id; one query's pairs belong to test."""
    rows = delta.read(spark, root, "pairs").select(
        "pair_id",
        F.lit("raters").alias("source"),
        (F.abs(F.xxhash64("pair_id")) % 4 + 1).cast("int").alias("label"),
        F.lit(None).cast("array<int>").alias("rater_labels"),
        F.lit(1.0).alias("weight"),
        F.expr(split).alias("split"),
        F.current_timestamp().alias("judged_at"),
    )
    delta.upsert(spark, root, "gold", rows.localCheckpoint())


@pytest.mark.slow
def test_a_pair_that_kills_the_engine_is_left_out_and_all_others_are_sampled(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    put(spark, root, PRODUCTS)
    judge(spark, root)
    run = sample.sample(spark, root, poisoned(tmp_path / "engine", PRODUCTS, [(1, QUERIES[0])]), FORM, ASKED)
    assert (run.status, run.counts["sampled"], run.counts["refused"]) == ("done", 8, 1)
    rows = samples(spark, root)
    assert len(rows) == 8 * 6
    assert (PRODUCTS[1][0], QUERIES[0]) not in {(r["product_id"], r["query"]) for r in rows}


def samples(spark: SparkSession, root: str) -> list[dict[str, Any]]:
    pairs = delta.read(spark, root, "pairs").select("pair_id", "query", "product_id")
    return [r.asDict() for r in delta.read(spark, root, "samples").join(pairs, "pair_id", how="inner").collect()]


@pytest.mark.slow
def test_every_train_pair_gets_its_own_samples_judged_against_gold_and_no_pair_of_a_held_out_query_is_asked(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, PRODUCTS)
    judge(spark, root)
    what = scoring()
    run = sample.sample(spark, root, what, FORM, ASKED)
    rows = samples(spark, root)
    assert {r["query"] for r in rows} == set(QUERIES) - {"blue towel"}
    assert len(rows) == len({(r["pair_id"], r["sample"]) for r in rows}) == 9 * 6
    render = Renderer(what.prompt)
    texts = {p[0]: render.product(p[1], "Hearthline", "Kitchen", *p[2:]) for p in PRODUCTS}
    gold = {r["pair_id"]: r["label"] for r in delta.read(spark, root, "gold").collect()}
    for row in rows:
        ids = render.join(texts[row["product_id"]], render.query(row["query"]))
        own = written(ids, ASKED.seed_of(ids) + row["sample"])[:40]
        read = FORM.read(own)
        assert (row["label"], row["chain"], row["finished"], row["tokens"]) == (*read, len(own))
        assert (row["gold"], row["correct"]) == (gold[row["pair_id"]], row["label"] == gold[row["pair_id"]])
        assert (row["conclusion"], row["agrees"]) == (conclusion(read.chain), conclusion(read.chain) == read.label)
        assert (row["run_id"], row["split"], row["temperature"], row["seed"]) == (run.run_id, "train", 1.0, 3)
    assert 0 < sum(r["correct"] for r in rows) < len(rows)
    assert 0 < sum(r["agrees"] for r in rows) < len(rows)
    assert run.counts == {"seen": 9, "skipped": 0, "sampled": 9, "refused": 0}
    assert run.generated_tokens == sum(r["tokens"] for r in rows)
    # What is told is what the rows say.
    said = capsys.readouterr().out
    one = sum(r["correct"] for r in rows) / len(rows)
    both = sum(r["correct"] and r["agrees"] and r["finished"] for r in rows) / len(rows)
    assert re.search(rf"label +9 +{one:.3f} ", said)
    assert re.search(rf"label and chain +9 +{both:.3f} ", said)
    assert re.search(rf"guessing one of four +0.250 +0.684 +{1 - 0.75**6:.3f}", said)


@pytest.mark.slow
def test_a_pair_is_asked_again_only_for_a_new_text_or_another_draw(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    judge(spark, root)
    what = scoring()
    run = sample.sample(spark, root, what, FORM, ASKED)
    version = delta.version(spark, root, "samples")
    again = sample.sample(spark, root, what, FORM, ASKED)
    assert (again.run_id, again.counts) == (run.run_id, {"seen": 9, "skipped": 9})
    assert delta.version(spark, root, "samples") == version
    put(spark, root, [("k2", "Plastic kettle, red", *PRODUCTS[1][2:])], ["cheap kettle"])
    assert sample.sample(spark, root, what, FORM, ASKED).counts["sampled"] == 1
    assert len(samples(spark, root)) == 9 * 6
    # Another seed is another draw, beside the first, in a run of its own; the limit takes some of the pairs.
    other = sample.sample(spark, root, what, FORM, dataclasses.replace(ASKED, seed=4), limit=2)
    assert other.run_id != run.run_id
    assert len(samples(spark, root)) == 9 * 6 + 2 * 6


@pytest.mark.slow
def test_a_draw_that_failed_goes_on_where_it_stopped_under_its_own_run(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(20)], QUERIES[:2])
    judge(spark, root, "'train'")
    monkeypatch.setattr(sample.Draw, "least", 600)
    monkeypatch.setattr(waves, "WAVE_SECONDS", 0.0)
    asked: list[str] = []
    upsert = delta.upsert

    def third_wave_fails(session: SparkSession, where: str, name: str, *rest: Any) -> dict[str, int]:
        if name == "samples":
            asked.append(name)
            if len(asked) == 3:
                raise OSError("disk full")
        return upsert(session, where, name, *rest)

    monkeypatch.setattr(delta, "upsert", third_wave_fails)
    with pytest.raises(OSError, match="disk full"):
        sample.sample(spark, root, scoring(), FORM, ASKED)
    kept = delta.read(spark, root, "samples").select("pair_id").distinct().count()
    assert 0 < kept < 40
    (failed,) = delta.read(spark, root, "runs").where("status = 'failed'").collect()
    run = sample.sample(spark, root, scoring(), FORM, ASKED)
    assert run.run_id == failed["run_id"]
    assert run.engine_loads == failed["engine_loads"] + 1
    assert 0 < run.figures["seconds_other"] < run.figures["seconds_total"]
    assert run.counts == {"seen": 40, "skipped": kept, "sampled": 40 - kept, "refused": 0}
    rows = samples(spark, root)
    assert len(rows) == len({(r["pair_id"], r["sample"]) for r in rows}) == 40 * 6
    assert delta.read(spark, root, "runs").count() == 1
    assert not list((Path(root) / "_scratch").glob("*"))


@pytest.mark.slow
def test_a_pair_that_leaves_no_room_for_an_answer_has_no_samples_and_is_counted(spark: SparkSession, root: str) -> None:
    put(spark, root, [*PRODUCTS[:1], ("long", "Kettle", {}, "xyzzy qwert " * 60)], QUERIES[:1])
    judge(spark, root, "'train'")
    run = sample.sample(spark, root, scoring(max_model_len=200), FORM, ASKED)
    assert (run.counts["sampled"], run.counts["refused"]) == (1, 1)
    assert {r["product_id"] for r in samples(spark, root)} == {"k1"}


@pytest.mark.slow
def test_findings_are_judged_once_by_the_names_that_follow_them_with_label_and_statement_out_of_sight(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, PRODUCTS)
    judge(spark, root)
    what = scoring()
    made = dataclasses.replace(FORM, name_ids=(5, 6, 7, 8))
    sample.sample(spark, root, what, made, ASKED)
    before = samples(spark, root)
    assert {r["entailed"] for r in before} == {None}
    run = sample.sample(spark, root, what, made, ASKED, findings=True)
    rows = samples(spark, root)
    dropped = {"entailed", "created_at"}
    assert sorted(repr({k: v for k, v in r.items() if k not in dropped}) for r in rows) == sorted(
        repr({k: v for k, v in r.items() if k not in dropped}) for r in before
    )
    render = Renderer(what.prompt)
    texts = {p[0]: render.product(p[1], "Hearthline", "Kitchen", *p[2:]) for p in PRODUCTS}
    asked = set()
    for row in rows:
        question = made.question(row["chain"])
        if question is None:
            assert row["entailed"] is None
            continue
        ids = [*render.join(texts[row["product_id"]], render.query(row["query"])), *question]
        p = logprobs(ids)
        assert row["entailed"] == 4 - p.index(max(p))
        asked.add((row["pair_id"], row["chain"]))
    assert (run.counts["scored"], run.p_outside) == (len(asked), None)
    assert "its findings alone lead there in" in capsys.readouterr().out
    version = delta.version(spark, root, "samples")
    sample.sample(spark, root, what, made, ASKED, findings=True)
    assert delta.version(spark, root, "samples") == version
    with pytest.raises(ValueError, match="begins two labels' names with one token"):
        sample.sample(spark, root, what, FORM, ASKED, findings=True)


def drawn(pairs: list[list[tuple[bool, bool]]]) -> pa.Table:
    """`samples` of one run from (correct, agrees) of each sample."""
    rows = [
        {"run_id": "r", "pair_id": f"p{p}", "gold": 1 + p % 4, "sample": i, "correct": c, "agrees": a, "finished": True}
        for p, pair in enumerate(pairs)
        for i, (c, a) in enumerate(pair)
    ]
    return pa.Table.from_pylist(rows)


def by_counting(hits: list[bool], k: int) -> float:
    subsets = list(itertools.combinations(hits, k))
    return sum(any(subset) for subset in subsets) / len(subsets)


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_answer_in_spark_and_in_duckdb(spark: SparkSession) -> None:
    rng = random.Random(7)
    pairs = [[(i < c, rng.random() < 0.5) for i in rng.sample(range(9), 9)] for c in range(10)]
    table = drawn(pairs)
    spark.createDataFrame(table).createOrReplaceTempView("samples")
    in_spark = [tuple(r) for r in spark.sql(sample.PASS_AT_K).select("pair_id", "what", "k", "pass").collect()]
    spark.catalog.dropTempView("samples")
    samples = table  # noqa: F841 (DuckDB finds it by its name)
    found: Any = duckdb.sql(f"SELECT pair_id, what, k, pass FROM ({sample.PASS_AT_K})")
    in_duckdb = found.fetchall()
    assert len(in_spark) == len(in_duckdb) == 10 * 2 * 5
    for rows in (in_spark, in_duckdb):
        assert {k for _, _, k, _ in rows} == {1, 2, 4, 8, 9}
        for pair_id, what, k, estimate in rows:
            hits = [c and (a or what == "label") for c, a in pairs[int(pair_id[1:])]]
            assert float(estimate) == pytest.approx(by_counting(hits, k), abs=1e-12)


def test_the_sql_for_readers_is_that_of_this_version() -> None:
    assert (REPO / "docs" / "pass_at_k.sql").read_text().endswith(sample.PASS_AT_K)


def test_pass_at_k_is_exact_for_a_thousand_samples() -> None:
    right = [0, 1, 3, 500, 900, 999, 1000]
    samples = drawn([[(i < c, True) for i in range(1000)] for c in right])  # noqa: F841
    found: Any = duckdb.sql(f"SELECT pair_id, k, pass FROM ({sample.PASS_AT_K}) WHERE what = 'label'")
    rows = found.fetchall()
    assert len(rows) == len(right) * 11
    for pair_id, k, estimate in rows:
        c = right[int(pair_id[1:])]
        assert float(estimate) == pytest.approx(1 - comb(1000 - c, k) / comb(1000, k), abs=1e-12)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--n", "0"], "--n 0: 1 to 1000 samples"),
        (["--temperature", "0"], "--temperature 0 gives the same answer --n 8 times"),
        (["--temperature", "nan"], "--temperature nan: allowed is 0 to 10"),
        (["--max-tokens", "512"], "--max-tokens 512: an answer has at least 2"),
    ],
)
def test_a_wrong_way_of_drawing_is_refused_with_what_is_allowed(flags: list[str], sentence: str) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    sample.add_sampling_flags(parser)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        sample.sampling(parser.parse_args(flags), scoring())


def test_a_model_is_asked_in_the_order_that_it_was_taught(tmp_path: Path) -> None:
    assert sample.order(None, str(tmp_path)) == "post"
    assert sample.order("pre", str(tmp_path)) == "pre"
    adapter.write_recipe(str(tmp_path), {"order": "pre"})
    assert sample.order(None, str(tmp_path)) == sample.order("pre", str(tmp_path)) == "pre"
    with pytest.raises(ValueError, match=r"--order post: .* was taught --order pre"):
        sample.order("post", str(tmp_path))


@pytest.mark.slow
def test_no_judged_pairs_is_an_error_that_names_the_command(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS[:1], QUERIES[:1])
    with pytest.raises(ValueError, match="no judged pairs in split dev; bring some: ingest"):
        sample.sample(spark, root, scoring(), FORM, ASKED, split="dev")
