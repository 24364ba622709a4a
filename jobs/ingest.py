"""Brings pairs and human judgements into the tables; what is unchanged is not rewritten, bad rows go to quarantine.

    ingest --tables T --pairs FILE [--format canonical|esci|wands] [--source NAME] [--snapshot] [--strict]
    ingest --tables T --products FILE      updates a product in all its pairs
    ingest --tables T --delete FILE        removes pairs, or all pairs of a product

FILE is a .jsonl, .ndjson, .json or .csv file (each also .gz), a .parquet file, a folder of these, or a URI that Spark
can read. For esci and wands it is the folder with the published files. One JSON object a line: query, product_id, title
(required), brand, description, attributes (an object), category, locale, label (4..1 or null), rater_labels, weight,
gold_weight, split. The three writes (quarantine, pairs, gold) are one commit each; after a kill between two of them the
same command completes the rest.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from urllib.parse import unquote

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from schemas import canonical, delta, files, formats, published, runs, tables
from schemas.files import File
from schemas.formats import Wanted

JOB = "ingest"
GATE_FAILED = 3
_LINES_TOLD = 20  # of a conflict, in its reason
_FILES_TOLD = 5

WANTED = {"--pairs": formats.PAIRS, "--products": formats.PRODUCTS, "--delete": formats.DELETIONS}


@dataclass(frozen=True)
class Input:
    """The files of one call: those to read by their published name ('' for canonical), those refused with a reason."""

    files: Mapping[str, Sequence[File]]
    refused: Mapping[str, str]
    skipped: Sequence[str] = ()

    @property
    def complete(self) -> bool:
        """Whether there is something to read; a published data set needs each of its files."""
        return all(self.files.values())

    @property
    def each(self) -> list[File]:
        """All files to read."""
        return [file for group in self.files.values() for file in group]

    def without(self, refused: Mapping[str, str]) -> Input:
        """The same, with some more files refused, by path."""
        left = {name: [f for f in group if f.path not in refused] for name, group in self.files.items()}
        return replace(self, files=left, refused={**self.refused, **refused})


def main(argv: list[str]) -> int:
    """Runs the job; returns 0, or 3 where `--strict` met bad rows or `--snapshot` could not delete."""
    parser = argparse.ArgumentParser(
        prog=JOB, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", required=True, metavar="T", help="root folder or URI of the tables")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pairs", metavar="FILE", help="pairs to insert or update, with labels into gold")
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
        "--source", metavar="NAME", help="names the judgements in gold (default: name of the file, esci or wands)"
    )
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="FILE is all there is: every pair of the whole table that is not in it is deleted",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit 3 where a row was bad; the good rows go in all the same"
    )
    args = parser.parse_args(argv)
    flag, where = next((f, w) for f in WANTED if (w := getattr(args, f[2:])) is not None)
    if flag != "--pairs" and (args.snapshot or args.format != "canonical"):
        raise ValueError(f"--snapshot and --format belong to --pairs, not to {flag}")
    refuse_hostile("--tables", args.tables)
    files.refuse_wrong_path(flag, where, tuple(published.FILES.get(args.format, ())))
    source = named_source(args.source, args.format, where)

    spark = delta.session(JOB)
    delta.prepare(spark, args.tables)
    found = listed(spark, flag, where, args.format)
    intake = Intake(spark, args.tables, source, args.format, WANTED[flag], runs.start(spark, args.tables, JOB))
    try:
        refusal = None
        if flag == "--pairs":
            refusal = intake.pairs(found, args.snapshot)
        elif flag == "--products":
            intake.products(found)
        else:
            intake.deletions(found)
    except BaseException as error:
        message = (str(error) or repr(error)).splitlines()[0]
        runs.finish(spark, args.tables, replace(intake.run, counts=dict(intake.counts)), "failed", message)
        raise
    finally:
        delta.drop_scratch(spark, args.tables, intake.run.run_id)
    runs.finish(spark, args.tables, replace(intake.run, counts=dict(intake.counts)), "done", refusal)
    for line in intake.told:
        print(line, flush=True)
    if refusal:
        print(f"{JOB}: {refusal}", flush=True)
    return GATE_FAILED if refusal or (args.strict and intake.counts["quarantined"]) else 0


def refuse_hostile(flag: str, text: str) -> None:
    """Raises ValueError for an empty path or one with control characters (a newline would break messages and logs)."""
    if not text.strip() or re.search(r"[\x00-\x1f\x7f-\x9f]", text):
        raise ValueError(f"{flag} {text!r}: a path may not be empty or hold control characters")


def named_source(given: str | None, format: str, where: str) -> str:
    """The name under which judgements and refused rows are kept. Raises ValueError for a name of other characters."""
    default = where.rstrip("/").rsplit("/", 1)[-1] if format == "canonical" else format
    name = default if given is None else given
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        asked = (
            "--source" if given is not None else "the name of the file cannot be the source; give one with --source:"
        )
        raise ValueError(f"{asked} {name!r} may only hold letters a to z, digits, '.', '_' and '-', 64 at most")
    return name


def listed(spark: SparkSession, flag: str, where: str, format: str) -> Input:
    """Lists the input and refuses the files that cannot be read. Raises ValueError where there is nothing at all."""
    wanted = WANTED[flag]
    if format == "canonical":
        parts = {"": (where, wanted.fields, wanted.required)}
    else:
        parts = {name: (f"{where.rstrip('/')}/{name}", c, c) for name, c in published.FILES[format].items()}
    groups: dict[str, list[File]] = {}
    refused: dict[str, str] = {}
    skipped: list[str] = []
    for name, (path, fields, required) in parts.items():
        groups[name], unfit, other = files.listing(spark, path)
        unfit |= {f.path: why for f in groups[name] if (why := formats.misfit(f, fields, required))}
        refused |= unfit
        skipped += other
    return Input(groups, {}, skipped).without(refused)


class Intake:
    """One run: reads and judges the rows once, sets the bad ones aside, and writes what is new or changed."""

    def __init__(self, spark: SparkSession, root: str, source: str, format: str, wanted: Wanted, run: runs.Run) -> None:
        self.spark, self.root, self.source, self.format, self.wanted, self.run = (
            spark,
            root,
            source,
            format,
            wanted,
            run,
        )
        self.now = F.lit(datetime.now(UTC))
        self.counts: Counter[str] = Counter()
        self.told: list[str] = []  # what the operator reads at the end

    # --- the three commands

    def pairs(self, found: Input, snapshot: bool = False) -> str | None:
        """Upserts pairs and gold; returns why `snapshot` deleted nothing, where it did not."""
        rows = self.judged(found)
        accepted = rows.where("reason IS NULL").withColumn("product_hash", _product_hash())
        judgement = [F.col("label").cast("string"), F.to_json("rater_labels")]
        judgement += [F.col(c).cast("string") for c in ("weight", "gold_weight")]
        torn = [
            conflicts(accepted, ["locale", "product_id"], F.col("product_hash"), "two texts of one product"),
            conflicts(accepted, ["pair_id"], tables.hash_fields(judgement), "two judgements of one pair"),
        ]
        if self.format == "canonical":
            split = accepted.where("split IS NOT NULL")
            torn.append(conflicts(split, ["locale", "normalised"], F.col("split"), "two splits of one query"))
        good, bad = self.parted(rows, accepted, torn)
        self.quarantine(bad)

        stored = delta.read(self.spark, self.root, "pairs")
        old = stored.select("pair_id", F.col("content_hash").alias("old_hash"), F.col("weight").alias("old_weight"))
        unique = good.dropDuplicates(["pair_id"]).join(old, "pair_id", how="left")
        unique = unique.withColumn("weight", F.coalesce("weight", "old_weight")).withColumn(
            "content_hash", _content_hash()
        )
        change = (
            F.when(F.col("old_hash").isNull(), "inserted")
            .when(F.col("old_hash") != F.col("content_hash"), "updated")
            .when(F.col("weight").eqNullSafe(F.col("old_weight")), "unchanged")
            .otherwise("updated")
        )
        unique = self.land("unique", unique.withColumn("change", change))
        self.counts.update(_by(unique, "change"))
        self.counts["duplicates"] = self.counts["accepted"] - unique.count()

        refusal, gone = self.snapshot(unique, bad, stored) if snapshot else (None, None)
        # One product has one text: pairs of it that this input does not name follow.
        texts = unique.select("locale", "product_id", *canonical.TEXTS, "product_hash")
        others = stored.select(
            "pair_id", "query", "locale", "product_id", "weight", F.col("content_hash").alias("old_hash")
        )
        others = others.join(unique, "pair_id", how="left_anti")
        if gone is not None:
            others = others.join(gone, "pair_id", how="left_anti")
        others = others.join(texts.dropDuplicates(["locale", "product_id"]), ["locale", "product_id"], how="inner")
        others = others.withColumn("content_hash", _content_hash()).where("old_hash <> content_hash")
        others = self.land("others", others)
        self.counts["updated_with_product"] = others.count()
        written = self.write_pairs([unique.where("change <> 'unchanged'"), others])
        self.gold(unique)
        if gone is not None:
            self.delete(gone)
        self.say(
            f"pairs: {written['inserted']:,} new, {written['updated']:,} changed"
            f" ({self.counts['updated_with_product']:,} of them by the new text of their product),"
            f" {self.counts['unchanged']:,} unchanged" + (f", {self.counts['deleted']:,} deleted" if snapshot else ""),
            f"gold: {self.counts['gold_inserted']:,} new, {self.counts['gold_updated']:,} changed,"
            f" {self.counts['gold_unchanged']:,} unchanged",
        )
        if kept := self.counts["split_kept"]:
            self.told.append(f"{JOB}: {kept:,} judged rows keep the split that gold already has for their query")
        return refusal

    def products(self, found: Input) -> None:
        """Updates the texts of products in all their pairs."""
        rows = self.judged(found)
        accepted = rows.where("reason IS NULL")
        values = tables.hash_fields([_product_hash(), F.to_json("given")])
        torn = conflicts(accepted, ["locale", "product_id"], values, "two texts of one product")
        good, bad = self.parted(rows, accepted, [torn])
        self.quarantine(bad)
        unique = good.dropDuplicates(["locale", "product_id"])
        unique = self.land(
            "unique", unique.select("locale", "product_id", "given", F.struct(*canonical.TEXTS).alias("new"))
        )
        stored = delta.read(self.spark, self.root, "pairs").withColumnRenamed("content_hash", "old_hash")
        matched = stored.join(unique, ["locale", "product_id"], how="inner")
        for text in canonical.TEXTS:
            given = F.array_contains("given", text)
            matched = matched.withColumn(text, F.when(given, F.col(f"new.{text}")).otherwise(F.col(text)))
        matched = matched.withColumn("product_hash", _product_hash()).withColumn("content_hash", _content_hash())
        matched = self.land("pairs", matched.withColumn("changed", F.col("old_hash") != F.col("content_hash")))
        written = self.write_pairs([matched.where("changed")])
        self.counts["updated"] = written["updated"]
        self.counts["unchanged"] = matched.where("NOT changed").count()
        known = matched.select("locale", "product_id").distinct()
        total = unique.count()
        self.counts["duplicates"] = self.counts["accepted"] - total
        self.counts["products_without_pairs"] = total - known.count()
        self.say(
            f"products: {total:,}, {self.counts['products_without_pairs']:,} of them in no pair",
            f"pairs: {self.counts['updated']:,} changed, {self.counts['unchanged']:,} unchanged",
        )

    def deletions(self, found: Input) -> None:
        """Removes pairs, or all pairs of a product; gold keeps its judgements."""
        rows = self.judged(found)
        good, bad = self.parted(rows, rows.where("reason IS NULL"), [])
        self.quarantine(bad)
        unique = self.land("unique", good.select("pair_id", "locale", "product_id", "query").distinct())
        stored = delta.read(self.spark, self.root, "pairs").select("pair_id", "locale", "product_id")
        of_product = unique.where("query IS NULL").select("locale", "product_id")
        named = stored.join(unique.where("query IS NOT NULL"), "pair_id", how="left_semi")
        gone = named.unionByName(stored.join(of_product, ["locale", "product_id"], how="left_semi"))
        gone = self.land("gone", gone.distinct())
        idle = unique.where("query IS NOT NULL").join(gone, "pair_id", how="left_anti").count()
        idle += of_product.join(gone, ["locale", "product_id"], how="left_anti").count()
        self.counts["duplicates"] = self.counts["accepted"] - unique.count()
        self.counts["rows_without_pairs"] = idle
        self.delete(gone)
        self.say(f"pairs: {self.counts['deleted']:,} deleted", f"{idle:,} rows named no pair that is there")

    # --- their steps

    def judged(self, found: Input) -> DataFrame:
        """All rows that are not blank, landed once, with pair_id (null where the row does not tell), name and line."""
        landed = delta.scratch(self.root, self.run.run_id, "rows")
        while found.complete:
            try:
                self.read(found).write.mode("overwrite").parquet(landed)
                wrong = {f.path: why for f in found.each if (why := files.changed(self.spark, f))}
            except Exception:
                wrong = {f.path: why for f in found.each if (why := self.unreadable(found, f))}
                if not wrong:
                    raise
            if not wrong:
                break
            found = found.without(wrong)
        refused = dict(found.refused)
        empty = self.spark.createDataFrame([], formats.ROW_TYPE)
        rows = self.spark.read.schema(formats.ROW_TYPE).parquet(landed) if found.complete else empty
        blocks = rows.groupBy("file", "block").agg(
            F.min("n").alias("first"),
            F.max("n").alias("last"),
            F.sum("size").alias("size"),
            F.count_if(~F.col("blank")).alias("read"),
            F.count_if(F.col("reason").isNotNull()).alias("refused"),
            F.array_distinct(F.flatten(F.collect_list("ignored"))).alias("ignored"),
        )
        lines: list[tuple[str, int, int, str, str]] = []
        sizes: Counter[str] = Counter()
        ignored: set[str] = set()
        before: Counter[str] = Counter()
        for block in sorted(blocks.collect(), key=lambda b: (b["file"], b["block"])):
            path = unquote(block["file"]).removeprefix("file:").replace("///", "/", 1)
            at = before[path] - block["first"] + 1
            lines.append((block["file"], block["block"], at, path, path.rsplit("/", 1)[-1]))
            before[path] += block["last"] - block["first"] + 1
            sizes[block["file"]] += block["size"]
            ignored.update(block["ignored"])
            self.counts.update({"read": block["read"], "quarantined": block["refused"]})
        for file in found.each if found.complete else ():
            if lost := formats.lost_bytes(file, sizes[file.uri]):
                refused[file.path] = (
                    f"{lost:,} bytes were not read: a line is longer than {formats.LONGEST_LINE:,} bytes"
                )
        self.counts["refused_files"] = len(refused)
        self.counts["quarantined"] += len(refused)
        if ignored:
            self.told.append(f"{JOB}: fields without a meaning here were left out: {', '.join(sorted(ignored)[:20])}")
        if found.skipped:
            some = ", ".join(sorted(found.skipped)[:_FILES_TOLD])
            self.told.append(f"{JOB}: {len(found.skipped):,} files of another kind were passed over: {some}")
        places = self.spark.createDataFrame(lines, "file STRING, block BIGINT, at BIGINT, path STRING, name STRING")
        rows = rows.where("NOT blank").join(F.broadcast(places), ["file", "block"], how="inner")
        named = F.col("query").isNotNull() & F.col("product_id").isNotNull()
        key = tables.pair_id(F.coalesce("locale", F.lit("")), F.col("query"), F.col("product_id"))
        rows = rows.withColumn("line", F.col("n") + F.col("at")).withColumn("pair_id", F.when(named, key))
        if not refused:
            return rows
        # A refused file is a bad row too: its name is what is left of it.
        whole = [
            (p.removeprefix("file:"), p.removeprefix("file:"), f"refused file: {why}") for p, why in refused.items()
        ]
        return rows.unionByName(
            self.spark.createDataFrame(whole, "raw STRING, path STRING, reason STRING"), allowMissingColumns=True
        )

    def read(self, found: Input) -> DataFrame:
        """The rows of all files: columns of `formats.ROW`."""
        if self.format == "canonical":
            return formats.canonical_rows(self.spark, found.files[""], self.wanted)
        return published.published_rows(self.spark, self.format, found.files)

    def unreadable(self, found: Input, file: File) -> str | None:
        """Why this one file cannot be read by Spark, or None."""
        name = next(name for name, group in found.files.items() if file in group)
        fields = self.wanted.fields if not name else published.FILES[self.format][name]
        return formats.unreadable(self.spark, file, fields)

    def parted(self, rows: DataFrame, accepted: DataFrame, torn: Sequence[DataFrame]) -> tuple[DataFrame, DataFrame]:
        """Good rows, and bad ones: those refused by themselves and those that contradict another (file, block, n, reason)."""
        bad = rows.where("reason IS NOT NULL")
        self.counts["accepted"] = self.counts["read"] - self.counts["quarantined"] + self.counts["refused_files"]
        if not torn:
            return accepted, bad
        both = torn[0]
        for other in torn[1:]:
            both = both.unionByName(other)
        reason = F.array_join(F.array_sort(F.collect_set("reason")), "; ").alias("reason")
        both = self.land("torn", both.groupBy("file", "block", "n").agg(reason))
        if not (count := both.count()):
            return accepted, bad
        place = ["file", "block", "n"]
        bad = bad.unionByName(accepted.select(*bad.drop("reason").columns).join(both, place, how="inner"))
        self.counts.update({"accepted": -count, "quarantined": count})
        return accepted.join(both, place, how="left_anti"), bad

    def quarantine(self, bad: DataFrame) -> None:
        """Keeps each bad row with its reason, once, however often it comes."""
        if not self.counts["quarantined"]:
            return
        named = bad.select(
            tables.hash_fields([F.col("raw"), F.col("reason")]).alias("row_hash"),
            F.struct("line", F.col("path").alias("file"), F.col("raw").alias("row"), "reason").alias("r"),
        )
        kept = named.groupBy("row_hash").agg(F.min("r").alias("r")).select("row_hash", "r.*")
        kept = kept.select(
            "*", F.lit(self.source).alias("source"), F.lit(JOB).alias("stage"), self.now.alias("seen_at")
        )
        delta.upsert(self.spark, self.root, "quarantine", kept)
        kinds = _by(bad.withColumn("kind", F.substring_index("reason", ":", 1)), "kind")
        self.told += [f"{JOB}:   {count:,} × {kind}" for kind, count in kinds.most_common(5)]
        self.told.append(
            f"{JOB}: look at them with: sql --tables {self.root} "
            f"\"SELECT reason, file, line, row FROM quarantine WHERE source = '{self.source}'\""
        )

    def write_pairs(self, parts: Sequence[DataFrame]) -> dict[str, int]:
        """Upserts rows that are new or changed, in one commit; no commit where there are none."""
        names = [name for name in tables.PAIRS.names if name != "updated_at"]
        rows = parts[0].select(*names)
        for part in parts[1:]:
            rows = rows.unionByName(part.select(*names))
        if rows.isEmpty():
            return {"inserted": 0, "updated": 0}
        rows = rows.withColumn("updated_at", self.now)
        changed = "old.content_hash <> new.content_hash OR NOT old.weight <=> new.weight"
        return delta.upsert(self.spark, self.root, "pairs", rows, changed)

    def gold(self, unique: DataFrame) -> None:
        """Upserts the judgements of this source; a query that gold knows keeps its split."""
        labelled = unique.where("label IS NOT NULL")
        stored = delta.read(self.spark, self.root, "gold")
        asked = delta.read(self.spark, self.root, "pairs").select("pair_id", "locale", "query")
        normalised = F.udf(canonical.normalised, "string")
        # ESCI splits by query as typed; where one normalised query is in both parts, all of it is test.
        given = labelled.groupBy("locale", "normalised").agg(
            F.when(F.max(F.col("split") == "test"), "test").otherwise(F.min("split")).alias("given_split")
        )
        kept = stored.join(asked, "pair_id", how="inner").select("locale", "query", "split").distinct()
        kept = kept.withColumn("normalised", normalised("query"))
        kept = kept.groupBy("locale", "normalised").agg(F.min("split").alias("kept_split"))
        own = stored.groupBy("pair_id").agg(F.min("split").alias("own_split"))
        mine = [F.col(c).alias(f"old_{c}") for c in ("label", "rater_labels", "weight", "split")]
        old = stored.where(F.col("source") == self.source).select("pair_id", *mine)
        rows = (
            labelled.drop("old_weight", "change", "weight")
            .join(given, ["locale", "normalised"], how="left")
            .join(kept, ["locale", "normalised"], how="left")
            .join(own, "pair_id", how="left")
            .join(old, "pair_id", how="left")
            .withColumn("wanted_split", F.coalesce("given_split", "drawn_split"))
            .withColumn("split", F.coalesce("own_split", "kept_split", "wanted_split"))
            .withColumn("weight", F.coalesce("gold_weight", "old_weight", F.lit(1.0)))
        )
        same = F.lit(True)
        for name in ("label", "rater_labels", "weight", "split"):
            same &= F.col(name).eqNullSafe(F.col(f"old_{name}"))
        change = (
            F.when(F.col("old_label").isNull(), "gold_inserted").when(same, "gold_unchanged").otherwise("gold_updated")
        )
        rows = self.land("gold", rows.withColumn("change", change))
        self.counts.update(_by(rows, "change"))
        self.counts["split_kept"] = rows.where("split <> wanted_split").count()
        if self.counts["gold_inserted"] + self.counts["gold_updated"]:
            rows = rows.where("change <> 'gold_unchanged'").withColumn("source", F.lit(self.source))
            delta.upsert(self.spark, self.root, "gold", rows.withColumn("judged_at", self.now))

    def snapshot(self, unique: DataFrame, bad: DataFrame, stored: DataFrame) -> tuple[str | None, DataFrame | None]:
        """The pairs (pair_id) that the input does not name; or, with a sentence, why none may be deleted."""
        if not self.counts["accepted"]:
            return "--snapshot deleted nothing: no row of the input was accepted", None
        if nameless := bad.where("pair_id IS NULL").count():
            return (
                f"--snapshot deleted nothing: {nameless:,} refused rows or files do not tell which pairs they are; mend "
                "them and run it again"
            ), None
        gone = stored.select("pair_id").join(unique, "pair_id", how="left_anti")
        return None, self.land("gone", gone.join(bad, "pair_id", how="left_anti"))

    def delete(self, gone: DataFrame) -> None:
        """Removes these pairs (pair_id); no commit where there are none."""
        if not gone.isEmpty():
            self.counts["deleted"] = delta.delete(self.spark, self.root, "pairs", gone, ("pair_id",))

    def land(self, name: str, frame: DataFrame) -> DataFrame:
        """Writes a step's rows once, so that what reads them twice (a MERGE does) reads the same rows."""
        folder = delta.scratch(self.root, self.run.run_id, name)
        frame.write.mode("overwrite").parquet(folder)
        return self.spark.read.schema(frame.schema).parquet(folder)

    def say(self, *parts: str) -> None:
        """Puts the line with all counts before what was noted on the way."""
        c = self.counts
        head = f"{c['read']:,} rows read · {c['accepted']:,} accepted ({c['duplicates']:,} duplicates)"
        tail = f"quarantined: {c['quarantined']:,}"
        self.told.insert(0, f"{JOB}: " + " · ".join((head, *parts, tail)))


