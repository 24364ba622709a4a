"""Brings pairs and human judgements into the tables; what is unchanged is not rewritten, bad rows go to quarantine.

    ingest --tables T --pairs FILE [--format canonical|esci|wands] [--source NAME] [--snapshot] [--strict]
    ingest --tables T --products FILE      updates a product in all its pairs
    ingest --tables T --delete FILE        removes pairs, or all pairs of a product

FILE is a .jsonl, .ndjson, .json or .csv file (each also .gz), a .parquet file, a folder of these, or a URI that Spark
can read. For esci and wands it is the folder with the published files. One JSON object a line: query, product_id, title
(required), brand, description, attributes (an object), category, locale, label (4..1 or null), rater_labels, weight,
gold_weight, split. The writes (quarantine, pairs, gold, and what a snapshot deletes) are one commit each; after a kill
between two of them the same command completes the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import reduce

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

import jobs
from schemas import canonical, delta, files, formats, inputs, published, runs, tables
from schemas.inputs import Input

JOB = "ingest"
WANTED = {"--pairs": formats.PAIRS, "--products": formats.PRODUCTS, "--delete": formats.DELETIONS}
_NAMES_TOLD = 20


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pairs", metavar="FILE", help="pairs to insert or update; their labels go to gold")
    what.add_argument(
        "--products",
        metavar="FILE",
        help="product_id, locale and new texts; a field that is absent stays, null (or an empty CSV cell) clears it",
    )
    what.add_argument(
        "--delete",
        metavar="FILE",
        help="product_id, locale and query; without a field query, all pairs of the product. Judgements stay in gold",
    )
    parser.add_argument("--format", default="canonical", choices=("canonical", *published.FILES), help="of --pairs")
    parser.add_argument(
        "--source", metavar="NAME", help="names where gold and bad rows come from (default: FILE's name)"
    )
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="FILE is all there is: every pair of the whole table that is not in it is deleted",
    )
    parser.add_argument("--strict", action="store_true", help="exit 3 where a row was bad; good rows go in")
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0, or 3 where `--strict` met bad rows or `--snapshot` could not delete."""
    args = flags().parse_args(argv)
    flag, where = next((f, given) for f in WANTED if (given := getattr(args, f[2:])) is not None)
    if flag != "--pairs" and (args.snapshot or args.format != "canonical"):
        raise ValueError(f"--snapshot and --format belong to --pairs, not to {flag}")
    files.refuse_wrong_path(flag, where, tuple(published.FILES.get(args.format, ())))
    source = named_source(args.source, args.format, where)

    spark = delta.session(JOB)
    found = inputs.listed(spark, where, args.format, WANTED[flag])  # before a table is made
    delta.prepare(spark, args.tables, new=True)
    intake = Intake(spark, args.tables, source, runs.start(spark, args.tables, JOB, alone=True))
    with runs.recorded(spark, args.tables, intake.counted):
        refusal = None
        if flag == "--pairs":
            refusal = intake.pairs(found, args.snapshot)
        elif flag == "--products":
            intake.products(found)
        else:
            refusal = intake.deletions(found)
    if intake.counts["refused_files"] and not intake.counts["read"]:
        refusal = refusal or "nothing was read: every file was refused, see quarantine"
    runs.finish(spark, args.tables, intake.counted(), "done", refusal)
    print(*map(jobs.printable, [*intake.told, *([f"{JOB}: {refusal}"] if refusal else [])]), sep="\n", flush=True)
    return jobs.GATE_FAILED if refusal or (args.strict and intake.counts["quarantined"]) else jobs.DONE


def named_source(given: str | None, format: str, where: str) -> str:
    """The name under which judgements and refused rows are kept. Raises ValueError for a name of other characters."""
    name = given
    if name is None:
        name = where.rstrip("/").rsplit("/", 1)[-1] if format == "canonical" else format
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        default = "" if given is not None else " (the file's name, since --source was not given)"
        raise ValueError(f"--source {name!r}{default} may only hold A-Z, a-z, 0-9, '.', '_' and '-', 64 at most")
    return name


