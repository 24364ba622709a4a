"""The record of a run: who is alive, and how an end is written where little works any more."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from partitioner.night import Night
from schemas import delta, runs
from tests import invariants


def left_to_another(spark: SparkSession, root: str, run: runs.Run) -> Path:
    """The run's lease, as if a process of another machine had signed it."""
    runs._lease(spark, root, run.run_id).leave()
    lease = Path(root) / "_leases" / f"{run.run_id}.json"
    (lease.parent / f".{lease.name}.crc").unlink()
    lease.write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": "1"}))
    return lease


FULL = OSError("No space left on device")


def test_what_a_failed_run_landed_goes_before_its_end_is_written(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    delta.prepare(spark, root, new=True)
    run = runs.start(spark, root, "rescore")
    delta.land(spark, root, run.run_id, "wave", spark.range(3).toDF("n"))
    upsert = delta.upsert

    def where_there_is_room(*told: Any) -> dict[str, int]:
        if list((Path(root) / "_scratch").glob("[!.]*")):
            raise FULL
        return upsert(*told)

    with monkeypatch.context() as patched:
        patched.setattr(delta, "upsert", where_there_is_room)
        assert runs.fail(spark, root, run, FULL).status == "failed"
    (row,) = invariants.table(root, "runs")
    assert (row["status"], row["message"]) == ("failed", str(FULL))
    # Where not even a row can be written, the error of the job is told, and the next start closes the run.
    run = runs.start(spark, root, "rescore")

    def never(*_: Any) -> dict[str, int]:
        raise FULL

    with monkeypatch.context() as patched:
        patched.setattr(delta, "upsert", never)
        with pytest.raises(ZeroDivisionError), runs.recorded(spark, root, lambda: run):
            raise ZeroDivisionError
    assert f"that run {run.run_id} failed could not be written: {FULL}" in capsys.readouterr().out
    assert runs.last is not None
    assert (runs.last.run_id, runs.last.status) == (run.run_id, "failed")
    assert runs.close_lost(spark, root) == [run.run_id]
    assert not invariants.left(root)


@pytest.mark.slow
def test_a_run_of_another_machine_is_waited_for_until_it_shows_whether_it_lives(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    delta.prepare(spark, root, new=True)
    first = runs.start(spark, root, "rescore", "m", "p", alone=True)
    lease = left_to_another(spark, root, first)
    monkeypatch.setattr(runs, "LAPSED_SECONDS", 8.0)

    ended = threading.Event()

    def renewed() -> None:
        while not ended.wait(0.7):
            lease.touch()

    other = threading.Thread(target=renewed, daemon=True)
    other.start()
    with pytest.raises(ValueError, match=f"run {first.run_id} of rescore .* is alive, in process 1 on elsewhere"):
        runs.start(spark, root, "rescore", "m", "p", alone=True)
    ended.set()
    other.join()
    lease.touch()
    began = time.monotonic()
    second = runs.start(spark, root, "rescore", "m", "p", alone=True)
    assert time.monotonic() - began > 7
    assert f"run {first.run_id} is of another machine; in " in capsys.readouterr().out
    assert {row["run_id"]: row["status"] for row in invariants.table(root, "runs")} == {
        first.run_id: "lost",
        second.run_id: "running",
    }
    runs.finish(spark, root, second, "done")
    assert not invariants.left(root)


def test_a_run_that_another_driver_goes_on_with_is_left_to_it(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that came second to it signs once, and then leaves: that takes nothing from it."""
    monkeypatch.setattr(runs, "RENEWED_SECONDS", 0.2)
    run = runs.start(spark, root, "rescore", "m", "p")
    lease = runs._lease(spark, root, run.run_id)
    file, me = Path(root) / "_leases" / f"{run.run_id}.json", lease._me()

    def signed_by_another() -> None:
        (file.parent / f".{file.name}.crc").unlink(missing_ok=True)
        file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "born": "1"}))

    def wait_for(what: Callable[[], bool]) -> None:
        until = time.monotonic() + 20
        while not what():
            assert time.monotonic() < until
            time.sleep(0.01)

    signed_by_another()
    wait_for(lambda: lease.holder() == me)
    time.sleep(0.5)
    assert run.run_id not in runs.overtaken
    signed_by_another()
    wait_for(lambda: lease.holder() == me)
    signed_by_another()
    wait_for(lambda: run.run_id in runs.overtaken)
    lease.give_up()
    assert lease.holder()["host"] == "elsewhere"
    lease.take()
    assert run.run_id not in runs.overtaken
    lease.give_up()
    assert not file.exists()


def test_a_run_that_was_closed_as_lost_beside_its_driver_stays_so_and_its_driver_is_told(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where its machine slept so long that another driver took it for dead."""
    monkeypatch.setattr(runs, "RENEWED_SECONDS", 0.05)
    run = runs.start(spark, root, "rescore", "m", "p")
    lease = Path(root) / "_leases" / f"{run.run_id}.json"
    lease.unlink()
    until = time.monotonic() + 20
    while run.run_id not in runs.overtaken:
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not lease.exists()
    with monkeypatch.context() as patched:  # it ends between the look at its row and the word that it is lost
        patched.setattr(runs, "_put", lambda *_: 0)
        assert runs.close_lost(spark, root) == []
    assert "closed as lost" not in capsys.readouterr().out
    assert runs.close_lost(spark, root) == [run.run_id]
    assert "closed as lost" in capsys.readouterr().out
    runs.write(spark, root, run)
    runs.finish(spark, root, run, "done")
    (row,) = runs.table(spark, root).collect()
    assert row["status"] == "lost"
    night = Night.__new__(Night)
    night.run = run
    assert "another driver took this one for dead" in (night.asked_to_stop() or "")


def test_a_second_driver_is_refused_where_neither_would_see_the_others_commits(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta.prepare(spark, root, new=True)
    store = f"io.delta.storage.{delta.ONE_DRIVER}"
    monkeypatch.setattr(delta, "log_store", lambda *_: ("spark.delta.logStore.s3a.impl", store))
    first, second = (runs.start(spark, root, "rescore", model, "p", alone=True) for model in "mn")  # of one driver
    runs.finish(spark, root, second, "done")
    left_to_another(spark, root, first)
    refused = rf"{first.run_id} of rescore is at work .* {store} sees one driver's"
    with pytest.raises(ValueError, match=refused):
        runs.start(spark, root, "backfill", "m", "p", alone=True)
    with pytest.raises(ValueError, match=refused):
        runs.begin(spark, root, "sample", "m", "p", "s")
    assert len(invariants.table(root, "runs")) == 2
