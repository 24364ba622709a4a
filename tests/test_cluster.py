"""The test cluster is a real one: two executors, GPUs that are handed out, and nothing left behind."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import wrong_answers
from tests import cluster as standalone
from tests import invariants
from tests.cluster import cluster
from tests.conftest import REPO
from tests.pairs import QUERIES, scoring
from tests.test_faults import poisoned
from udfs.prompt import Renderer

# A driver of its own: one Python process can hold one Spark alone. Each task says where it ran, when and on which GPU.
DRIVER = """
import json, os, sys, time
from pyspark.sql import SparkSession
from partitioner import engines

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

gpus = int(sys.argv[2])
profile = engines.profile(spark, gpus)
engines.refuse_unfit(spark, gpus)
assert engines.count(spark) == 2
assert profile.id == engines.profile(spark, gpus).id
said = spark.range(0, 100, 1, 6).mapInArrow(task, "said string", profile=profile).collect()
print(json.dumps([json.loads(row.said) for row in said]))
"""

# A night whose engines are of unlike speed.
NIGHT = """
import json, sys, time
from dataclasses import replace
from jobs.backfill import backfill
from partitioner import engines, prefix, waves
from schemas import delta
from tests import engines as kinds
from tests.conftest import QUICK
from tests.pairs import put, scoring

master, root, folder, products, engine = sys.argv[1:]
waves.WAVE_SECONDS, prefix.HOT_TOKENS = 0.0, 2000
conf = {"spark.driver.host": "127.0.0.1", "spark.executor.resource.gpu.amount": "1", "spark.executor.memory": "1g"}
spark = delta.session("night", {**QUICK, **conf, "spark.master": master})
until = time.time() + 60
while spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() < 3 and time.time() < until:
    time.sleep(0.1)
put(spark, root, [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(int(products))])
what = scoring()
what = replace(what, settings=replace(what.settings, model=folder), load_engine=getattr(kinds, engine))
asked, searched, touched = [], [], []

def timed(method, times):
    def call(*args, **more):
        began = time.time()
        found = method(*args, **more)
        times.append((began, time.time()))
        return found
    return call

