"""Samples N answers for each judged pair of a split, and says how often the model is right: pass@k.

sample --tables T --model M [--split train] [--n 8] [--temperature 1.0] [--seed 0] [--limit PAIRS] [--findings]

Pairs are lined up by prefix and sharded over the engines as rescore does; the N samples of a pair share its prompt.
The answers go to `samples`, a wave at a time: the same command goes on where it was killed, and does nothing where all
is there; another --seed draws anew. pass@k is docs/pass_at_k.sql, over `samples`. --findings asks the model once more,
for each different chain, which label its findings lead to, with the label and the closing statement out of sight.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from dataclasses import replace
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema

import jobs
from partitioner import models, tiers
from partitioner.waves import Drawing, Waves
from schemas import delta, gold, runs
from schemas.canonical import SPLITS
from schemas.labels import LABELS, NAMES
from schemas.tables import SAMPLES
from udfs import adapter
from udfs.answer import ORDERS, Form, form
from udfs.engine import Sampling
from udfs.render import rendered
from udfs.sample import questioner
from udfs.score import Scoring

JOB = "sample"
# One row for each pair, each k (1, 2, 4 … and n) and each way to be right, from nothing but `samples`. For readers it
# stands in docs/pass_at_k.sql.
# pass is the unbiased estimate of the chance that at least one of k answers is right (Chen et al. 2021, arXiv
# 2107.03374): 1 − C(n−c, k) / C(n, k) with c right ones of n. The quotient is the product of 1 − k/j over j from
# n−c+1 to n, one factor for each right sample: a sum of logarithms, exact to 1e-12 for n = 1000.
PASS_AT_K = """
WITH judged AS (
    SELECT run_id, pair_id, gold, sample, 'label' AS what, correct AS is_right FROM samples
    UNION ALL
    SELECT run_id, pair_id, gold, sample, 'label and chain' AS what, correct AND agrees AND finished AS is_right
    FROM samples
),
counted AS (
    SELECT run_id, pair_id, gold, what, count(*) AS n, sum(CASE WHEN is_right THEN 1 ELSE 0 END) AS c
    FROM judged GROUP BY run_id, pair_id, gold, what
),
ks AS (
    SELECT DISTINCT run_id, sample + 1 AS k FROM samples
    WHERE sample + 1 IN (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    UNION
    SELECT run_id, max(sample) + 1 AS k FROM samples GROUP BY run_id
),
placed AS (
    SELECT run_id, pair_id, what, row_number() OVER (PARTITION BY run_id, pair_id, what ORDER BY sample) AS place
    FROM judged WHERE is_right
)
SELECT counted.run_id, counted.pair_id, counted.gold, counted.what, counted.n, counted.c, ks.k,
    CASE
        WHEN counted.c = 0 THEN 0.0
        WHEN counted.n - counted.c < ks.k THEN 1.0
        ELSE 1.0 - exp(sum(ln(
            CASE
                WHEN counted.n - counted.c < ks.k OR placed.place IS NULL THEN CAST(1 AS DOUBLE)
                ELSE 1 - CAST(ks.k AS DOUBLE) / (counted.n - counted.c + placed.place)
            END
        )))
    END AS pass
FROM counted
JOIN ks ON ks.run_id = counted.run_id AND ks.k <= counted.n
LEFT JOIN placed
    ON placed.run_id = counted.run_id AND placed.pair_id = counted.pair_id AND placed.what = counted.what
GROUP BY counted.run_id, counted.pair_id, counted.gold, counted.what, counted.n, counted.c, ks.k
"""  # noqa: S105 (no password)


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--split", default="train", choices=SPLITS, help="part of gold (default train)")
    parser.add_argument("--source", metavar="NAME", help="take the labels of this source of gold only")
    parser.add_argument("--limit", type=jobs.positive, metavar="PAIRS", help="so many pairs, always the same ones")
    parser.add_argument(
        "--findings", action="store_true", help="judge the findings of each chain too; half as dear again"
    )
    add_sampling_flags(parser)
    jobs.add_scoring_flags(parser)
    parser.set_defaults(max_num_seqs=256)  # 634 tokens a second on 2 cores, against 535 with 128 and 409 with 64
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0, also where pairs were too long or the engine died on them, which it tells."""
    args = flags().parse_args(argv)
    spark, asked = jobs.opened(args, JOB, drawing)
    sample(spark, args.tables, *asked, split=args.split, source=args.source, limit=args.limit, findings=args.findings)
    return 0


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say how answers are drawn."""
    parser.add_argument("--n", type=int, default=8, help="samples of each pair (default 8)")
    parser.add_argument("--temperature", type=float, default=1.0, help="default 1: the model's own probabilities")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer, its end included (default 64)")
    parser.add_argument("--seed", type=jobs.seed, default=0, help="another seed draws other answers")
    parser.add_argument(
        "--order", choices=ORDERS, help="post: label, then chain; pre: chain first (default: as it was taught, or post)"
    )


def drawing(args: argparse.Namespace, folder: str, stage: str) -> tuple[Scoring, Form, Sampling]:
    """Who is asked, the answers' form, and how they are drawn. Raises ValueError with a sentence."""
    what = jobs.scoring(args, folder, stage)
    return what, *sampling(args, what)


def sampling(args: argparse.Namespace, what: Scoring) -> tuple[Form, Sampling]:
    """The answers' form and how they are drawn. Raises ValueError with a sentence."""
    asked = Sampling(args.max_tokens, (), args.n, args.temperature, args.seed)
    refuse_wrong_draw(asked, what)
    made = form(what.model, what.prompt, order(args.order, what.model.path))
    return made, dataclasses.replace(asked, end_ids=made.end_ids)


def order(asked: str | None, folder: str) -> str:
    """The order in which a model answers. Raises ValueError where it was taught another than the one asked for."""
    taught = adapter.recipe(folder).get("order")
    if taught and asked not in (None, taught):
        raise ValueError(f"--order {asked}: {folder} was taught --order {taught}; leave --order away")
    return asked or taught or "post"


def refuse_wrong_draw(asked: Sampling, what: Scoring) -> None:
    """Raises ValueError, with the flag's name, for what cannot be drawn."""
    if not 1 <= asked.n <= 1000:
        raise ValueError(f"--n {asked.n}: 1 to 1000 samples of each pair can be drawn")
    if not 0 <= asked.temperature <= 10:
        raise ValueError(f"--temperature {asked.temperature}: allowed is 0 to 10; 1 is the model's own probabilities")
    if asked.temperature == 0 and asked.n > 1:
        raise ValueError(
            f"--temperature 0 gives the same answer --n {asked.n} times; add --n 1, or a temperature above 0"
        )
    if not 2 <= asked.max_tokens < what.settings.max_model_len:
        raise ValueError(
            f"--max-tokens {asked.max_tokens}: an answer has at least 2 (label and end), prompt and answer together at "
            f"most {what.settings.max_model_len} (--max-model-len)"
        )


def none_judged(root: str, split: str, source: str | None) -> runs.Unmet:
    """What an operator reads where a split has no pair that could be asked."""
    named = f" of source {source}" if source else ""
    return runs.Unmet(
        f"there are no judged pairs{named} in split {split}; bring some: ingest --tables {root} --pairs FILE "
        "(with labels)"
    )


def sample(
    spark: SparkSession,
    root: str,
    what: Scoring,
    made: Form,
    asked: Sampling,
    split: str = "train",
    source: str | None = None,
    limit: int | None = None,
    findings: bool = False,
) -> runs.Run:
    """Draws the samples that are not there yet; returns the run's row, that of an earlier run where it is continued."""
    models.refuse_foreign_prompt(spark, root, what)
    if findings and made.name_ids is None:
        raise ValueError("--findings: this tokenizer begins two labels' names with one token; leave --findings away")
    draw = Draw(spark, root, what, made, asked, split)
    with draw.at_work():
        draw.missing(source, limit)
    run = draw.run
    if findings:
        look = Findings(draw)
        with look.at_work():
            run = look.judge(draw.chosen(source, limit))
    run = runs.finish(spark, root, run, "done")
    # Its counts are of pairs; what was found out behind it counts chains.
    print(*told(spark, root, draw.run, draw.chosen(source, limit)), sep="\n", flush=True)
    return run


class Draw(Drawing):
    """One run: the samples of a split by one model, prompt and way of drawing."""

    # A pair is seconds of decoding and few tokens of prompt, so waves are cut by much less of these.
    least = 512

    def __init__(self, spark: SparkSession, root: str, what: Scoring, made: Form, asked: Sampling, split: str) -> None:
        # What decides an answer, and nothing that only decides how quickly it comes.
        settings = [dataclasses.asdict(asked), made.order, split, what.settings.dtype, what.settings.fp32_head]
        hashed = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        model_id, prompt_id = what.model.model_id, what.prompt.prompt_id
        run = runs.begin(spark, root, JOB, model_id, prompt_id, hashed)
        super().__init__(spark, root, what, run)
        self.settings_hash = hashed
        self.form, self.sampling, self.split = made, asked, split

    def chosen(self, source: str | None, limit: int | None) -> DataFrame:
        """The judged pairs that are asked: rows of pairs, with gold."""
        judged = gold.judged(self.spark, self.root, self.split, source).where("label IS NOT NULL")
        judged = judged.withColumnRenamed("label", "gold")
        return judged if limit is None else judged.orderBy(F.xxhash64("pair_id"), "pair_id").limit(limit)

    def missing(self, source: str | None, limit: int | None) -> None:
        """Draws what is not there yet."""
        started = time.monotonic()
        if self.split == "train":
            gold.learnt_from(self.spark, self.root, source)  # raises where one of its queries is held out
        chosen = self.chosen(source, limit).localCheckpoint()
        total = chosen.count()
        if not total:
            raise none_judged(self.root, self.split, source)
        there = delta.read(self.spark, self.root, "samples").where(F.col("run_id") == self.run.run_id)
        there = there.select("pair_id", "content_hash", "gold").distinct()
        todo = chosen.join(there, ["pair_id", "content_hash", "gold"], how="left_anti")
        prompts = rendered(todo, self.what.prompt).join(chosen.select("pair_id", "gold"), "pair_id", how="inner")
        line = self.land_line(prompts, "samples")
        self._count(seen=total, skipped=total - line.prompts)
        self.run_through(line, "samples", total, started, self.sampling.n * self.sampling.max_tokens)

    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Merges the wave into `samples`, one row a sample."""
        each = answered.select("pair_id", "gold", "content_hash", F.posexplode("samples").alias("sample", "one"))
        same = self.same | {"run_id": self.run.run_id}
        given: dict[str, Any] = {
            **same,
            "split": self.split,
            "temperature": float(self.sampling.temperature),
            "seed": self.sampling.seed,
        }
        rows = each.select(
            "pair_id", "sample", "gold", "content_hash", "one.*", *(F.lit(v).alias(k) for k, v in given.items())
        )
        rows = rows.withColumns(
            {
                "correct": F.col("label").eqNullSafe(F.col("gold")),
                "agrees": F.col("label").isNotNull() & F.col("label").eqNullSafe(F.col("conclusion")),
                "entailed": F.lit(None).cast("int"),
                "created_at": F.current_timestamp(),
            }
        )
        delta.upsert(self.spark, self.root, "samples", rows.select(*SAMPLES.names), "true", same)


class Findings(Waves):
    """The second look at a run's chains: which label their findings lead to, label and statement unseen.

    A chain's question is the pair's prompt and the findings behind it; one forward pass gives the label's name.
    """

    least = 2048

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw.spark, draw.root, draw.what, draw.run)
        self.form, self.label_ids = draw.form, draw.form.name_ids or ()
        self.settings_hash = draw.settings_hash
        self.loads, self.engine_names = draw.loads, draw.engine_names  # which are asked on

    def judge(self, chosen: DataFrame) -> runs.Run:
        """Asks for the chains of the chosen pairs that were not asked about; returns the run's row."""
        started = time.monotonic()
        open_ = self.samples().where("label IS NOT NULL AND entailed IS NULL")
        chains = open_.join(chosen, ["pair_id", "gold"], how="left_semi").select("pair_id", "chain").distinct()
        pairs = delta.read(self.spark, self.root, "pairs").join(chains, "pair_id", how="left_semi")
        prompts = rendered(pairs, self.what.prompt).join(chains, "pair_id", how="inner")
        prompts = prompts.select("pair_id", "chain", "ids", "group_tokens", "tokens_cut")
        ask = questioner(self.form, to_arrow_schema(prompts.schema))
        line = self.land_line(prompts.mapInArrow(ask, prompts.schema), "findings")
        self.run_through(line, "findings", line.prompts, started)
        return replace(self.run, p_outside=None)  # that of names, not of labels

    def samples(self) -> DataFrame:
        """The run's samples."""
        return delta.read(self.spark, self.root, "samples").where(F.col("run_id") == self.run.run_id)

    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Puts what was found beside the samples of these chains."""
        found = answered.select("pair_id", "chain", tiers.likeliest().alias("entailed"))
        rows = self.samples().drop("entailed").join(found, ["pair_id", "chain"], how="inner")
        rows = rows.where("label IS NOT NULL").select(*SAMPLES.names)
        landed = delta.land(self.spark, self.root, self.run.run_id, f"{wave_id}-entailed", rows)
        same = self.same | {"run_id": self.run.run_id}
        delta.upsert(self.spark, self.root, "samples", landed, "true", same)


def pass_at_k(spark: SparkSession, samples: DataFrame) -> DataFrame:
    """`PASS_AT_K` over some rows of `samples`: run_id, pair_id, gold, what, n, c, k, pass."""
    return spark.sql(PASS_AT_K.replace("FROM samples", "FROM {samples}"), samples=samples)


def told(spark: SparkSession, root: str, run: runs.Run, chosen: DataFrame) -> list[str]:
    """What the samples of the chosen pairs say, for people: pass@k, pairs without spread, agreement, by label."""
    mine = delta.read(spark, root, "samples").where(F.col("run_id") == run.run_id)
    mine = mine.join(chosen, ["pair_id", "gold"], how="left_semi").localCheckpoint()
    counts = run.counts
    head = (
        f"{JOB}: done · run {run.run_id} · {counts.get('seen', 0):,} pairs, {counts.get('skipped', 0):,} were there, "
        f"{counts.get('sampled', 0):,} sampled, {counts.get('refused', 0):,} too long, or the engine died · "
        f"{run.generated_tokens or 0:,} tokens written in all"
    )
    if mine.isEmpty():
        return [head]
    passes = pass_at_k(spark, mine)
    table = [f"{JOB}:   {'':<22}{'pairs':>7}{'pass@1':>9}{'pass@4':>9}{'pass@n':>9}{'all wrong':>11}{'all right':>11}"]
    rows = passes.groupBy("what", "gold").agg(
        F.count_distinct("pair_id").alias("pairs"),
        *(F.sum(F.when(F.col("k") == k, F.col("pass"))).alias(f"pass_{k}") for k in (1, 4)),
        F.sum(F.when(F.col("k") == F.col("n"), F.col("pass"))).alias("pass_n"),
        *(
            F.count_if((F.col("k") == 1) & (F.col("c") == c)).alias(name)
            for name, c in (("wrong", F.lit(0)), ("right", F.col("n")))
        ),
    )
    found = [row.asDict() for row in rows.collect()]
    for way in ("label", "label and chain"):
        for label in (None, *LABELS):
            some = [row for row in found if row["what"] == way and label in (None, row["gold"])]
            pairs = sum(row["pairs"] for row in some)
            if not pairs:
                continue
            shares = [
                f"{sum(row[name] for row in some) / pairs:.3f}" if all(row[name] is not None for row in some) else "–"
                for name in ("pass_1", "pass_4", "pass_n", "wrong", "right")
            ]
            name = way if label is None else f"  {label} {NAMES[label]}"
            one, four, n, wrong, right = shares
            table.append(f"{JOB}:   {name:<22}{pairs:>7,}{one:>9}{four:>9}{n:>9}{wrong:>11}{right:>11}")
    n = mine.agg(F.max("sample") + 1).collect()[0][0]
    guess = [f"{1 - 0.75**k:.3f}" for k in (1, 4, n)]
    table.append(f"{JOB}:   {'guessing one of four':<22}{'':>7}{guess[0]:>9}{guess[1]:>9}{guess[2]:>9}")
    agreed = mine.agg(
        F.avg(F.col("label").isNotNull().cast("int")),
        F.avg(F.when(F.col("label").isNotNull(), F.col("agrees").cast("int"))),
        F.avg(F.when(F.col("correct"), F.col("agrees").cast("int"))),
        F.avg(F.col("finished").cast("int")),
        F.avg("tokens"),
        F.avg(F.when(F.col("entailed").isNotNull(), F.col("entailed").eqNullSafe(F.col("label")).cast("int"))),
    ).collect()[0]
    formed, agrees, rightly, finished, tokens, entailed = (float("nan") if x is None else float(x) for x in agreed)
    return [
        head,
        *table,
        f"{JOB}:   answers with a label {formed:.3f}, finished {finished:.3f}, {tokens:.1f} tokens each · the chain "
        f"concludes its label in {agrees:.3f} of those with a label, in {rightly:.3f} of the right ones"
        + ("" if agreed[5] is None else f"; its findings alone lead there in {entailed:.3f}"),
    ]
