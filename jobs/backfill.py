"""Scores every pair that this model and prompt have not scored, in waves; interrupted, it goes on where it stopped.

backfill --tables T --model M [--where "locale = 'de'"] [--order-by weight] [--limit N] [--deadline 06:00]
backfill --tables T --model M --dry-run          (pairs and tokens; hours too, once a run has told the rate)
backfill --tables T --model M --sample 1%        (both models on a few products: how the tiers would shift)

A new model fills rows beside the old one's; `labels` goes on serving the old one until a version of thresholds of the
new one is promoted, which switches both at once. --where is one SQL condition over the columns of `pairs`. --order-by
takes the most wanted products first: weight, or updated_at for the newest. What is done is known from `label_probs`, so
no list of what is left is kept anywhere.
"""

from __future__ import annotations

import math
import time
from datetime import datetime, timedelta
from typing import Any

from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

import jobs
from jobs.rescore import add_night_flags, end_when_told, exit_code
from partitioner import engines, models, prefix, tiers
from partitioner.night import Night, unjudged
from partitioner.waves import Stopped, about_engine
from schemas import delta, runs
from schemas.crash import crash
from schemas.labels import LABELS
from schemas.tables import PAIRS, SEGMENT_COLUMNS
from udfs.score import Scoring

JOB = "backfill"
ORDERS = ("weight", "updated_at")
PASSES = 3  # over pairs whose text changes while they are scored
# What --where may be made of: reading and comparing columns. By the names of Spark's expressions.
ALLOWED = {
    "And", "Or", "Not", "EqualTo", "EqualNullSafe", "LessThan", "LessThanOrEqual", "GreaterThan",
    "GreaterThanOrEqual", "In", "InSet", "IsNull", "IsNotNull", "Like", "ILike", "RLike", "Contains", "StartsWith",
    "EndsWith", "AttributeReference", "Literal", "Cast", "Lower", "Upper", "Length", "StringTrim", "Add", "Subtract",
    "Multiply", "Divide", "Remainder", "Pmod", "Abs", "UnaryMinus", "Coalesce", "If", "CaseWhen", "Concat",
    "Substring", "ElementAt", "GetMapValue", "MapKeys", "MapValues", "Size", "ArrayContains", "XxHash64",
    "CurrentTimestamp", "CurrentDate", "DateAdd", "DateSub", "TimestampAddInterval", "DateAddInterval", "Between",
    "ParseToDate", "ParseToTimestamp", "DatetimeSub", "SubtractTimestamps", "With",
    "CommonExpressionDef", "CommonExpressionRef",
}  # fmt: skip


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--where", metavar="SQL", help="only pairs for which this holds")
    parser.add_argument("--order-by", choices=ORDERS, help="highest first (default: weight, where pairs bear one)")
    parser.add_argument(
        "--limit", type=jobs.positive, metavar="N", help="score at most so many pairs, the first in that order"
    )
    parser.add_argument(
        "--sample", type=jobs.some, metavar="X", help="only this share of the products, for both models"
    )
    parser.add_argument("--by", choices=SEGMENT_COLUMNS, help="--sample: the table of shifts also by this column")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    add_night_flags(parser)
    jobs.add_scoring_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0 when all that was chosen is scored, 3 where a gate failed, 5 at the deadline."""
    args = flags().parse_args(argv)
    end_when_told()
    spark, what = jobs.opened(args, JOB, jobs.scoring)
    if args.model == models.ACTIVE:
        models.refuse_other_prompt(spark, args.tables, what)
    chosen = Chosen(args.where, args.order_by, args.limit, args.sample)
    if args.sample is not None and not args.dry_run:
        in_force = tiers.active(spark, args.tables)
        if in_force is None or (in_force.model_id, in_force.prompt_id) == what.regime:
            raise ValueError(
                "--sample compares with the model and prompt in force, and there are none other; leave --sample away"
            )
        runs.close_lost(spark, args.tables)
        runs.refuse_second(spark, args.tables, JOB, *what.regime)  # before the other model's run begins
        models.refuse_as_scorer(spark, args.tables, what)
        before = jobs.in_force(spark, args)
        run = backfill(spark, args.tables, before, chosen, False, args.retry_failed, args.max_refused, args.deadline)
        if exit_code(run):
            return exit_code(run)
    run = backfill(spark, args.tables, what, chosen, args.dry_run, args.retry_failed, args.max_refused, args.deadline)
    if args.sample is not None and not args.dry_run:
        print(*shifts(spark, args.tables, what, chosen, args.by), sep="\n", flush=True)
    return exit_code(run)


class Chosen:
    """Which pairs: a condition, an order, how many, which share of the products."""

    def __init__(
        self,
        where: str | None = None,
        order_by: str | None = None,
        limit: int | None = None,
        sample: float | None = None,
    ) -> None:
        self.where, self.order_by, self.limit, self.sample = where, order_by, limit, sample

    def of(self, pairs: DataFrame) -> DataFrame:
        """The pairs that may be scored, before the limit. Raises ValueError for a condition that is none."""
        if self.where is not None:
            pairs = pairs.where(condition(pairs, self.where))
        if self.sample is not None:
            # The same products for every model, whichever pairs are there.
            drawn = F.pmod(F.xxhash64("locale", "product_id"), F.lit(1_000_000))
            pairs = pairs.where(drawn < math.ceil(self.sample * 1_000_000))
        return pairs

    @property
    def wanted(self) -> Column | None:
        """What comes first, highest first; None: what the pairs' weight says."""
        return F.col(self.order_by) if self.order_by else None


