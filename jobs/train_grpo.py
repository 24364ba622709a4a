"""GRPO with difficulty-based dynamic sampling: the last stage of a model (TaoSR1, section 3.3).

train_grpo --tables T --model PARENT --out DIR --steps N

The policy answers train pairs in groups and learns from what sets a group's better answers apart. Pairs that it always
or never gets right are left out, harder ones are drawn oftener, and pass rates are read off the policy anew every R
steps. Rewards (a right label, an answer's form, a chain that concludes its label) are logged apart, with KL, entropy,
length and the share of groups without spread, in DIR/log.jsonl and as charts in DIR/log.html. `--sampling uniform`
draws all pairs alike, to compare with.
"""

from __future__ import annotations

from typing import Any

from pyspark.sql import functions as F

import jobs
from jobs import train_sft
from schemas import gold
from udfs.render import rendered
from udfs.train import TrainSettings

JOB = "train_grpo"


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    train_sft.add_training_flags(parser, learning_rate=3e-5)
    train_sft.add_batch_flag(parser, "tokens of one sequence when pass rates are read")
    parser.add_argument("--steps", type=jobs.at_least(1), required=True, metavar="N", help="steps of the optimizer")
    parser.add_argument(
        "--groups", type=jobs.at_least(1), default=TrainSettings.groups, help="pairs in one step and process"
    )
    parser.add_argument("--group", type=jobs.at_least(2), default=TrainSettings.group, help="answers to a pair")
    parser.add_argument("--max-tokens", type=jobs.at_least(2), default=TrainSettings.max_tokens, help="of an answer")
    parser.add_argument(
        "--generated-tokens",
        type=jobs.at_least(0),
        default=TrainSettings.generated_tokens,
        help="end after so many tokens of answers (0: never)",
    )
    parser.add_argument(
        "--refresh",
        type=jobs.at_least(1),
        default=TrainSettings.refresh,
        metavar="R",
        help="steps between readings of the pass rates (label first; not with --sampling uniform)",
    )
    parser.add_argument("--sampling", choices=("difficulty", "uniform"), default="difficulty")
    parser.add_argument("--beta", type=jobs.number, default=0.02, help="weight of the KL term")
    parser.add_argument(
        "--rewards",
        type=jobs.number,
        nargs=3,
        default=TrainSettings.rewards,
        metavar=("RIGHT", "FORM", "AGREES"),
        help="weights",
    )
    return parser


def main(argv: list[str]) -> int:
    """Trains and registers; returns 0."""
    args = flags().parse_args(argv)
    spark, lesson = train_sft.opened(args, JOB)
    how = train_sft.settings(args, lesson, "grpo", rewards=tuple(args.rewards), uniform=args.sampling == "uniform")
    pairs = train_sft.limited(gold.learnt_from(spark, args.tables, args.source), args)
    # A pass rate is that of the policy as it is, at temperature 1; runs at others say nothing about it.
    asked = train_sft.answered(spark, args, lesson, pairs, "temperature = 1")
    rates = asked.groupBy("pair_id", "content_hash").agg(
        F.avg(F.col("correct").cast("double")).alias("rate"), F.count("*").alias("answers")
    )
    prompts = rendered(pairs, lesson.prompt).select("pair_id", "content_hash", "ids", "group_tokens")
    rows = (
        prompts.join(pairs.select("pair_id", "label"), "pair_id", how="inner")
        .join(rates, ["pair_id", "content_hash"], how="left")
        .orderBy("ids", "pair_id")
    )
    data: list[dict[str, Any]] = [
        train_sft.parts(row) | {name: row[name] for name in ("label", "rate", "answers")}
        for row in rows.toArrow().to_pylist()
    ]
    if not data:
        raise ValueError(train_sft.no_pairs(args))
    known = sum(row["rate"] is not None for row in data)
    if 0 < known < len(data) and lesson.form.order == "pre" and not how.uniform:  # its rates are read nowhere else
        print(f"{JOB}: {len(data) - known:,} pairs were not sampled, so are left out", flush=True)
        data = [row for row in data if row["rate"] is not None]
    if not known and lesson.form.order == "pre" and not how.uniform:
        raise ValueError(
            f"{args.model} answers chain first, so pass rates come from its samples alone, and there are none; draw "
            f"some (sample --tables {args.tables} --model {args.model}), or all pairs alike (--sampling uniform)"
        )
    print(f"{JOB}: {len(data):,} train pairs, {known:,} with sampled answers of this model", flush=True)
    train_sft.train(spark, args, lesson, how, data, form=lesson.form)
    return 0
