"""Writes the reasoning behind labels, for the pairs that an SQL query selects.

explain --tables T --model M --pairs "SELECT pair_id FROM label_probs WHERE p_excellent BETWEEN 0.45 AND 0.55"

The query sees the tables under their names and returns a column pair_id. A pair must have been scored by the same model
and prompt: the label that the scores chose (the likeliest one) is put behind the prompt, and the model goes on from it,
so label and reasoning are of one answer. What it wrote goes to `explanations`; a chain that concludes another label
than its own is marked (`contradicts`). What is explained already, with the same label and text, is not asked again.
The query is the operator's own, with all that Spark's SQL functions can do: it is no sandbox.
"""

from __future__ import annotations

import time

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import jobs
from jobs.sample import refuse_wrong_draw
from partitioner import models, tiers
from partitioner.waves import Drawing
from schemas import delta, runs
from schemas.labels import LABELS, NAMES
from schemas.tables import EXPLANATIONS
from udfs.answer import form
from udfs.engine import Sampling
from udfs.render import rendered
from udfs.score import Scoring

JOB = "explain"
SHOWN = 5
# Why a selected pair is not explained.
REASONS = {
    "unknown": "there is no such pair",
    "not_scored": "this model has not scored it with this prompt",
    "stale": "its text changed since it was scored",
    "no_label": "it was scored without a result, and is asked again by --retry-failed",
}


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--pairs", required=True, metavar="SQL", help="a query that returns a column pair_id")
    parser.add_argument(
        "--limit", type=jobs.positive, default=1000, help="explain at most so many pairs (default 1000)"
    )
    parser.add_argument(
        "--max-tokens", type=jobs.positive, default=96, help="of a chain, its end included (default 96)"
    )
    jobs.add_scoring_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0, also where pairs were too long or the engine died on them, which it tells."""
    args = flags().parse_args(argv)
    spark, what = jobs.opened(args, JOB, jobs.scoring)
    explain(spark, args.tables, what, args.pairs, args.limit, args.max_tokens)
    return 0


def explain(
    spark: SparkSession, root: str, what: Scoring, pairs: str, limit: int = 1000, max_tokens: int = 96
) -> runs.Run:
    """Writes the missing explanations of the pairs that the query `pairs` selects; returns the run's row.

    Raises ValueError for a query that cannot be run, and where none of the selected pairs can be explained.
    """
    models.refuse_as_scorer(spark, root, what)
    made = form(what.model, what.prompt)
    asked = Sampling(max_tokens, made.end_ids, temperature=0.0)
    refuse_wrong_draw(asked, what)
    selected = jobs.selected(spark, root, JOB, pairs, limit)
    run = runs.start(spark, root, JOB, what.model.model_id, what.prompt.prompt_id)
    reasoning = Reasoning(spark, root, what, run)
    reasoning.form, reasoning.sampling = made, asked
    with reasoning.at_work():
        reasoning.write_missing(selected)
        run = runs.finish(spark, root, reasoning.run, "done")
    print(*told(spark, root, run, selected), sep="\n", flush=True)
    return run


class Reasoning(Drawing):
    """One run: the reasoning of chosen pairs, greedily continued from the labels that the scores chose."""

    least = 512
    begun = 1

    def write_missing(self, selected: DataFrame) -> None:
        """Explains what can be explained and is not yet."""
        started = time.monotonic()
        what = self.what
        mine = models.of(*what.regime)
        probs = self.judged().select(
            "pair_id", "outcome", F.col("content_hash").alias("scored_hash"), tiers.likeliest().alias("label")
        )
        old = delta.read(self.spark, self.root, "explanations").where(mine)
        old = old.select("pair_id", F.col("label").alias("old_label"), F.col("content_hash").alias("old_hash"))
        texts = delta.read(self.spark, self.root, "pairs").select("pair_id", "content_hash")
        looked = selected.join(texts, "pair_id", how="left").join(probs, "pair_id", how="left")
        looked = looked.join(old, "pair_id", how="left").withColumn(
            "reason",
            F.when(F.col("content_hash").isNull(), "unknown")
            .when(F.col("outcome").isNull(), "not_scored")
            .when(F.col("scored_hash") != F.col("content_hash"), "stale")
            .when(F.col("label").isNull(), "no_label")
            .when((F.col("old_label") == F.col("label")) & (F.col("old_hash") == F.col("content_hash")), "skipped"),
        )
        looked = looked.select("pair_id", "label", "content_hash", "reason").localCheckpoint()
        counts = {row["reason"]: row["count"] for row in looked.groupBy("reason").count().collect()}
        total = sum(counts.values())
        self._count(seen=total, **{reason: count for reason, count in counts.items() if reason})
        if not counts.keys() & {None, "skipped"}:
            why = "; ".join(f"{counts[r]:,}: {sentence}" for r, sentence in REASONS.items() if r in counts)
            raise runs.Unmet(
                f"none of the {total:,} selected pairs can be explained ({why}); score them first: rescore --tables "
                f"{self.root} --model {what.model.path}"
            )
        todo = looked.where("reason IS NULL").select("pair_id", "label")
        pairs = delta.read(self.spark, self.root, "pairs").join(todo, "pair_id", how="left_semi")
        token = F.create_map(*[F.lit(x) for pair in zip(LABELS, what.prompt.label_ids, strict=True) for x in pair])
        prompts = rendered(pairs, what.prompt).join(todo, "pair_id", how="inner")
        line = self.land_line(prompts.withColumn("ids", F.array_append("ids", token[F.col("label")])), "chains")
        self.run_through(line, "chains", total, started, self.sampling.max_tokens)

    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Merges the wave into `explanations`."""
        one = answered.where(F.col("outcome") == self.done).withColumn("one", F.col("samples")[0])
        rows = one.select(
            "pair_id",
            F.lit(self.what.model.model_id).alias("model_id"),
            F.lit(self.what.prompt.prompt_id).alias("prompt_id"),
            "label",
            F.lit("argmax").alias("label_source"),
            "one.chain",
            "one.conclusion",
            (F.col("one.conclusion").isNotNull() & ~F.col("one.conclusion").eqNullSafe(F.col("label"))).alias(
                "contradicts"
            ),
            "one.tokens",
            "one.finished",
            "content_hash",
            F.lit(self.run.run_id).alias("run_id"),
            F.current_timestamp().alias("created_at"),
        )
        delta.upsert(self.spark, self.root, "explanations", rows.select(*EXPLANATIONS.names), "true", self.same)


