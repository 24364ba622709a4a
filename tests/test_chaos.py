"""A short storm of kills over nightly and backfill; bench/chaos.py has the long one, and the one on a cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from pyspark.sql import Column, SparkSession
from pyspark.sql import functions as F

from bench.chaos import model_id, wrong_answers
from jobs.rescore import rescore
from schemas import delta
from schemas.labels import P_COLUMNS
from tests.conftest import REPO
from tests.pairs import PRODUCTS, probs, put, scoring


@pytest.mark.slow
def test_the_storms_audit_sees_two_pairs_that_have_each_others_probabilities(spark: SparkSession, root: str) -> None:
    put(spark, root, PRODUCTS)
    what = scoring()
    what = replace(what, model=replace(what.model, model_id=model_id(1)))
    rescore(spark, root, what)
    assert wrong_answers(root, 1, what, real=False) == []
    one, other, *_ = probs(spark, root).orderBy("pair_id").collect()
    for mine, theirs in ((one, other), (other, one)):
        swapped: dict[str, str | Column] = {p: F.lit(theirs[p]) for p in P_COLUMNS}
        delta.update(spark, root, "label_probs", F.col("pair_id") == mine["pair_id"], swapped)
    told = [f"{row['pair_id']} has another prompt's probabilities" for row in (one, other)]
    assert sorted(wrong_answers(root, 1, what, real=False)) == told


@pytest.mark.slow
def test_nightly_and_backfill_beside_each_other_survive_a_kill_of_each_kind(tmp_path: Path) -> None:
    words = ["--folder", str(tmp_path), "--kills", "0", "--least", "1", "--pairs", "60", "--minutes", "10"]
    ended = subprocess.run(
        [sys.executable, "-m", "bench.chaos", *words], cwd=REPO, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    fired = Counter(json.loads(line)["kind"] for line in (tmp_path / "journal.jsonl").read_text().splitlines())
    assert set(fired) == {"driver", "executor", "worker", "engine"}
    assert "breaches: 0" in ended.stdout