def conflicts(rows: DataFrame, key: list[str], value: Column, kind: str) -> DataFrame:
    """Rows of one `key` that have two different values: file, block, n, and a reason that names their lines."""
    valued = rows.select("file", "block", "n", "name", "line", *key, value.alias("value"))
    torn = valued.groupBy(*key).agg(F.min("value").alias("low"), F.max("value").alias("high")).where("low <> high")
    both = valued.join(torn.select(*key), key, how="left_semi")
    at = both.groupBy(*key).agg(F.array_sort(F.collect_set(F.struct("name", "line"))).alias("at"))
    told = F.array_join(
        F.transform(F.slice("at", 1, _LINES_TOLD), lambda p: F.concat(p["name"], F.lit(":"), p["line"])), ", "
    )
    more = F.when(F.size("at") > _LINES_TOLD, F.concat(F.lit(" and "), F.size("at") - _LINES_TOLD, F.lit(" more")))
    reason = F.concat(F.lit(f"{kind}: "), told, F.coalesce(more, F.lit(""))).alias("reason")
    return both.join(at, key, how="inner").select("file", "block", "n", reason)


def _product_hash() -> Column:
    return tables.product_hash(*map(F.col, canonical.TEXTS))


def _content_hash() -> Column:
    return tables.content_hash(F.col("product_hash"), F.col("locale"), F.col("query"))


def _by(rows: DataFrame, column: str) -> Counter[str]:
    return Counter({row[column]: row["count"] for row in rows.groupBy(column).count().collect()})
