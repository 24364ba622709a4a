"""Putting versions into force, back, and against each other; what readers see meanwhile."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs import promote_thresholds as job
from jobs.promote_thresholds import Gates, promote, swap
from partitioner import tiers
from schemas import delta
from tests.judged import MODEL, PROMPT, cuts, fill, pair, run, scored

LOW, HIGH = {"": (0.3, 0.3, 0.3)}, {"": (0.8, 0.8, 0.8)}


def scored_tables(spark: SparkSession, root: str, versions: list[dict[str, Any]]) -> None:
    fill(spark, root, "pairs", [pair(i, f"q {i % 5}", category="Kettles" if i < 10 else "Towels") for i in range(20)])
    fill(spark, root, "label_probs", [scored(i, f"q {i % 5}", [0.5, 0.4, 0.1, 0.0]) for i in range(20)])
    fill(spark, root, "runs", [run(), run("r1", "bfloat16", "fake 2")])
    fill(spark, root, "thresholds", versions)


def in_force(spark: SparkSession, root: str) -> int | None:
    version = tiers.active(spark, root)
    return version.version if version else None


def test_a_version_is_put_into_force_where_not_too_much_would_change(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scored_tables(spark, root, [*cuts(1, LOW), *cuts(2, HIGH)])
    assert in_force(spark, root) is None
    assert promote(spark, root, 1, who="ada", reason="first") == 0
    assert promote(spark, root, 2, who="bob") == 3
    assert "100.00% of the tiers would change, allowed 20.00%" in capsys.readouterr().out
    assert in_force(spark, root) == 1
    assert promote(spark, root, 2, Gates(shift=1.0), "bob", "stricter") == 0
    said = capsys.readouterr().out
    assert re.search(r"Excellent +0 +20 ", said)
    assert "category Kettles" in said
    assert in_force(spark, root) == 2


@pytest.mark.slow
def test_a_version_is_taken_back_with_who_when_and_why(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scored_tables(spark, root, [*cuts(1, LOW), *cuts(2, HIGH)])
    assert promote(spark, root, 1, who="ada", reason="first") == 0
    assert promote(spark, root, 2, dry_run=True, gates=Gates(shift=1.0)) == 0
    assert "20 of 20 tiers change (100.00%), 0 of them are lost" in capsys.readouterr().out
    assert in_force(spark, root) == 1
    assert promote(spark, root, 2, Gates(shift=1.0), "bob", "stricter") == 0
    assert promote(spark, root, 1, Gates(shift=1.0), "ada", "way back") == 0
    rows = delta.read(spark, root, "thresholds").collect()
    kept = {(r["version"], r["status"], r["activated_by"], r["reason"]) for r in rows}
    assert kept == {(1, "active", "ada", "way back"), (2, "retired", "bob", "stricter")}
    told = delta.read(spark, root, "runs").where("job = 'promote_thresholds' AND counts['version'] > 0").collect()
    assert sorted(r["message"] for r in told) == [
        "version 1 instead of 2, by ada: way back",
        "version 1 instead of none, by ada: first",
        "version 2 instead of 1, by bob: stricter",
    ]
    version = delta.version(spark, root, "thresholds")
    assert promote(spark, root, 1) == 0
    assert delta.version(spark, root, "thresholds") == version


@pytest.mark.slow
def test_what_cannot_be_trusted_is_refused_with_a_sentence(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [row for row in cuts(3, {"": (0.2, 0.3, 0.4)})]
    scored_tables(spark, root, [*cuts(1, LOW), *bad, *cuts(4, LOW, model_id="another"), *cuts(5, LOW)[:2]])
    assert not delta.claim(
        spark, root, "thresholds", delta.read(spark, root, "thresholds").where("version = 1"), "version"
    )
    for version, reason in ((9, "no version 9"), (3, "not whole"), (5, "not whole")):
        with pytest.raises(ValueError, match=reason):
            promote(spark, root, version)
    assert promote(spark, root, 4) == 3
    assert "100.00% of the pairs would have no tier, allowed 1.00%: 20 have no row of model another" in (
        capsys.readouterr().out
    )
    fill(spark, root, "pairs", [pair(50, "new")])
    # A row that says why there is no probability gives no tier either.
    fill(spark, root, "label_probs", [scored(50, "new", None, run_id="r1")])
    assert promote(spark, root, 1, Gates(engines=("bfloat16, fake 2",))) == 3
    assert "4.76% of the pairs would have no tier, allowed 1.00%: 0 have no row" in capsys.readouterr().out
    assert promote(spark, root, 1, Gates(missing=1.0)) == 3
    said = capsys.readouterr().out
    assert "were scored with 'bfloat16, fake 2'" in said
    assert "--allow-engine 'bfloat16, fake 2'" in said
    assert in_force(spark, root) is None
    # The way back after the engine was upgraded.
    flags = ["--tables", root, "--version", "1", "--max-missing", "5%", "--by-whom", "ada", "--reason", "way back"]
    assert job.main([*flags, "--allow-engine", "bfloat16, fake 2"]) == 0
    (row,) = delta.read(spark, root, "thresholds").where("status = 'active' AND boundary = 4").collect()
    assert row["reason"] == "way back (allowed beside the engines of the fit: bfloat16, fake 2)"


@pytest.mark.slow
def test_a_model_that_judges_nothing_is_refused_by_both_gates_and_takes_no_published_row_away(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scored_tables(spark, root, [*cuts(1, LOW, "active"), *cuts(2, LOW, model_id="broken")])
    fill(spark, root, "label_probs", [
        scored(i, f"q {i % 5}", None, model_id="broken", outcome="engine_failed") for i in range(20)
    ])  # fmt: skip
    assert promote(spark, root, 2) == 3
    said = capsys.readouterr().out
    assert "20 of 20 tiers change (100.00%), 20 of them are lost" in said
    assert "100.00% of the pairs would have no tier, allowed 1.00%: 0 have no row of model broken" in said
    assert "And 100.00% of the tiers would change, allowed 20.00%" in said
    assert in_force(spark, root) == 1


@pytest.mark.slow
def test_of_two_promoters_who_looked_at_the_same_version_one_wins_and_the_other_is_told(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored_tables(spark, root, [*cuts(1, LOW), *cuts(2, HIGH), *cuts(3, {"": (0.31, 0.3, 0.3)})])

    def race(seen: int | None) -> int:
        """Versions 1 and 2 truly at once: both commits meet; returns which is in force then."""
        gate, ended = threading.Barrier(2), Counter[str]()

        def promoter(version: int) -> None:
            gate.wait()
            try:
                swap(spark, root, seen, version, f"promoter {version}", None)
                ended["won"] += 1
            except RuntimeError as error:
                ended["told" if "put into force meanwhile" in str(error) else str(error)] += 1

        threads = [threading.Thread(target=promoter, args=(version,)) for version in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == {"won": 1, "told": 1}
        won = in_force(spark, root)
        assert won in (1, 2)
        return won

    first = race(None)  # nothing is in force yet
    # After it looked and before it commits.
    looked = job.shifted

    def slow(*args: Any) -> list[str]:
        found = looked(*args)
        swap(spark, root, first, 3, "faster", None)
        return found

    monkeypatch.setattr(job, "shifted", slow)
    with pytest.raises(RuntimeError, match="another version was put into force meanwhile; nothing was written"):
        promote(spark, root, 3 - first, Gates(shift=1.0), "slower")
    assert in_force(spark, root) == 3
    race(3)


@pytest.mark.slow
def test_each_read_sees_exactly_one_whole_version_in_every_commit(spark: SparkSession, root: str) -> None:
    segments = {"": (0.3, 0.3, 0.3), "Kettles": (0.95, 0.95, 0.2)}
    scored_tables(spark, root, [*cuts(1, segments, "active", "category"), *cuts(2, HIGH, segment_by=None)])
    tiers.register(spark, root)
    whole = {1: {4: 10, 2: 10}, 2: {3: 20}}  # pairs by tier
    stop, seen, torn = threading.Event(), Counter[str](), []

    def by_delta_rs() -> None:
        rows = DeltaTable(f"{root}/thresholds").to_pyarrow_table(filters=[("status", "=", "active")]).to_pylist()
        versions = {row["version"] for row in rows}
        if versions not in ({1}, {2}) or len(rows) != {1: 6, 2: 3}[versions.pop()]:
            torn.append(rows)

    def by_the_view() -> None:
        rows = spark.sql("SELECT version, tier, count(*) AS n FROM labels GROUP BY version, tier").collect()
        versions = {row["version"] for row in rows}
        if len(versions) != 1 or {row["tier"]: row["n"] for row in rows} != whole[versions.pop()]:
            torn.append(rows)

    def reading(read: Callable[[], None]) -> None:
        while not stop.is_set():
            read()
            seen[read.__name__] += 1

    readers = [threading.Thread(target=reading, args=(read,)) for read in (by_delta_rs, by_the_view)]
    for reader in readers:
        reader.start()
    now = 1
    for _ in range(3):
        swap(spark, root, now, 3 - now, "a test", None)
        now = 3 - now
        by_the_view()
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn
    assert min(seen["by_delta_rs"], seen["by_the_view"]) >= 3
    for version in range(delta.version(spark, root, "thresholds") + 1):
        rows = DeltaTable(f"{root}/thresholds", version=version).to_pyarrow_table().to_pylist()
        assert len({row["version"] for row in rows if row["status"] == "active"}) == (1 if rows else 0)


def test_a_pair_without_a_probability_has_no_tier(spark: SparkSession, root: str) -> None:
    scored_tables(spark, root, cuts(1, LOW, "active"))
    fill(spark, root, "pairs", [pair(90, "long")])
    fill(spark, root, "label_probs", [scored(90, "long", None)])
    tiers.register(spark, root)
    (row,) = spark.sql("SELECT tier, tier_name, outcome FROM labels WHERE query = 'long'").collect()
    assert tuple(row) == (None, None, "too_long")
    assert tuple(spark.sql("SELECT DISTINCT model_id, prompt_id FROM labels").collect()[0]) == (MODEL, PROMPT)