def told(spark: SparkSession, root: str, run: runs.Run, selected: DataFrame) -> list[str]:
    """What became of the selected pairs, and a few of the chains, for people."""
    counts = run.counts
    lines = [
        f"{JOB}: done · {counts['seen']:,} pairs, {counts.get('sampled', 0):,} explained, "
        f"{counts.get('skipped', 0):,} were there, {counts.get('refused', 0):,} without an answer (too long, or the "
        "engine died of them)"
    ]
    lines += [f"{JOB}:   {counts[r]:,} not explained: {sentence}" for r, sentence in REASONS.items() if r in counts]
    mine = delta.read(spark, root, "explanations").where(models.of(run.model_id, run.prompt_id))
    mine = mine.join(selected, "pair_id", how="left_semi").join(
        delta.read(spark, root, "pairs").select("pair_id", "query", "title"), "pair_id", how="inner"
    )
    found = mine.localCheckpoint()
    figures = found.agg(
        F.count("*"),
        F.count_if("contradicts"),
        F.count_if(F.col("conclusion").isNull()),
        F.count_if(~F.col("finished")),
    ).collect()[0]
    lines.append(
        f"{JOB}:   of {figures[0]:,} chains {figures[1]:,} contradict their label, {figures[2]:,} conclude nothing, "
        f"{figures[3]:,} were cut"
    )
    for row in found.orderBy(F.desc("contradicts"), "pair_id").limit(SHOWN).collect():
        mark = " [contradicts]" if row["contradicts"] else ""
        lines.append(f"{JOB}:   {row['query']} · {row['title']} · {NAMES[row['label']]}: {row['chain']}{mark}")
    return lines
