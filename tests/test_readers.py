"""The tables without this project, Spark or a JVM: delta-rs, DuckDB and Polars read what Spark reads."""

from __future__ import annotations

from typing import Any

import duckdb
import polars
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from jobs.rescore import rescore
from schemas import delta, tables
from tests import judged
from tests.pairs import PRODUCTS, put, scoring


@pytest.fixture(scope="module")
def written(spark: SparkSession, empty_tables: object, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tables with rows in each."""
    import shutil

    root = str(shutil.copytree(str(empty_tables), tmp_path_factory.mktemp("readers") / "tables"))
    put(spark, root, PRODUCTS)
    gold = delta.read(spark, root, "pairs").select(
        "pair_id",
        F.lit("raters").alias("source"),
        F.lit(3).alias("label"),
        F.array(F.lit(3), F.lit(4)).alias("rater_labels"),
        F.lit(1.0).alias("weight"),
        F.lit("dev").alias("split"),
        F.current_timestamp().alias("judged_at"),
    )
    delta.upsert(spark, root, "gold", gold)
    bad = spark.range(1).select(
        *[F.lit(x).alias(n) for n, x in {"source": "s", "row_hash": "h", "row": '{"', "reason": "broken"}.items()],
        F.lit("f.jsonl").alias("file"),
        F.lit(1).cast("bigint").alias("line"),
        F.lit("ingest").alias("stage"),
        F.current_timestamp().alias("seen_at"),
    )
    delta.upsert(spark, root, "quarantine", bad)
    rescore(spark, root, scoring())
    pair, run = judged.pair_key(0), "20260102T000000-0"
    chain = "Missed: colour. So Related."
    told = {"pair_id": pair, "label": 3, "chain": chain, "content_hash": "h", "run_id": run, "created_at": judged.NOW}
    judged.fill(spark, root, "chains", [{**told, "teacher": "file", "kept": True}])
    judged.fill(spark, root, "samples", [judged.sample(pair, 3, 3, chain)])
    why = {"model_id": "m", "prompt_id": "p", "label_source": "argmax", "conclusion": 3, "contradicts": False}
    judged.fill(spark, root, "explanations", [{**told, **why, "tokens": 9, "finished": True}])
    preferred = {"model_id": "m", "prompt_id": "p", "chosen_sample": 0, "rejected_sample": 1, "chosen_chain": chain}
    judged.fill(spark, root, "preferences", [{**told, **preferred, "rejected_label": 1, "rejected_chain": "So."}])
    judged.fill(spark, root, "thresholds", judged.cuts(1, {"": (0.7, 0.5, 0.3)}, "active", reason="a test"))
    tier = {"product_id": "k1", "locale": "en", "tier": 3, "tier_since_version": 1, "tier_since_model_id": "m"}
    published = {"pair_id": judged.pair_key(1), "query": "kettle", **tier, "published_at": judged.NOW}
    judged.fill(spark, root, "published_labels", [published])
    figure = {"run_id": "r", "cuts": "one", "split": "test", "segment": "", "measure": "macro_f1", "value": 0.5, "n": 9}
    judged.fill(spark, root, "measures", [figure])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(tables.TABLES))
def test_every_column_of_every_table_reads_the_same_in_delta_rs_duckdb_and_polars(
    spark: SparkSession, written: str, name: str
) -> None:
    key = list(tables.TABLES[name].key)
    expected = delta.read(spark, written, name).toArrow().sort_by([(k, "ascending") for k in key])
    table = DeltaTable(f"{written}/{name}")
    assert table.protocol().min_reader_version == 1
    by_delta_rs = pa.table(table.to_pyarrow_table()).sort_by([(k, "ascending") for k in key])
    assert by_delta_rs.column_names == expected.column_names
    for column in expected.column_names:
        assert plain(by_delta_rs[column]) == plain(expected[column])
    lake = by_delta_rs  # noqa: F841 (DuckDB finds it by its name)
    by_duckdb: Any = duckdb.sql(f"SELECT * FROM lake ORDER BY {', '.join(key)}")
    by_duckdb = by_duckdb.arrow()
    by_duckdb = by_duckdb.read_all() if hasattr(by_duckdb, "read_all") else by_duckdb
    by_polars = polars.read_delta(f"{written}/{name}").sort(key)
    assert by_polars.height == by_duckdb.num_rows == expected.num_rows > 0
    for column in tables.TABLES[name].names:
        assert plain(by_duckdb[column]) == plain(expected[column])
        assert plain(by_polars[column].to_arrow()) == plain(expected[column])


@pytest.mark.slow
def test_an_analyst_without_spark_finds_the_least_relevant_pairs_in_sql(written: str) -> None:
    pairs = DeltaTable(f"{written}/pairs").to_pyarrow_table()  # noqa: F841
    label_probs = DeltaTable(f"{written}/label_probs").to_pyarrow_table()  # noqa: F841
    relation: Any = duckdb.sql(
        "SELECT title, round(p_irrelevant, 3) AS p FROM pairs JOIN label_probs USING (pair_id) ORDER BY p DESC LIMIT 3"
    )
    found = relation.fetchall()
    assert len(found) == 3
    assert found[0][1] >= found[2][1] > 0


def plain(column: pa.ChunkedArray | pa.Array) -> list[object]:
    """Values without the type's dress: times in UTC, maps as sorted pairs (Polars has them as lists of structs)."""

    def bare(v: Any) -> object:
        if isinstance(v, list) and v and isinstance(v[0], dict):
            v = [tuple(pair.values()) for pair in v]
        if isinstance(v, list) and v and isinstance(v[0], tuple):
            return sorted(v)
        return v.replace(tzinfo=None) if hasattr(v, "tzinfo") else v

    return [bare(v) for v in column.to_pylist()]
