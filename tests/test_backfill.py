"""The backfill, on real Spark and Delta with an engine that needs no model."""

from __future__ import annotations

import json
import os
import socket
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs import rescore as job
from jobs.backfill import Chosen, backfill, condition, main, shifts
from partitioner import models, prefix, waves
from partitioner.night import Night, in_portions
from schemas import delta, runs
from tests import invariants, judged
from tests.models import tiny_model
from tests.pairs import PRODUCTS, QUERIES, probs, put, scoring
from udfs.model import inspect
from udfs.prompt import load

MODEL = "0123456789abcdef"


def weigh(spark: SparkSession, root: str, weights: dict[str, float]) -> None:
    """Gives products' pairs a weight."""
    rows = delta.read(spark, root, "pairs").collect()
    changed = [{**r.asDict(), "weight": weights[r["product_id"]]} for r in rows if r["product_id"] in weights]
    delta.upsert(
        spark, root, "pairs", delta.rows(spark, "pairs", [list(r.values()) for r in changed]).localCheckpoint()
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1=1) OR (1=1", "Syntax error"),
        ("locale = 'de'; DROP TABLE pairs", "Syntax error"),
        ("locale", "BOOLEAN"),
        ("colour = 'red'", "colour"),
        ("reflect('java.lang.System', 'exit', '1') IS NULL", "reflect"),
        ("java_method('java.lang.System', 'exit', '1') IS NULL", "java_method"),
        ("pair_id IN (SELECT pair_id FROM parquet.`/etc`)", "Wanted is one condition"),
        ("EXISTS (SELECT 1)", "not allowed here"),
        ("rand() < 2", "rand"),
        ("try_reflect('java.lang.System', 'exit', '1') IS NULL", "reflect"),
        ("_metadata.file_size > 0", "only the columns of pairs"),
        ("_metadata.file_size > 0 AND reflect('java.util.UUID', 'randomUUID') IS NULL", "only the columns of pairs"),
    ],
)
def test_a_condition_that_is_none_is_refused(spark: SparkSession, root: str, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        condition(delta.read(spark, root, "pairs"), text)


@pytest.mark.parametrize(
    "text",
    [
        "locale = 'de' AND NOT (brand IS NULL OR title LIKE '%x%')",
        "updated_at >= current_timestamp() - INTERVAL 2 DAYS",
        "attributes['colour'] IN ('red', 'blue') OR lower(category) RLIKE '^kit'",
        "weight BETWEEN 1 AND 5 -- the middle",
    ],
)
def test_a_condition_may_read_and_compare_any_column(spark: SparkSession, root: str, text: str) -> None:
    delta.read(spark, root, "pairs").where(condition(delta.read(spark, root, "pairs"), text)).collect()


@pytest.mark.slow
def test_the_most_wanted_products_come_first_and_a_limit_is_kept(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    weigh(spark, root, {"k2": 3.0, "t1": 9.0})
    run = backfill(spark, root, scoring(), Chosen(limit=6))
    found = [(r["product_id"], r["count"]) for r in probs(spark, root).groupBy("product_id").count().collect()]
    assert sorted(found) == [("k2", 2), ("t1", 4)]
    assert run.counts == {"seen": 6, "skipped": 0, "scored": 6, "refused": 0}
    gates = {r["name"]: (r["level"], r["found"]) for r in delta.read(spark, root, "gates").collect()}
    assert gates["freshness"] == ("warn", 0.5)
    assert gates["refused_share"] == ("ok", 0.0)


@pytest.mark.slow
def test_a_backfill_goes_on_where_another_one_stopped_among_the_pairs_that_are_asked_for(
    spark: SparkSession, root: str
) -> None:
    put(spark, root, PRODUCTS)
    weigh(spark, root, {"k2": 3.0, "t1": 9.0})
    backfill(spark, root, scoring(), Chosen(limit=6))
    run = backfill(spark, root, scoring(), Chosen(where="product_id = 'k1'"))
    assert run.counts["scored"] == 4
    run = backfill(spark, root, scoring())
    assert (run.counts["skipped"], run.counts["scored"]) == (10, 2)
    assert not invariants.audit(root, MODEL) + invariants.left(root)


@pytest.mark.slow
def test_pairs_without_probabilities_are_retried_among_those_asked_for_and_within_the_limit(
    spark: SparkSession, root: str
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(4)])
    short = scoring(max_model_len=16)
    assert backfill(spark, root, short).counts["refused"] == 16
    chosen = Chosen("product_id IN ('k1', 'k2')", limit=6)
    run = backfill(spark, root, scoring(), chosen, retry_failed=True)
    assert run.counts["scored"] == 6
    scored = probs(spark, root).where("outcome = 'scored'").collect()
    assert {row["product_id"] for row in scored} == {"k1", "k2"}


@pytest.mark.slow
def test_portions_are_scored_in_order_of_weight_and_keep_a_product_together(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(8)])
    weigh(spark, root, {f"k{i}": float(i) for i in range(8)})
    monkeypatch.setattr(waves, "WAVE_SECONDS", 0.0)
    monkeypatch.setattr(prefix, "HOT_TOKENS", 200)
    backfill(spark, root, scoring())
    merged: dict[str, set[str]] = {}
    for row in probs(spark, root).collect():
        merged.setdefault(row["wave_id"], set()).add(row["product_id"])
    order = [sorted(merged[wave], reverse=True) for wave in sorted(merged)]
    assert [product for wave in order for product in wave] == [f"k{i}" for i in reversed(range(8))]


