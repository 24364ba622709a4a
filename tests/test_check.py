"""What check finds before a night, and the command that mends it."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path

import pytest
from pyspark import TaskContext
from pyspark.sql import SparkSession

import jobs
from jobs import check
from partitioner import engines
from schemas import delta
from tests import judged
from udfs.engine import EngineSettings


def points(tmp_path: Path, root: str | None, model: str) -> dict[str, tuple[bool, str]]:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tables", type=delta.root)
    jobs.add_scoring_flags(parser)
    flags = ["--model", model, *(["--tables", root] if root else [])]
    found, _ = check.looked_at(parser.parse_args(flags))
    return {name: (blocked, told) for name, blocked, told in found}


def test_tables_without_pairs_and_a_model_that_is_none_are_in_the_way(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"x")
    found = points(tmp_path, root, str(tmp_path / "model"))
    assert not found["versions"][0]
    assert not found["storage"][0]
    assert not list(Path(root).glob("_written"))
    blocked, told = found["tables"]
    assert blocked
    assert f"bring some: ingest --tables {root} --pairs FILE" in told
    assert found["model and prompt"][0]
    judged.fill(spark, root, "pairs", [judged.pair(1, "kettle")])
    found = points(tmp_path, root, "active")
    assert found["tables"] == (False, "14 of 14, 1 pairs")
    assert "no version of thresholds is in force yet" in found["model and prompt"][1]


def test_a_table_that_does_not_fit_is_named_with_the_sql_that_mends_it(
    spark: SparkSession, root: str, tmp_path: Path
) -> None:
    spark.sql(f"ALTER TABLE delta.`{root}/runs` ADD COLUMN mood STRING")
    blocked, told = points(tmp_path, root, "/nowhere")["table runs"]
    assert blocked
    assert told.startswith("column mood is not in the contract (move the folder of delta.`")


def test_a_root_that_is_a_file_is_no_storage(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert points(tmp_path, str(tmp_path / "file"), "/nowhere")["storage"][0]


def test_blocked_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--model", str(tmp_path)]) == 3
    assert "check: blocked, 1 of 3 points" in capsys.readouterr().out


def test_each_executor_is_looked_at_and_versions_that_differ_are_in_the_way(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "is_local", lambda _: False)
    monkeypatch.setattr(engines, "settled", lambda _: 2)

    def look() -> tuple[bool, str]:
        context = TaskContext.get()
        return False, f"Python 3.{context.partitionId() if context else ''}"

    blocked, told = check.worker(spark, look, alike=True)
    assert blocked
    assert "Python 3.0" in told
    assert "Python 3.1" in told
    assert not check.worker(spark, look)[0]
    assert check.worker(spark, lambda: (False, "the same"), alike=True) == (False, "on 2 executor(s): the same")


def test_weights_that_grow_in_float32_and_the_kv_cache_must_fit_into_a_cpus_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "model.safetensors", "wb") as weights:
        weights.truncate(2 * 2**30)
    (tmp_path / "config.json").write_text('{"dtype": "bfloat16"}')
    monkeypatch.setattr(check, "nvidia_smi", lambda *_: [])
    monkeypatch.setattr(check, "available", lambda: 4 * 2**30)
    half = EngineSettings(model="", dtype="bfloat16", kv_cache_gib=1.0)
    assert check.memory(str(tmp_path), half)[0] is False
    assert check.memory(str(tmp_path), replace(half, kv_cache_gib=2.0))[0]
    blocked, told = check.memory(str(tmp_path), replace(half, dtype="float32"))
    assert blocked
    assert "weights 4.00 GiB in float32, KV cache 1 GiB, 4.0 GiB of memory free here; end what holds it" in told


@pytest.mark.parametrize(
    ("listed", "gpus", "told"),
    [
        (["81559, 81000", "81559, 80000"], 1, None),
        (["81559, 81000", "81559, 20000"], 1, None),
        (["81559, 81000", "81559, 20000"], 2, r"1 of 2 GPU\(s\) with 90% free, which an engine takes; end what is on"),
        (["1024, 1000", "1024, 1000"], 2, r"weights 1\.00 GiB a GPU, .*several: --tensor-parallel 3"),
        ([], 1, None),
    ],
)
def test_weights_that_do_not_fit_on_a_gpu_are_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: list[str], gpus: int, told: str | None
) -> None:
    with open(tmp_path / "model.safetensors", "wb") as weights:
        weights.truncate(2 * 2**30)
    monkeypatch.setattr(check, "nvidia_smi", lambda *_: listed)
    settings = EngineSettings(model="", tensor_parallel=gpus, gpu_memory=0.9, kv_cache_gib=0.5)
    blocked, found = check.memory(str(tmp_path), settings)
    assert blocked == (told is not None)
    assert re.search(told or "weights 2", found)
