"""What a kill, a bad pair, a damaged checkpoint or a late writer leaves behind: the invariants, and nothing else."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pyspark import SparkConf
from pyspark.java_gateway import launch_gateway
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs import rescore as job
from jobs.backfill import backfill
from jobs.rescore import rescore
from partitioner import engines, models, prefix, waves
from partitioner import night as nights
from partitioner.night import Night
from schemas import crash, delta, runs
from schemas.labels import P_COLUMNS
from tests import invariants, judged
from tests.conftest import QUICK, REPO
from tests.engines import load_drifting, load_falling, load_hungry, load_poisoned, load_slow, logprobs
from tests.pairs import PRODUCTS, QUERIES, probs, put, scoring
from udfs.engine import EngineSettings
from udfs.prompt import Renderer
from udfs.score import Scoring

MODEL = "0123456789abcdef"


def row(**changed: Any) -> dict[str, Any]:
    return judged.scored(1, "q", [0.7, 0.1, 0.1, 0.1], **changed)


def ran(**counts: int) -> dict[str, Any]:
    return {"run_id": "r", "job": "rescore", "status": "done", "counts": counts.items()}


@pytest.mark.parametrize(
    ("check", "breach"),
    [
        (lambda: invariants.one_row_a_key([row(), row(wave_id="w2")]), "2 rows of"),
        (lambda: invariants.simplex_or_null([row(p_related=0.2)]), "is scored with"),
        (lambda: invariants.simplex_or_null([row(outcome="engine_failed")]), "is engine_failed with"),
        (lambda: invariants.conserved([], [judged.pair(1, "q")], judged.MODEL), "is lost"),
        (lambda: invariants.conserved([row()], [], judged.MODEL), "is of no pair"),
        (lambda: invariants.conserved([row(content_hash="x")], [judged.pair(1, "q")], judged.MODEL), "has old text"),
        (lambda: invariants.never_back([row(pairs_version=3)], [row(pairs_version=2)]), "fell back"),
        (lambda: invariants.whole_waves([row()], [row(), {**row(), "pair_id": "b"}], {"w"}), "came in pieces"),
        (lambda: invariants.accounted([ran(seen=3, scored=2)]), "saw 3 pairs and tells of 2"),
        (lambda: invariants.conserved([row(), row(prompt_id="p2", content_hash="x")], [judged.pair(1, "q")],
                                      judged.MODEL), "has old text"),
        (lambda: invariants.told_as_written([ran() | {"figures": [("rows_written", 3.0)]}], Counter(r=4)),
         "tells of 3 rows and wrote 4"),
        (lambda: invariants.told_as_written([ran() | {"figures": [("rows_written", 3.0)], "status": "lost"}],
                                            Counter(r=2)), "tells of 3 rows and wrote 2"),
        (lambda: invariants.one_regime([*judged.cuts(1, {"": (0.5,) * 3}, "active")] * 2), "active cuts"),
    ],
)  # fmt: skip
def test_each_invariant_sees_its_breach(check: Any, breach: str) -> None:
    (first, *_) = check()
    assert breach in first


def test_the_invariants_have_nothing_against_a_fair_row() -> None:
    rows, pairs = [row()], [judged.pair(1, "q")]
    assert not invariants.one_row_a_key(rows) + invariants.simplex_or_null(rows)
    assert not invariants.conserved(rows, pairs, judged.MODEL) + invariants.never_back(rows, rows)
    assert not invariants.whole_waves([], rows, set())
    assert not invariants.accounted([ran(seen=3, skipped=1, scored=1, refused=1), ran(seen=3, skipped=1)])
    assert not invariants.told_as_written([ran() | {"figures": [], "status": "failed"}], Counter(r=2))


PAIR = st.sampled_from("klm")


@dataclass
class Writer:
    """The nightly stream or a backfill: how far in the feed its checkpoint is, and its wave that is not merged yet."""

    done: int = 0
    wave: tuple[int, invariants.Rows] | None = None  # where its batch ends in the feed, its answers


class Model(RuleBasedStateMachine):
    """Two writers over pairs that change, go and come back, whose waves may be merged late, twice, or never.

    Their steps are those of Night, with its own guard, over rows of label_probs; each version of those is held against
    the audit's own checks of 1, 2, 5 and 6; 4 and 7 are held when both are through. Without Spark, so in seconds.
    """

    guard = nights.NEWER
    looks = forgets = known = merges = whole = True  # what a broken writer leaves out

    def __init__(self) -> None:
        super().__init__()
        self.sql = sqlite3.connect(":memory:")
        self.pairs: dict[str, str] = {}  # pair_id -> content_hash; texts come back, so a text is no version
        self.feed: list[str] = []  # pairs in the order they changed; its length is the version of `pairs`
        self.table: invariants.Rows = []
        self.waves: set[str] = set()  # that are in the table, or were
        self.landed = 0
        self.writers = [Writer(), Writer()]

    @rule(pair=PAIR, text=st.sampled_from("ab"))
    def ingest(self, pair: str, text: str) -> None:
        if self.pairs.get(pair) != text:
            self.pairs[pair] = text
            self.feed.append(pair)

    @rule(pair=PAIR)
    def remove(self, pair: str) -> None:
        if self.pairs.pop(pair, None):
            self.feed.append(pair)

    @rule(who=st.integers(0, 1), dies=st.sets(PAIR, max_size=1))
    def land(self, who: int, dies: set[str]) -> None:
        changed = set(self.feed[self.writers[who].done :])
        if changed - self.pairs.keys():
            self.forget()
        judged = {row["pair_id"]: row["content_hash"] for row in self.table} if self.known else {}
        self.writers[who].wave = len(self.feed), self.answers(changed, judged, dies)

    @rule(who=st.integers(0, 1), dies=st.sets(PAIR, max_size=1))
    def retry_failed(self, who: int, dies: set[str]) -> None:
        failed = {row["pair_id"] for row in self.table if row["outcome"] != "scored"}
        self.writers[who].wave = self.writers[who].done, self.answers(failed, {}, dies)

    def answers(self, asked: set[str], judged: dict[str, str], dies: set[str]) -> invariants.Rows:
        self.landed += 1
        found = []
        for pair in sorted(asked & self.pairs.keys()):
            if (text := self.pairs[pair]) != judged.get(pair):
                of = {"pair_id": pair, "content_hash": text, "pairs_version": len(self.feed)}
                dead = dict.fromkeys([*P_COLUMNS, "p_outside"]) | {"outcome": "engine_failed"}
                found.append(row(**of, wave_id=f"w{self.landed}") | (dead if pair in dies else {}))
        return found

    def forget(self) -> None:
        if self.forgets:
            self.table = [row for row in self.table if row["pair_id"] in self.pairs]

    @rule(who=st.integers(0, 1), checkpoint=st.booleans())
    def merge(self, who: int, checkpoint: bool) -> None:
        writer = self.writers[who]
        if writer.wave is None:
            return
        end, answers = writer.wave
        for part in [answers] if self.whole else [answers[:1], answers[1:]]:
            before = self.table
            self.upsert(part)
            breaches = invariants.one_row_a_key(self.table) + invariants.simplex_or_null(self.table)
            breaches += invariants.never_back(before, self.table)
            breaches += invariants.whole_waves(before, self.table, self.waves)
            assert not breaches
            kept = {(new["pair_id"], new["content_hash"]): new for new in self.table}
            scored = [old for old in before if old["outcome"] == "scored"]
            assert all(kept.get((old["pair_id"], old["content_hash"]), old) == old for old in scored)
        before = self.table
        self.upsert(answers)  # a commit whose answer was lost is made once more
        assert self.table == before
        if checkpoint:  # else killed before it, and the batch comes again
            writer.done = max(writer.done, end)
        writer.wave = None

    def upsert(self, answers: invariants.Rows) -> None:
        table = {row["pair_id"]: row for row in self.table}
        more = []
        for new in answers:
            if self.looks and self.pairs.get(new["pair_id"]) != new["content_hash"]:
                continue
            old = table.get(new["pair_id"])
            if not self.merges:
                more.append(new)
            elif old is None or self.newer(old, new):
                table[new["pair_id"]] = new
        self.table = [*table.values(), *more]

    def newer(self, old: dict[str, Any], new: dict[str, Any]) -> bool:
        names = ("pairs_version", "content_hash", "outcome")
        told = ", ".join(f"? AS {name}" for name in names)
        query = f"SELECT {self.guard} FROM (SELECT {told}) AS old, (SELECT {told}) AS new"
        return bool(self.sql.execute(query, [row[name] for row in (old, new) for name in names]).fetchone()[0])

    @rule(who=st.integers(0, 1))
    def killed(self, who: int) -> None:
        self.writers[who].wave = None

    @rule(who=st.integers(0, 1))
    def checkpoint_lost(self, who: int) -> None:
        self.writers[who] = Writer()

    @rule()
    def both_go_on_until_they_are_through(self) -> None:
        for who in (0, 1):
            self.merge(who, True)
            self.forget()  # as each start does
            self.land(who, set())
            self.merge(who, True)
        pairs = [{"pair_id": pair, "content_hash": text} for pair, text in self.pairs.items()]
        assert not invariants.conserved(self.table, pairs, MODEL)
        self.retry_failed(0, set())
        self.merge(0, True)
        assert all(row["outcome"] == "scored" for row in self.table)
        for who in (0, 1):
            self.checkpoint_lost(who)
            self.land(who, set())
            assert self.writers[who].wave == (len(self.feed), [])  # so no engine is asked
            self.merge(who, True)

    @invariant()
    def whoever_is_through_left_nothing_old(self) -> None:
        text = {row["pair_id"]: row["content_hash"] for row in self.table}
        for writer in self.writers:
            for pair in set(self.feed[: writer.done]) & self.pairs.keys() - set(self.feed[writer.done :]):
                assert text.get(pair) == self.pairs[pair]

    def teardown(self) -> None:
        self.sql.close()


Model.TestCase.settings = settings(
    max_examples=150, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestModel = Model.TestCase


Step = tuple[Any, ...]
INGEST: Step = ("ingest", "k", "a")
LAND: Step = ("land", 0, set())
MERGE: Step = ("merge", 0, True)
THROUGH: Step = ("both_go_on_until_they_are_through",)


@pytest.mark.parametrize(
    ("broken", "steps"),
    [
        (
            {"guard": "true"},
            [INGEST, LAND, ("ingest", "k", "b"), INGEST, ("land", 1, set()), ("merge", 1, True), MERGE],
        ),
        (
            {"guard": "new.pairs_version >= old.pairs_version"},
            [INGEST, LAND, ("land", 1, {"k"}), MERGE, ("merge", 1, True)],
        ),
        ({"guard": nights.NEWER.replace(">=", ">")}, [INGEST, ("land", 0, {"k"}), MERGE, THROUGH]),
        (
            {"looks": False},
            [INGEST, LAND, MERGE, ("ingest", "k", "b"), LAND, INGEST, ("land", 1, set()), ("merge", 1, True), MERGE],
        ),
        ({"forgets": False}, [INGEST, LAND, MERGE, ("remove", "k"), THROUGH]),
        ({"known": False}, [INGEST, THROUGH]),
        ({"merges": False}, [INGEST, LAND, MERGE]),
        ({"whole": False}, [INGEST, ("ingest", "l", "a"), LAND, MERGE]),
    ],
)
def test_the_model_sees_what_a_broken_writer_leaves(broken: dict[str, Any], steps: list[Step]) -> None:
    def walk(machine: Model) -> None:
        for name, *of in steps:
            getattr(machine, name)(*of)
            machine.whoever_is_through_left_nothing_old()
        machine.teardown()

    walk(Model())
    with pytest.raises(AssertionError):
        walk(type("Broken", (Model,), broken)())


def poisoned(folder: Path, products: list[Any], bad: list[tuple[int, str]]) -> Scoring:
    """What scores with an engine that dies on these (product number, query)."""
    what = scoring()
    render = Renderer(what.prompt)
    settings = EngineSettings(model=str(folder), max_model_len=512, hang_seconds=1)
    ids = []
    for number, query in bad:
        _, title, attributes, description = products[number]
        ids.append(
            render.join(render.product(title, "Hearthline", "Kitchen", attributes, description), render.query(query))
        )
    folder.mkdir()
    (folder / "poison.json").write_text(json.dumps([list(map(int, i)) for i in ids]))
    return Scoring(what.model, what.stage, what.prompt, settings, load_poisoned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("products", "each", "bad", "how"),
    [
        (2, 3, [(0, 0)], "dies"),
        (2, 3, [(1, 2)], "hangs"),
        (2, 3, [(1, 2)], "company"),
        (100, 50, [(0, 0), (50, 1), (50, 2)], "dies"),
    ],
)
def test_pairs_that_kill_the_engine_get_a_row_and_all_others_are_scored(
    spark: SparkSession,
    root: str,
    tmp_path: Path,
    products: int,
    each: int,
    bad: list[tuple[int, int]],
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kettles: list[Any] = [(f"k{i}", f"Steel kettle {i}", {}, f"Boils {i} cups.") for i in range(products)]
    queries = [f"kettle {i}" for i in range(each)]
    put(spark, root, kettles, queries)
    what = poisoned(tmp_path / "engine", kettles, [(number, queries[query]) for number, query in bad])
    (tmp_path / "engine" / how).touch()
    monkeypatch.setattr(waves.Waves, "least", 10**9)  # all in one shard
    run = rescore(spark, root, what)
    assert "canaries_max_dp" not in run.figures  # those that rode died with the engine
    rows = probs(spark, root).where("outcome <> 'scored'").collect()
    if how == "company":
        bad = []  # alone it is answered
    assert sorted((r["product_id"], r["query"]) for r in rows) == sorted((f"k{n}", queries[q]) for n, q in bad)
    assert {(r["outcome"], r["p_excellent"], r["p_outside"]) for r in rows} <= {("engine_failed", None, None)}
    n, poisons = products * each, len(bad)
    assert (run.counts["scored"], run.counts["refused"]) == (n - poisons, poisons)
    deaths = (tmp_path / "engine" / "deaths").read_text().splitlines()
    assert 0 < len(deaths) <= 1 + max(1, poisons) * math.ceil(math.log2(n)) + 3  # one at the check of first use
    assert not (tmp_path / "engine" / "beside").exists()  # never two engines at once
    assert not invariants.audit(root, MODEL)
    shutil.rmtree(Path(root) / "_checkpoints")
    assert rescore(spark, root, what).engine_loads is None  # not tried again
    (tmp_path / "engine" / "poison.json").write_text("[]")
    again = Scoring(what.model, what.stage, what.prompt, EngineSettings(model=str(tmp_path / "engine")), load_poisoned)
    assert rescore(spark, root, again, retry_failed=True).counts.get("scored", 0) == poisons
    assert probs(spark, root).where("outcome = 'scored'").count() == n


@pytest.mark.slow
def test_a_pair_that_was_alone_when_executors_were_lost_is_asked_once_more(
    spark: SparkSession, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that go one after the other look as an engine that dies twice of its only prompt."""
    kettles: list[Any] = [("k0", "Steel kettle", {}, "Boils water.")]
    put(spark, root, kettles, queries := ["kettle 0", "kettle 1"])
    what = poisoned(tmp_path / "engine", kettles, [(0, queries[0])])
    asked: list[int] = []

    def lost(_: Any) -> set[str]:
        """Looked at before and behind each level: one goes in the first, and with it what made the engine die."""
        asked.append(len(asked))
        if len(asked) == 2:
            (tmp_path / "engine" / "poison.json").write_text("[]")
        return {"1"} if len(asked) > 1 else set()

    monkeypatch.setattr(engines, "lost", lost)
    run = rescore(spark, root, what)
    assert (run.counts["scored"], run.counts["refused"]) == (2, 0)
    assert len(asked) == 4
    assert not invariants.audit(root, MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("heals", [True, False])
def test_a_search_whose_answers_are_no_numbers_is_made_again_with_fresh_engines(
    spark: SparkSession, root: str, tmp_path: Path, heals: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kettles: list[Any] = [(f"k{i}", f"Steel kettle {i}", {}, f"Boils {i} cups.") for i in range(4)]
    put(spark, root, kettles, queries := [f"kettle {i}" for i in range(4)])
    what, broken = poisoned(tmp_path / "engine", kettles, [(0, queries[0])]), tmp_path / "engine" / "nan"
    monkeypatch.setattr(waves.Waves, "least", 10**9)  # all in one shard
    searched, drop = waves.Waves._searched, waves.Waves._drop
    searches: list[str] = []

    def breaks(night: Any, *rest: Any) -> Any:
        if not searches:
            broken.touch()
        searches.append(rest[-1])
        return searched(night, *rest)

    def mends(night: Any, *rest: Any) -> None:
        drop(night, *rest)
        if heals:
            broken.unlink()

    monkeypatch.setattr(waves.Waves, "_searched", breaks)
    monkeypatch.setattr(waves.Waves, "_drop", mends)
    if not heals:
        with pytest.raises(delta.GaveUp, match="of 16 answers are not numbers, with engines loaded anew too"):
            rescore(spark, root, what)
        assert not invariants.table(root, "label_probs")
    else:
        run = rescore(spark, root, what)
        assert (run.counts["scored"], run.counts["refused"], run.counts["waves_dropped"]) == (15, 1, 1)
        assert [r["outcome"] for r in invariants.table(root, "label_probs")].count("engine_failed") == 1
    assert len(searches) == 2
    assert not invariants.audit(root) + invariants.left(root)


@pytest.mark.slow
def test_a_stream_that_stays_asks_again_of_what_each_line_scored(spark: SparkSession, root: str) -> None:
    (night,) = job.opened_nights(spark, root, [scoring()], math.inf, None)
    for number in range(2):  # an hour lies between them
        put(spark, root, [(f"k{number}", f"Steel kettle {number}", {}, None)])
        night.score(night.pairs(), f"{number}", night.judged())
        assert night.run.figures.get(nights.ASKED) == 4
        night.run = replace(night.run, figures={k: v for k, v in night.run.figures.items() if k != nights.ASKED})
    assert night.run.figures["noise_tokens"] > 0
    assert night.close().counts["scored"] == 8


def test_the_statement_that_forgets_what_is_in_doubt_reaches_sql_through_a_shell(root: str) -> None:
    night = Night.__new__(Night)
    night.root, night._unlooked, night._unlooked_searches = root, ["w-1"], ["w-2"]
    night.run = runs.Run("r-1", "rescore", "running", datetime.now(), model_id="m")
    command = night._in_doubt().partition("to have those asked anew: sql ")[2].partition(", then backfill")[0]
    got = subprocess.run(["bash", "-c", f"printf '%s\n' {command}"], capture_output=True, text=True, check=True)
    assert got.stderr == ""
    forget = f"DELETE FROM delta.`{root}/label_probs` WHERE run_id = 'r-1' AND wave_id IN ('w-1', 'w-2')"
    assert got.stdout.splitlines() == ["--tables", root, forget]


@pytest.mark.slow
def test_where_more_pairs_kill_engines_than_a_run_looks_for_each_start_has_fewer_before_it(
    spark: SparkSession, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product's text kills: all its pairs, and the check of first use must get around it."""
    kettles: list[Any] = [(f"k{i}", f"Steel kettle {i}", {}, f"Boils {i} cups.") for i in range(3)]
    queries = [f"kettle {i}" for i in range(8)]
    put(spark, root, kettles, queries)
    what = poisoned(tmp_path / "engine", kettles, [(0, query) for query in queries])
    monkeypatch.setattr(waves, "POISONS", 2)
    monkeypatch.setattr(waves, "CHECKED_PROMPTS", 4)
    found, run = [0], None
    while run is None:
        try:
            run = rescore(spark, root, what)
        except delta.GaveUp:
            found.append(probs(spark, root).where("outcome = 'engine_failed'").count())
            assert found[-1] > found[-2]
            assert not invariants.audit(root)
    assert len(found) > 1
    rows = {(r["product_id"], r["outcome"]) for r in probs(spark, root).collect()}
    assert rows == {("k0", "engine_failed"), ("k1", "scored"), ("k2", "scored")}
    assert not invariants.audit(root, MODEL) + invariants.left(root)


@pytest.mark.slow
def test_a_column_that_is_added_between_two_waves_stops_the_next_run_and_says_so(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, PRODUCTS)
    monkeypatch.setattr(waves.Waves, "least", 1)
    monkeypatch.setattr(waves, "WAVE_SECONDS", 1e-6)
    write, written = Night.write, []

    def then_altered(night: Night, answered: Any, wave_id: str) -> None:
        write(night, answered, wave_id)
        written.append(wave_id)
        if len(written) == 1:
            spark.sql(f"ALTER TABLE delta.`{root}/label_probs` ADD COLUMN mood STRING")

    monkeypatch.setattr(Night, "write", then_altered)
    run = rescore(spark, root, scoring())
    assert run.counts["scored"] == 12
    assert len(written) > 2
    assert not invariants.audit(root, MODEL)
    with pytest.raises(ValueError, match="column mood is not in the contract"):
        delta.prepare(spark, root)  # as each job begins


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, "1 second"])
def test_rows_that_are_lost_behind_the_feed_of_changes_are_scored_again(
    spark: SparkSession,
    root: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    every: str | None,
) -> None:
    put(spark, root, PRODUCTS)
    rescore(spark, root, scoring())
    lost = probs(spark, root).where("product_id = 'k1'").select("pair_id").localCheckpoint()
    delta.delete(spark, root, "label_probs", lost, ("pair_id",))
    if every:  # a stream looks with its gates, and here ends with them
        put(spark, root, [("n1", "A new kettle", {}, None)])
        monkeypatch.setattr(nights, "GATES_SECONDS", 0.0)
        monkeypatch.setattr(job, "FOLLOWED_SECONDS", 1)
        look = Night.look_at_gates

        def looked(night: Night) -> None:
            look(night)
            night.deadline = datetime.now()

        monkeypatch.setattr(Night, "look_at_gates", looked)
    run = rescore(spark, root, scoring(), every=every)
    assert run.counts["scored"] == (8 if every else 4)
    assert "the feed of changes is worked off, and some pairs are not judged as they are" in capsys.readouterr().out
    assert not invariants.audit(root, MODEL)


@pytest.mark.slow
def test_an_engine_that_runs_out_of_memory_comes_back_with_smaller_steps(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    run = rescore(spark, root, replace(scoring(), load_engine=load_hungry))
    assert (run.counts["scored"], run.counts["refused"]) == (12, 0)  # of 128, 64 and 32 prompts in a step


class Killed(Exception):
    """Stands for SIGKILL where one process must go on living."""


def test_a_kill_at_each_step_is_made_good_by_the_next_run(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step once, by an error that no handler sees; processes that are killed in earnest: below, and slow.

    The steps of a wave are a backfill's, which begins and ends sooner than a stream; the others are the stream's. What
    stands between the steps is left out, but in the last run.
    """
    put(spark, root, PRODUCTS)
    of_a_wave = ("planned", "landed", "checked", "merged")
    drop_scratch = delta.drop_scratch

    def not_of_the_killed(session: SparkSession, where: str, run_id: str, *name: str) -> None:
        if not runs._lease(session, where, run_id).held():
            drop_scratch(session, where, run_id, *name)

    for n, point in enumerate(crash.POINTS):
        if point in ("told", "batch"):  # all else is merged by then
            put(spark, root, [("k2", f"Plastic kettle {n}", *PRODUCTS[1][2:])])

        def kill(at: str, here: str = point) -> None:
            if at == here:
                raise Killed(at)

        with monkeypatch.context() as patched:
            for module in (job, nights, waves, delta):
                patched.setattr(module, "crash", kill)
            patched.setattr(runs, "fail", lambda *told: told[2])
            patched.setattr(delta, "drop_scratch", not_of_the_killed)
            for name in ("forget_removed_pairs", "follow_pairs", "ask_again", "look_at_gates"):
                patched.setattr(Night, name, lambda *_: None)
            with pytest.raises((Killed, RuntimeError)):
                (backfill if point in of_a_wave else rescore)(spark, root, scoring())
        for run_id in runs._signed(spark, root):
            runs._lease(spark, root, run_id).give_up()  # a dead process renews none
        behind = crash.POINTS.index(point) >= crash.POINTS.index("merged")
        assert len(invariants.table(root, "label_probs")) == (12 if behind else 0)
    assert rescore(spark, root, scoring()).counts == {}
    assert not invariants.audit(root, MODEL) + invariants.left(root)
    by_time = sorted(invariants.table(root, "runs"), key=lambda row: row["started_at"])
    # Two were killed at the commit that closes the run before them, one behind its end.
    assert [row["status"] for row in by_time] == [*["lost"] * (len(crash.POINTS) - 3), "done", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one wave", "several waves", "fresh ones fall too"])
def test_a_wave_in_which_a_canary_is_off_is_dropped_and_asked_again_of_a_fresh_engine(
    spark: SparkSession, root: str, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(30)])
    (tmp_path / "after").write_text("60")  # past the check of first use, inside the first wave
    if case == "fresh ones fall too":
        (tmp_path / "always").touch()
    if case == "several waves":  # canaries in the first alone: the second is asked of the same engine
        riders = Night._riders

        def in_the_first(night: Night, *rest: Any) -> Any:
            monkeypatch.setattr(Night, "_riders", lambda *_: None)
            return riders(night, *rest)

        monkeypatch.setattr(Night, "_riders", in_the_first)
        monkeypatch.setattr(waves, "WAVE_SECONDS", 0.0)
        monkeypatch.setattr(prefix, "HOT_TOKENS", 1500)
    monkeypatch.setattr(waves, "CANARY_SHARE", 0.2)  # else a night of 120 pairs pays for none
    settings = EngineSettings(model=str(tmp_path), max_model_len=512)
    what = replace(scoring(), settings=settings, load_engine=load_falling)
    if case == "fresh ones fall too":
        with pytest.raises(delta.GaveUp, match=r"a canary's probabilities are off by .* with engines loaded anew too"):
            rescore(spark, root, what)
        assert not invariants.table(root, "label_probs")
        return
    run = rescore(spark, root, what)
    assert (run.status, run.counts["scored"], run.counts["waves_dropped"]) == ("done", 120, 1)
    assert (run.waves or 0) > 2 if case == "several waves" else run.waves == 1
    assert run.figures["canaries_max_dp"] > 0.01
    render = Renderer(what.prompt)
    for row in invariants.table(root, "label_probs"):
        title = f"Steel kettle {row['product_id'][1:]}"
        ids = render.join(
            render.product(title, "Hearthline", "Kitchen", {}, "Boils water. " * 30), render.query(row["query"])
        )
        assert row["p_outside"] == pytest.approx(0.1)
        assert [row[p] for p in P_COLUMNS] == pytest.approx([math.exp(x) / 0.9 for x in logprobs(ids)], abs=1e-9)
    gates = {(r["name"], r["level"]) for r in invariants.table(root, "gates")}
    assert {("canaries", "warn"), ("noise", "ok"), ("freshness", "ok")} <= gates


@pytest.mark.slow
def test_a_stream_that_stays_follows_a_promotion_and_a_candidate_is_kept_current(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, PRODUCTS)
    old, new = scoring(), scoring()
    new = replace(new, model=replace(new.model, model_id="f" * 16))
    regime = [{**cut, "prompt_id": old.prompt.prompt_id} for cut in judged.cuts(1, {"": (0.5,) * 3}, "active")]
    judged.fill(spark, root, "thresholds", regime)
    monkeypatch.setattr(job, "FOLLOWED_SECONDS", 1)
    merged: list[str] = []
    write = Night.write

    def promoted(night: Night, answered: Any, wave_id: str) -> None:
        write(night, answered, wave_id)
        merged.append(night.what.model.model_id)
        if merged == [MODEL, "f" * 16]:
            delta.update(spark, root, "thresholds", F.lit(True), {"model_id": F.lit("f" * 16)})

    monkeypatch.setattr(Night, "write", promoted)
    run = rescore(spark, root, old, every="1 second", also=[new], follow=True)
    assert (run.status, run.model_id, merged) == ("done", MODEL, [MODEL, "f" * 16])
    assert not invariants.audit(root, MODEL, "f" * 16) + invariants.left(root)
    # The candidate is the model now; a stream without work sees its deadline too.
    deadline = datetime.now() + timedelta(seconds=15)  # it looks at its batch before
    run = rescore(spark, root, new, every="1 second", follow=True, deadline=deadline)
    assert (run.status, run.counts) == ("stopped", {"seen": 12, "skipped": 12})
    with pytest.raises(ValueError, match=r"the thresholds in force are of prompt .* --prompt FILE"):
        models.refuse_other_prompt(spark, root, replace(new, prompt=replace(new.prompt, prompt_id="other")))


NIGHT = """
import os, resource, sys
from pyspark.sql import SparkSession
from tests.conftest import QUICK
from schemas import delta
from jobs import rescore as job
from jobs.backfill import backfill
from partitioner import prefix, waves
from tests.pairs import scoring
waves.WAVE_SECONDS, prefix.HOT_TOKENS = 0.0, int(os.environ.get("HOT_TOKENS", "120"))
spark = delta.session("night", QUICK)
if len(sys.argv) > 3:
    spark.range(9).repartition(2).write.parquet(sys.argv[1] + "-warm")  # unpacks libraries, which are larger
    jvm = spark._jvm.java.lang.ProcessHandle.current().pid()
    resource.prlimit(jvm, resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
{"rescore": job.rescore, "backfill": backfill}[sys.argv[2]](spark, sys.argv[1], scoring())
"""


ONCE_A_RUN = ("started", "planned", "batch", "streamed", "finished")
OF_A_STREAM = ("batch", "streamed")
OF_A_WAVE = ("landed", "checked", "merged", "told")


@pytest.fixture
def warm() -> Iterator[Callable[..., subprocess.CompletedProcess[bytes]]]:
    """Runs as `night` does, in a JVM that has run before: a new one interprets its first minute.

    A JVM whose Python was killed reads the end of its input, stops its SparkContext and gives up the commit lock;
    this one is told to.
    """
    conf = SparkConf(loadDefaults=False)
    ours = {**delta.CONF, **delta.LOCAL_CONF, "spark.master": "local[*,4]", "spark.jars.packages": delta.PACKAGE}
    for key, value in {**ours, **QUICK}.items():
        conf.set(key, value)
    gateway = launch_gateway(conf)  # type: ignore[no-untyped-call]
    where = gateway.java_parameters
    there = {"PYSPARK_GATEWAY_PORT": str(where.port), "PYSPARK_GATEWAY_SECRET": where.auth_token}

    def night_there(root: str, name: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        ended = night(root, name, **there, **environment)
        sql = gateway.jvm.org.apache.spark.sql
        gateway.jvm.org.apache.spark.SparkContext.getOrCreate().stop()
        sql.classic.SparkSession.clearDefaultSession()
        sql.delta.DeltaLog.clearCache()
        (Path(root) / delta.LOCK).unlink(missing_ok=True)
        return ended

    yield night_there
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rescore", "backfill"])
def test_a_process_killed_at_each_step_leaves_what_the_next_one_makes_whole(
    spark: SparkSession,
    root: str,
    tmp_path: Path,
    name: str,
    warm: Callable[..., subprocess.CompletedProcess[bytes]],
) -> None:
    """Each process finds what the one killed before it left, and is killed one step further.

    A step that comes again in a run, such as those of a wave, is met at its first time and at its second. The last
    process has a JVM of its own.
    """
    products: list[Any] = PRODUCTS
    put(spark, root, products)
    steps = [point for point in crash.POINTS if name == "rescore" or point not in OF_A_STREAM]
    kills = [f"{step}:{time}" for step in steps for time in ((1,) if step in ONCE_A_RUN else (1, 2))]
    for n, where in enumerate(kills):
        if where in ("told:1", "batch:1") or where.removesuffix(":2") in OF_A_WAVE:
            products = [(key, f"{title} {n}", *rest) for key, title, *rest in PRODUCTS]
            put(spark, root, products)  # else all may be merged by now
        killed = warm(root, name, TAOSR1_CRASH=where)
        assert killed.returncode == -9, f"{where}: {killed.stderr[-2000:]!r}"
        assert not invariants.audit(root), where
    whole = night(root, name)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert not invariants.audit(root, MODEL) + invariants.left(root)
    undisturbed = str(tmp_path / "undisturbed")
    put(spark, undisturbed, products)
    rescore(spark, undisturbed, scoring())
    assert len(invariants.final(root)) == 12
    assert invariants.final(root) == invariants.final(undisturbed)
    *before, last = [row["status"] for row in sorted(invariants.table(root, "runs"), key=lambda r: r["started_at"])]
    assert (last, set(before)) == ("done", {"lost", "done"})
    assert before.count("done") <= 1  # killed behind its last commit


def night(root: str, name: str, *more: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A run in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), **environment}
    return subprocess.run([sys.executable, "-c", NIGHT, root, name, *more], env=environment, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["_scratch", "_checkpoints", "label_probs"])
def test_a_storage_that_refuses_ends_the_run_with_its_sentence_and_the_next_one_completes_it(
    spark: SparkSession, root: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, PRODUCTS)
    refuses = "Mkdirs failed|Not a directory|not a directory|FileAlreadyExists|No space left"
    with monkeypatch.context() as patched:
        if what != "label_probs":
            Path(root, what).write_text("a file where a folder must be")
        else:
            upsert = delta.upsert

            def refused(session: SparkSession, where: str, name: str, *rest: Any) -> dict[str, int]:
                if name == "label_probs":
                    raise OSError("No space left on device")
                return upsert(session, where, name, *rest)

            patched.setattr(delta, "upsert", refused)
        with pytest.raises(Exception, match=refuses):
            rescore(spark, root, scoring())
    (run,) = invariants.table(root, "runs")
    assert run["status"] == "failed"
    assert re.search(refuses, run["message"])
    assert not invariants.table(root, "label_probs")
    if what != "label_probs":
        Path(root, what).unlink()
    assert rescore(spark, root, scoring()).counts["scored"] == 12
    assert not invariants.audit(root, MODEL) + invariants.left(root)


@pytest.mark.slow
def test_a_commit_whose_answer_is_lost_is_found_by_the_next_run_and_not_made_twice(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, PRODUCTS)
    upsert = delta.upsert
    lost: list[str] = []

    def silent(session: SparkSession, where: str, name: str, *rest: Any) -> dict[str, int]:
        made = upsert(session, where, name, *rest)
        if name == "label_probs" and not lost:
            lost.append(name)
            raise OSError("Connection reset")
        return made

    monkeypatch.setattr(delta, "upsert", silent)
    with pytest.raises(OSError, match="Connection reset"):
        rescore(spark, root, scoring())
    assert len(invariants.table(root, "label_probs")) == 12
    run = rescore(spark, root, scoring())
    assert (run.counts, run.engine_loads) == ({"seen": 12, "skipped": 12}, None)
    assert not invariants.audit(root, MODEL) + invariants.left(root)


@pytest.mark.slow
def test_files_may_be_joined_and_removed_beside_a_run(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(20)])
    monkeypatch.setattr(waves, "WAVE_SECONDS", 0.0)
    monkeypatch.setattr(prefix, "HOT_TOKENS", 1500)
    write = Night.write
    joined: list[int] = []

    def beside(night: Night, answered: Any, wave_id: str) -> None:
        if len(joined) < 3:
            for name in ("label_probs", "pairs", "runs"):
                joined.append(delta.optimize(spark, root, name))
                delta.vacuum(spark, root, name, delta.KEPT_DAYS)
        write(night, answered, wave_id)

    monkeypatch.setattr(Night, "write", beside)
    run = rescore(spark, root, scoring())
    assert (run.status, run.counts["scored"]) == ("done", 80)
    assert len(joined) == 3
    assert not invariants.audit(root, MODEL) + invariants.left(root)


@pytest.mark.slow
def test_a_batch_that_comes_again_or_late_writes_nothing_and_a_clock_that_goes_back_hides_no_text(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changes(title: str) -> DataFrame:
        put(spark, root, [("k1", title, {}, None)])
        return delta.read(spark, root, "pairs").withColumn("_change_type", F.lit("insert")).localCheckpoint()

    night = Night(spark, root, scoring(), runs.start(spark, root, "rescore", MODEL))
    first, second = changes("Kettle A"), changes("Kettle B")
    for batch, number in ((first, 0), (second, 1)):
        night.batch(batch, number)
    version = delta.version(spark, root, "label_probs")
    for batch, number in ((second, 1), (first, 0)):
        night.batch(batch, number)
    assert delta.version(spark, root, "label_probs") == version
    assert night.run.counts["scored"] == 4
    third = changes("Kettle C")
    yesterday = F.current_timestamp() - F.expr("INTERVAL 1 DAY")
    delta.update(spark, root, "pairs", F.lit(True), {"updated_at": yesterday})
    monkeypatch.setattr(runs, "datetime", Yesterday)
    night.batch(third, 2)
    assert night.run.counts["scored"] == 8
    assert not invariants.audit(root, MODEL)


class Yesterday(datetime):
    """A clock that is a day behind."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) - timedelta(days=1)


@pytest.mark.slow
def test_a_candidate_that_fails_does_not_end_the_night_of_the_model_in_force(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    here = scoring()
    settings = replace(here.settings, max_model_len=500)  # other ones than here, so an engine of its own
    other = replace(here.model, model_id="f" * 16)
    drifting = replace(here, model=other, settings=settings, load_engine=load_drifting)
    run = rescore(spark, root, here, also=[drifting])
    assert (run.status, run.counts["scored"], run.counts["gates_failed"]) == ("done", 12, 1)
    assert job.exit_code(run) == 3
    rows = {row["model_id"]: row for row in invariants.table(root, "runs")}
    assert (rows["f" * 16]["status"], rows[MODEL]["status"]) == ("failed", "done")
    assert "does not agree with itself" in rows["f" * 16]["message"]
    gates = {(r["run_id"], r["name"]): r["level"] for r in invariants.table(root, "gates")}
    assert gates[run.run_id, "candidates"] == "fail"
    assert (rows["f" * 16]["run_id"], "noise") in gates
    assert not invariants.audit(root, MODEL) + invariants.left(root)


@pytest.mark.slow
def test_a_ctrl_c_ends_the_night_at_once_and_no_candidate_is_to_blame(
    spark: SparkSession, root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, None) for i in range(10)])
    here = scoring()
    settings = replace(here.settings, model=str(tmp_path))
    slow = replace(here, model=replace(here.model, model_id="f" * 16), settings=settings, load_engine=load_slow)
    began: list[float] = []

    def interrupt() -> None:
        while not (tmp_path / "asked").exists():
            time.sleep(0.1)
        began.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        rescore(spark, root, here, also=[slow])  # of the candidate's 40 pairs 28 take two seconds each
    assert time.monotonic() - began[0] < 25
    assert "goes on without it" not in capsys.readouterr().out
    rows = {row["model_id"]: row for row in invariants.table(root, "runs")}
    assert {row["status"] for row in rows.values()} == {"failed"}
    assert "candidates_failed" not in dict(rows[MODEL]["counts"])
    assert not invariants.left(root)
    again = rescore(spark, root, here, also=[replace(slow, settings=here.settings, load_engine=here.load_engine)])
    assert (again.status, again.counts.get("scored", 0)) == ("done", 0)
    assert not invariants.audit(root, MODEL, "f" * 16) + invariants.left(root)


@pytest.mark.slow
def test_of_two_that_go_on_with_one_run_at_the_same_moment_one_is_refused(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = ("sample", MODEL, "p", "settings")
    first = runs.begin(spark, root, *what)
    runs.finish(spark, root, first, "failed")
    look, others = runs.refuse_second, []

    def other_comes_first(*arguments: Any) -> None:
        monkeypatch.setattr(runs, "refuse_second", look)
        look(*arguments)
        others.append(runs.begin(spark, root, *what))

    monkeypatch.setattr(runs, "refuse_second", other_comes_first)
    with pytest.raises(ValueError, match=f"run {first.run_id} of sample with this model and prompt is alive"):
        runs.begin(spark, root, *what)
    assert [run.run_id for run in others] == [first.run_id]
    assert [row["status"] for row in invariants.table(root, "runs")] == ["running"]
    runs.finish(spark, root, others[0], "done")
    assert not invariants.left(root)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_the_next_one_completes_it(spark: SparkSession, root: str) -> None:
    kettles: list[Any] = [(f"k{i}", f"Steel kettle {i}", {}, None) for i in range(20)]
    put(spark, root, kettles, [f"kettle {i}" for i in range(40)])
    # No file of the JVM may grow beyond 40 KiB: a write fails as on a full disk, whoever runs this test.
    full = night(root, "rescore", "40960", HOT_TOKENS="4000")
    assert full.returncode == 1
    assert b"File too large" in full.stderr
    (run,) = invariants.table(root, "runs")
    assert (run["status"], "File too large" in run["message"]) == ("failed", True), run["message"]
    assert not invariants.audit(root)
    assert night(root, "rescore", HOT_TOKENS="4000").returncode == 0
    assert not invariants.audit(root, MODEL) + invariants.left(root)
    assert len(invariants.table(root, "label_probs")) == 800


@pytest.mark.slow
@pytest.mark.parametrize("how", ["half gone", "old copy", "truncated"])
def test_a_damaged_checkpoint_skips_no_pair(spark: SparkSession, root: str, tmp_path: Path, how: str) -> None:
    put(spark, root, PRODUCTS)
    rescore(spark, root, scoring())
    (checkpoint,) = (Path(root) / "_checkpoints" / "rescore").iterdir()
    shutil.copytree(checkpoint, tmp_path / "old")
    put(spark, root, [("k9", "Red kettle", {}, None)])
    if how == "half gone":
        shutil.rmtree(checkpoint / "offsets")
        shutil.rmtree(checkpoint / "commits")
    elif how == "old copy":
        rescore(spark, root, scoring())
        put(spark, root, [("k9", "Green kettle", {}, None)])
        shutil.rmtree(checkpoint)
        shutil.copytree(tmp_path / "old", checkpoint)
    else:
        last = max((f for f in (checkpoint / "offsets").iterdir() if f.name.isdigit()), key=lambda f: int(f.name))
        last.write_text("")
        for checksum in last.parent.glob(f".{last.name}.crc"):
            checksum.unlink()
        with pytest.raises(RuntimeError, match=r"delete .*_checkpoints/rescore/.* and start again") as told:
            rescore(spark, root, scoring())
        assert "and start again" in str(told.value).splitlines()[0]  # which is what the last line tells
        assert any("and start again" in (row["message"] or "") for row in invariants.table(root, "runs"))
        shutil.rmtree(checkpoint)
    assert rescore(spark, root, scoring()).counts["scored"] == 4
    assert not invariants.audit(root, MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["before it looks", "behind its look", "without its guard"])
def test_a_writer_that_wakes_up_late_changes_nothing(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It read text B; meanwhile a pair went, one got text C and was judged, one went back to the judged text A.

    Behind its look at `pairs` the MERGE itself must keep B from C; without its guard the invariants must see that.
    """
    kettle: list[Any] = [("k1", "Kettle A", {}, None), ("k2", "Kettle A2", {}, None), ("k3", "Kettle A3", {}, None)]
    put(spark, root, kettle, QUERIES[:1])
    rescore(spark, root, scoring())
    put(spark, root, [(k, f"{title} B", a, d) for k, title, a, d in kettle], QUERIES[:1])
    write, upsert = Night.write, delta.upsert
    slept = False

    def sleep() -> None:
        nonlocal slept
        if not slept:
            slept = True
            put(spark, root, [kettle[0], ("k2", "Kettle C", {}, None)], QUERIES[:1])
            gone = delta.read(spark, root, "pairs").where("product_id = 'k3'").localCheckpoint()
            delta.delete(spark, root, "pairs", gone, ("pair_id",))
            other = Night(spark, root, scoring(), runs.start(spark, root, "rescore", MODEL))
            other.forget_removed_pairs()
            other.score_changed(delta.read(spark, root, "pairs").select("pair_id"), "other")
            other.close()

    def late(night: Night, answered: Any, wave_id: str) -> None:
        sleep()
        write(night, answered, wave_id)

    def later(session: SparkSession, folder: str, name: str, rows: Any, changed: str = "true", *rest: Any) -> Any:
        if name == "label_probs":
            sleep()
            changed = "true" if where == "without its guard" else changed
        return upsert(session, folder, name, rows, changed, *rest)

    if where == "before it looks":
        monkeypatch.setattr(Night, "write", late)
    else:
        monkeypatch.setattr(delta, "upsert", later)
    rescore(spark, root, scoring())
    assert slept
    monkeypatch.undo()
    if where == "behind its look":  # the pair that went is taken out when the next run begins
        assert [row["product_id"] for row in invariants.table(root, "label_probs")].count("k3") == 1
        rescore(spark, root, scoring())
    breaches = invariants.audit(root, MODEL)
    assert any("fell back" in breach for breach in breaches) == (where == "without its guard"), breaches
    assert where == "without its guard" or not breaches


@pytest.mark.slow
def test_the_audit_sees_rows_that_are_added_where_they_should_be_merged(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(spark, root, PRODUCTS)
    rescore(spark, root, scoring())
    put(spark, root, [("k1", "Steel kettle, red", *PRODUCTS[0][2:])])
    upsert = delta.upsert

    def added(session: SparkSession, folder: str, name: str, rows: DataFrame, *rest: Any) -> dict[str, int]:
        if name != "label_probs":
            return upsert(session, folder, name, rows, *rest)
        delta.append(session, folder, name, rows)
        return {"inserted": rows.count(), "updated": 0}

    monkeypatch.setattr(delta, "upsert", added)
    rescore(spark, root, scoring())
    assert any("2 rows of" in breach for breach in invariants.audit(root, MODEL))
    (Path(root) / "_scratch" / "dead").mkdir(parents=True)
    assert invariants.left(root) == [str(Path(root) / "_scratch" / "dead")]


def test_commits_of_another_process_are_waited_for(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\nsys.stdin.read()"
    )
    words = [sys.executable, "-c", held, str(Path(root) / delta.LOCK)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        monkeypatch.setattr(delta, "LOCK_SECONDS", 0.2)
        with pytest.raises(RuntimeError, match=r"another process holds .*_commit\.lock"):
            runs.start(spark, root, "rescore")
        other.communicate()
    runs.start(spark, root, "rescore")
    assert delta.read(spark, root, "runs").count() == 1


def test_s3_without_a_log_store_that_sees_other_writers_is_refused(spark: SparkSession) -> None:
    with pytest.raises(ValueError, match=r"spark\.delta\.logStore\.s3a\.impl=io\.delta\.storage\.S3DynamoDBLogStore"):
        delta.prepare(spark, "s3a://bucket/tables")


@pytest.mark.slow
def test_an_engine_outlives_a_gap_of_ninety_seconds(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    night = Night(spark, root, scoring(), runs.start(spark, root, "rescore", MODEL))
    with engines.kept_alive(spark, 1):
        night.score_changed(delta.read(spark, root, "pairs").select("pair_id"), "before")
        time.sleep(90)
        put(spark, root, [("k9", "Red kettle", {}, None)])
        night.score_changed(delta.read(spark, root, "pairs").select("pair_id"), "after")
    assert (night.run.counts["scored"], night.run.engine_loads) == (16, 1)


def test_halves_of_a_stretch_are_its_rows_again() -> None:
    stretch: prefix.Stretch = [(0, 5, 9), (2, 0, 0), (3, 0, 3)]
    while stretch:
        first, *rest = prefix.halves(stretch)
        assert sum(map(prefix.length, [first, *rest])) == prefix.length(stretch)
        if not rest:
            break
        stretch = rest[0]
    assert stretch == [(3, 3, 3)]