def test_what_is_wanted_most_comes_first_though_nearly_all_is_wanted_alike(spark: SparkSession) -> None:
    weights = {f"k{i}": {98: 2.0, 99: 9.0}.get(i, 0.0) if i else None for i in range(100)}
    rows = spark.createDataFrame(
        [("en", k, w) for k, w in weights.items()], "locale STRING, product_id STRING, w DOUBLE"
    )
    found = {r["product_id"]: r["portion"] for r in in_portions(rows, F.col("w"), ("locale", "product_id")).collect()}
    assert len(found) == 100
    assert found["k99"] < found["k98"] < min(found[f"k{i}"] for i in range(1, 98))
    assert len({found[f"k{i}"] for i in range(1, 98)}) == 1
    assert found["k0"] == max(found.values()) > found["k1"]


@pytest.mark.slow
def test_the_deadline_ends_it_after_a_wave_and_the_next_run_goes_on(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(24)])
    monkeypatch.setattr(waves, "WAVE_SECONDS", 0.0)
    monkeypatch.setattr(prefix, "HOT_TOKENS", 600)
    write, written = Night.write, 0

    def late(night: Night, answered: Any, wave_id: str) -> None:
        nonlocal written
        written += 1
        write(night, answered, wave_id)
        if written == 2:
            night.deadline = datetime.now() - timedelta(seconds=1)

    monkeypatch.setattr(Night, "write", late)
    run = backfill(spark, root, scoring(), deadline=datetime.now() + timedelta(hours=1))
    kept = probs(spark, root).count()
    assert run.status == "stopped"
    assert "of 96 pairs are left" in (run.message or "")
    assert 0 < kept < 96
    assert job.exit_code(run) == 5
    again = backfill(spark, root, scoring())
    assert (again.counts["skipped"], again.counts["scored"]) == (kept, 96 - kept)
    # Each run's tokens are of the pairs that it asked.
    for one in (run, again):
        rows = probs(spark, root).where(F.col("run_id") == one.run_id)
        assert one.prompt_tokens == rows.agg(F.sum("prompt_tokens")).collect()[0][0]
        assert one.block_floor
        assert one.computed_tokens
        assert 0.8 < one.computed_tokens / one.block_floor < 1.1


@pytest.mark.slow
def test_a_dry_run_asks_no_engine_and_its_prediction_is_held_against_what_came(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, PRODUCTS[:2])
    assert backfill(spark, root, scoring(), dry_run=True).engine_loads is None
    assert "no rate of this model was measured yet" in capsys.readouterr().out
    first = backfill(spark, root, scoring())
    assert first.figures["tokens_per_second"] > 0
    put(spark, root, PRODUCTS)
    told = backfill(spark, root, scoring(), dry_run=True)
    assert told.status == "done"
    assert probs(spark, root).count() == 8
    assert f"tokens/s (run {first.run_id})" in capsys.readouterr().out
    run = backfill(spark, root, scoring())
    assert run.figures["predicted_engine_seconds"] == told.figures["predicted_engine_seconds"]
    assert run.engine_seconds is not None
    expected = run.figures["predicted_engine_seconds"] / run.engine_seconds - 1
    assert run.figures["prediction_error"] == pytest.approx(expected)
    names = {"startup", "planning", "scoring", "engine", "idle", "commit", "commit_waited", "check", "total"}
    assert {f"seconds_{name}" for name in names} <= run.figures.keys()
    assert run.figures["noise_max_dp"] == 0


