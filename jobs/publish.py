"""Hands the tiers in force on: to published_labels, changed rows only, or to a file for search tools.

publish --tables T
publish --tables T --format qrels|quepid --out FILE [--locale de]

published_labels is written in one commit in which only rows with another tier appear, so its change feed is what the
index must update; a pair that is gone, or has no tier any more, leaves it. qrels: TREC's judgements with grades 0..3
(label - 1) and FILE.topics.tsv beside it; ids hold no white space. quepid: the CSV that Quepid imports as judgements.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TextIO
from urllib.parse import quote

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import jobs
from partitioner import tiers
from partitioner.tiers import Version
from schemas import delta, runs

JOB = "publish"
FORMATS = ("qrels", "quepid")
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 (full-width forms count too)


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--format", choices=FORMATS, help="write a file instead of the table")
    parser.add_argument("--out", metavar="FILE", help="the file, on this machine")
    parser.add_argument("--locale", metavar="L", help="of the file: pairs of this locale alone")
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0."""
    args = flags().parse_args(argv)
    if (args.format is None) != (args.out is None):
        raise ValueError("--format and --out belong together: --format qrels --out FILE")
    if args.locale is not None and not args.out:
        raise ValueError("--locale is for a file: --format qrels --out FILE --locale de")
    if args.out and not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
        raise ValueError(f"--out {args.out}: its folder does not exist")
    spark = delta.session(JOB)
    delta.prepare(spark, args.tables)
    if args.format:
        export(spark, args.tables, args.format, args.out, args.locale)
    else:
        publish(spark, args.tables)
    return 0


def in_force(spark: SparkSession, root: str) -> tuple[Version, DataFrame]:
    """The active version, and the view's rows that have a tier. Raises ValueError before the first promotion."""
    version = tiers.active(spark, root)
    if version is None:
        raise ValueError(f"no version is in force; put one there: promote_thresholds --tables {root} --version V")
    read = [delta.read(spark, root, name) for name in ("label_probs", "pairs", "thresholds")]
    return version, tiers.labels(spark, *read).where("tier IS NOT NULL")


def publish(spark: SparkSession, root: str) -> dict[str, int]:
    """Brings published_labels to the tiers in force; returns how many rows were inserted, updated and deleted.

    Raises ValueError where another publisher is at work, whatever its model.
    """
    version, tiered = in_force(spark, root)
    if tiered.isEmpty() and not delta.read(spark, root, "published_labels").isEmpty():
        raise ValueError(
            f"no pair has a tier under version {version.version}, so all of published_labels would be withdrawn, and "
            "nothing was done. Look at pairs and label_probs: bring back what they lack (ingest, backfill)"
        )
    run = runs.start(spark, root, JOB, alone=True)
    counts: Counter[str] = Counter(inserted=0, updated=0, deleted=0)
    with runs.recorded(spark, root, lambda: run):
        while True:
            version, tiered = in_force(spark, root)
            run = replace(run, model_id=version.model_id, prompt_id=version.prompt_id)
            seen = delta.version(spark, root, "published_labels")
            written = _written(spark, root, run.run_id, tiered, seen)
            counts.update(written or {})
            at = delta.version(spark, root, "published_labels")
            # A commit that came between (two may start at once) is one that this one did not compare itself with.
            if at == seen + (written is not None):
                break
    runs.finish(spark, root, replace(run, counts=dict(counts)), "done")
    print(
        f"{JOB}: version {version.version}: {counts['inserted']:,} new, {counts['updated']:,} with another tier, "
        f"{counts['deleted']:,} gone; published_labels is at Delta version {at}"
        + ("" if any(counts.values()) else ", nothing was written"),
        flush=True,
    )
    after = tiers.active(spark, root)
    if after and after.version != version.version:
        print(f"{JOB}: version {after.version} was put into force meanwhile; publish again")
    return dict(counts)


