"""Keeps the tables small and quick: joins small files, clusters, removes what no version needs any more.

maintain --tables T [--table NAME]… [--keep-days 7] [--dry-run]
maintain --tables T --drop-model MODEL_ID [--yes]

A stream that stays commits a few rows at a time, and each commit leaves a file. OPTIMIZE puts them together (and sorts
them by the table's clustering columns); VACUUM deletes files that no version of the last days reads. Both may run while
the other jobs do: readers of an old version keep it for --keep-days, which may not be less than 7 (Delta's own limit),
and a commit of another job is waited for. --drop-model removes a model's rows from label_probs; without --yes it only
says how many, and the model in force is never dropped.
"""

from __future__ import annotations

from dataclasses import replace

from pyspark.sql import SparkSession
from pyspark.sql import functions as F

import jobs
from partitioner import tiers
from schemas import delta, runs
from schemas.tables import TABLES

JOB = "maintain"


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--table", action="append", choices=sorted(TABLES), help="only this one (may be repeated)")
    parser.add_argument(
        "--keep-days", type=int, default=delta.KEPT_DAYS, metavar="N", help="versions to keep (default 7)"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what is there, and stop")
    parser.add_argument("--drop-model", metavar="MODEL_ID", help="remove this model's rows from label_probs")
    parser.add_argument("--yes", action="store_true", help="do it: with --drop-model")
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0."""
    args = flags().parse_args(argv)
    if args.keep_days < delta.KEPT_DAYS:
        raise ValueError(
            f"--keep-days {args.keep_days}: at least {delta.KEPT_DAYS}; readers, and a stream that was away, need the "
            "files"
        )
    if args.yes and not args.drop_model:
        raise ValueError("--yes belongs to --drop-model MODEL_ID")
    if args.drop_model and (args.dry_run or args.table):
        raise ValueError("--drop-model goes without --dry-run and --table; without --yes it only says what would go")
    spark = delta.session(JOB)
    delta.prepare(spark, args.tables, new=True)
    if args.drop_model:
        drop_model(spark, args.tables, args.drop_model, args.yes)
    else:
        maintain(spark, args.tables, args.table or list(TABLES), args.keep_days, args.dry_run)
    return 0


def maintain(
    spark: SparkSession, root: str, names: list[str], keep_days: int = delta.KEPT_DAYS, dry_run: bool = False
) -> None:
    """Optimises and vacuums the tables, one after the other."""
    counts = {"removed_files": 0, "joined_files": 0}
    if dry_run:
        for name in names:
            files, size = delta.size(spark, root, name)
            print(f"{JOB}: {name}: {files:,} files, {size / 2**20:,.1f} MiB", flush=True)
        return
    run = runs.start(spark, root, JOB)
    with runs.recorded(spark, root, lambda: run):
        for name in names:
            files, _ = delta.size(spark, root, name)
            joined, vacuumed = delta.optimize(spark, root, name), delta.vacuum(spark, root, name, keep_days)
            counts["joined_files"] += joined
            counts["removed_files"] += vacuumed
            left, size = delta.size(spark, root, name)
            print(
                f"{JOB}: {name}: {files:,} files are now {left:,} ({size / 2**20:,.1f} MiB); {vacuumed:,} files of "
                f"versions older than {keep_days} days are gone",
                flush=True,
            )
        runs.finish(spark, root, replace(run, counts=counts), "done")


def drop_model(spark: SparkSession, root: str, model_id: str, yes: bool) -> None:
    """Removes a model's rows from label_probs, in one commit. Raises ValueError for the model in force, as long as
    there are pairs, and for one without rows."""
    in_force = tiers.active(spark, root)
    if in_force and in_force.model_id == model_id and not delta.read(spark, root, "pairs").isEmpty():
        raise ValueError(
            f"--drop-model {model_id}: it is in force (version {in_force.version} of thresholds); promote another first"
        )
    rows = delta.read(spark, root, "label_probs").where(F.col("model_id") == model_id)
    count = rows.count()
    if not count:
        known = sorted(r[0] for r in delta.read(spark, root, "label_probs").select("model_id").distinct().collect())
        raise ValueError(f"--drop-model {model_id}: it has no rows in label_probs (models with rows: {known})")
    if not yes:
        print(f"{JOB}: {count:,} rows of model {model_id} would go; nothing was done. Add --yes to do it", flush=True)
        return
    runs.close_lost(spark, root)
    if alive := runs.alive(spark, root, model_id):
        raise ValueError(f"--drop-model {model_id}: run {alive} of it is alive; wait for it, or end it")
    run = runs.start(spark, root, JOB, model_id)
    with runs.recorded(spark, root, lambda: run):
        # The stream remembers how far it looked; without its rows it must look at all pairs again.
        checkpoints = delta.checkpoint(root)
        for name in delta.inside(spark, checkpoints):
            if name.startswith(f"{model_id}-"):
                delta.drop(spark, f"{checkpoints}/{name}")
        count = rows.count()  # once more: a run of it may have ended since
        delta.remove(spark, root, "label_probs", F.col("model_id") == model_id)
    runs.finish(spark, root, replace(run, counts={"removed": count}), "done")
    print(
        f"{JOB}: {count:,} rows of model {model_id} are gone from label_probs (versions of 7 days keep them)",
        flush=True,
    )
