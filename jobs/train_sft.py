"""Supervised fine-tuning on chains of reasoning: the first stage of a model (TaoSR1, section 3.1).

train_sft --tables T --model BASE --out DIR [--order pre | --labels-only]

Teaches `label, then chain` (post-CoT) with the kept chains of the table `chains`, pairs of the train split alone; what
it makes lies in DIR and is registered in `models`. `--order pre` teaches `chain, then label`, to compare with;
`--labels-only` the label and the end, from all judged train pairs. Killed, the same command goes on from its last
checkpoint. BASE is demo-base, a folder, or a registered model_id.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import jobs
from partitioner import engines, models
from schemas import delta, gold, runs
from schemas.files import is_uri
from udfs import adapter, answer
from udfs.engine import number_type
from udfs.model import Model, inspect, weights_hash
from udfs.prompt import Prompt
from udfs.prompt import load as load_prompt
from udfs.render import rendered
from udfs.train import DATA, TrainSettings, draw, gpus_of_a_task, has_gpu, land, launch, leave

JOB = "train_sft"


@dataclass(frozen=True)
class Lesson:
    """What a stage starts from.

    parent: the model before the stage, whole. base: folder of the weights that stay, of which the recipe keeps
    `base_name` and `base_hash`. adapter: the adapter on them that is trained on, or None. trained_on: sources of gold
    that the parent has seen.
    """

    parent: Model
    base: str
    base_name: str
    base_hash: str
    adapter: str | None
    prompt: Prompt
    prompt_file: str
    form: answer.Form
    trained_on: tuple[str, ...]


def add_training_flags(parser: argparse.ArgumentParser, learning_rate: float) -> None:
    """The flags that the three stages share."""
    told = "the parent: demo-base, a folder, or a model_id"
    parser.add_argument("--model", type=jobs.named, required=True, metavar="M", help=told)
    parser.add_argument("--out", type=jobs.named, required=True, metavar="DIR", help="folder that is made")
    told = "prompt.json (default: the one beside the parent's weights)"
    parser.add_argument("--prompt", type=jobs.named, metavar="FILE", help=told)
    parser.add_argument("--source", metavar="NAME", help="take the labels of this source of gold only")
    parser.add_argument(
        "--limit",
        type=jobs.positive,
        metavar="N",
        help="train on at most so many of the pairs it could, always the same",
    )
    parser.add_argument("--full", action="store_true", help="train all weights, not a LoRA adapter")
    parser.add_argument("--rank", type=jobs.positive, help=f"of a new adapter (default {TrainSettings.rank})")
    parser.add_argument("--learning-rate", type=jobs.above_zero, default=learning_rate)
    parser.add_argument("--seed", type=jobs.seed, default=0)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"),
        help="auto: bfloat16, on CPUs without instructions for it float32",
    )  # fmt: skip
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep few")
    parser.add_argument(
        "--checkpoint-every", type=jobs.positive, default=TrainSettings.checkpoint_every, metavar="STEPS"
    )
    parser.add_argument(
        "--processes", type=jobs.positive, default=1, help="training processes, one a GPU (TorchDistributor)"
    )


def add_batch_flag(parser: argparse.ArgumentParser, help_: str = "tokens of one sequence") -> None:
    """Of the stages that lay rows out as forests of a set size."""
    parser.add_argument("--batch-tokens", type=jobs.positive, default=TrainSettings.batch_tokens, help=help_)


def add_epoch_flags(parser: argparse.ArgumentParser, epochs: float) -> None:
    """Of the stages that go through their rows."""
    parser.add_argument("--epochs", type=jobs.above_zero, default=epochs)
    parser.add_argument(
        "--accumulate", type=jobs.positive, default=TrainSettings.accumulate, help="batches in one optimizer step"
    )


def settings(args: argparse.Namespace, lesson: Lesson, stage: str, **more: Any) -> TrainSettings:
    """The flags as settings: those that a stage has not, or was not given, keep their defaults."""
    names = {field.name for field in fields(TrainSettings)}
    flags = {name: value for name, value in vars(args).items() if name in names and value is not None}
    flags |= {"stage": stage, "base": lesson.base, "adapter": lesson.adapter, "out": str(Path(args.out).absolute())}
    dtype = number_type(args.dtype, trains_on_cpu())
    flags["dtype"] = TrainSettings.dtype if dtype == "auto" else dtype
    return TrainSettings(**flags | more)


def trains_on_cpu() -> bool:
    """Whether neither this machine nor the cluster's tasks have a GPU, whatever engine is installed here."""
    return not (has_gpu() or gpus_of_a_task())


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    add_training_flags(parser, learning_rate=5e-4)
    add_batch_flag(parser)
    add_epoch_flags(parser, epochs=3)
    parser.add_argument("--order", choices=answer.ORDERS, default="post", help="post: label, then chain")
    parser.add_argument("--labels-only", action="store_true", help="teach the label alone; no chains are needed")
    parser.add_argument(
        "--raters", choices=("median", "fractions"), default="median",
        help="with --labels-only: teach a pair's label, or each label that its raters gave, by the share of them",
    )  # fmt: skip
    parser.add_argument(
        "--label-weight", type=jobs.number, default=TrainSettings.label_weight, help="of a label, a chain token has 1"
    )
    parser.add_argument(
        "--balance",
        type=float,
        default=TrainSettings.balance,
        metavar="POWER",
        help="rarer labels weigh more, by (mean count / own count) to this power; 1: all labels alike (default 0: off)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Trains and registers; returns 0."""
    args = flags().parse_args(argv)
    if args.labels_only and args.order == "pre":
        raise ValueError("--labels-only teaches no chain that --order pre could put first; leave one of the two away")
    if args.raters == "fractions" and not args.labels_only:
        raise ValueError("--raters fractions: a chain argues for one label; it wants --labels-only")
    if not 0 <= args.balance <= 1:
        raise ValueError(f"--balance {args.balance}: allowed is 0 (off) to 1 (all labels weigh alike)")
    spark, lesson = opened(args, JOB, args.order)
    how = settings(args, lesson, "sft")
    pairs = gold.learnt_from(spark, args.tables, args.source)
    chains = pairs.select(
        "pair_id", "label", "gold_weight", F.lit(None).cast("string").alias("chain"), F.lit(1.0).alias("share")
    )
    if args.raters == "fractions":
        chains = chains.drop("label", "share").join(gold.votes(spark, args.tables, args.source), "pair_id", how="inner")
    if not args.labels_only:
        taught = delta.read(spark, args.tables, "chains").where("kept")
        chains = (
            pairs.join(taught, ["pair_id", "label", "content_hash"], how="inner")
            .groupBy("pair_id", "label", "gold_weight")
            .agg(F.max_by("chain", F.struct("created_at", "teacher")).alias("chain"))  # of several teachers the last
            .withColumn("share", F.lit(1.0))
        )
    pairs = limited(pairs.join(chains, "pair_id", how="left_semi"), args)
    rows = (
        rendered(pairs, lesson.prompt)
        .select("pair_id", "ids", "group_tokens")
        .join(chains, "pair_id", how="inner")
        .orderBy("ids", "pair_id", "label")
    )
    data = [
        parts(row)
        | {"answer": lesson.form.target(row["label"], row["chain"])}
        | {"weight": round(row["share"] * row["gold_weight"], 9)}  # a sum's last digits are those of its order
        for row in rows.toArrow().to_pylist()
    ]
    if not data and args.labels_only:
        raise ValueError(no_pairs(args))
    if not data:
        raise ValueError(
            f"no train pair in {args.tables}{of_source(args)} has a kept chain; bring some: write_chains --tables "
            f"{args.tables} --chains FILE, or teach the labels alone: --labels-only"
        )
    taught_pairs = len({row["pair_id"] for row in data})
    print(f"{JOB}: {taught_pairs:,} train pairs{'' if args.labels_only else ' with a kept chain'}", flush=True)
    train(spark, args, lesson, how, data, label_at=lesson.form.label_at)
    return 0


def opened(args: argparse.Namespace, job: str, order: str | None = None) -> tuple[SparkSession, Lesson]:
    """Spark over the tables, and the parent; one that is named by its folder is looked at before Spark starts."""
    folder = models.named(args.model)
    lesson = read_lesson(folder, args, order) if folder else None
    spark = delta.session(job)
    delta.prepare(spark, args.tables)
    if lesson is None:
        folder = models.registered(spark, args.tables, args.model)[0]
        lesson = read_lesson(folder, args, order)
        models.refuse_another(args.model, folder, lesson.parent)
    refuse_seen(spark, args.tables, str(folder), lesson.parent.model_id)
    return spark, lesson


def refuse_seen(spark: SparkSession, root: str, folder: str, model_id: str) -> None:
    """Raises ValueError where the model in `folder`, or one that it was made from, as far as their folders are there,
    has learnt from a query that is held out now: what is made from it could not be reported on."""
    folders = [folder]  # one that an adapter was merged into holds no rows; the adapter's is the registered one
    while (row := models.row(spark, root, model_id)) and row["path"] not in folders[1:]:
        folders.append(row["path"])
        model_id = str(adapter.recipe(row["path"]).get("parent_id"))
    for each in dict.fromkeys(folders):
        if (file := Path(each) / DATA).is_file():
            refuse_held_out(spark, root, file, "start from a model that has not")


def refuse_held_out(spark: SparkSession, root: str, file: Path, instead: str) -> None:
    """Raises ValueError where the rows of a training are of queries that are held out now."""
    seen = spark.createDataFrame(pq.read_table(file, columns=["pair_id"])).distinct()
    learnt = delta.read(spark, root, "pairs").join(seen, "pair_id", how="left_semi")
    if leaks := gold.leaked(spark, root, learnt):
        raise runs.Unmet(
            f"{file.parent} has learnt from queries that are in dev or test now, such as {leaks[0]!r}; {instead}, or "
            f"put them back into the train split of {root}/gold by an UPDATE (sql --help)"
        )


def of_source(args: argparse.Namespace) -> str:
    """Words for `--source`, where it was given."""
    return "" if args.source is None else f" of source {args.source!r} (--source)"


def no_pairs(args: argparse.Namespace) -> str:
    """What an operator reads where there is nothing to learn from."""
    return (
        f"there is no judged train pair{of_source(args)} in {args.tables}; bring some: ingest --tables {args.tables} "
        "--pairs FILE (with labels)"
    )


def read_lesson(folder: str, args: argparse.Namespace, order: str | None = None) -> Lesson:
    """The parent in a folder and how it is asked. Raises ValueError with a sentence, before any work."""
    is_adapter = adapter.is_adapter(folder)
    if is_adapter and args.full:
        raise ValueError(f"{folder} is an adapter, which --full does not train on; leave --full away")
    if args.rank is not None and (args.full or is_adapter):
        what = (
            "--full trains all weights" if args.full else f"{folder} is an adapter, which is trained on at its own rank"
        )
        raise ValueError(f"--rank {args.rank}: {what}; leave --rank away")
    parent = inspect(models.whole_folder(folder))
    if parent.architecture.endswith("ForConditionalGeneration"):
        raise ValueError(
            f"{folder} is a {parent.architecture}, which also takes images; a training takes decoders of text alone "
            "(…ForCausalLM)"
        )
    recipe = adapter.recipe(folder if is_adapter else parent.path)  # of a URI its copy here
    base = models.base_folder(folder) if is_adapter else str(Path(parent.path).absolute())
    refuse_wrong_out(args.out, folder, base)
    source = args.prompt or parent.prompt_file
    if source is None:
        raise ValueError(f"{folder} has no prompt.json; name one by --prompt FILE (demo/prompt.json is one that works)")
    prompt = load_prompt(source, parent.tokenizer_json, parent.vocab_size)
    if recipe.get("prompt_id", prompt.prompt_id) != prompt.prompt_id:
        raise ValueError(
            f"{folder} was trained with prompt {recipe['prompt_id']}, the one beside it, not with {source}; leave "
            "--prompt away"
        )
    order = order or recipe.get("order", "post")
    if recipe.get("order", order) != order:
        raise ValueError(f"{folder} was taught --order {recipe['order']}; a stage keeps the order of its parent")
    return Lesson(
        parent=parent,
        base=base,
        # By its folder, also where it was named by its model_id: whoever merges an adapter has no tables to ask.
        base_name=recipe["base"] if is_adapter else named_base(args.model, folder),
        base_hash=(recipe.get("base_hash") or weights_hash(base)) if is_adapter else parent.weights_hash,
        adapter=str(Path(folder).absolute()) if is_adapter else None,
        prompt=prompt,
        prompt_file=str(source),
        form=answer.form(parent, prompt, order),
        trained_on=tuple(recipe.get("trained_on", ())),
    )


def refuse_wrong_out(out: str, *parents: str) -> None:
    """Raises ValueError where a training would write over something that is none, or to what is no folder here."""
    if is_uri(out):
        raise ValueError(f"--out {out}: a training writes to a folder; copy it to where it is to lie when it is done")
    folder = Path(out).resolve()
    if any(folder == Path(parent).resolve() for parent in parents if not is_uri(parent)):
        raise ValueError(f"--out {out} is the folder of --model; name another one, which is made")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder, which is made")
    there = [file.name for file in (*folder.glob("config.json"), *folder.glob("*.safetensors"))]
    if there and not (folder / adapter.PLAN).is_file():
        raise ValueError(f"--out {out} holds a model already ({min(there)}) and no training; name another folder")


def named_base(name: str, folder: str) -> str:
    """What a recipe calls a whole model: demo-base, which is built anywhere, its URI, or its absolute folder."""
    return name if name == "demo-base" or is_uri(folder) else str(Path(folder).absolute())


def limited(pairs: DataFrame, args: argparse.Namespace) -> DataFrame:
    """At most `--limit` of the pairs that a stage can learn from: query by query, always the same."""
    if args.limit is None:
        return pairs
    # Whole queries in the order of a hash, so that a smaller limit takes a subset of a larger one.
    return pairs.orderBy(F.xxhash64(F.lower("query")), "query", "pair_id").limit(args.limit)


def answered(
    spark: SparkSession, args: argparse.Namespace, lesson: Lesson, pairs: DataFrame, where: str = "true"
) -> DataFrame:
    """The parent's sampled answers to the present text and judgement of train `pairs`: those of the run with most pairs
    among those of several answers a pair, of equals the newest."""
    asked = delta.read(spark, args.tables, "samples").where(
        models.of(lesson.parent.model_id, lesson.prompt.prompt_id) & (F.col("split") == "train")
    )
    present = pairs.select("pair_id", "content_hash", F.col("label").alias("gold"))
    mine = asked.where(where).join(present, ["pair_id", "content_hash", "gold"], how="left_semi")
    of_runs = mine.groupBy("run_id").agg(
        (F.max("sample") > 0).alias("several"), F.count_distinct("pair_id").alias("pairs")
    )
    best = of_runs.orderBy(F.desc("several"), F.desc("pairs"), F.desc("run_id")).head()
    return mine.where(F.col("run_id") == F.lit(best["run_id"] if best else None))


def parts(row: dict[str, Any]) -> dict[str, Any]:
    """A rendered pair as a row to train on: its id, and its prompt in the part that others share and its own."""
    ids, shared = row["ids"], row["group_tokens"]
    return {"pair_id": row["pair_id"], "root": ids[:shared], "rest": ids[shared:]}


def train(
    spark: SparkSession,
    args: argparse.Namespace,
    lesson: Lesson,
    how: TrainSettings,
    data: Sequence[dict[str, Any]],
    landed: Callable[[], None] = lambda: None,
    **more: Any,
) -> str:
    """Lands the rows, trains, merges and registers; returns the new model's id. The run's row tells how it ended.

    `landed` is called when the rows are, before the training: where they are refused, nothing is written.
    """
    job = f"train_{how.stage}"
    run = runs.start(spark, args.tables, job, lesson.parent.model_id, lesson.prompt.prompt_id)
    with runs.recorded(spark, args.tables, lambda: run):
        Path(how.out).mkdir(parents=True, exist_ok=True)
        with alone_in(how.out):
            chosen = {"order": lesson.form.order, "prompt_id": lesson.prompt.prompt_id, **chosen_rows(args)}
            hashes = {"parent": lesson.parent.weights_hash, "base": lesson.base_hash}
            data_hash, is_this = land(how, data, args.processes, chosen, **hashes)
            recipe = {
                "stage": how.stage,
                "base": lesson.base_name,
                "base_hash": lesson.base_hash,
                "parent_id": lesson.parent.model_id,
                "prompt_id": lesson.prompt.prompt_id,
                "order": lesson.form.order,
                "trained_on": sorted({*lesson.trained_on, *sources(spark, args)}),
                "data_hash": data_hash,
                "settings": {**how.recipe(), "processes": args.processes, **chosen_rows(args)},
            }
            if is_this:
                landed()
            else:
                refuse_held_out(spark, args.tables, Path(how.out) / DATA, "begin anew under another --out")
                print(f"{job}: the tables hold other rows by now; it goes on with those it began with", flush=True)
            figures = launch(how, args.processes, not engines.is_local(spark), **more)
            shutil.copyfile(lesson.prompt_file, f"{how.out}/prompt.json")
            recipe |= {"metrics": figures}
            leave(how, lesson.base_name)
            adapter.write_recipe(how.out, recipe)  # merging reads it
            made = inspect(models.whole_folder(how.out))
            adapter.write_recipe(how.out, recipe | {"merged_hash": made.weights_hash})
            print(f"{job}: its log as charts: {draw(how.out)}")
            models.register(spark, args.tables, made, how.stage, how.out)
    trained = pq.read_metadata(f"{how.out}/{DATA}").num_rows
    runs.finish(spark, args.tables, replace(run, counts={"trained": trained}), "done")
    # One that reasons first has no label to read off.
    ask = ("score with it: rescore", "") if lesson.form.order == "post" else ("ask it: sample", " --split dev --n 1")
    print(f"{job}: made model {made.model_id}; {ask[0]} --tables {args.tables} --model {how.out}{ask[1]}")
    return made.model_id


def chosen_rows(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that choose what is learnt from, as far as they were given."""
    given = {name: getattr(args, name, None) for name in ("source", "limit", "labels_only", "raters", "per_pair")}
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def alone_in(out: str) -> Iterator[None]:
    """Holds a training's folder. Raises ValueError where another training is at work in it: each would go on from the
    other's checkpoints."""
    with open(Path(out) / "training.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise runs.Unmet(f"--out {out}: another training is at work there; wait for it, or name another") from None
        yield


def sources(spark: SparkSession, args: argparse.Namespace) -> list[str]:
    """Sources of gold whose train split is learnt from."""
    rows = delta.read(spark, args.tables, "gold").where("split = 'train'").select("source").distinct().collect()
    return sorted(row["source"] for row in rows if args.source in (None, row["source"]))