def condition(pairs: DataFrame, text: str) -> Column:
    """`--where` as one condition over the columns of `pairs`. Raises ValueError for anything else.

    It is the operator's own text and no sandbox; but it can only read and compare the columns of the one table.
    """
    help_ = f"Wanted is one condition over the columns of pairs ({', '.join(PAIRS.names)}), such as: locale = 'de'"
    try:
        wanted = F.expr(text)
        plan: Any = pairs.where(wanted)._jdf.queryExecution().analyzed()
    except PySparkException as error:
        raise ValueError(f"--where {text!r}: {runs.in_a_line(error)} {help_}") from error
    if plan.getClass().getSimpleName() != "Filter":  # _metadata puts a node of its own before the condition
        raise ValueError(f"--where {text!r}: only the columns of pairs can be asked for. {help_}")
    inside = [plan.expressions().apply(i) for i in range(plan.expressions().size())]
    while inside:
        one = inside.pop()
        if (name := one.getClass().getSimpleName()) not in ALLOWED:
            raise ValueError(f"--where {text!r}: {one.prettyName()} ({name}) is not allowed here. {help_}")
        inside += [one.children().apply(i) for i in range(one.children().size())]
    return wanted


def backfill(
    spark: SparkSession,
    root: str,
    what: Scoring,
    chosen: Chosen | None = None,
    dry_run: bool = False,
    retry_failed: bool = False,
    max_refused: float = math.inf,
    deadline: datetime | None = None,
) -> runs.Run:
    """Scores what is not scored yet of the chosen pairs; returns the run's row.

    Raises ValueError, before any work, for a condition that is none, a foreign prompt, and a second run of its like.
    """
    models.refuse_as_scorer(spark, root, what)
    chosen = chosen or Chosen()
    chosen.of(delta.read(spark, root, "pairs"))  # a wrong condition stops it here
    job = f"{JOB} --dry-run" if dry_run else JOB  # of its own: a real one may start beside it
    run = runs.start(spark, root, job, what.model.model_id, what.prompt.prompt_id, alone=not dry_run)
    fill = Backfill(spark, root, what, run)
    fill.chosen, fill.max_refused, fill.deadline = chosen, max_refused, deadline
    crash("started")
    with fill.at_work():
        if dry_run:
            fill.predict()
            return runs.finish(spark, root, fill.run, "done", "dry run")
        try:
            with engines.kept_alive(spark, what.settings.tensor_parallel):
                fill.forget_removed_pairs()
                fill.follow_pairs()
                if retry_failed:
                    fill.retry_failed()
                message = fill.fill()
        except Stopped as stopped:
            print(f"{JOB}: {stopped}", flush=True)
            return fill.close("stopped", str(stopped))
        done = fill.close(message=message)
    crash("finished")
    return done


