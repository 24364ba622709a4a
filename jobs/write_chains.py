"""Brings chains of reasoning for judged train pairs, from a file or a teacher model, and keeps those that are right.

write_chains --tables T --chains FILE
write_chains --tables T --model TEACHER [--teacher-prompt FILE] [--limit PAIRS] [--n 1]

FILE is JSON Lines (or CSV, Parquet, also .gz): query, product_id, locale, label, chain. What is not of the train split
is counted and left out; a row that cannot be read goes to quarantine. A teacher is shown the rules, judged neighbours
of other train queries, and the pair, but not its label. A chain is kept only if its own conclusion is the human label.
All go to the table `chains`, kept or with the reason why not: train_sft teaches what was kept. A teacher goes on where
it was killed, and is not asked again for what it has answered, but for dropped chains with --again.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import ArrayType, IntegerType, StructField, StructType

import jobs
from jobs.sample import none_judged, refuse_wrong_draw
from partitioner.waves import Drawing
from schemas import canonical, delta, files, formats, gold, inputs, runs
from schemas.labels import LABELS, NAMES
from schemas.tables import CHAINS
from udfs import teacher
from udfs.answer import Form, conclusion, required_end_ids
from udfs.engine import Sampling
from udfs.score import Scoring
from udfs.teacher import TeacherPrompt

JOB = "write_chains"
FILE = "file"  # the teacher's name where chains come from a file
POOL = 100_000  # judged pairs that neighbours are looked for among, and that are asked at once: both on the driver


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--chains", metavar="FILE", help="chains written elsewhere; without it, --model writes them")
    parser.add_argument("--source", metavar="NAME", help="take the labels of this source of gold only")
    parser.add_argument("--teacher-prompt", metavar="FILE", help="what a teacher is asked (default: demo/teacher.json)")
    parser.add_argument("--pairs", metavar="SQL", help="of these pairs alone: a query that returns a column pair_id")
    parser.add_argument("--limit", type=jobs.positive, metavar="PAIRS", help="so many pairs, always the same ones")
    parser.add_argument("--n", type=int, default=1, help="chains a pair; the first right one is kept (default 1)")
    parser.add_argument("--temperature", type=float, help="default: 0 for one chain a pair, else 1")
    parser.add_argument("--seed", type=jobs.seed, default=0, help="another seed draws other chains")
    parser.add_argument("--max-tokens", type=int, default=96, help="of a chain, its end included (default 96)")
    parser.add_argument("--again", action="store_true", help="ask again for pairs whose chain was dropped")
    jobs.add_scoring_flags(parser, model_required=False)
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0, or 3 where nothing of a file could be read."""
    parser = flags()
    args = parser.parse_args(argv)
    if (args.chains is None) == (args.model is None):
        raise ValueError("chains come either from --chains FILE or from a teacher, --model M: name one of them")
    if args.chains is not None:
        of_file = ("tables", "chains", "source")
        given = [
            name for name, value in vars(args).items() if name not in of_file and value != parser.get_default(name)
        ]
        if given:
            told = ", ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(f"--chains brings all chains of its file; it has no use for {told}, so leave that away")
        files.refuse_wrong_path("--chains", args.chains)
        spark = delta.session(JOB)
        delta.prepare(spark, args.tables)
        counts = from_file(spark, args.tables, args.chains, args.source).counts
        return jobs.GATE_FAILED if counts["refused_files"] and not counts["read"] else jobs.DONE
    spark, teaches = jobs.opened(args, JOB, teaching)
    if args.again and not teaches[2].temperature:
        print(
            f"{JOB}: at temperature 0 a pair whose rules and neighbours are as they were gets the same chain again; "
            "--temperature 1 --n 4 --seed 1 draws others",
            flush=True,
        )
    from_teacher(spark, args.tables, *teaches, args.source, args.limit, args.again, args.pairs)
    return 0


def teaching(args: argparse.Namespace, folder: str, stage: str) -> tuple[Scoring, TeacherPrompt, Sampling]:
    """The teacher, what it is asked, and how its chains are drawn. Raises ValueError with a sentence."""
    what = jobs.scoring(args, folder, stage)
    temperature = args.temperature if args.temperature is not None else float(args.n > 1)
    asked = Sampling(args.max_tokens, required_end_ids(what.model), args.n, temperature, seed=args.seed)
    refuse_wrong_draw(asked, what)
    source = args.teacher_prompt or importlib.resources.files("demo") / "teacher.json"
    content = source if isinstance(source, str) else json.loads(source.read_text(encoding="utf-8"))
    return what, teacher.load(content, what.model.tokenizer_json, what.model.vocab_size), asked


