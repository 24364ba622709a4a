"""Housekeeping on real Delta: files are joined, a model's rows go only when it was said so."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from bench import scaling
from jobs import maintain as job
from schemas import delta, runs
from tests import invariants, judged


@pytest.mark.slow
def test_small_files_are_joined_and_no_row_changes(spark: SparkSession, root: str) -> None:
    for i in range(4):
        judged.fill(spark, root, "label_probs", [judged.scored(i, "q", [0.7, 0.1, 0.1, 0.1])])
    before = sorted(map(str, invariants.table(root, "label_probs")))
    job.maintain(spark, root, ["label_probs"], dry_run=True)
    assert delta.size(spark, root, "label_probs")[0] == 4
    job.maintain(spark, root, ["label_probs"])
    assert delta.size(spark, root, "label_probs")[0] == 1
    assert sorted(map(str, invariants.table(root, "label_probs"))) == before
    assert len(list((Path(root) / "label_probs").glob("*.parquet"))) >= 5  # old versions can still be read
    (run,) = delta.read(spark, root, "runs").collect()
    assert (run["status"], run["counts"]) == ("done", {"joined_files": 4, "removed_files": 0})


@pytest.mark.slow
def test_only_files_that_no_version_of_the_last_days_needs_are_removed(spark: SparkSession, root: str) -> None:
    for i in range(3):
        judged.fill(spark, root, "label_probs", [judged.scored(i, "q", [0.7, 0.1, 0.1, 0.1])])
    version = delta.version(spark, root, "label_probs")
    for days, name in ((8, "old"), (6, "new")):  # as a commit that failed leaves them
        file = Path(root) / "label_probs" / f"part-{name}.parquet"
        file.write_bytes(b"")
        os.utime(file, (time.time() - 86_400 * days,) * 2)
    job.maintain(spark, root, ["label_probs"])
    run = delta.read(spark, root, "runs").collect()[0]
    assert run["counts"] == {"joined_files": 3, "removed_files": 1}
    assert [f.name for f in (Path(root) / "label_probs").glob("part-???.parquet")] == ["part-new.parquet"]
    assert len(invariants.table(root, "label_probs", version)) == 3


@pytest.mark.slow
def test_a_model_is_dropped_only_with_yes_and_never_while_in_force(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = "00000000000000ff"
    row = judged.scored(1, "q", [0.7, 0.1, 0.1, 0.1])
    judged.fill(spark, root, "label_probs", [row, {**row, "model_id": other}])
    judged.fill(spark, root, "thresholds", judged.cuts(1, {"": (0.5, 0.5, 0.5)}, "active"))
    judged.fill(spark, root, "pairs", [judged.pair(1, "q")])
    with pytest.raises(ValueError, match="it is in force"):
        job.drop_model(spark, root, judged.MODEL, yes=True)
    with pytest.raises(ValueError, match="it has no rows"):
        job.drop_model(spark, root, "0000000000000000", yes=True)
    job.drop_model(spark, root, other, yes=False)
    assert "1 rows of model 00000000000000ff would go; nothing was done" in capsys.readouterr().out
    assert len(invariants.table(root, "label_probs")) == 2
    checkpoint = Path(root) / "_checkpoints" / "rescore"
    for model in (other, judged.MODEL):
        (checkpoint / f"{model}-{judged.PROMPT}").mkdir(parents=True)
    alive = runs.start(spark, root, "backfill", other)
    with pytest.raises(ValueError, match=f"run {alive.run_id} of it is alive"):
        job.drop_model(spark, root, other, yes=True)
    runs.finish(spark, root, alive, "done")
    job.drop_model(spark, root, other, yes=True)
    assert [folder.name for folder in checkpoint.iterdir()] == [f"{judged.MODEL}-{judged.PROMPT}"]
    assert [r["model_id"] for r in invariants.table(root, "label_probs")] == [judged.MODEL]
    pairs = delta.read(spark, root, "pairs").localCheckpoint()
    delta.delete(spark, root, "pairs", pairs, ("pair_id",))  # where no pair is left, nothing is served
    job.drop_model(spark, root, judged.MODEL, yes=True)
    assert not invariants.table(root, "label_probs")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--keep-days", "1"], "at least 7"),
        (["--yes"], "belongs to --drop-model"),
        (["--drop-model", "m", "--yes", "--dry-run"], "goes without --dry-run"),
        (["--drop-model", "m", "--yes", "--table", "gold"], "goes without --dry-run and --table"),
    ],
)
def test_a_flag_that_would_take_a_readers_files_is_refused(flags: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        job.main(["--tables", "/nowhere", *flags])


@pytest.mark.slow
def test_a_stream_that_commits_a_row_a_minute_leaves_few_files(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are joined after fewer commits than the 50 of a stream; a whole day of them: bench.scaling commits."""
    monkeypatch.setattr(delta, "JOINED_EVERY", 8)
    _, most = scaling.commits(spark, root, 21)
    assert most["label_probs"] <= 12
    assert most["runs"] <= 12
    assert len(invariants.table(root, "label_probs")) == 21
