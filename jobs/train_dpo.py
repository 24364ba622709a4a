"""DPO on the model's own answers: right ones preferred to wrong ones of the same pair (TaoSR1, section 3.2).

train_dpo --tables T --model PARENT --out DIR

PARENT must have sampled the train split (`sample --model PARENT`). Of each pair that it got both right and wrong, a few
right answers are set against wrong ones in the table `preferences`, which holds PARENT's latest choice (what a model
learnt from stays in its folder); pairs without a right answer cannot teach here and are counted and listed: they are
the teacher's next work. What is made lies in DIR and is registered in `models`.
"""

from __future__ import annotations

import argparse
from typing import Any

from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

import jobs
from jobs import train_sft
from partitioner import models
from schemas import delta, gold
from schemas.labels import LABELS, NAMES
from schemas.tables import PREFERENCES
from udfs.render import rendered

JOB = "train_dpo"
LISTED = 10  # all-wrong pairs that are printed
NEVER_RIGHT = "SELECT pair_id FROM samples WHERE run_id = '{}' GROUP BY pair_id HAVING NOT bool_or(correct)"


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    train_sft.add_training_flags(parser, learning_rate=5e-5)
    train_sft.add_epoch_flags(parser, epochs=1)
    parser.add_argument("--beta", type=jobs.number, default=0.1, help="how dear it is to move away from the parent")
    parser.add_argument(
        "--label-weight", type=jobs.number, default=1.0, help="of a label in what is preferred, a chain token has 1"
    )
    parser.add_argument(
        "--per-pair", type=jobs.positive, default=2, metavar="N", help="preferences of one pair, at most"
    )
    return parser


def main(argv: list[str]) -> int:
    """Builds the preferences, trains and registers; returns 0."""
    args = flags().parse_args(argv)
    spark, lesson = train_sft.opened(args, JOB)
    how = train_sft.settings(args, lesson, "dpo")
    pairs = gold.learnt_from(spark, args.tables, args.source)
    found = samples(spark, args, lesson, pairs)
    pairs = train_sft.limited(pairs.join(found, "pair_id", how="left_semi"), args)
    answers = found.join(pairs, "pair_id", how="left_semi")
    chosen = preferences(answers, args.per_pair, args.seed).localCheckpoint()
    tell(spark, args, answers, chosen)
    preferred = pairs.join(chosen.select("pair_id").distinct(), "pair_id", how="left_semi")
    rows = rendered(preferred, lesson.prompt).select("pair_id", "ids").join(chosen, "pair_id", how="inner")
    data: list[dict[str, Any]] = [
        {
            "pair_id": row["pair_id"],
            "prompt": row["ids"],
            "chosen": lesson.form.target(row["label"], row["chosen_chain"]),
            "rejected": lesson.form.target(row["rejected_label"], row["rejected_chain"] or None),  # a label alone
        }
        for row in rows.orderBy("ids", "pair_id", "chosen_sample", "rejected_sample").toArrow().to_pylist()
    ]
    if not data:
        raise ValueError(why_none(answers, args))
    label_at = lesson.form.label_at
    train_sft.train(spark, args, lesson, how, data, lambda: put(spark, args, lesson, chosen), label_at=label_at)
    return 0


def samples(spark: SparkSession, args: argparse.Namespace, lesson: train_sft.Lesson, pairs: DataFrame) -> DataFrame:
    """The parent's answers that there is something to learn from. Raises ValueError without any."""
    found = train_sft.answered(spark, args, lesson, pairs)
    if found.isEmpty():
        raise ValueError(
            f"model {lesson.parent.model_id} has not answered any train pair yet; ask it: sample --tables "
            f"{args.tables} --model {args.model} --split train"
        )
    return found


