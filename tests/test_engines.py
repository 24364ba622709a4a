"""Workers of engines: whose functions run in them, and with how many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest
from pyspark.sql import SparkSession

from partitioner import engines
from udfs.engine import threads_of_task


def told(spark: SparkSession) -> tuple[int, str]:
    """Threads of an engine, and the worker's name, as a task of a function that is made here finds them."""

    def tell(_: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        import os

        found = {"threads": [threads_of_task()], "name": [os.environ.get("TAOSR1_WORKER", "")]}
        yield pa.RecordBatch.from_pydict(found)

    row = spark.range(1).repartition(1).mapInArrow(tell, "threads BIGINT, name STRING").collect()[0]
    return row["threads"], row["name"]


def test_an_engine_gets_the_threads_that_were_named_and_not_the_one_of_a_task(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of_task() == 0  # outside of a task: torch's own choice
    with engines.own_workers(spark):
        assert told(spark) == (3, "engine")
    assert told(spark) == (1, "")


def test_executors_of_unlike_cores_are_used_all_or_refused(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "is_local", lambda _: False)
    monkeypatch.setattr(engines, "_cores", lambda _: [8, 6])
    assert engines.count(spark, 1) == 2
    profile = engines.profile(spark, 1)
    assert profile is not None
    assert profile.taskResources["cpus"].amount == 6
    monkeypatch.setattr(engines, "_cores", lambda _: [8, 4])
    with pytest.raises(ValueError, match=r"--conf spark\.executor\.cores=4"):
        engines.count(spark, 1)


def test_only_the_thread_that_asks_for_an_engines_workers_gets_them(spark: SparkSession) -> None:
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with engines.own_workers(spark):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert inside.wait(60)
        assert told(spark)[1] == ""
    finally:
        done.set()
        thread.join()