def from_file(spark: SparkSession, root: str, where: str, source: str | None = None) -> runs.Run:
    """Brings the chains of a file; returns the run's row."""
    brought = Chains(spark, root, source, runs.start(spark, root, JOB))
    with runs.recorded(spark, root, brought.counted):
        brought.from_file(where)
        run = runs.finish(spark, root, brought.counted(), "done")
    print(*brought.told, sep="\n", flush=True)
    return run


def from_teacher(
    spark: SparkSession,
    root: str,
    what: Scoring,
    prompt: TeacherPrompt,
    asked: Sampling,
    source: str | None = None,
    limit: int | None = None,
    again: bool = False,
    pairs: str | None = None,
) -> runs.Run:
    """Lets a teacher write the chains that are not there yet, of all judged train pairs or of those that the query
    `pairs` selects; returns the run's row."""
    wanted = None if pairs is None else jobs.selected(spark, root, JOB, pairs)
    run = runs.start(spark, root, JOB, what.model.model_id, what.prompt.prompt_id)
    lesson = Lesson(spark, root, what, run, prompt, asked)
    with lesson.at_work():
        chosen = lesson.write_missing(source, limit, again, wanted)
        there = delta.read(spark, root, "chains").where(F.col("teacher") == what.model.model_id)
        told, counts = by_label(there.join(chosen, "pair_id", how="left_semi"))
        run = runs.finish(spark, root, replace(lesson.run, counts=lesson.run.counts | counts), "done")
    print(
        f"{JOB}: done · {run.counts['seen']:,} pairs, {run.counts['skipped']:,} were answered before, "
        f"{run.counts.get('sampled', 0):,} asked · {run.generated_tokens or 0:,} tokens written",
        *told,
        sep="\n",
        flush=True,
    )
    return run


class Chains:
    """One run: judges chains against the human labels and writes them, kept or with the reason why not."""

    def __init__(self, spark: SparkSession, root: str, source: str | None, run: runs.Run) -> None:
        self.spark, self.root, self.source, self.run = spark, root, source, run
        self.now = F.lit(datetime.now(UTC))
        self.counts: Counter[str] = Counter()
        self.told: list[str] = []  # what the operator reads at the end

    def from_file(self, where: str) -> None:
        """Chains of a file, those of train pairs; of a pair it may bring one."""
        found = inputs.listed(self.spark, where, "canonical", formats.CHAINS)
        rows = inputs.judged(self.spark, found, delta.scratch(self.root, self.run.run_id, "rows"))
        said = F.struct("label", "chain")
        good, bad, torn = inputs.parted(rows.rows, [("two chains of one pair", [F.col("pair_id")], said)], self.land)
        good = good.dropDuplicates(["pair_id"]).select(
            "pair_id", F.col("label").alias("written_for"), "chain", F.lit(True).alias("finished")
        )
        pairs = gold.learnt_from(self.spark, self.root, self.source)
        judged = self.judged(good.join(pairs.select("pair_id", "label", "content_hash"), "pair_id", how="inner"))
        write(self.spark, self.root, judged, FILE, self.run.run_id, self.now)
        quarantined = rows.refused + rows.refused_files + torn
        brought, used = good.count(), judged.count()
        self.counts.update(
            read=rows.read, refused_files=rows.refused_files, quarantined=quarantined, not_train=brought - used
        )
        self.told.append(
            f"{JOB}: {rows.read:,} rows read · {used:,} of judged train pairs, {brought - used:,} left out (held out, "
            f"or not judged) · quarantined: {quarantined:,}"
        )
        if rows.ignored:
            self.told.append(f"{JOB}: fields that mean nothing here were left out: {', '.join(rows.ignored[:20])}")
        told, counts = by_label(judged)
        self.told += told
        self.counts.update(counts)
        if quarantined:
            source = re.sub(r"[^A-Za-z0-9._-]", "_", where.rstrip("/").rsplit("/", 1)[-1])  # it is told inside of SQL
            self.told += inputs.quarantine(self.spark, self.root, bad, source, JOB, self.now)

    def judged(self, chains: DataFrame) -> DataFrame:
        """Adds `reason` to pair_id, written_for, chain, label, content_hash, and lands the rows."""
        schema = StructType([*chains.schema.fields, StructField("concluded", IntegerType())])
        return self.land("judged", chains.mapInArrow(_concluded, schema).withColumn("reason", why_not()))

    def land(self, name: str, frame: DataFrame) -> DataFrame:
        """Writes a step's rows once."""
        return delta.land(self.spark, self.root, self.run.run_id, name, frame)

    def counted(self) -> runs.Run:
        """The run's row with the counts so far."""
        return replace(self.run, counts=dict(self.counts))


