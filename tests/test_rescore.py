"""The stream, on real Spark and Delta with an engine that needs no model; the real engine has its own tests."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pyspark.sql import Row, SparkSession
from pyspark.sql import functions as F
from safetensors.numpy import save_file

import jobs
from jobs import main as dispatcher
from jobs import rescore as job
from jobs.rescore import rescore
from partitioner import engines, models, prefix, waves
from partitioner import night as nights
from partitioner.night import Night
from schemas import delta, runs
from tests import invariants, judged
from tests.engines import load_counted, load_drifting, load_fake, load_mortal, logprobs
from tests.models import PROMPT, tiny_model
from tests.pairs import PRODUCTS, QUERIES, probs, put, scoring
from udfs import selfcheck
from udfs.engine import EngineSettings
from udfs.model import inspect
from udfs.prompt import Renderer
from udfs.score import Scoring


def test_few_pairs_of_a_product_are_asked_again_where_there_are_others() -> None:
    rows = [Row(product_id=product, query=query) for product in "ab" for query in range(20)]
    rows.append(Row(product_id="c", query=0))

    def drawn(count: int) -> list[str]:
        return [row[0] for row in nights.drawn_in_groups(rows, ("product_id",), count)]

    assert sorted(drawn(17)) == ["a"] * 8 + ["b"] * 8 + ["c"]
    assert drawn(10) == ["a"] * 8 + ["b"] * 2
    assert len(drawn(30)) == 30  # no others are left
    assert len({tuple(row) for row in nights.drawn_in_groups(rows, ("product_id",), 64)}) == 41


@pytest.mark.slow
def test_the_mix_of_labels_and_of_tiers_is_held_against_the_run_before(spark: SparkSession, root: str) -> None:
    what, many = scoring(), nights.MIX_PAIRS
    mine: dict[str, Any] = {"model_id": what.regime[0], "prompt_id": what.regime[1]}
    judged.fill(spark, root, "pairs", [judged.pair(i, "q") for i in range(many)])

    def night(p: list[list[float]], scored: int = many) -> dict[str, tuple[str, float | None]]:
        started = datetime.now(UTC)
        run = runs.Run(f"{started:%H%M%S%f}", "rescore", "done", started, None, *what.regime, {"scored": scored})
        rows = [judged.scored(i, "q", p[i % len(p)], run_id=run.run_id, **mine) for i in range(many)]
        delta.upsert(spark, root, "label_probs", judged.rows(spark, "label_probs", rows))
        night = Night(spark, root, what, run)
        gates = {name: (level, found) for _, name, level, found, *_ in night.gates()}
        runs.write(spark, root, night.run)
        return gates

    related = [0.3, 0.6, 0.05, 0.05]
    assert night([related])["mix_shift"] == ("ok", None)  # nothing to compare with
    assert night([related], scored=many - 1)["mix_shift"] == ("ok", None)  # too few of them
    gates = night([related, [0.6, 0.3, 0.05, 0.05]])
    assert gates["mix_shift"] == ("warn", 0.5)
    assert gates["tier_shift"] == ("ok", None)  # no cuts are in force
    judged.fill(spark, root, "thresholds", judged.cuts(1, {"": (0.2, 0.2, 0.2)}, "active", **mine))
    assert night([related])["tier_shift"] == ("ok", None)  # by these cuts there was no run before
    gates = night([[0.1, 0.05, 0.05, 0.8], [0.6, 0.3, 0.05, 0.05], related, related])
    assert gates["mix_shift"] == ("warn", 0.5)
    assert gates["tier_shift"] == ("warn", 0.25)  # an Irrelevant one; the others are Excellent both times


def test_every_pair_gets_the_probabilities_of_its_own_prompt(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    what = scoring()
    run = rescore(spark, root, what)
    render = Renderer(what.prompt)
    rows = {(r["product_id"], r["query"]): r for r in probs(spark, root).collect()}
    assert len(rows) == 12
    for product_id, title, attributes, description in PRODUCTS:
        product = render.product(title, "Hearthline", "Kitchen", attributes, description)
        for query in QUERIES:
            ids = render.join(product, render.query(query))
            expected = [2.718281828459045**x / 0.9 for x in logprobs(ids)]
            row = rows[product_id, query]
            got = [row[c] for c in ("p_excellent", "p_related", "p_mismatch", "p_irrelevant")]
            assert got == pytest.approx(expected, abs=1e-9)
            assert row["p_outside"] == pytest.approx(0.1)
            assert (row["outcome"], row["prompt_tokens"]) == ("scored", len(ids))
    assert run.counts == {"seen": 12, "skipped": 0, "scored": 12, "refused": 0}
    assert run.status == "done"
    assert run.engine_loads == 1
    # With the query first a perfect cache would compute the nodes of a trie of such prompts; estimated from above,
    # since texts of products share beginnings too, but no more than a few tokens a pair.
    head = what.prompt.head
    turned: set[tuple[int, ...]] = set()
    for _, title, attributes, description in PRODUCTS:
        text = render.product(title, "Hearthline", "Kitchen", attributes, description).ids
        for query in QUERIES:
            ids = text[:head] + render.query(query).ids + text[head:]
            turned |= {tuple(ids[:end]) for end in range(1, len(ids) + 1)}
    assert head > 0
    assert len(turned) <= run.figures["other_order_tokens"] <= len(turned) + 12 * 20


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 500])
def test_a_second_run_scores_only_the_pairs_of_a_changed_product(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(nights, "FEW", few)
    put(spark, root, PRODUCTS)
    rescore(spark, root, scoring())
    before = {r["pair_id"]: r["wave_id"] for r in probs(spark, root).collect()}
    put(spark, root, [("k2", "Plastic kettle, red", *PRODUCTS[1][2:]), PRODUCTS[0]])
    run = rescore(spark, root, scoring())
    after = {r["pair_id"]: (r["wave_id"], r["product_id"]) for r in probs(spark, root).collect()}
    assert {product for pair, (wave, product) in after.items() if wave != before[pair]} == {"k2"}
    assert run.counts["scored"] == 4


@pytest.mark.slow
def test_a_second_run_scores_nothing_loads_no_engine_and_writes_no_row(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    put(spark, root, PRODUCTS)
    rescore(spark, root, scoring())
    version = delta.version(spark, root, "label_probs")
    what = scoring()
    told = replace(what, settings=replace(what.settings, model=str(tmp_path)), load_engine=load_counted)
    run = rescore(spark, root, told)
    assert (run.counts.get("scored", 0), run.engine_loads) == (0, None)
    assert not (tmp_path / "loads").exists()
    assert delta.version(spark, root, "label_probs") == version
    put(spark, root, [("k9", "Red kettle", {}, None)])
    assert rescore(spark, root, told).engine_loads == 1
    assert (tmp_path / "loads").read_text() == "loaded\n"


def of_pairs(run: runs.Run) -> float:
    """Tokens that were computed for the pairs themselves."""
    assert run.computed_tokens is not None
    return run.computed_tokens - run.figures["canaries_tokens"]


@pytest.mark.slow
def test_a_night_costs_what_changed(spark: SparkSession, root: str) -> None:
    text = "Boils water for four cups of tea in three minutes. " * 5
    kettles: list[Any] = [(f"k{i}", f"Steel kettle {i}", {}, text) for i in range(100)]
    queries = [f"kettle for {i} cups" for i in range(10)]
    put(spark, root, kettles, queries)
    full = rescore(spark, root, scoring())
    assert full.counts["scored"] == 1000
    assert full.block_floor is not None
    assert of_pairs(full) <= full.block_floor <= (full.computed_tokens or 0)  # a canary may be one of the pairs
    put(spark, root, [("k7", "Steel kettle 7, red", {}, text)], queries)  # all pairs of 1 % of the products
    some = rescore(spark, root, scoring())
    assert some.counts["scored"] == 10
    assert some.computed_tokens is not None
    assert full.computed_tokens is not None
    assert some.computed_tokens <= 0.02 * full.computed_tokens
    for i in range(10):  # 1 % of the pairs, anywhere
        put(spark, root, [kettles[i * 9]], [f"pot of {i}"])
    some = rescore(spark, root, scoring())
    assert some.counts["scored"] == 10
    assert some.computed_tokens is not None
    assert some.block_floor is not None
    assert of_pairs(some) <= 1.02 * some.block_floor
    none = rescore(spark, root, scoring())
    assert (none.counts, none.engine_loads, none.computed_tokens) == ({}, None, None)


@pytest.mark.slow
def test_pairs_that_were_made_anew_neither_take_the_rows_along_nor_keep_new_texts_out(
    spark: SparkSession, root: str
) -> None:
    put(spark, root, PRODUCTS[:1])
    rescore(spark, root, scoring())
    pairs = delta.read(spark, root, "pairs").localCheckpoint()
    delta.delete(spark, root, "pairs", pairs, ("pair_id",))
    with pytest.raises(runs.Unmet, match="table pairs is empty, and label_probs is not"):
        rescore(spark, root, scoring())
    assert probs(spark, root).count() == 4
    # As after a copy of the tables: rows name a version of `pairs` that its history has not reached yet.
    delta.update(spark, root, "label_probs", F.lit(True), {"pairs_version": F.lit(4312).cast("bigint")})
    put(spark, root, [("k1", "Steel kettle, red", *PRODUCTS[0][2:])])
    rescore(spark, root, scoring())
    assert text_of(spark, root, "pairs") == text_of(spark, root, "label_probs")
    # Lost, and made anew: the checkpoint follows a table that is no more, at a version that the new one has reached.
    shutil.rmtree(Path(root) / "pairs")
    spark._jvm.org.apache.spark.sql.delta.DeltaLog.clearCache()  # type: ignore[union-attr]
    for edition in "abcd":
        put(spark, root, [("k1", f"Steel kettle {edition}", *PRODUCTS[0][2:])])
    assert rescore(spark, root, scoring()).counts["scored"] == 4
    assert text_of(spark, root, "pairs") == text_of(spark, root, "label_probs")


def text_of(spark: SparkSession, root: str, table: str) -> dict[str, str]:
    return {r["pair_id"]: r["content_hash"] for r in delta.read(spark, root, table).collect()}


@pytest.mark.slow
def test_the_model_in_force_is_asked_with_the_prompt_in_force_of_which_the_tables_keep_a_copy(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    folder = tiny_model(tmp_path / "model")
    (tried := tmp_path / "tried.json").write_text(json.dumps({**PROMPT, "block": 64}))
    parser = argparse.ArgumentParser()
    jobs.add_scoring_flags(parser, model_required=False)
    args = parser.parse_args(["--prompt", str(tried)])
    args.tables = root
    what = jobs.scoring(args, str(folder), "external")
    models.register(spark, root, what.model, "external", config=models.keep_prompt(what.prompt))
    in_force: dict[str, Any] = {"model_id": what.model.model_id, "prompt_id": what.prompt.prompt_id}
    judged.fill(spark, root, "thresholds", judged.cuts(1, {"": (0.5, 0.5, 0.5)}, "active", **in_force))
    tried.unlink()
    args.prompt = None
    assert jobs.scoring(args, str(folder), "external").prompt.prompt_id != what.prompt.prompt_id  # beside the weights
    for name in (None, "active"):
        args.model = name
        assert jobs.registered(spark, args, jobs.scoring).prompt == what.prompt
    args.model, args.prompt = "another", str(folder / "prompt.json")  # those of a candidate
    assert jobs.in_force(spark, args).regime == what.regime
    (folder / "prompt.json").unlink()
    assert jobs.in_force(spark, args).regime == what.regime


@pytest.mark.slow
def test_a_second_model_is_asked_with_its_own_prompt_or_else_with_the_one_that_was_named(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "model")
    parser = argparse.ArgumentParser()
    jobs.add_scoring_flags(parser)
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**PROMPT, "block": 64}))
    args = parser.parse_args(["--model", "any", "--prompt", str(other)])
    named = jobs.scoring(args, str(folder), "external").prompt.prompt_id
    own = jobs.scoring_beside(args, str(folder), "external").prompt.prompt_id
    assert own != named
    (folder / "prompt.json").unlink()
    assert jobs.scoring_beside(args, str(folder), "external").prompt.prompt_id == named
    save_file({"lm_head.qweight": np.ones(2)}, folder / "more.safetensors")
    with pytest.raises(ValueError, match=r"has a quantised head.*add --head model"):
        jobs.scoring(args, str(folder), "external")
    args.head = "model"
    assert jobs.scoring(args, str(folder), "external").model.quantised_head


@pytest.mark.parametrize(("on_cpu", "waves_of"), [(False, (60, 60, 60, 120, 300)), (True, (60, 100, 300, 300, 300))])
def test_waves_grow_where_commits_are_slow_but_not_without_end(
    on_cpu: bool, waves_of: tuple[int, ...], spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "on_cpu", lambda: on_cpu)
    slow = Night(spark, root, scoring(), runs.start(spark, root, "rescore"))
    slow._rate, ends = 1000.0, []
    line: Any = SimpleNamespace(length=10**9, shards=lambda *_: None)
    asker: Any = SimpleNamespace(submit=lambda *_: None)
    for seconds in (0.0, 2.0, 40.0, 90.0, 9000.0):
        slow._committed = seconds
        ends.append(slow._put(line, 0, "w", asker).end)
    assert ends == [1000 * seconds for seconds in waves_of]
    slow.deadline = datetime.now() + timedelta(seconds=150)
    assert 140_000 < slow._put(line, 0, "w", asker).end <= 150_000


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--every", "5 minuts"], "'5 minuts' is no interval"),
        (["--every", "often"], "'often' is no interval"),
        (["--gpu-memory", "90"], "'90' is no share: write 0.2 or 20%"),
        (["--gpu-memory", "0"], "a share above 0 is needed"),
        (["--max-refused", "0"], "a whole number is needed, at least 1"),
    ],
)
def test_a_flag_that_is_wrong_stops_the_job_before_any_work(flags: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        job.main(["--tables", str(tmp_path / "t"), "--model", "demo", *flags])
    assert not (tmp_path / "t").exists()


@pytest.mark.slow
def test_a_lost_checkpoint_costs_no_tokens(spark: SparkSession, root: str) -> None:
    import shutil

    put(spark, root, PRODUCTS)
    rescore(spark, root, scoring())
    shutil.rmtree(Path(root) / "_checkpoints")
    run = rescore(spark, root, scoring())
    assert run.counts == {"seen": 12, "skipped": 12}


@pytest.mark.slow
def test_a_checkpoint_that_rested_longer_than_files_are_kept_is_begun_anew(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, PRODUCTS)
    rescore(spark, root, scoring())
    (commits,) = Path(root).glob("_checkpoints/rescore/*/commits")
    for file in commits.iterdir():
        os.utime(file, (time.time() - 8 * 86_400,) * 2)
    put(spark, root, [("k1", "Steel kettle, new", {}, None)])
    run = rescore(spark, root, scoring())
    assert "rested for more than 7 days and is begun anew" in capsys.readouterr().out
    assert (run.counts["skipped"], run.counts["scored"]) == (12 - run.counts["scored"], run.counts["scored"])
    assert run.counts["scored"] > 0


@pytest.mark.slow
def test_a_model_id_whose_folder_holds_another_model_now_is_refused(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    model = inspect(str(tiny_model(tmp_path / "model")))
    row = {"path": model.path, "stage": "sft", "weights_hash": "ff", "created_at": judged.NOW}
    of_now, of_before = {**row, "model_id": model.model_id}, {**row, "model_id": "00000000000000ff"}
    judged.fill(spark, root, "models", [of_now, of_before])
    assert models.registered_folder(spark, root, model.model_id) == (model.path, "sft")
    with pytest.raises(ValueError, match=f"holds another model now \\({model.model_id}\\)"):
        models.registered_folder(spark, root, "00000000000000ff")


@pytest.mark.slow
def test_waves_that_were_merged_before_a_failure_are_not_scored_again(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(40)])
    monkeypatch.setattr(waves, "WAVE_SECONDS", 0.0)
    monkeypatch.setattr(prefix, "HOT_TOKENS", 1500)
    merged = 0
    upsert = delta.upsert

    def third_wave_fails(session: SparkSession, where: str, name: str, *rest: Any) -> dict[str, int]:
        nonlocal merged
        if name == "label_probs":
            merged += 1
            if merged == 3:
                raise OSError("disk full")
        return upsert(session, where, name, *rest)

    monkeypatch.setattr(delta, "upsert", third_wave_fails)
    with pytest.raises(OSError, match="disk full"):
        rescore(spark, root, scoring())
    monkeypatch.setattr(delta, "upsert", upsert)
    kept = probs(spark, root).count()
    assert 0 < kept < 160
    failed = delta.read(spark, root, "runs").where("status = 'failed'").collect()
    assert [(r["message"], r["waves"], r["counts"]["scored"]) for r in failed] == [("disk full", 2, kept)]
    run = rescore(spark, root, scoring())
    assert run.counts == {"seen": 160, "skipped": kept, "scored": 160 - kept, "refused": 0}
    assert probs(spark, root).select("pair_id").distinct().count() == probs(spark, root).count() == 160
    assert not list((Path(root) / "_scratch").glob("*"))


@pytest.mark.slow
def test_a_run_whose_time_is_over_before_its_first_wave_loads_no_engine(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, PRODUCTS)
    loaded: list[Night] = []
    monkeypatch.setattr(Night, "begin_loading", lambda night: loaded.append(night))
    monkeypatch.setattr(Night, "check_first_use", lambda night, _: loaded.append(night))
    over = datetime.now() - timedelta(seconds=1)
    run = rescore(spark, root, scoring(), deadline=over)
    assert (run.status, run.message, loaded) == ("stopped", f"the deadline {over:%H:%M} is reached", [])
    plan = Night.plan

    def until_late(night: Night, *of: Any) -> Any:
        night.deadline = datetime.now() - timedelta(seconds=1)
        return plan(night, *of)

    monkeypatch.setattr(Night, "plan", until_late)
    run = rescore(spark, root, scoring())
    assert (run.status, len(loaded)) == ("stopped", 1)  # it began to load before it planned
    assert "12 of 12 pairs are left for the next run" in (run.message or "")
    assert (run.prompt_tokens, run.trie_nodes, run.block_floor) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [False, True])
def test_a_run_that_is_to_end_while_a_wave_is_at_work_tells_what_became_of_it(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(40)])
    monkeypatch.setattr(waves, "WAVE_SECONDS", 0.0)
    monkeypatch.setattr(prefix, "HOT_TOKENS", 1500)
    monkeypatch.setattr(job, "FOLLOWED_SECONDS", 1)
    write = Night.write

    def late(one: Night, answered: Any, wave_id: str) -> None:
        one.deadline = datetime.now() - timedelta(seconds=1)
        time.sleep(3)  # the deadline is seen while the wave is at work
        if fault:
            raise OSError("disk full")
        write(one, answered, wave_id)

    monkeypatch.setattr(Night, "write", late)
    deadline = datetime.now() + timedelta(hours=1)
    if fault:
        with pytest.raises(OSError, match="disk full"):
            rescore(spark, root, scoring(), deadline=deadline)
        assert [row["status"] for row in delta.read(spark, root, "runs").collect()] == ["failed"]
        return
    run = rescore(spark, root, scoring(), deadline=deadline)
    assert (run.status, job.exit_code(run)) == ("stopped", 5)
    assert job.exit_code(replace(run, counts=run.counts | {"gates_failed": 1})) == 3
    assert 0 < probs(spark, root).count() < 160


@pytest.mark.slow
def test_a_job_that_is_told_to_end_merges_its_wave_exits_with_5_and_the_next_start_goes_on(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(40)])
    monkeypatch.setattr(waves, "WAVE_SECONDS", 0.0)
    monkeypatch.setattr(prefix, "HOT_TOKENS", 1500)
    monkeypatch.setattr(jobs, "opened", lambda *_: (spark, scoring()))
    words = ["rescore", "--tables", root, "--model", "demo"]
    before = signal.getsignal(signal.SIGTERM)

    def notice(step: str) -> None:
        if step == "landed":
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with monkeypatch.context() as patched:
            patched.setattr(waves, "crash", notice)
            assert dispatcher.main(words) == 5
    finally:
        signal.signal(signal.SIGTERM, before)
        waves.stop_asked.clear()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["exit"], told["status"]) == (5, "stopped")
    assert told["message"].startswith("asked to end (SIGTERM); ")
    assert 0 < probs(spark, root).count() < 160
    try:
        assert dispatcher.main(words) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not invariants.audit(root, scoring().model.model_id) + invariants.left(root)
    assert probs(spark, root).count() == 160


def test_a_look_at_the_model_in_force_may_fail_some_times_in_a_row(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any) -> None:
        raise OSError("503 Slow Down")

    monkeypatch.setattr(models, "in_force", unreachable)
    for before in range(job.UNREAD - 1):
        assert job._promoted(spark, root, scoring(), before) == (False, before + 1)
    assert "it goes on (503 Slow Down)" in capsys.readouterr().out
    with pytest.raises(OSError, match="503"):
        job._promoted(spark, root, scoring(), job.UNREAD - 1)
    monkeypatch.setattr(models, "in_force", lambda *_: ("another", "prompt"))
    assert job._promoted(spark, root, scoring(), 3) == (True, 0)


@pytest.mark.slow
def test_refused_rows_of_a_stream_that_stays_count_for_an_hour(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (night,) = job.opened_nights(spark, root, [scoring(max_model_len=150)], 3, None)
    night.stays = True

    def come(number: int) -> None:
        put(spark, root, [(f"long{number}", "Kettle", {}, "xyzzy qwert " * 60)], ["one", "two"])
        changed = delta.read(spark, root, "pairs").where(F.col("product_id") == f"long{number}")
        night._batch(changed.withColumn("_change_type", F.lit("insert")).localCheckpoint(), f"{number}")

    monkeypatch.setattr(nights, "GATES_SECONDS", 0.0)  # an hour is over
    come(0)
    monkeypatch.setattr(nights, "GATES_SECONDS", 3600.0)
    come(1)
    with pytest.raises(waves.TooManyRefused, match="more than --max-refused 3"):
        come(2)
    runs.fail(spark, root, night.run, RuntimeError("ended"))


@pytest.mark.slow
def test_a_prompt_that_is_too_long_gets_a_row_without_probabilities_and_too_many_stop_the_run(
    spark: SparkSession, root: str
) -> None:
    put(spark, root, [*PRODUCTS, ("long", "Kettle", {}, "xyzzy qwert " * 60)])
    with pytest.raises(waves.TooManyRefused, match="4 pairs were refused, more than --max-refused 3"):
        rescore(spark, root, scoring(max_model_len=150), max_refused=3)
    rows = probs(spark, root).where("product_id = 'long'").collect()
    assert [(r["outcome"], r["p_excellent"], r["p_outside"]) for r in rows] == [("too_long", None, None)] * 4
    assert all(r["tokens_cut"] > 0 for r in rows)
    told = runs.last
    assert told is not None
    assert (told.status, told.counts["scored"], told.counts["refused"]) == ("failed", 12, 4)
    # What was judged is kept, and not asked again by itself, although it has room now.
    assert rescore(spark, root, scoring()).counts == {"seen": 16, "skipped": 16}
    assert rescore(spark, root, scoring(), retry_failed=True).counts["scored"] == 4
    assert probs(spark, root).where("outcome = 'scored'").count() == 16


@pytest.mark.slow
def test_rows_of_removed_pairs_go_at_the_next_start_for_all_models(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    rescore(spark, root, scoring())
    other = scoring(block=64)
    assert other.prompt.prompt_id != scoring().prompt.prompt_id
    rescore(spark, root, other)
    assert probs(spark, root).count() == 24
    gone = delta.read(spark, root, "pairs").where("product_id = 't1'").localCheckpoint()
    delta.delete(spark, root, "pairs", gone, ("pair_id",))
    rescore(spark, root, scoring())
    assert probs(spark, root).groupBy("prompt_id").count().select("count").collect() == [(8,), (8,)]


def test_a_model_trained_with_another_prompt_is_refused(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    what = scoring()
    row = {"model_id": what.model.model_id, "path": "/m", "stage": "sft", "prompt_id": "another-prompt"}
    judged.fill(spark, root, "models", [{**row, "weights_hash": "ff", "created_at": judged.NOW}])
    with pytest.raises(ValueError, match="was trained with prompt another-prompt"):
        rescore(spark, root, what)
    assert probs(spark, root).isEmpty()


@pytest.mark.slow
def test_an_engine_that_disagrees_with_itself_writes_nothing(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    what = scoring()
    bad = Scoring(what.model, what.stage, what.prompt, EngineSettings(model="/drifting"), load_drifting)
    with pytest.raises(RuntimeError, match="does not agree with itself"):
        rescore(spark, root, bad)
    assert probs(spark, root).isEmpty()
    assert delta.read(spark, root, "models").isEmpty()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_an_engine_that_dies_as_it_scores_takes_its_worker_along_and_the_retry_scores_all(
    spark: SparkSession, root: str, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, [*PRODUCTS, ("t2", "Red towel", {}, None)])
    monkeypatch.setattr(waves.Waves, "least", 10**9)  # all in one shard
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "how").write_text(how)
    what = scoring()
    settings = EngineSettings(model=str(tmp_path / "engine"), max_model_len=512, hang_seconds=2)
    run = rescore(spark, root, Scoring(what.model, what.stage, what.prompt, settings, load_mortal))
    assert (run.counts["scored"], probs(spark, root).count()) == (16, 16)
    assert run.counts["engine_deaths"] == 1
    died = int((tmp_path / "engine" / "died").read_text())
    assert not Path(f"/proc/{died}").exists()
    assert run.engine_version != f"fake {died} cpu"


@pytest.mark.slow
def test_canaries_that_are_off_stop_the_run_those_too_that_come_after_first_use(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    put(spark, root, PRODUCTS[:1])
    rescore(spark, root, scoring())
    put(spark, root, PRODUCTS)
    what = scoring()
    file = tmp_path / "canaries.json"
    file.write_text(json.dumps([{"query": "kettle", "title": "Steel kettle", "p": [0.97, 0.01, 0.01, 0.01]}]))
    model = replace(what.model, canaries_file=str(file))
    with pytest.raises(RuntimeError, match=r"does not agree with its canaries\.json"):
        rescore(spark, root, Scoring(model, "external", what.prompt, what.settings, load_fake))
    assert probs(spark, root).count() == 4
    short = replace(what.settings, max_model_len=64)  # the pairs' prompts are shorter
    file.write_text(json.dumps([{"query": "kettle " * 40, "title": "Steel kettle", "p": [0.97, 0.01, 0.01, 0.01]}]))
    with pytest.raises(runs.Unmet, match=r"canaries\.json has a prompt of .* tokens, and --max-model-len is 64"):
        rescore(spark, root, Scoring(model, "external", what.prompt, short, load_fake))


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", '[{"query": "kettle", "title": "Kettle"}]', '[{"query": "k", "title": "K", "p": [0.5, 0.5]}]',
     '[{"query": "k", "title": "K", "p": [1, 1, 1, 1]}]', '[{"title": "K", "p": [1, 0, 0, 0]}]'],
)  # fmt: skip
def test_canaries_that_are_none_are_refused_by_the_name_of_their_file(tmp_path: Path, text: str) -> None:
    what, file = scoring(), tmp_path / "canaries.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"canaries\.json: .*; each entry needs query, title, and p"):
        selfcheck.canaries(replace(what.model, canaries_file=str(file)), what.prompt)


def test_a_check_that_killed_its_engine_asks_other_prompts_at_each_try() -> None:
    prompts = list(range(12))
    assert selfcheck.asked(prompts, 0) == prompts
    assert sorted(p for attempt in (1, 2, 3) for p in selfcheck.asked(prompts, attempt)) == prompts


def test_lines_for_people_say_which_job_and_how_it_ended() -> None:
    run = runs.Run("r", "backfill", "stopped", judged.NOW, counts={"seen": 5, "skipped": 1, "scored": 0, "refused": 4})
    assert nights.summary(run) == "backfill: stopped · 5 seen, 1 skipped, 0 scored, 4 refused"
    line = waves.progress("rescore", 30, 120, 1000, 4000, 10.0)
    assert line == "rescore: 30 of 120 pairs · 3.0 pairs/s · 100 tokens/s · 0.5 min left"


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("absent", "there is no model folder"), ("pickled", r"pytorch_model\.bin, which is not loaded")],
)
def test_a_model_that_cannot_score_stops_the_job_before_spark(
    tmp_path: Path, folder: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 9, "max_position_embeddings": 9}
    (tmp_path / "pickled" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(delta, "session", lambda *_: pytest.fail("Spark was started"))
    assert dispatcher.main(["rescore", "--tables", str(tmp_path), "--model", str(tmp_path / folder)]) == 2
    assert re.search(reason, capsys.readouterr().err)