@pytest.mark.slow
def test_a_new_model_fills_beside_the_old_one_and_a_sample_shows_how_tiers_shift(
    spark: SparkSession, root: str
) -> None:
    put(spark, root, PRODUCTS)
    old, new = scoring(), scoring(block=64)
    backfill(spark, root, old)
    cuts = [
        {**cut, "model_id": MODEL, "prompt_id": old.prompt.prompt_id}
        for cut in judged.cuts(1, {"": (0.5, 0.5, 0.5)}, "active")
    ]
    judged.fill(spark, root, "thresholds", cuts)
    some = Chosen(sample=1.0)
    backfill(spark, root, new, some)
    assert probs(spark, root).groupBy("prompt_id").count().select("count").collect() == [(12,), (12,)]
    told = shifts(spark, root, new, some, "category")
    assert "cut by its likeliest label (no version is fitted)" in told[0]
    assert told[1].startswith("backfill:   all: 12 pairs, ")
    assert any("category = Kitchen: 12 pairs" in line for line in told)
    none = Chosen(sample=0.0)
    assert none.of(delta.read(spark, root, "pairs")).isEmpty()
    assert shifts(spark, root, new, none, None)[1] == "backfill: no pair of the sample is judged by both"


@pytest.mark.slow
def test_the_model_in_force_is_asked_with_the_prompt_in_force_and_another_prompt_of_it_may_be_sampled(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    put(spark, root, PRODUCTS, QUERIES[:1])
    model = inspect(str(tiny_model(tmp_path / "model")))
    models.register(spark, root, model, "external")
    prompt = load(model.prompt_file or "", model.tokenizer_json, model.vocab_size)
    cuts = [{**cut, "model_id": model.model_id} for cut in judged.cuts(1, {"": (0.5, 0.5, 0.5)}, "active")]
    judged.fill(spark, root, "thresholds", cuts)
    for flags in (["--model", "active"], ["--model", model.path, "--sample", "1%"]):
        with pytest.raises(ValueError, match=f"the thresholds in force are of prompt {judged.PROMPT}"):
            main(["--tables", root, *flags])
    delta.update(spark, root, "thresholds", F.lit(True), {"prompt_id": F.lit(prompt.prompt_id)})
    with pytest.raises(ValueError, match="model and prompt in force, and there are none other"):
        main(["--tables", root, "--model", model.path, "--sample", "1%"])
    assert not invariants.table(root, "runs")


@pytest.mark.slow
def test_a_second_run_of_its_like_is_refused_while_the_first_is_alive(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS, QUERIES[:1])
    what = scoring()
    first = runs.start(spark, root, "backfill", MODEL, what.prompt.prompt_id, alone=True)
    with pytest.raises(ValueError, match=rf"run {first.run_id} of backfill with this model and prompt is alive"):
        backfill(spark, root, what)
    runs.finish(spark, root, first, "done")
    # One that was killed between its lease and its row, and one of another machine that renews no more.
    dead = {"host": socket.gethostname(), "pid": 2**22 + 1, "born": "1"}
    for name, who in (("dead", dead), ("gone", {"host": "elsewhere", "pid": 1, "born": "1"})):
        file = Path(root) / "_leases" / f"{name}.json"
        file.write_text(json.dumps(who))
        os.utime(file, (1, 1))
    assert backfill(spark, root, what).counts["scored"] == 3
    assert not list((Path(root) / "_leases").glob("[!.]*"))


@pytest.mark.slow
def test_of_two_runs_that_looked_at_the_same_moment_the_one_whose_row_came_second_gives_way(
    spark: SparkSession, root: str
) -> None:
    delta.prepare(spark, root, new=True)
    before = delta.version(spark, root, "runs")
    for name in ("z", "a"):
        run = runs.Run(name, "backfill", "running", judged.NOW, model_id=MODEL, prompt_id="p")
        runs._lease(spark, root, name).take()
        delta.append(spark, root, "runs", runs._row(spark, run))
    versions = range(before + 1, before + 3)
    runs.refuse_second(spark, root, "backfill", MODEL, "p", "z", versions)
    with pytest.raises(ValueError, match="run z of backfill"):
        runs.refuse_second(spark, root, "backfill", MODEL, "p", "a", versions)
    for name in ("z", "a"):
        runs._lease(spark, root, name).give_up()
    assert sorted(runs.close_lost(spark, root)) == ["a", "z"]
    assert {row["status"] for row in delta.read(spark, root, "runs").collect()} == {"lost"}


@pytest.mark.slow
def test_a_backfill_that_pairs_outrun_says_so(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, PRODUCTS)
    score, turns = Night.score, iter(range(9))

    def outrun(night: Night, *rest: Any) -> Any:
        done = score(night, *rest)
        put(spark, root, [("k9", f"Kettle {next(turns)}", {}, None)])
        return done

    monkeypatch.setattr(Night, "score", outrun)
    run = backfill(spark, root, scoring())
    assert (run.status, run.counts["scored"]) == ("done", 20)
    assert next(turns) == 3
    told = "pairs changed again while they were scored, 3 times over; what came last is for the next run"
    assert run.message == told
    assert told in capsys.readouterr().out
