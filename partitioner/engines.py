"""How many engines there are, and how Spark is made to run one scoring task at a time on each.

An engine fills its executor: all its cores, or its GPUs. So scoring tasks ask for all of them. In local mode, where
Spark takes no such request, a wave is one shard, so there is one scoring task at a time there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession

_GPUS = "spark.executor.resource.gpu.amount"


def is_local(spark: SparkSession) -> bool:
    """Whether driver and executor are one process on this machine."""
    return str(spark.sparkContext.master).startswith("local")


def gpus_per_executor(spark: SparkSession) -> int:
    """GPUs that each executor was given; 0 on CPU."""
    return int(spark.sparkContext.getConf().get(_GPUS, "0") or 0)


def count(spark: SparkSession, tensor_parallel: int) -> int:
    """Engines that can work at the same time: one an executor, or one for each `tensor_parallel` of its GPUs.

    Raises ValueError where an executor has fewer GPUs than one engine asks for.
    """
    if is_local(spark):
        return 1
    executors = max(1, len(_cores(spark)))
    gpus = gpus_per_executor(spark)
    if gpus and gpus < tensor_parallel:
        raise ValueError(
            f"--tensor-parallel {tensor_parallel} asks for more GPUs than an executor has ({gpus}); "
            f"start with --conf {_GPUS}={tensor_parallel}"
        )
    return executors * (gpus // tensor_parallel if gpus else 1)


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