class Intake:
    """One run: reads and judges the rows once, sets the bad ones aside, and writes what is new or changed."""

    def __init__(self, spark: SparkSession, root: str, source: str, run: runs.Run) -> None:
        self.spark, self.root, self.source, self.run = spark, root, source, run
        self.now = F.lit(datetime.now(UTC))
        self.counts: Counter[str] = Counter()
        self.told: list[str] = []  # what the operator reads at the end
        self.ignored: list[str] = []  # names of fields that mean nothing here

    # The three commands

    def pairs(self, found: Input, snapshot: bool = False) -> str | None:
        """Upserts pairs and gold; returns why `snapshot` deleted nothing, where it did not."""
        said = {name: F.col(name).cast("string") for name in ("label", "gold_weight")}
        said["rater_labels"] = F.to_json("rater_labels")
        claims: list[inputs.Claim] = [
            ("two texts of one product", [F.col("locale"), F.col("product_id")], _product_hash()),
            *(("two judgements of one pair", [F.col("pair_id"), F.lit(name)], value) for name, value in said.items()),
        ]
        if found.format == "canonical":
            claims.append(("two splits of one query", [F.col("locale"), F.col("normalised")], F.col("split")))
        good, bad = self.read(found, claims)
        stored = delta.read(self.spark, self.root, "pairs")
        old = stored.select("pair_id", F.col("content_hash").alias("old_hash"), F.col("weight").alias("old_weight"))
        unique = together(good).join(old, "pair_id", how="left")
        unique = unique.withColumn("weight", F.coalesce("weight", "old_weight"))
        unique = unique.withColumn("product_hash", _product_hash()).withColumn("content_hash", _content_hash())
        same = F.col("old_hash").eqNullSafe(F.col("content_hash")) & F.col("weight").eqNullSafe(F.col("old_weight"))
        change = F.when(F.col("old_hash").isNull(), "inserted").when(same, "unchanged").otherwise("updated")
        unique = self.land("unique", unique.withColumn("change", change))
        self.tally(unique, "change")
        total = sum(self.counts[c] for c in ("inserted", "updated", "unchanged"))
        self.counts["duplicates"] = self.counts["accepted"] - total

        refusal, gone = self.absent(unique, bad, stored, found.skipped) if snapshot else (None, None)
        if total > self.counts["unchanged"]:
            kept_away = unique.select("pair_id") if gone is None else unique.select("pair_id").union(gone)
            others = self.land("others", self.followers(unique, stored.join(kept_away, "pair_id", how="left_anti")))
            self.counts["updated_with_product"] = others.count()
            self.write_pairs(unique.where("change <> 'unchanged'"), others)
        self.gold(unique)
        if gone is not None:
            self.delete(gone)
        c = self.counts
        self.say(
            f"pairs: {c['inserted']:,} new, {c['updated'] + c['updated_with_product']:,} changed"
            + (f" ({c['updated_with_product']:,} by their product's new text)" if c["updated_with_product"] else "")
            + f", {c['unchanged']:,} unchanged"
            + (f", {c['deleted']:,} deleted" if snapshot else ""),
            f"gold: {c['gold_inserted']:,} new, {c['gold_updated']:,} changed, {c['gold_unchanged']:,} unchanged",
        )
        if c["split_kept"]:
            self.told.append(f"{JOB}: {c['split_kept']:,} judged rows keep the split that gold has for their query")
        return refusal

    def products(self, found: Input) -> None:
        """Updates the texts of products in all their pairs."""
        key = [F.col("locale"), F.col("product_id")]
        told = tables.hash_fields([_product_hash(), F.to_json("given")])
        good, _ = self.read(found, [("two texts of one product", key, told)])
        unique = good.dropDuplicates(["locale", "product_id"])
        unique = unique.select("locale", "product_id", "given", F.struct(*canonical.TEXTS).alias("new"))
        unique = self.land("unique", unique)
        stored = delta.read(self.spark, self.root, "pairs").withColumnRenamed("content_hash", "old_hash")
        matched = stored.join(unique, ["locale", "product_id"], how="inner")
        for text in canonical.TEXTS:
            new = F.when(F.array_contains("given", text), F.col(f"new.{text}")).otherwise(F.col(text))
            matched = matched.withColumn(text, new)
        matched = matched.withColumn("product_hash", _product_hash()).withColumn("content_hash", _content_hash())
        change = F.when(F.col("old_hash") == F.col("content_hash"), "unchanged").otherwise("updated")
        matched = self.land("pairs", matched.withColumn("change", change))
        self.tally(matched, "change")
        if self.counts["updated"]:
            self.write_pairs(matched.where("change = 'updated'"))
        total = unique.count()
        idle = unique.join(matched, ["locale", "product_id"], how="left_anti").count()
        self.counts.update(duplicates=self.counts["accepted"] - total, products_without_pairs=idle)
        self.say(
            f"products: {total:,}, {idle:,} of them in no pair",
            f"pairs: {self.counts['updated']:,} changed, {self.counts['unchanged']:,} unchanged",
        )

    def deletions(self, found: Input) -> str | None:
        """Removes pairs, or all pairs of a product; gold keeps its judgements. Returns why nothing was deleted."""
        good, _ = self.read(found, [])
        unique = self.land("unique", good.select("pair_id", "locale", "product_id", "query").distinct())
        stored = delta.read(self.spark, self.root, "pairs").select("pair_id", "locale", "product_id")
        one, all_of = unique.where("query IS NOT NULL"), unique.where("query IS NULL")
        if self.ignored and not all_of.isEmpty():
            return (
                f"--delete deleted nothing: there are rows without a query, which delete all pairs of a product, and "
                f"fields that mean nothing here ({', '.join(self.ignored[:_NAMES_TOLD])}); was one of them the query? "
                f"The fields are {', '.join(canonical.DELETE_FIELDS)}"
            )
        gone = stored.join(one, "pair_id", how="left_semi")
        gone = gone.unionByName(stored.join(all_of, ["locale", "product_id"], how="left_semi"))
        gone = self.land("gone", gone.distinct())
        idle = one.join(gone, "pair_id", how="left_anti").count()
        idle += all_of.join(gone, ["locale", "product_id"], how="left_anti").count()
        self.counts.update(duplicates=self.counts["accepted"] - unique.count(), rows_without_pairs=idle)
        self.delete(gone)
        self.say(f"pairs: {self.counts['deleted']:,} deleted", f"{idle:,} rows named no pair that is there")
        return None

    # Their steps

    def read(self, found: Input, claims: Sequence[inputs.Claim]) -> tuple[DataFrame, DataFrame]:
        """All good rows, and all bad ones with their reason, which are put into quarantine."""
        judged = inputs.judged(self.spark, found, delta.scratch(self.root, self.run.run_id, "rows"))
        self.counts.update(read=judged.read, refused_files=judged.refused_files)
        self.counts.update(accepted=judged.read - judged.refused, quarantined=judged.refused + judged.refused_files)
        good, bad, torn = inputs.parted(judged.rows, claims, self.land)
        self.counts.update(accepted=-torn, quarantined=torn)
        self.ignored = judged.ignored
        if judged.ignored:
            some = ", ".join(judged.ignored[:_NAMES_TOLD])
            self.told.append(f"{JOB}: fields that mean nothing here were left out: {some}")
        if found.skipped:
            some = ", ".join(sorted(found.skipped)[:_NAMES_TOLD])
            self.told.append(f"{JOB}: {len(found.skipped):,} files of another kind were passed over: {some}")
        if self.counts["quarantined"]:
            self.told += inputs.quarantine(self.spark, self.root, bad, self.source, JOB, self.now)
        return good, bad

    def followers(self, unique: DataFrame, others: DataFrame) -> DataFrame:
        """Stored pairs that the input does not name, with the new text of their product: one product has one text."""
        texts = unique.select("locale", "product_id", *canonical.TEXTS, "product_hash")
        texts = texts.dropDuplicates(["locale", "product_id"])
        others = others.withColumnRenamed("content_hash", "old_hash").drop(*canonical.TEXTS)
        others = others.join(texts, ["locale", "product_id"], how="inner")
        return others.withColumn("content_hash", _content_hash()).where("old_hash <> content_hash")

    def write_pairs(self, *parts: DataFrame) -> None:
        """Upserts rows that are new or changed, in one commit."""
        names = [name for name in tables.PAIRS.names if name != "updated_at"]
        rows = reduce(DataFrame.unionByName, [part.select(*names) for part in parts])
        changed = "old.content_hash <> new.content_hash OR NOT old.weight <=> new.weight"
        delta.upsert(self.spark, self.root, "pairs", rows.withColumn("updated_at", self.now), changed)

    def gold(self, unique: DataFrame) -> None:
        """Upserts the judgements of this source; a query that gold knows already keeps its split."""
        stored = delta.read(self.spark, self.root, "gold")
        asked = delta.read(self.spark, self.root, "pairs").select("pair_id", "query")
        names = ("pair_id", "normalised", "label", "rater_labels", "gold_weight", "split", "drawn_split")
        labelled = unique.where("label IS NOT NULL").select(*names)
        # ESCI splits by query as typed, in each locale apart; where one normalised query is in both of its parts, all
        # of it is test: what a training has seen in one market cannot be held out in another.
        test = F.when(F.max(F.col("split") == "test"), "test")
        given = labelled.groupBy("normalised").agg(test.otherwise(F.min("split")).alias("given_split"))
        kept = stored.join(asked, "pair_id", how="inner").select("query", "split").distinct()
        kept = kept.mapInArrow(_normalise, "normalised STRING, split STRING")
        kept = kept.groupBy("normalised").agg(F.min("split").alias("kept_split"))
        compared = ("label", "rater_labels", "weight", "split")
        mine = F.when(F.col("source") == self.source, F.struct(*compared))
        own = stored.groupBy("pair_id").agg(F.min("split").alias("own_split"), F.max(mine).alias("old"))
        rows = (
            labelled.join(given, "normalised", how="left")
            .join(kept, "normalised", how="left")
            .join(own, "pair_id", how="left")
        )
        rows = rows.withColumn("wanted_split", F.coalesce("given_split", "drawn_split"))
        rows = rows.withColumn("split", F.coalesce("own_split", "kept_split", "wanted_split"))
        rows = rows.withColumn("weight", F.coalesce("gold_weight", "old.weight", F.lit(1.0)))
        same = F.lit(True)
        for name in compared:
            same &= F.col(name).eqNullSafe(F.col(f"old.{name}"))
        change = F.when(F.col("old").isNull(), "gold_inserted").when(same, "gold_unchanged")
        rows = self.land("gold", rows.withColumn("change", change.otherwise("gold_updated")))
        self.tally(rows, "change")
        self.counts["split_kept"] = rows.where("split <> wanted_split").count()
        if self.counts["gold_inserted"] + self.counts["gold_updated"]:
            rows = rows.where("change <> 'gold_unchanged'")
            rows = rows.withColumns({"source": F.lit(self.source), "judged_at": self.now})
            delta.upsert(self.spark, self.root, "gold", rows)

    def absent(
        self, unique: DataFrame, bad: DataFrame, stored: DataFrame, skipped: Sequence[str]
    ) -> tuple[str, None] | tuple[None, DataFrame]:
        """The pairs (pair_id) that a snapshot does not name; or, with a sentence, why none may be deleted."""
        if not self.counts["accepted"]:
            return "--snapshot deleted nothing, because no row of the input was accepted", None
        if skipped:
            why = f"{len(skipped):,} files of another kind lie there, such as {sorted(skipped)[0]}; take them away"
            return f"--snapshot deleted nothing, because {why}", None
        if nameless := bad.where("pair_id IS NULL").count():
            why = f"{nameless:,} refused rows or files do not tell which pairs they are; mend them and run it again"
            return f"--snapshot deleted nothing, because {why}", None
        gone = stored.select("pair_id").join(unique, "pair_id", how="left_anti")
        return None, self.land("gone", gone.join(bad, "pair_id", how="left_anti"))

    def delete(self, gone: DataFrame) -> None:
        """Removes these pairs (pair_id); no commit where there are none."""
        if not gone.isEmpty():
            self.counts["deleted"] = delta.delete(self.spark, self.root, "pairs", gone, ("pair_id",))

    def land(self, name: str, frame: DataFrame) -> DataFrame:
        """Writes a step's rows once."""
        return delta.land(self.spark, self.root, self.run.run_id, name, frame)

    def tally(self, rows: DataFrame, column: str) -> None:
        """Adds the rows to the counts that `column` names."""
        self.counts.update({row[column]: row["count"] for row in rows.groupBy(column).count().collect()})

    def counted(self) -> runs.Run:
        """The run's row with the counts so far."""
        return replace(self.run, counts=dict(self.counts))

    def say(self, *parts: str) -> None:
        """Puts the line with all counts before what was noted on the way."""
        c = self.counts
        head = f"{c['read']:,} rows read · {c['accepted']:,} accepted ({c['duplicates']:,} duplicates)"
        self.told.insert(0, f"{JOB}: " + " · ".join((head, *parts, f"quarantined: {c['quarantined']:,}")))


def together(rows: DataFrame) -> DataFrame:
    """The rows of each pair as one: they say the same, or nothing, of all but `weight`, of which the highest counts."""
    some = {"label", "rater_labels", "gold_weight", "split", "weight"}
    said = [F.max(c).alias(c) if c in some else F.first(c).alias(c) for c in rows.columns if c != "pair_id"]
    return rows.groupBy("pair_id").agg(*said)


def _product_hash() -> Column:
    return tables.product_hash(*map(F.col, canonical.TEXTS))


def _content_hash() -> Column:
    return tables.content_hash(F.col("product_hash"), F.col("locale"), F.col("query"))


def _normalise(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """query, split with the query normalised.

    Not a plain Python UDF: Spark repeats one in the filter that it infers for a join, and two of them in one stage were
    seen to wait for each other for ever in Spark 4.2.0.
    """
    for batch in batches:
        query, split = batch.columns
        normalised = pa.array(map(canonical.normalised, query.to_pylist()), pa.string())
        yield pa.RecordBatch.from_arrays([normalised, split], ["normalised", "split"])