class Backfill(Night):
    """One run over the pairs that a model has not judged."""

    chosen: Chosen
    _taken = 0  # pairs that count against the limit
    _predicted: float | None = None  # engine seconds

    def fill(self) -> str | None:
        """Scores what is left, and again what changed meanwhile; returns a sentence where that did not come to an end.
        Raises Stopped at the deadline."""
        for number in range(PASSES):
            judged = self.judged()
            line = self.score(self.chosen_pairs(), f"{number:04d}", judged)
            if not line.prompts or self.chosen.limit or delta.version(self.spark, self.root, "pairs") == self._version:
                return None
        told = f"pairs changed again while they were scored, {PASSES} times over; what came last is for the next run"
        print(f"{JOB}: {told}", flush=True)
        return told

    def chosen_pairs(self) -> DataFrame:
        """Those that the operator chose."""
        return self.chosen.of(self.pairs())

    def plan(
        self, seen: DataFrame, name: str, judged: DataFrame, wanted: Column | None = None
    ) -> tuple[prefix.Line, int]:
        """As a night does; of what is to be done only the first so many, where there is a limit."""
        wanted = self.chosen.wanted if wanted is None else wanted
        if self.chosen.limit:
            first = F.col("weight") if wanted is None else wanted
            # Without their texts: so many are held by each task, and by one in the end.
            every = unjudged(seen, judged).select(
                "pair_id", first.alias("first"), F.xxhash64("locale", "product_id").alias("product")
            )
            some = every.orderBy(F.desc_nulls_last("first"), "product", "pair_id")
            some = some.limit(self.chosen.limit - self._taken).select("pair_id")
            some = delta.land(self.spark, self.root, self.run.run_id, f"{name}-chosen", some)
            seen = seen.join(some, "pair_id", how="left_semi")
        line, total = super().plan(seen, name, judged, wanted)
        self._taken += line.prompts
        return line, total

    def planned(self, line: prefix.Line, total: int, seconds: float) -> None:
        """Tells also when it will be done, and keeps that, so that the run's row can hold it against what came."""
        super().planned(line, total, seconds)
        rate, source = self.measured_rate()
        if not rate:
            print(f"{JOB}: no rate of this model was measured yet; a first run with --limit 500 brings one", flush=True)
            return
        self._predicted = (self._predicted or 0.0) + line.length / rate
        self._measure(predicted_engine_seconds=self._predicted)
        hours = self._predicted / engines.count(self.spark)
        print(
            f"{JOB}: {self._predicted / 3600:,.2f} engine hours at {rate:,.0f} tokens/s ({source}), so done at about "
            f"{datetime.now() + timedelta(seconds=hours):%d %b %H:%M} on {_engines(self)}",
            flush=True,
        )

    def predict(self) -> None:
        """The same, without any engine."""
        started = time.monotonic()
        line, total = self.plan(self.chosen_pairs(), "plan", self.judged())
        self._count(seen=total, skipped=total - line.prompts)
        if line.prompts:
            self.planned(line, total, time.monotonic() - started)
        else:
            print(f"{JOB}: nothing to do, {total:,} pairs are scored", flush=True)

    def measured_rate(self) -> tuple[float, str]:
        """Tokens of work that one engine does in a second, and where that is known from; 0 where it is not."""
        mine = (F.col("model_id") == self.what.model.model_id) & (F.col("settings_hash") == self.settings_hash)
        here = F.col("engine_version").endswith(" cpu") == engines.on_cpu()
        rows = runs.table(self.spark, self.root).where(mine & here & F.col("job").isin("rescore", JOB))
        rows = rows.where(F.col("figures")["tokens_per_second"] > 0).orderBy(
            (F.col("engine_seconds") > 60).desc(), F.desc("started_at")
        )
        if row := rows.select("run_id", F.col("figures")["tokens_per_second"].alias("rate")).head():
            return float(row["rate"]), f"run {row['run_id']}"
        known = models.row(self.spark, self.root, self.what.model.model_id)
        rate = (known["metrics"] or {}).get(f"tokens_per_second {about_engine(self.what)}", 0.0) if known else 0.0
        return float(rate), "the first-use check, a low guess"

    def close(self, status: str = "done", message: str | None = None) -> runs.Run:
        """Also keeps how far the prediction was off: predicted ÷ actual engine seconds - 1."""
        if self._predicted and self.run.engine_seconds and status == "done":
            self._measure(prediction_error=self._predicted / self.run.engine_seconds - 1)
        return super().close(status, message)


