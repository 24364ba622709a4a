"""One Spark with Delta for all tests, and a fresh folder of empty tables for each."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"

# Workers import the project's packages and the tests' own engines from the repository.
sys.path.insert(0, str(REPO))
os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ["PYSPARK_PYTHON"] = sys.executable
# Two test processes on two cores: threads of torch that spin while they wait for each other cost ten times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a large table wants only costs on a few rows: compiling queries and projections to Java took half of the suite's
# time, and the JVM's own second compiler and concurrent collector a third of what was left.
QUICK = {
    "spark.driver.memory": "2g",
    # With one compiler alone the JVM keeps 48 MB for compiled code, which Spark fills: it then compiles over and over.
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:ReservedCodeCacheSize=400m",
    "spark.sql.adaptive.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
}


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    from schemas import delta

    session = delta.session("tests", QUICK)
    yield session
    session.stop()


@pytest.fixture(scope="session")
def empty_tables(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from schemas import delta

    folder = tmp_path_factory.mktemp("empty") / "tables"
    delta.prepare(spark, str(folder), new=True)
    return folder


@pytest.fixture
def root(empty_tables: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(empty_tables, tmp_path / "tables"))
