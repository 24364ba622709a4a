"""On a real standalone cluster: the whole job with the real engine, plain on CPUs and with a GPU declared a worker;
and a training whose two processes are tasks of the cluster."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from jobs import check, train_sft
from partitioner import engines
from schemas.labels import P_COLUMNS
from tests.cluster import cluster
from tests.commands import submit, table
from tests.conftest import REPO
from tests.models import tiny_model
from tests.pairs import QUERIES, put
from tests.test_train_sft import told
from udfs import selfcheck
from udfs.model import inspect, weights_hash
from udfs.prompt import load

CONF = (
    "--conf",
    "spark.driver.host=127.0.0.1",
    "--conf",
    "spark.ui.enabled=false",
    "--conf",
    "spark.executor.memory=1g",
    "--conf",
    "spark.executorEnv.OMP_NUM_THREADS=1",  # two engines on two cores
)


@pytest.mark.slow
@pytest.mark.parametrize("gpu", [False, True], ids=["plain", "gpu"])
def test_each_executor_scores_its_own_shard_with_one_engine(
    spark: SparkSession, root: str, tmp_path: Path, gpu: bool
) -> None:
    if not gpu and not engines.on_cpu():
        pytest.skip("the engine that is installed is the build for GPUs")
    model = tiny_model(tmp_path / "model")
    text = "boils water for {} cups of tea in three minutes. "
    put(spark, root, [(f"k{i}", f"Steel kettle no. {i}", {}, text.format(i) * 6) for i in range(40)], QUERIES)
    conf = [*CONF, *(("--conf", "spark.executor.resource.gpu.amount=1") if gpu else ())]
    flags = ["--tables", root, "--model", str(model), "--dtype", "float32"]
    # Two cores a worker: were it not for the profile, two scoring tasks would run side by side in an executor.
    with cluster(tmp_path / "cluster", cores=2, gpus=int(gpu)) as running:
        said = submit("--master", running.master, *conf, "check", *flags, "then", "rescore", *flags)
    assert "ok       versions: on 2 executor(s): Python" in said
    assert "160 scored" in said
    (run,) = (row for row in table(Path(root), "runs") if row["job"] == "rescore")
    assert (run["status"], run["engine_loads"]) == ("done", 2)
    rows = {row["pair_id"]: row for row in table(Path(root), "label_probs")}
    assert len(rows) == len(table(Path(root), "label_probs")) == 160
    if not gpu:
        looked = inspect(str(model))
        prompt = load(looked.prompt_file or "", looked.tokenizer_json, looked.vocab_size)
        pairs = table(Path(root), "pairs")
        asked = check.prompts(prompt, [{**pair, "attributes": dict(pair["attributes"] or {})} for pair in pairs])
        plain = check.plain_model(str(model), asked, prompt.label_ids)
        engine = [[rows[pair["pair_id"]][p] for p in P_COLUMNS] for pair in pairs]
        assert selfcheck.largest_difference(plain, engine) < 1e-3
    else:
        # Spark does not set CUDA_VISIBLE_DEVICES by itself: each engine saw its own made-up address.
        logs = "".join(f.read_text(errors="replace") for f in (tmp_path / "cluster").rglob("stderr"))
        assert "CUDA_VISIBLE_DEVICES=10" in logs
        assert "CUDA_VISIBLE_DEVICES=11" in logs
    time.sleep(3)  # what watches over an engine looks once a second whether that has ended
    left = [pid for pid in os.listdir("/proc") if pid.isdigit() and str(tmp_path / "cluster") in environment(pid)]
    assert not left


@pytest.mark.slow
@pytest.mark.usefixtures("spark")
def test_a_training_in_tasks_of_the_cluster_makes_the_model_that_processes_of_one_machine_make(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")  # the tests' own, which a cluster's workers do not have
    model = tiny_model(tmp_path / "model")
    told(root, tmp_path)
    flags = ["--tables", root, "--model", str(model), "--labels-only", "--epochs", "2", "--accumulate", "1"]
    flags += ["--processes", "2", "--dtype", "float32", "--batch-tokens", "512"]
    assert train_sft.main([*flags, "--out", str(tmp_path / "here")]) == 0
    with cluster(tmp_path / "cluster", cores=1) as running:
        archive = tmp_path / "taosr1.zip"
        subprocess.run([REPO / "spark-submit.sh", "--archive", archive], check=True, capture_output=True)
        code = ["--conf", f"spark.executorEnv.PYTHONPATH={archive}"]
        said = submit("--master", running.master, *CONF, *code, "train_sft", *flags, "--out", tmp_path / "there")
    assert "train_sft: made model" in said
    assert weights_hash(str(tmp_path / "there")) == weights_hash(str(tmp_path / "here"))
    logs = [file.read_text(errors="replace") for file in (tmp_path / "cluster").rglob("app-*/*/stderr")]
    assert ["BarrierTaskContext" in log for log in logs] == [True, True]  # a task of the training in each executor
    assert {run["status"] for run in table(Path(root), "runs") if run["job"] == "train_sft"} == {"done"}


def environment(pid: str) -> str:
    """A process's environment, empty where it has ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""
