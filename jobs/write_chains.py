"""Brings chains of reasoning for judged train pairs: from a file, each kept only if it concludes the human label.

write_chains --tables T --chains FILE

FILE is JSON Lines (or CSV, Parquet, also .gz): query, product_id, locale, label, chain. What is not of the train split
is counted and left out; a row that cannot be read goes to quarantine. The rest goes to the table `chains`, kept or
with the reason why not: train_sft teaches what was kept.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from schemas import delta, files, formats, gold, inputs, runs
from schemas.labels import LABELS, NAMES
from schemas.tables import CHAINS
from udfs.answer import conclusion

JOB = "write_chains"
FILE = "file"  # the teacher's name where chains come from a file


def main(argv: list[str]) -> int:
    """Runs the job; returns 0."""
    parser = argparse.ArgumentParser(prog=JOB, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--tables", required=True, type=delta.root, metavar="T", help="root folder or URI of the tables"
    )
    parser.add_argument("--chains", required=True, metavar="FILE", help="chains written elsewhere")
    parser.add_argument("--source", metavar="NAME", help="take the labels of this source of gold only")
    args = parser.parse_args(argv)
    files.refuse_wrong_path("--chains", args.chains)
    spark = delta.session(JOB)
    delta.prepare(spark, args.tables)
    brought = Chains(spark, args.tables, args.source, runs.start(spark, args.tables, JOB))
    try:
        brought.from_file(args.chains)
    except BaseException as error:
        runs.finish(spark, args.tables, brought.counted(), "failed", (str(error) or repr(error)).splitlines()[0])
        raise
    finally:
        delta.drop_scratch(spark, args.tables, brought.run.run_id)
    runs.finish(spark, args.tables, brought.counted(), "done")
    print(*brought.told, sep="\n", flush=True)
    return 0


class Chains:
    """One run: judges chains against the human labels and writes them, kept or with the reason why not."""

    def __init__(self, spark: SparkSession, root: str, source: str | None, run: runs.Run) -> None:
        self.spark, self.root, self.source, self.run = spark, root, source, run
        self.now = F.lit(datetime.now(UTC))
        self.counts: Counter[str] = Counter()
        self.told: list[str] = []  # what the operator reads at the end

    def from_file(self, where: str) -> None:
        """Chains of a file, those of train pairs; of a pair it may bring one."""
        found = inputs.listed(self.spark, where, "canonical", formats.CHAINS)
        rows = inputs.judged(self.spark, found, self.landing("rows"))
        good, bad = rows.rows.where("reason IS NULL"), rows.rows.where("reason IS NOT NULL")
        said = F.struct("label", "chain")
        torn = inputs.contradictions(good, {"two chains of one pair": ([F.col("pair_id")], said)}, self.land)
        if torn is not None:
            place = ["file", "block", "n"]
            bad = bad.unionByName(good.drop("reason").join(torn, place, how="inner"))
            good = good.join(torn, place, how="left_anti")
        good = good.dropDuplicates(["pair_id"]).select("pair_id", F.col("label").alias("written_for"), "chain")
        pairs = gold.judged(self.spark, self.root, "train", self.source).where("label IS NOT NULL")
        judged = self.judged(good.join(pairs.select("pair_id", "label", "content_hash"), "pair_id", how="inner"))
        self.write(judged, FILE)
        quarantined = rows.refused + rows.refused_files + (torn.count() if torn is not None else 0)
        brought, used = good.count(), judged.count()
        self.counts.update(read=rows.read, quarantined=quarantined, not_train=brought - used)
        self.told.append(
            f"{JOB}: {rows.read:,} rows read · {used:,} of judged train pairs, {brought - used:,} left out (held out, "
            f"or not judged) · quarantined: {quarantined:,}"
        )
        if rows.ignored:
            self.told.append(f"{JOB}: fields that mean nothing here were left out: {', '.join(rows.ignored[:20])}")
        self.tell(judged)
        if quarantined:
            source = where.rstrip("/").rsplit("/", 1)[-1]
            self.told += inputs.quarantine(self.spark, self.root, bad, source, JOB, self.now)

    def judged(self, chains: DataFrame) -> DataFrame:
        """Adds `reason` to pair_id, written_for, chain, label, content_hash, and lands the rows."""
        schema = f"{', '.join(f'{f.name} {f.dataType.simpleString()}' for f in chains.schema.fields)}, concluded INT"
        concluded = chains.mapInArrow(_concluded, schema)
        reason = (
            F.when(F.col("written_for") != F.col("label"), "other_label")
            .when(F.col("concluded").isNull(), "no_conclusion")
            .when(F.col("concluded") != F.col("label"), "other_conclusion")
        )
        return self.land("judged", concluded.withColumn("reason", reason))

    def write(self, judged: DataFrame, teacher: str) -> None:
        """Upserts the judged chains of one teacher; what says the same already is not touched."""
        rows = judged.withColumns(
            {
                "teacher": F.lit(teacher),
                "kept": F.col("reason").isNull(),
                "run_id": F.lit(self.run.run_id),
                "created_at": self.now,
            }
        )
        same = ("label", "chain", "reason", "content_hash")
        changed = " OR ".join(f"NOT old.{name} <=> new.{name}" for name in same)
        delta.upsert(self.spark, self.root, "chains", rows.select(*CHAINS.names), changed)

    def tell(self, judged: DataFrame) -> None:
        """Counts kept and dropped chains by label and reason, for the run's row and for people."""
        found = {
            (row["label"], row["reason"]): row["count"] for row in judged.groupBy("label", "reason").count().collect()
        }
        for (_, reason), count in found.items():
            self.counts[reason or "kept"] += count
        for label in LABELS:
            mine = {reason or "kept": count for (of, reason), count in sorted(found.items(), key=str) if of == label}
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in mine.items() if reason != "kept") or "none"
            self.told.append(f"{JOB}:   {label} {NAMES[label]}: kept {mine.get('kept', 0):,}, dropped {dropped}")

    def landing(self, name: str) -> str:
        """Where a step of this run lands its rows."""
        return delta.scratch(self.root, self.run.run_id, name)

    def land(self, name: str, frame: DataFrame) -> DataFrame:
        """Writes a step's rows once, so that what reads them twice (a MERGE does) reads the same rows."""
        frame.write.mode("overwrite").parquet(self.landing(name))
        return self.spark.read.schema(frame.schema).parquet(files.literal(self.landing(name)))

    def counted(self) -> runs.Run:
        """The run's row with the counts so far."""
        return replace(self.run, counts=dict(self.counts))


def _concluded(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Adds what each chain concludes."""
    for batch in batches:
        chains = batch.column(batch.schema.get_field_index("chain")).to_pylist()
        yield batch.append_column("concluded", pa.array(map(conclusion, chains), pa.int32()))