waves.Waves._land = timed(waves.Waves._land, asked)
waves.Waves._searched = timed(waves.Waves._searched, searched)
engines.each, engines.TOUCH_SECONDS = timed(engines.each, touched), 2.0
run = backfill(spark, root, what)
told = {"counts": run.counts, "waves": run.waves, "loads": run.engine_loads, "asked": sorted(asked)}
told |= {"searched": searched, "touched": touched}
print(json.dumps({**told, **run.figures}))
"""


def tasks(master: str, gpus: int, *conf: str) -> list[dict[str, Any]]:
    """What the tasks of a small job on the cluster, each on so many GPUs, said of themselves."""
    words = [sys.executable, "-c", DRIVER, master, str(gpus), *conf]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180, check=False, cwd=REPO)
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
def test_an_executor_runs_one_scoring_task_at_a_time_which_has_all_gpus_of_its_engine_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    with cluster(tmp_path, cores=2, gpus=2) as running:
        said = tasks(running.master, 2, "spark.executor.resource.gpu.amount=2")
        started = [*running.processes(0), *running.processes(1)]
        assert set(running.workers) <= set(started)
    assert not [pid for pid in started if alive(pid)]
    sets = [("10", "20"), ("11", "21")]
    assert {tuple(sorted(task["gpus"])) for task in said} == set(sets)
    for own in sets:
        times = sorted((task["began"], task["ended"]) for task in said if tuple(sorted(task["gpus"])) == own)
        assert len({task["worker"] for task in said if tuple(sorted(task["gpus"])) == own}) == 1
        # Two cores would have let two of them run side by side.
        assert all(ended <= began for (_, ended), (began, _) in itertools.pairwise(times))


@pytest.mark.slow
def test_an_engine_that_is_done_with_its_shard_goes_on_with_the_next_wave_while_another_is_slow(tmp_path: Path) -> None:
    root = tmp_path / "tables"
    with cluster(tmp_path / "cluster", cores=2, gpus=1) as running:
        words = [sys.executable, "-c", NIGHT, running.master, str(root), str(tmp_path), "60", "load_uneven"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=400, check=False, cwd=REPO)
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["counts"]["scored"] == 240
    assert told["loads"] == 2
    assert told["waves"] > 3
    asked = sorted(
        map(json.loads, (tmp_path / "asked").read_text().splitlines()), key=lambda task: float(task["began"])
    )
    slow, fast = ([task for task in asked if task["slow"] is kind] for kind in (True, False))
    for own in (slow, fast):  # one task at a time
        assert all(one["ended"] <= other["began"] for one, other in itertools.pairwise(own))
    assert len(slow) > 1
    assert len(fast) > 2
    # Shards are of equal work: when the fast one is done with its own, the next wave is put beside the slow one's.
    beside = [following < ended for (_, ended), (following, _) in itertools.pairwise(told["asked"])]
    assert sum(beside) >= len(beside) / 2
    # Meanwhile its worker, which Spark would end after a minute without a task, gets one.
    assert any(task["began"] < began < ended < task["ended"] for task in slow for began, ended in told["touched"])
    # What the engines were asked is counted once where two waves were.
    assert told["seconds_scoring"] <= told["seconds_total"]
    assert told["seconds_other"] >= 0
    assert not invariants.audit(str(root), "0123456789abcdef") + invariants.left(str(root))


@pytest.mark.slow
def test_a_pair_that_kills_its_engine_is_looked_for_while_the_others_go_on(tmp_path: Path) -> None:
    root, folder = tmp_path / "tables", tmp_path / "engine"
    kettles: list[Any] = [(f"k{i}", f"Steel kettle {i}", {}, "Boils water. " * 30) for i in range(120)]
    render = Renderer(scoring().prompt)
    first = min(
        range(120), key=lambda n: list(render.product(kettles[n][1], "Hearthline", "Kitchen", {}, kettles[n][3]).ids)
    )
    poisoned(folder, kettles, [(first, QUERIES[0])])  # in the first wave
    with cluster(tmp_path / "cluster", cores=2, gpus=1) as running:
        words = [sys.executable, "-c", NIGHT, running.master, str(root), str(folder), "120", "load_poisoned"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=500, check=False, cwd=REPO)
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["counts"]["scored"], told["counts"]["refused"]) == (479, 1)
    ((began, ended),) = told["searched"]
    assert sum(began < wave < ended for wave, _ in told["asked"]) > 1, told
    assert told["loads"] <= 2 + told["counts"]["engine_deaths"]
    dead = [row for row in invariants.table(str(root), "label_probs") if row["outcome"] == "engine_failed"]
    assert [(row["product_id"], row["query"]) for row in dead] == [(f"k{first}", QUERIES[0])]
    assert not invariants.audit(str(root), "0123456789abcdef") + invariants.left(str(root))


@pytest.mark.slow
def test_an_executor_that_is_killed_in_the_middle_of_a_wave_costs_its_shard_and_no_row(tmp_path: Path) -> None:
    root = tmp_path / "tables"
    with cluster(tmp_path / "cluster", cores=2, gpus=1) as running:
        words = [sys.executable, "-c", NIGHT, running.master, str(root), str(tmp_path), "24", "load_uneven"]
        with open(tmp_path / "said", "wb") as said:
            night = subprocess.Popen(words, stdout=said, stderr=said, cwd=REPO)
        first = root / "label_probs" / "_delta_log" / f"{1:020}.json"
        until = time.monotonic() + 200
        while not first.exists() and night.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        (slow,) = (pid for pid, words in running.processes(0).items() if "CoarseGrainedExecutorBackend" in words)
        os.kill(slow, signal.SIGKILL)
        night.wait(300)
    lines = (tmp_path / "said").read_text().splitlines()
    assert night.returncode == 0, lines[-100:]
    told = json.loads(next(line for line in reversed(lines) if line.startswith("{")))
    assert (told["counts"]["scored"], told["counts"]["refused"]) == (96, 0)
    assert not invariants.audit(str(root), "0123456789abcdef") + invariants.left(str(root))
    assert not wrong_answers(str(root), 0x0123456789ABCDEF, scoring(), real=False)


@pytest.mark.slow
def test_a_cluster_that_does_not_come_up_shows_its_logs_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standalone, "START_S", 8)
    monkeypatch.setattr(standalone, "_gpus", lambda home, addresses: "-Dspark.worker.resource.gpu.amount=none")
    with pytest.raises(RuntimeError, match=r"0 of 2 workers came up(.|\n)*worker1/log"), cluster(tmp_path, gpus=1):
        pass
    assert not [command for command in commands() if str(tmp_path) in command]
