"""One Spark with Delta for all tests, and a fresh tables folder for each."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    from schemas import delta

    session = delta.session("tests", {"spark.driver.memory": "2g", "spark.ui.showConsoleProgress": "false"})
    yield session
    session.stop()


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "tables")
