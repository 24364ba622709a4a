"""Puts a version of thresholds, and with it its model and prompt, into force; also the way back.

promote_thresholds --tables T --version V [--dry-run] [--max-shift 20%] [--max-missing 1%] [--max-flips 50%]
    [--reason "…"] [--allow-engine "bfloat16, vllm 0.33.0 cpu"]

Shows first how many pairs change their tier, from what to what. The swap is one commit, and it compares: where someone
else has put a version into force since this one looked, nothing is written.
"""

from __future__ import annotations

import getpass
from collections import Counter
from dataclasses import dataclass, replace

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, Row, SparkSession
from pyspark.sql import functions as F

import jobs
from jobs.fit_thresholds import engines_of
from jobs.probe import LEAST
from partitioner import models, tiers
from partitioner.tiers import Version
from schemas import delta, runs
from schemas.labels import LABELS, NAMES

JOB = "promote_thresholds"
_SEGMENTS_TOLD = 10
_LOST = "put into force meanwhile"


@dataclass(frozen=True)
class Gates:
    """What may be missing (share of pairs that the new version gives no tier) and change (share of the tiers) at most.

    `flips`: share of what its model calls Irrelevant that words in a product's text may make Related (jobs/probe.py).
    `engines`: number type and engine, as thresholds.engines has them, that are let in beside those of the fit.
    """

    missing: float = 0.01
    shift: float = 0.2
    flips: float = 0.5
    engines: tuple[str, ...] = ()


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--version", required=True, type=jobs.positive, metavar="V", help="of thresholds")
    parser.add_argument(
        "--max-missing", type=jobs.share, default=Gates.missing, metavar="X",
        help="refuse where it leaves more of the pairs without a tier: not scored by its model and prompt, or without\n"
        "a probability (default 1%%)",
    )  # fmt: skip
    parser.add_argument(
        "--max-shift", type=jobs.share, default=Gates.shift, metavar="X",
        help="refuse where more of the tiers would change or be lost (default 20%%)",
    )  # fmt: skip
    parser.add_argument(
        "--max-flips", type=jobs.share, default=Gates.flips, metavar="X",
        help="refuse where words written into their text made more of what the model calls Irrelevant Related or\n"
        "better, as its last probe found (default 50%%)",
    )  # fmt: skip
    parser.add_argument(
        "--allow-engine", action="append", default=[], metavar="NAME",
        help="let in rows of an engine that the fit did not see (the refusal names it); kept with the reason; may be\n"
        "given again",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="show what would change, and stop")
    parser.add_argument("--by-whom", default=None, metavar="NAME", help="who does it (default: the login name)")
    parser.add_argument("--reason", default=None, metavar="TEXT", help="why; kept with the version and its run")
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0, or 3 where a gate refused."""
    args = flags().parse_args(argv)
    spark = delta.session(JOB)
    delta.prepare(spark, args.tables)
    who = args.by_whom or getpass.getuser()
    gates = Gates(args.max_missing, args.max_shift, args.max_flips, tuple(args.allow_engine))
    return promote(spark, args.tables, args.version, gates, who, args.reason, args.dry_run)


def promote(
    spark: SparkSession,
    root: str,
    version: int,
    gates: Gates | None = None,
    who: str = "",
    reason: str | None = None,
    dry_run: bool = False,
) -> int:
    """Puts `version` into force; returns 0, or 3 where a gate refused.

    Raises ValueError for a version that is not there or not whole, RuntimeError where another promotion was faster.
    """
    gates = gates or Gates()
    stored = delta.read(spark, root, "thresholds", delta.version(spark, root, "thresholds"))
    rows = stored.where(F.col("status").isin("active") | (F.col("version") == version)).collect()
    wanted = [row for row in rows if row["version"] == version]
    if not wanted:
        known = sorted(row[0] for row in stored.select("version").distinct().collect())
        raise ValueError(f"there is no version {version} of thresholds (there are: {known}); fit one: fit_thresholds")
    new, fit = tiers.version_of(wanted), next(row for row in wanted if not row["segment"])
    in_force = [row for row in rows if row["status"] == "active"]
    old = tiers.version_of(in_force) if in_force else None
    if old and old.version == version:
        print(f"{JOB}: version {version} is in force already; nothing was written")
        return 0
    run = runs.start(spark, root, JOB, new.model_id, new.prompt_id)
    with runs.recorded(spark, root, lambda: run):
        print(
            f"{JOB}: version {version}, {fit['objective']} = {fit['value']:.4f} on {fit['n_gold']:,} "
            f"judgements, model {new.model_id}, instead of " + (f"version {old.version}" if old else "none")
        )
        refused = shifted(spark, root, stored, old, new, gates)
        fitted, now = set(fit["engines"]), set(engines_of(spark, root, new.model_id, new.prompt_id))
        if other := sorted(now - fitted - set(gates.engines)):
            refused.append(
                f"rows of its model were scored with {', '.join(map(repr, other))}, but it was fitted on rows of "
                f"{sorted(fitted)}; fit anew (fit_thresholds --tables {root} --model-id {new.model_id} --prompt-id "
                f"{new.prompt_id}), or let them in: " + " ".join(f"--allow-engine {engine!r}" for engine in other)
            )
        if allowed := sorted((now - fitted) & set(gates.engines)):
            reason = f"{reason or 'no reason given'} (allowed beside the engines of the fit: {'; '.join(allowed)})"
        refused += fooled(spark, root, new, gates)
        refusal = ". And ".join(refused)
        done = f"version {version} instead of {old.version if old else 'none'}, by {who}: {reason or 'no reason given'}"
        if refusal or dry_run:
            told = f"not put into force: {refusal}" if refusal else "dry run, nothing was written"
            print(f"{JOB}: version {version} {told}", flush=True)
            runs.finish(spark, root, run, "done", f"{told} ({done})")
            return jobs.GATE_FAILED if refusal else jobs.DONE
        swap(spark, root, old.version if old else None, version, who, reason)
    runs.finish(spark, root, replace(run, counts={"version": version}), "done", done)
    print(f"{JOB}: version {version} is in force. Hand the changed tiers on: publish --tables {root}", flush=True)
    return 0


def swap(spark: SparkSession, root: str, old: int | None, new: int, who: str, reason: str | None) -> None:
    """Compares and swaps, in one commit: `new` becomes active where `old` (or none) still is.

    Raises RuntimeError, with nothing written, where another version is.
    """
    status, version = F.col("status"), F.col("version")
    # Each active row must be of `old`, and each of `old` active: else the whole commit fails, whoever came between.
    foreign = (status == "active") & ~version.eqNullSafe(F.lit(old).cast("bigint"))
    fallen = (version == old) & (status != "active") if old is not None else F.lit(False)
    lost = F.raise_error(F.concat(F.lit(f"another version was {_LOST} (seen at version "), version.cast("string")))
    becomes = F.when(foreign | fallen, lost).when(version == new, "active").when(status == "active", "retired")
    touched = (status == "active") | (version == new) | (F.lit(False) if old is None else version == old)
    mine = version == new
    values: dict[str, str | Column] = {
        "status": becomes.otherwise(status),
        "activated_at": F.when(mine, F.current_timestamp()).otherwise(F.col("activated_at")),
        "activated_by": F.when(mine, F.lit(who)).otherwise(F.col("activated_by")),
        "reason": F.when(mine, F.lit(reason)).otherwise(F.col("reason")),
    }
    try:
        delta.update(spark, root, "thresholds", touched, values)
    except PySparkException as error:
        if _LOST not in str(error):
            raise
        raise RuntimeError(
            f"another version was {_LOST}; nothing was written. See which: promote_thresholds --tables {root} "
            f"--version {new} --dry-run"
        ) from error


def tier_changes(spark: SparkSession, root: str, stored: DataFrame, old: Version | None, new: Version) -> list[Row]:
    """Pairs counted by segment, tier before and after (null: none), there (has a row of new's model), stale.

    `segment` is that of the new version, else of the old one, else the category.
    """
    pairs, probs = delta.read(spark, root, "pairs"), delta.read(spark, root, "label_probs")

    def under(version: Version, name: str) -> DataFrame:
        found = tiers.labels_under(spark, version.version, stored, probs, pairs)
        return found.select("pair_id", F.col("tier").alias(name), F.col("stale").alias(f"{name}_stale"))

    rows = pairs.select("pair_id", F.coalesce(F.col(segment_column(old, new)), F.lit("")).alias("segment"))
    rows = rows.join(under(new, "after").withColumn("there", F.lit(True)), "pair_id", how="left")
    if old:
        rows = rows.join(under(old, "before"), "pair_id", how="left")
    else:
        rows = rows.withColumn("before", F.lit(None).cast("int"))
    return rows.groupBy("segment", "before", "after", "there", F.col("after_stale").alias("stale")).count().collect()


def summed(counted: list[Row]) -> tuple[Counter[tuple[int | None, int | None]], list[tuple[str, int, int]]]:
    """`tier_changes` as pairs by tier before and after; and as segment, its pairs with a tier before, and how many of
    these change, where most change first."""
    matrix: Counter[tuple[int | None, int | None]] = Counter()
    pairs: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    for r in counted:
        matrix[r["before"], r["after"]] += r["count"]
        if r["before"] is not None:
            pairs[r["segment"]] += r["count"]
            changed[r["segment"]] += r["count"] * (r["before"] != r["after"])
    segments = [(segment, n, changed[segment]) for segment, n in pairs.items()]
    return matrix, sorted(segments, key=lambda told: (-told[2], told[0]))


def segment_column(old: Version | None, new: Version) -> str:
    """The column of pairs by which a change of tiers is told."""
    return new.segment_by or (old.segment_by if old else None) or "category"


def shifted(
    spark: SparkSession, root: str, stored: DataFrame, old: Version | None, new: Version, gates: Gates
) -> list[str]:
    """Prints which tiers change; returns why gates refuse."""
    counted, by = tier_changes(spark, root, stored, old, new), segment_column(old, new)
    total = sum(r["count"] for r in counted)
    unscored = sum(r["count"] for r in counted if not r["there"])
    without = sum(r["count"] for r in counted if r["there"] and r["after"] is None)
    stale = sum(r["count"] for r in counted if r["stale"])
    print(
        f"{JOB}: {total:,} pairs: {unscored:,} without a row of its model and prompt, {without:,} without a "
        f"probability, {stale:,} judged on an older text"
    )
    # A tier that is lost is a change too: publish takes that pair out of the index.
    tiered = [r for r in counted if r["before"] is not None]
    of, change = sum(r["count"] for r in tiered), sum(r["count"] for r in tiered if r["before"] != r["after"])
    lost = sum(r["count"] for r in tiered if r["after"] is None)
    matrix, segments = summed(counted)
    names: dict[int | None, str] = {**dict(NAMES.items()), None: "no tier"}
    print(f"    {'from, to':<12}" + "".join(f"{names[a]:>12}" for a in (*LABELS, None)))
    for b in (*LABELS, None) if old else (None,):
        print(f"    {names[b]:<12}" + "".join(f"{matrix[b, a]:>12,}" for a in (*LABELS, None)))
    if old:
        print(f"{JOB}: {change:,} of {of:,} tiers change ({_percent(change, of)}), {lost:,} of them are lost")
        for segment, n, m in segments[:_SEGMENTS_TOLD] if len(segments) > 1 else ():
            print(f"    {by} {segment[:60] or '(none)':<30} {m:>9,} of {n:>9,} change ({_percent(m, n)})")
    refused = []
    if unscored + without > gates.missing * total:
        refused.append(
            f"{_percent(unscored + without, total)} of the pairs would have no tier, allowed {gates.missing:.2%}: "
            f"{unscored:,} have no row of model {new.model_id} and prompt {new.prompt_id}, {without:,} no probability; "
            "score them (backfill, with --retry-failed for those that failed), or allow more with --max-missing"
        )
    if old and change > gates.shift * of:
        refused.append(
            f"{_percent(change, of)} of the tiers would change, allowed {gates.shift:.2%}; look at the shift above, "
            "and allow it with --max-shift"
        )
    return refused


def fooled(spark: SparkSession, root: str, new: Version, gates: Gates) -> list[str]:
    """Says what the last probe of the version's model found; returns why the gate refuses."""
    flips = [f for f in last_probe(spark, root, new) if not f["segment"] and f["measure"].startswith("flips_")]
    worst = max(flips, key=lambda f: float(f["value"]), default=None)
    if worst is None:
        probe = f"probe --tables {root} --model {new.model_id}"
        prompt = f"asked with prompt {new.prompt_id} (--prompt FILE where that is not the one beside its weights)"
        print(f"{JOB}: how easily model {new.model_id} is fooled is not known; measure it, {prompt}: {probe}")
        return []
    found = f"{worst['value']:.2%} of {worst['n']:,} pairs that model {new.model_id} calls Irrelevant"
    way = worst["measure"].removeprefix("flips_")
    print(f"{JOB}: {found} became Related or better in the worst way of its last probe ({way})")
    if worst["value"] <= gates.flips:
        return []
    return [
        f"{found} became Related or better when a product's text was stuffed ({way}; see probe --help), allowed "
        f"{gates.flips:.2%}; train it on such pairs, or allow more with --max-flips"
    ]


def last_probe(spark: SparkSession, root: str, of: Version) -> list[Row]:
    """The measures of the last probe of a version's model and prompt that had `LEAST` pairs or more; empty where there
    was none."""
    probed = delta.read(spark, root, "runs").where((F.col("job") == "probe") & (F.col("status") == "done"))
    probed = probed.where(models.of(of.model_id, of.prompt_id))
    figures = delta.read(spark, root, "measures")
    enough = figures.where((F.col("segment") == "") & (F.col("n") >= LEAST)).select("run_id")
    last = probed.join(enough, "run_id", how="left_semi").orderBy(F.desc("started_at")).select("run_id").head()
    if last is None:
        return []
    return figures.where(F.col("run_id") == last["run_id"]).orderBy("segment", "measure").collect()


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.2%}" if whole else "none"
