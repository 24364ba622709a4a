"""The test cluster is a real one: two executors, GPUs that are handed out, and nothing left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import cluster as standalone
from tests.cluster import cluster

# A driver of its own: one Python process can hold one Spark alone. Each task says where it ran, when and on which GPU.
DRIVER = """
import json, os, sys, time
from pyspark.sql import SparkSession
from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests

builder = SparkSession.builder.config("spark.driver.host", "127.0.0.1").config("spark.ui.enabled", "false")
for setting in sys.argv[3:]:
    builder = builder.config(*setting.split("=", 1))
spark = builder.master(sys.argv[1]).getOrCreate()
until = time.time() + 60
while spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() < 3 and time.time() < until:
    time.sleep(0.1)

def task(batches):
    import pyarrow
    from pyspark import TaskContext
    began = time.time()
    rows = sum(batch.num_rows for batch in batches)
    time.sleep(0.5)
    gpus = [a for r in TaskContext.get().resources().values() for a in r.addresses]
    said = {"worker": os.getcwd(), "rows": rows, "gpus": gpus, "began": began, "ended": time.time()}
    yield pyarrow.RecordBatch.from_pydict({"said": [json.dumps(said)]})

profile = None
if sys.argv[2] == "gpu":
    profile = ResourceProfileBuilder().require(TaskResourceRequests().cpus(1).resource("gpu", 1)).build
said = spark.range(0, 100, 1, 6).mapInArrow(task, "said string", profile=profile).collect()
print(json.dumps([json.loads(row.said) for row in said]))
"""


def tasks(master: str, kind: str, *conf: str) -> list[dict[str, Any]]:
    """What the tasks of a small job on the cluster said of themselves."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, master, kind, *conf], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    said: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert sum(task["rows"] for task in said) == 100
    return said


def alive(pid: int) -> bool:
    """Whether there is such a process; a zombie is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def commands() -> list[str]:
    """The command line of every process."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_text(errors="replace"))
    return found


@pytest.mark.slow
def test_a_job_runs_on_both_workers_and_nothing_of_the_cluster_is_left(tmp_path: Path) -> None:
    with cluster(tmp_path) as running:
        said = tasks(running.master, "plain")
        assert len({task["worker"] for task in said}) == 2
        assert all(task["worker"].startswith(str(tmp_path)) for task in said)
        started = [*running.processes(0), *running.processes(1)]
        assert set(running.workers) <= set(started)
    assert not [pid for pid in started if alive(pid)]


@pytest.mark.slow
def test_a_worker_with_one_gpu_runs_one_gpu_task_at_a_time_and_names_its_address(tmp_path: Path) -> None:
    with cluster(tmp_path, cores=2, gpu=True) as running:
        said = tasks(running.master, "gpu", "spark.executor.resource.gpu.amount=1")
    assert {tuple(task["gpus"]) for task in said} == {("10",), ("11",)}
    for gpu in ("10", "11"):
        times = sorted((task["began"], task["ended"]) for task in said if task["gpus"] == [gpu])
        assert len({task["worker"] for task in said if task["gpus"] == [gpu]}) == 1
        # Two cores would have let two of them run side by side.
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))


@pytest.mark.slow
def test_a_cluster_that_does_not_come_up_shows_its_logs_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "START_S", 8)
    monkeypatch.setattr(standalone, "_one_gpu", lambda home, address: "-Dspark.worker.resource.gpu.amount=none")
    with pytest.raises(RuntimeError, match=r"0 of 2 workers came up(.|\n)*worker1/log"), cluster(tmp_path, gpu=True):
        pass
    assert not [command for command in commands() if str(tmp_path) in command]