def preferences(answers: DataFrame, per_pair: int, seed: int) -> DataFrame:
    """Right against wrong answers of the same pair, as rows of `preferences`.

    A right answer is finished, has the human label and a chain that concludes it; a wrong one is finished and has
    another label. Equal answers count once. Of each pair at most `per_pair`, chosen by a hash; of each human label at
    most an equal share of all that were found, so that the labels it confuses most do not drown the others.
    """
    told = ["pair_id", "model_id", "prompt_id", "run_id", "gold", "content_hash"]
    finished = answers.where("finished AND label IS NOT NULL")

    def side(rows: DataFrame, name: str) -> DataFrame:
        once = rows.groupBy(*told, "label", "chain").agg(F.min("sample").alias("sample"))
        order = Window.partitionBy("pair_id").orderBy(F.xxhash64("pair_id", "sample", F.lit(seed)))
        return once.withColumn("place", F.row_number().over(order)).select(
            *told,
            "place",
            F.col("sample").alias(f"{name}_sample"),
            F.col("label").alias(f"{name}_label"),
            F.col("chain").alias(f"{name}_chain"),
        )

    right = side(finished.where("correct AND agrees"), "chosen")
    wrong = side(finished.where("NOT correct"), "rejected")
    # The first right with the first wrong, the second with the second; what one side lacks does not repeat the other.
    matched = right.join(wrong, [*told, "place"], how="inner").where(F.col("place") <= per_pair)
    order = Window.partitionBy("gold").orderBy(F.xxhash64("pair_id", F.lit(seed)), "place")
    share = matched.agg(F.ceil(F.try_divide(F.count("*"), F.count_distinct("gold"))).alias("share"))
    balanced = matched.withColumn("rank", F.row_number().over(order)).crossJoin(share).where("rank <= share")
    return (
        balanced.withColumn("label", F.col("gold"))
        .withColumn("created_at", F.current_timestamp())
        .select(*PREFERENCES.names)
    )


def why_none(answers: DataFrame, args: argparse.Namespace) -> str:
    """Why there are no preferences, and what to do."""
    readable = answers.where("finished AND label IS NOT NULL").groupBy("pair_id")
    by_pair = readable.agg(F.bool_or("correct").alias("right"), F.bool_and("correct").alias("always"))
    if by_pair.where("right AND NOT always").isEmpty():
        return (
            "no train pair was answered both rightly and wrongly, so there is nothing to prefer; sample more answers "
            f"(sample --tables {args.tables} --model {args.model} --n 16), or go on with train_grpo"
        )
    return (
        "pairs were answered both rightly and wrongly, but no right answer to them has a chain that concludes its "
        "label (a model that was taught --labels-only writes none); teach it chains, or go on with train_grpo"
    )


def put(spark: SparkSession, args: argparse.Namespace, lesson: train_sft.Lesson, chosen: DataFrame) -> None:
    """Writes the parent's preferences; those of an earlier choice that are none any more go."""
    earlier = delta.read(spark, args.tables, "preferences").where(
        models.of(lesson.parent.model_id, lesson.prompt.prompt_id)
    )
    gone = earlier.join(chosen, list(PREFERENCES.key), how="left_anti")
    if not gone.isEmpty():
        delta.delete(spark, args.tables, "preferences", gone.localCheckpoint(), PREFERENCES.key)
    delta.upsert(spark, args.tables, "preferences", chosen)


def tell(spark: SparkSession, args: argparse.Namespace, answers: DataFrame, chosen: DataFrame) -> None:
    """What there was to prefer, by label, and which pairs nobody got right."""
    by_pair = answers.groupBy("pair_id", "gold").agg(
        F.sum(F.col("correct").cast("int")).alias("right"), F.count("*").alias("n")
    )
    sides = (
        by_pair.groupBy("gold")
        .agg(
            F.count("*").alias("pairs"),
            F.sum((F.col("right") == 0).cast("int")).alias("all_wrong"),
            F.sum((F.col("right") == F.col("n")).cast("int")).alias("all_right"),
        )
        .collect()
    )
    made = {row["label"]: row["count"] for row in chosen.groupBy("label").count().collect()}
    found = {row["gold"]: row for row in sides}
    for label in LABELS:
        if row := found.get(label):
            print(
                f"{JOB}:   {label} {NAMES[label]}: {made.get(label, 0):,} preferences of {row['pairs']:,} pairs "
                f"({row['all_right']:,} always right, {row['all_wrong']:,} never)"
            )
    never = by_pair.where("right = 0").join(delta.read(spark, args.tables, "pairs"), "pair_id", how="inner")
    for row in never.orderBy(F.xxhash64("pair_id")).limit(LISTED).collect():
        print(f"{JOB}:   never right: {row['gold']} {row['query'][:60]!r} and {row['title'][:60]!r}")
    if total := sum(row["all_wrong"] for row in sides):
        # A run is of one model, prompt and split.
        (run,) = answers.select("run_id").distinct().collect()
        list_them = NEVER_RIGHT.format(run[0])
        print(
            f"{JOB}: {total:,} pairs were never right: a teacher's next work (write_chains --tables {args.tables} "
            f'--model TEACHER --pairs "{list_them}", which are all that this run asked)',
            flush=True,
        )
