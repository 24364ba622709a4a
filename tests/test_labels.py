"""One rule, five readers: the view in Spark, the SQL in DuckDB and in Polars, docs/labels.py, and numpy in the fit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import numpy as np
import polars
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs.promote_thresholds import swap
from partitioner import tiers
from schemas import delta
from tests import judged
from tests.judged import MODEL, PROMPT, cuts, fill, pair, scored

DOCS = Path(__file__).resolve().parent.parent / "docs"
VECTORS = json.loads((DOCS / "tiers.json").read_text())


def reader() -> ModuleType:
    """docs/labels.py, as a stranger runs it."""
    spec = importlib.util.spec_from_file_location("labels", DOCS / "labels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_by_all(spark: SparkSession, root: str) -> dict[str, dict[str, int | None]]:
    """pair_id -> tier, by each reader."""
    assert "labels" in tiers.register(spark, root)
    found = {"spark": {r[0]: r[1] for r in spark.sql("SELECT pair_id, tier FROM labels").collect()}}
    sql = (DOCS / "labels.sql").read_text()
    lake = duckdb.connect()
    for name in ("thresholds", "pairs", "label_probs"):
        lake.register(name, DeltaTable(f"{root}/{name}").to_pyarrow_table())
    relation: Any = lake.sql(f"SELECT pair_id, tier FROM ({sql})")
    found["duckdb"] = dict(relation.fetchall())
    frames = {name: polars.scan_delta(f"{root}/{name}") for name in ("thresholds", "pairs", "label_probs")}
    table: Any = polars.SQLContext(frames).execute(sql).select("pair_id", "tier").collect()
    found["polars"] = dict(table.iter_rows())
    found["labels.py"] = dict(reader().tiers(root))
    return found


def test_the_sql_for_readers_is_the_rule_of_this_version() -> None:
    assert (DOCS / "labels.sql").read_text().endswith(tiers.LABELS_SQL)


@pytest.mark.slow
def test_all_readers_find_the_tiers_of_the_shared_vectors(spark: SparkSession, root: str) -> None:
    rows = VECTORS["rows"]
    pairs, probs, stored = [], [], []
    for i, row in enumerate(rows):
        by = VECTORS["versions"][row["version"]]["segment_by"] or "category"
        pairs.append(pair(i, "q", **{by: row["segment"]}))
        probs.append(scored(i, "q", row["p"], model_id=f"model {row['version']}"))
    for v, of in enumerate(VECTORS["versions"]):
        made_by = {"model_id": f"model {v}"}
        stored += cuts(v, of["taus"], "candidate", of["segment_by"], of["temperature"], **made_by)
    fill(spark, root, "pairs", pairs)
    fill(spark, root, "label_probs", probs)
    fill(spark, root, "thresholds", stored)
    for v, of in enumerate(VECTORS["versions"]):
        swap(spark, root, v - 1 if v else None, v, "a test", None)
        mine = {judged.pair_key(i): row for i, row in enumerate(rows) if row["version"] == v}
        expected = {key: row["tier"] for key, row in mine.items()}
        for name, found in read_by_all(spark, root).items():
            assert found == expected, (name, v)
        for row in mine.values():
            if row["p"]:
                taus = of["taus"].get(row["segment"], of["taus"][""])
                c = tiers.cumulative(np.array([row["p"]], dtype=float), of["temperature"])
                assert tiers.cut(c, taus).tolist() == [row["tier"]]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 1.37])
def test_all_readers_agree_on_100_000_random_rows_and_on_exact_ties(
    spark: SparkSession, root: str, temperature: float
) -> None:
    import pyarrow as pa

    n, random = 100_000, np.random.default_rng(11)
    parts = np.where(np.arange(n)[:, None] % 2, random.dirichlet([0.5] * 4, n), random.integers(1, 6, (n, 4)) / 8.0)
    p = parts / parts.sum(1, keepdims=True)
    keys = [judged.pair_key(i) for i in range(n)]
    category = np.array(["Kettles", "Towels", "Lamps", ""], dtype=object)[random.integers(0, 4, n)]
    c = tiers.cumulative(p, temperature)
    # Cuts that many rows meet exactly.
    taus = {"": sorted(c[0], reverse=True), "Kettles": sorted(c[2], reverse=True), "Towels": sorted(c[4], reverse=True)}
    same = {"query": ["q"] * n, "product_id": keys, "locale": ["en"] * n}
    now = pa.array([judged.NOW] * n, pa.timestamp("us", "UTC"))
    of_pairs = {"title": ["t"] * n, "category": category.tolist(), "content_hash": ["c1"] * n, "updated_at": now}
    pairs = pa.table({"pair_id": keys, **same, **of_pairs})
    ones = pa.array([1] * n, pa.int32())
    probs = pa.table({
        "pair_id": keys, "model_id": [MODEL] * n, "prompt_id": [PROMPT] * n, **same,
        **{name: p[:, k] for k, name in enumerate(("p_excellent", "p_related", "p_mismatch", "p_irrelevant"))},
        "p_outside": [0.0] * n, "outcome": ["scored"] * n, "content_hash": ["c1"] * n, "pairs_version": [0] * n,
        "wave_id": ["w"] * n, "prompt_tokens": ones, "tokens_cut": ones, "run_id": ["r0"] * n, "scored_at": now,
    })  # fmt: skip
    delta.append(spark, root, "pairs", spark.createDataFrame(pairs))
    delta.append(spark, root, "label_probs", spark.createDataFrame(probs))
    fill(spark, root, "thresholds", cuts(1, taus, "active", "category", temperature))
    each = np.array([taus.get(s, taus[""]) for s in category])
    expected = tiers.cut(c, each)
    near = (np.abs(c - each) <= 1e-12).any(1)
    assert near.sum() > 1000
    for name, found in read_by_all(spark, root).items():
        given = np.array([found[key] for key in keys])
        apart = given != expected
        assert not (apart if temperature == 1 else apart & ~near).any(), name