def _engines(fill: Backfill) -> str:
    count = engines.count(fill.spark)
    return f"{count} engine{'s' if count > 1 else ''}"


def shifts(spark: SparkSession, root: str, what: Scoring, chosen: Chosen, by: str | None) -> list[str]:
    """How the tiers of the chosen pairs would shift from the model in force to this one, for people.

    Each model is cut by its own thresholds: those in force, and the newest version fitted for the other; where that has
    none yet, its likeliest label counts as its tier.
    """
    stored = delta.read(spark, root, "thresholds")
    in_force = tiers.active(spark, root)
    if in_force is None:
        raise ValueError("no version of thresholds is in force")
    mine = models.of(*what.regime)
    newest = stored.where(mine).orderBy(F.desc("version")).select("version").head()
    pairs = chosen.of(delta.read(spark, root, "pairs"))
    probs = delta.read(spark, root, "label_probs").where("outcome = 'scored'")

    def tiered(version: int) -> DataFrame:
        found = tiers.labels_under(spark, version, stored, probs, pairs)
        return found.where("tier IS NOT NULL AND NOT stale")

    old = tiered(in_force.version).select("pair_id", F.col("tier").alias("old"))
    if newest:
        cut = f"version {newest['version']}"
        new = tiered(newest["version"]).select("pair_id", F.col("tier").alias("new"))
    else:
        cut = "its likeliest label (no version is fitted)"
        new = probs.where(mine).select("pair_id", tiers.likeliest().alias("new"))
    segment_of = pairs.select("pair_id", (F.col(by) if by else F.lit("")).alias("segment"))
    both = old.join(new, "pair_id", how="inner").join(segment_of, "pair_id", how="inner")
    cells = both.groupBy("segment", "old", "new").count().collect()
    told = [f"{JOB}: tiers of the sample, version {in_force.version} -> model {what.model.model_id}, cut by {cut}"]
    segments = sorted({row["segment"] or "" for row in cells}) if by else []
    for segment in [None, *segments]:
        mine_ = [row for row in cells if segment in (None, row["segment"] or "")]
        total = sum(row["count"] for row in mine_)
        if not total:
            told.append(f"{JOB}: no pair of the sample is judged by both")
            continue
        moved = sum(row["count"] for row in mine_ if row["old"] != row["new"])
        name = "all" if segment is None else f"{by} = {segment or 'none'}"
        told.append(f"{JOB}:   {name}: {total:,} pairs, {moved / total:.1%} change their tier")
        for label in LABELS:
            counts = {row["new"]: 0 for row in mine_}
            for row in mine_:
                if row["old"] == label:
                    counts[row["new"]] += row["count"]
            if sum(counts.values()):
                told.append(f"{JOB}:     {label} -> " + "  ".join(f"{to}: {counts.get(to, 0):,}" for to in LABELS))
    return told