class Lesson(Drawing):
    """One run: a teacher writes chains for judged train pairs, shown their judged neighbours."""

    least = 2048

    def __init__(
        self, spark: SparkSession, root: str, what: Scoring, run: runs.Run, prompt: TeacherPrompt, asked: Sampling
    ) -> None:
        super().__init__(spark, root, what, run)
        self.prompt, self.sampling = prompt, asked
        # A teacher answers with the chain alone: no token of it is a label's.
        self.form = Form("post", (-1, -2, -3, -4), asked.end_ids, None, prompt.reserved, prompt.tokenizer_json)

    def write_missing(self, source: str | None, limit: int | None, again: bool, wanted: DataFrame | None) -> DataFrame:
        """Asks for the chains that are not there yet, of `wanted` pairs; returns the chosen pairs (pair_id)."""
        started = time.monotonic()
        judged = gold.learnt_from(self.spark, self.root, source)
        order = (F.xxhash64("pair_id"), F.col("pair_id"))  # so a limit takes the same ones always
        pool = judged.orderBy(*order).limit(POOL).localCheckpoint()
        chosen = judged if wanted is None else judged.join(wanted, "pair_id", how="left_semi")
        chosen = chosen if limit is None else chosen.orderBy(*order).limit(limit)
        # Wanted until the end: what executors hold may be gone by then.
        chosen = delta.land(self.spark, self.root, self.run.run_id, "chosen", chosen)
        total = chosen.count()
        if not total and wanted is not None:
            raise runs.Unmet("--pairs: none of the selected pairs is a judged one of split train; others get no chain")
        if not total:
            raise none_judged(self.root, "train", source)
        old = delta.read(self.spark, self.root, "chains").where(F.col("teacher") == self.what.model.model_id)
        old = old.where("kept") if again else old
        there = old.select("pair_id", "content_hash", "label")
        todo = chosen.join(there, ["pair_id", "content_hash", "label"], how="left_anti")
        if total > POOL and (waiting := todo.count() - POOL) > 0:
            total -= waiting
            todo = todo.orderBy(*order).limit(POOL)
            print(f"{JOB}: {POOL:,} pairs are asked now; start it again for the other {waiting:,}", flush=True)
        line = self.land_line(self.rendered(with_neighbours(todo, pool, self.prompt)), "chains")
        self._count(seen=total, skipped=total - line.prompts)
        self.run_through(line, "chains", total, started, self.sampling.n * self.sampling.max_tokens)
        return chosen.select("pair_id")

    def rendered(self, pairs: DataFrame) -> DataFrame:
        """Pairs with their neighbours as prompts: pair_id, content_hash, label, ids, group_tokens, tokens_cut."""
        kept = [f for f in pairs.schema.fields if f.name in ("pair_id", "content_hash", "label")]
        made = [StructField("ids", ArrayType(IntegerType()))]
        made += [StructField(name, IntegerType()) for name in ("group_tokens", "tokens_cut")]
        schema = StructType(kept + made)
        return pairs.mapInArrow(teacher.asked(self.prompt, to_arrow_schema(schema)), schema)

    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Merges the wave into `chains`: of a pair the first right chain, or else the first."""
        right = F.filter("samples", lambda one: one["finished"] & one["conclusion"].eqNullSafe(F.col("label")))
        best = F.coalesce(F.get(right, F.lit(0)), F.get("samples", F.lit(0)))
        # One that the engine died of has no chain to keep or drop: it is asked again at the next start.
        one = (
            answered.where(F.col("outcome") != "engine_failed")
            .withColumn("best", best)
            .select(
                "pair_id",
                "label",
                "content_hash",
                F.col("label").alias("written_for"),
                F.coalesce("best.chain", F.lit("")).alias("chain"),
                F.col("best.finished").alias("finished"),
                F.col("best.conclusion").alias("concluded"),
            )
        )
        judged = one.withColumn("reason", F.when(F.col("finished").isNull(), "too_long").otherwise(why_not()))
        now = F.lit(datetime.now(UTC))
        write(self.spark, self.root, judged, self.what.model.model_id, self.run.run_id, now)


def with_neighbours(pairs: DataFrame, pool: DataFrame, prompt: TeacherPrompt) -> DataFrame:
    """Pairs with `neighbours`: the most similar judged pairs of other queries, nearest first, as rows of `pool`.

    A neighbour has the fields that the prompt shows of it. Both are of the train split, so nothing held out is ever
    shown. The texts of both come to the driver.
    """
    shown = sorted({"label", *(segment.field for segment in prompt.neighbour if segment.field)})
    read = ["pair_id", *{"query", "title", "category", *shown}]
    known = [row.asDict() for row in pool.select(*read).collect()]
    place = {row["pair_id"]: i for i, row in enumerate(known)}
    # Asked pairs beyond a full pool are compared, but never shown.
    mine = [row.asDict() for row in pairs.select(*read).collect()]
    both = known + [row for row in mine if row["pair_id"] not in place]
    place = {row["pair_id"]: i for i, row in enumerate(both)}
    texts = [" ".join(filter(None, (row["query"], row["title"], row["category"]))) for row in both]
    queries = [canonical.normalised(row["query"]) for row in both]
    asked = [place[row["pair_id"]] for row in mine]
    found = teacher.neighbours(texts, queries, asked, prompt.neighbours, among=len(known))
    rows = [
        (row["pair_id"], [tuple(both[j][name] for name in shown) for j in near])
        for row, near in zip(mine, found, strict=True)
    ]
    kept = StructType([pool.schema[name] for name in shown])
    schema = StructType([pairs.schema["pair_id"], StructField("neighbours", ArrayType(kept))])
    return pairs.join(pairs.sparkSession.createDataFrame(rows, schema), "pair_id", how="inner")


def why_not() -> Column:
    """Why a chain is dropped, from written_for, label, finished and concluded; null where it is kept."""
    return (
        F.when(F.col("written_for") != F.col("label"), "other_label")
        .when(~F.col("finished"), "unfinished")
        .when(F.col("concluded").isNull(), "no_conclusion")
        .when(F.col("concluded") != F.col("label"), "other_conclusion")
    )


def write(spark: SparkSession, root: str, judged: DataFrame, teacher: str, run_id: str, now: Column) -> None:
    """Upserts the judged chains of one teacher; what says the same already is not touched."""
    rows = judged.withColumns(
        {
            "teacher": F.lit(teacher),
            "kept": F.col("reason").isNull(),
            "run_id": F.lit(run_id),
            "created_at": now,
        }
    )
    same = ("label", "chain", "reason", "content_hash")
    changed = " OR ".join(f"NOT old.{name} <=> new.{name}" for name in same)
    delta.upsert(spark, root, "chains", rows.select(*CHAINS.names), changed, {"teacher": teacher})


def by_label(judged: DataFrame) -> tuple[list[str], dict[str, int]]:
    """Kept and dropped chains by label and reason: for people, and summed over labels for the run's row."""
    found = {(row["label"], row["reason"]): row["count"] for row in judged.groupBy("label", "reason").count().collect()}
    counts: Counter[str] = Counter()
    for (_, reason), count in found.items():
        counts[reason or "kept"] += count
    told = []
    for label in LABELS:
        mine = {reason or "kept": count for (of, reason), count in sorted(found.items(), key=str) if of == label}
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in mine.items() if reason != "kept") or "none"
        told.append(f"{JOB}:   {label} {NAMES[label]}: kept {mine.get('kept', 0):,}, dropped {dropped}")
    return told, dict(counts)


def _concluded(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Adds what each chain concludes."""
    for batch in batches:
        chains = batch.column(batch.schema.get_field_index("chain")).to_pylist()
        yield batch.append_column("concluded", pa.array(map(conclusion, chains), pa.int32()))
