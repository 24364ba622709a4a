"""One call's input: its files listed, read once and landed, its rows numbered and held against each other.

A row is judged alone by `schemas.canonical`; here is what needs the others: its line in the file, two rows that
contradict each other, and a file that cannot be read or changed meanwhile, which is refused while the others go on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote

from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from schemas import delta, files, formats, published, tables
from schemas.files import File
from schemas.formats import Wanted

_PLACE = ("file", "block", "n")  # of a row in its input
_LINES_TOLD = 20  # of a contradiction, in its reason

Claim = tuple[str, Sequence[Column], Column]  # kind, key, and what a row says of it


@dataclass(frozen=True)
class Input:
    """The files of one call: those to read, by published name ('' for canonical), and those refused, with a reason."""

    format: str
    wanted: Wanted
    files: Mapping[str, Sequence[File]]
    refused: Mapping[str, str]
    skipped: Sequence[str]

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

    def fields(self, file: File) -> tuple[str, ...]:
        """The fields that are read from a file."""
        name = next(name for name, group in self.files.items() if file in group)
        return published.FILES[self.format][name] if name else self.wanted.fields


@dataclass(frozen=True)
class Judged:
    """What an input holds. `rows`: columns of `formats.ROW`, and path, name, line, and pair_id where the row tells it.

    A refused file is one row of it, without a line but where its header was refused. `read` and `refused` count rows.
    """

    rows: DataFrame
    read: int
    refused: int
    refused_files: int
    ignored: list[str]


def listed(spark: SparkSession, where: str, format: str, wanted: Wanted) -> Input:
    """Lists the input and refuses the files that cannot be read. Raises ValueError where there is nothing at all."""
    if format == "canonical":
        parts = {"": (where, wanted.fields, wanted.required)}
    else:
        parts = {name: (f"{where.rstrip('/')}/{name}", c, c) for name, c in published.FILES[format].items()}
    found = Input(format, wanted, {}, {}, ())
    for name, (path, fields, required) in parts.items():
        group, unfit, other = files.listing(spark, path)
        misfits = {f.path: why for f in group if (why := formats.misfit(f, fields, required))}
        found = replace(found, files={**found.files, name: group}, skipped=[*found.skipped, *other])
        found = found.without({**unfit, **misfits})
    return found


def judged(spark: SparkSession, found: Input, folder: str) -> Judged:
    """Reads, judges and lands all rows in `folder`."""
    found = _landed(spark, found, folder)
    if found.complete:
        landed = spark.read.schema(formats.ROW_TYPE).parquet(files.literal(folder))
    else:
        landed = spark.createDataFrame([], formats.ROW_TYPE)
    blocks = landed.groupBy("file", "block").agg(
        F.min("n").alias("first"),
        F.max("n").alias("last"),
        F.sum("size").alias("size"),
        F.count_if(~F.col("blank")).alias("read"),
        F.count_if(F.col("reason").isNotNull()).alias("refused"),
        F.count_if(F.col("reason").startswith(formats.REFUSED)).alias("whole"),  # files, by their header
        F.array_distinct(F.flatten(F.collect_list("ignored"))).alias("ignored"),
    )
    told = sorted(blocks.collect(), key=lambda b: (b["file"], b["block"]))  # a block has up to 128 MB
    before: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    places: list[tuple[str, int, int, str, str]] = []
    for block in told:
        path = files.shown(unquote(block["file"]))
        places.append((block["file"], block["block"], before[path] + 1 - block["first"], path, path.rsplit("/", 1)[-1]))
        before[path] += block["last"] - block["first"] + 1
        sizes[path] += block["size"]
    refused = dict(found.refused)
    for file in found.each if found.complete else ():
        if lost := formats.lost_bytes(file, sizes[files.shown(file.path)]):
            longest = formats.LONGEST_LINE
            refused[file.path] = f"{lost:,} bytes of it were not read: it has a line of more than {longest:,} bytes"
    place = spark.createDataFrame(places, "file STRING, block BIGINT, shift BIGINT, path STRING, name STRING")
    rows = landed.where("NOT blank").join(F.broadcast(place), ["file", "block"], how="inner")
    key = tables.pair_id(F.coalesce("locale", F.lit("")), F.col("query"), F.col("product_id"))
    known = F.col("query").isNotNull() & F.col("product_id").isNotNull()
    rows = rows.withColumn("line", F.col("n") + F.col("shift")).withColumn("pair_id", F.when(known, key)).drop("shift")
    if refused:
        whole = [(files.shown(path), files.shown(path), f"{formats.REFUSED}{why}") for path, why in refused.items()]
        rows = rows.unionByName(
            spark.createDataFrame(whole, "raw STRING, path STRING, reason STRING"), allowMissingColumns=True
        )
    by_header = sum(block["whole"] for block in told)
    return Judged(
        rows=rows,
        read=sum(block["read"] for block in told) - by_header,
        refused=sum(block["refused"] for block in told) - by_header,
        refused_files=len(refused) + by_header,
        ignored=sorted({name for block in told for name in block["ignored"]}),
    )


def _landed(spark: SparkSession, found: Input, folder: str) -> Input:
    """Writes the rows to `folder`, leaving out one by one the files that Spark cannot read; returns what was read."""
    while found.complete:
        try:
            if found.format == "canonical":
                frame = formats.canonical_rows(spark, found.files[""], found.wanted)
            else:
                frame = published.published_rows(spark, found.format, found.files)
            frame.write.mode("overwrite").parquet(folder)
            wrong = {f.path: why for f in found.each if (why := files.changed(spark, f))}
        except Exception:
            wrong = {f.path: why for f in found.each if (why := formats.unreadable(spark, f, found.fields(f)))}
            if not wrong:
                raise
        if not wrong:
            break
        found = found.without(wrong)
    return found


def quarantine(spark: SparkSession, root: str, bad: DataFrame, source: str, stage: str, now: Column) -> list[str]:
    """Keeps each bad row (of `Judged.rows`) with its reason, once, however often it comes; returns what to tell."""
    named = bad.select(
        tables.hash_fields([F.col("raw"), F.col("reason")]).alias("row_hash"),
        F.struct("line", F.col("path").alias("file"), F.col("raw").alias("row"), "reason").alias("r"),
    )
    rows = named.groupBy("row_hash").agg(F.min("r").alias("r")).select("row_hash", "r.*")
    rows = rows.withColumns({"source": F.lit(source), "stage": F.lit(stage), "seen_at": now})
    delta.upsert(spark, root, "quarantine", rows)
    # A row's kind, but why a file was refused whole.
    kind = F.when(F.col("reason").startswith(formats.REFUSED), F.substring(F.concat_ws(": ", "path", "reason"), 1, 400))
    kinds = bad.groupBy(F.coalesce(kind, F.substring_index("reason", ":", 1)).alias("kind")).count()
    counted = kinds.orderBy(F.desc("count"), "kind").limit(5).collect()
    ask = (  # only shown
        f"SELECT reason, file, line, row FROM quarantine WHERE source = '{source}' ORDER BY seen_at DESC"  # noqa: S608
    )
    return [
        *(f"{stage}:   {row['count']:,} quarantined for: {row['kind']}" for row in counted),
        f'{stage}: look at them with: sql --tables {root} --width 0 "{ask}"',
    ]


def parted(
    rows: DataFrame, claims: Sequence[Claim], land: Callable[[str, DataFrame], DataFrame]
) -> tuple[DataFrame, DataFrame, int]:
    """Good rows of `Judged.rows`, bad ones with their reason, and how many of these contradict another (`claims`)."""
    good, bad = rows.where("reason IS NULL"), rows.where("reason IS NOT NULL")
    torn = contradictions(good, claims, land) if claims else None
    if torn is None:
        return good, bad, 0
    bad = bad.unionByName(good.drop("reason").join(torn, list(_PLACE), how="inner"))
    return good.join(torn, list(_PLACE), how="left_anti"), bad, torn.count()


def contradictions(
    rows: DataFrame, claims: Sequence[Claim], land: Callable[[str, DataFrame], DataFrame]
) -> DataFrame | None:
    """Rows that contradict another one: file, block, n, and a reason that names the lines of all; None where none do.

    `claims`: two rows of one kind and key must say the same of it; null says nothing.
    """
    said = [
        F.struct(F.lit(kind).alias("kind"), tables.hash_fields(list(key)).alias("key"), value.alias("value"))
        for kind, key, value in claims
    ]
    each = rows.select(*_PLACE, "name", "line", F.inline(F.array(*said))).where("value IS NOT NULL")
    torn = each.groupBy("kind", "key").agg(F.min("value").alias("low"), F.max("value").alias("high"))
    torn = land("torn", torn.where("low <> high").select("kind", "key"))
    if torn.isEmpty():
        return None
    both = each.join(torn, ["kind", "key"], how="left_semi")
    at = both.groupBy("kind", "key").agg(F.array_sort(F.collect_set(F.struct("name", "line"))).alias("at"))
    lines = F.transform(F.slice("at", 1, _LINES_TOLD), lambda p: F.concat(p["name"], F.lit(":"), p["line"]))
    more = F.when(F.size("at") > _LINES_TOLD, F.concat(F.lit(" and "), F.size("at") - _LINES_TOLD, F.lit(" more")))
    reason = F.concat("kind", F.lit(": "), F.array_join(lines, ", "), F.coalesce(more, F.lit("")))
    told = both.join(at.withColumn("reason", reason), ["kind", "key"], how="inner")
    reasons = F.array_join(F.array_sort(F.collect_set("reason")), "; ")
    return land("contradictions", told.groupBy(*_PLACE).agg(reasons.alias("reason")))