def _written(spark: SparkSession, root: str, run_id: str, tiered: DataFrame, seen: int) -> dict[str, int] | None:
    """Writes what differs between tiers and version `seen` of published_labels; None, with no commit: nothing does."""
    new = tiered.select("pair_id", "query", "product_id", "locale", "tier", "version", "model_id")
    old = delta.read(spark, root, "published_labels", seen).select("pair_id", F.struct("*").alias("old"))
    both = new.join(old, "pair_id", how="full")

    def either(name: str) -> Any:
        return F.coalesce(name, f"old.{name}").alias(name)

    changes = both.where("tier IS NULL OR old IS NULL OR tier <> old.tier").select(
        "pair_id",
        either("query"),
        either("product_id"),
        either("locale"),
        either("tier"),
        F.coalesce("version", "old.tier_since_version").alias("tier_since_version"),
        F.coalesce("model_id", "old.tier_since_model_id").alias("tier_since_model_id"),
        F.current_timestamp().alias("published_at"),
        F.col("tier").isNull().alias("gone"),
    )
    changes = delta.land(spark, root, run_id, "changes", changes)
    return None if changes.isEmpty() else delta.sync(spark, root, "published_labels", changes)


def export(spark: SparkSession, root: str, format: str, out: str, locale: str | None = None) -> int:
    """Writes the tiers in force to a file, of all locales or of one; returns how many.

    Raises ValueError where there is none of that locale, and for several locales in Quepid's CSV.
    """
    version, tiered = in_force(spark, root)
    if locale is not None or format == "quepid":
        known = sorted(row["locale"] for row in tiered.select("locale").distinct().collect())
        if locale is None and len(known) > 1:
            raise ValueError(
                "Quepid's CSV cannot tell the query of one locale from that of another, and there are "
                f"{', '.join(known)}; write a file for each: --locale L"
            )
        if locale is not None and locale not in known:
            raise ValueError(f"--locale {locale}: no pair with a tier is of it (there are: {', '.join(known)})")
    tiered = tiered if locale is None else tiered.where(F.col("locale") == locale)
    rows = tiered.select("locale", "query", "product_id", "tier").orderBy("locale", "query", "product_id")
    write = qrels if format == "qrels" else quepid
    count = write(rows.toLocalIterator(), out)
    print(f"{JOB}: {count:,} judgements of version {version.version} in {out}", flush=True)
    return count


def query_id(locale: str, query: str) -> str:
    """A topic's id: q and 16 hex digits of a hash of locale and query."""
    text = f"{len(locale.encode())}:{locale}{query}"
    return "q" + hashlib.sha256(text.encode()).hexdigest()[:16]


def document_id(product_id: str) -> str:
    """A product's id without white space: what is not a letter, digit or one of `_.-~` is percent-encoded UTF-8."""
    return quote(product_id, safe="")


def qrels(rows: Iterator[Any], out: str) -> int:
    """`topic 0 document grade` a line, and OUT.topics.tsv with `topic<tab>query`; rows come sorted by query."""
    count, last = 0, None
    with whole(f"{out}.topics.tsv") as topics, whole(out) as judgements:
        for row in rows:
            topic = query_id(row["locale"], row["query"])
            if topic != last:
                last = topic
                topics.write(f"{topic}\t{' '.join(row['query'].split())}\n")
            judgements.write(f"{topic} 0 {document_id(row['product_id'])} {row['tier'] - 1}\n")
            count += 1
    return count


def quepid(rows: Iterator[Any], out: str) -> int:
    """query,docid,rating with a head; a cell that a spreadsheet would take for a formula gets an apostrophe first."""
    count = 0
    with whole(out) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["query", "docid", "rating"])
        for row in rows:
            table.writerow([_guarded(row["query"]), _guarded(row["product_id"]), row["tier"] - 1])
            count += 1
    return count


def _guarded(cell: str) -> str:
    return f"'{cell}" if cell.lstrip(" ").startswith(_FORMULA) else cell


@contextmanager
def whole(path: str) -> Iterator[TextIO]:
    """A file that appears under its name only when it is whole."""
    part = f"{path}.part"
    try:
        with open(part, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.unlink(part)
