"""Which pairs of a split have a human label, and which label: one judgement a pair, whatever the number of sources."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from schemas import delta
from schemas.canonical import normalised
from schemas.runs import Unmet


def judged(spark: SparkSession, root: str, split: str, source: str | None = None) -> DataFrame:
    """Rows of `pairs` that were judged and belong to `split`, with `label` and `gold_weight`, the mean of how much its
    judgements count.

    `label` is null where sources disagree: which of them is right is not for a job to guess. A pair that any source
    puts into another split is left out, so nothing held out slips in by a second source. `source` keeps one source's.
    """
    gold = delta.read(spark, root, "gold")
    splits = gold.groupBy("pair_id").agg(F.min("split").alias("low"), F.max("split").alias("high"))
    mine = splits.where((F.col("low") == split) & (F.col("high") == split)).select("pair_id")
    chosen = gold if source is None else gold.where(F.col("source") == source)
    one = F.when(F.min("label") == F.max("label"), F.min("label"))
    counts = F.avg("weight").alias("gold_weight")
    labels = chosen.groupBy("pair_id").agg(one.alias("label"), counts).join(mine, "pair_id", how="left_semi")
    return delta.read(spark, root, "pairs").join(labels, "pair_id", how="inner")


def votes(spark: SparkSession, root: str, source: str | None = None) -> DataFrame:
    """For each judged pair the labels that its raters gave, or its label where they are not known: (pair_id, label,
    share), where share is that of the raters, so that a pair's sum to 1. Of several sources each counts by its weight.
    """
    gold = delta.read(spark, root, "gold")
    chosen = gold if source is None else gold.where(F.col("source") == source)
    each = F.when(F.size("rater_labels") > 0, F.col("rater_labels")).otherwise(F.array("label"))
    given = chosen.select("pair_id", F.explode(each).alias("label"), (F.col("weight") / F.size(each)).alias("share"))
    summed = given.groupBy("pair_id", "label").agg(F.sum("share").alias("share"))
    all_of_pair = F.sum("share").over(Window.partitionBy("pair_id"))
    return summed.withColumn("share", F.col("share") / all_of_pair)


def learnt_from(spark: SparkSession, root: str, source: str | None = None) -> DataFrame:
    """Judged pairs of the train split, those without a label left out.

    Raises Unmet where a query of theirs is held out (dev or test) under another locale, source or spelling: what a
    stage of training has seen, were it only as a neighbour, cannot be reported on.
    """
    pairs = judged(spark, root, "train", source).where("label IS NOT NULL")
    if leaks := leaked(spark, root, pairs):
        raise Unmet(
            f"queries of the train split are also in dev or test, such as {leaks[0]!r}; all pairs of a query want one "
            f"split. Ingest keeps the one that is stored in {root}/gold; there it is changed by an UPDATE (sql --help)"
        )
    return pairs


def leaked(spark: SparkSession, root: str, pairs: DataFrame) -> list[str]:
    """Queries of `pairs` (normalised, up to five) that any source holds out, under whatever product or locale."""
    held_out = delta.read(spark, root, "gold").where("split <> 'train'").select("pair_id")
    queries = delta.read(spark, root, "pairs").join(held_out, "pair_id", how="left_semi")
    both = _spelt(pairs).join(_spelt(queries), "spelt", how="left_semi")
    return [row["spelt"] for row in both.limit(5).collect()]


def _spelt(rows: DataFrame) -> DataFrame:
    def spell(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            spelt = pa.array([normalised(query) for query in batch.column(0).to_pylist()], pa.string())
            yield pa.RecordBatch.from_arrays([spelt], names=["spelt"])

    return rows.select("query").distinct().mapInArrow(spell, "spelt STRING").distinct()
