"""The nightly stream: scores new and changed pairs and stops, or stays and keeps on.

rescore --tables T --model M [--prompt FILE] [--every "5 minutes"]

M is `demo`, a model folder, or a registered model_id. The stream follows the change feed of `pairs`. A batch of changes
may be of any size (the feed's own limits count files, not rows), so it is lined up by prefix, cut into waves of about a
minute of engine work, and each wave is landed and merged in one commit. What a wave has merged is never scored again:
a pair is known by (content_hash, model, prompt), so a batch that is repeated after a kill goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from pyspark.errors import StreamingQueryException
from pyspark.resource import ResourceProfile
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

import demo.model
from partitioner import engines, prefix
from schemas import delta, files, runs, tables
from schemas.labels import LABELS, P_COLUMNS
from udfs import adapter, selfcheck
from udfs.engine import Engine, EngineSettings, load
from udfs.model import Model, inspect
from udfs.prompt import Prompt, renderer
from udfs.prompt import load as load_prompt
from udfs.render import product_text, rendered
from udfs.score import scored_schema, scorer

T = TypeVar("T")
WAVE_SECONDS = 60.0  # of engine work: what a kill can cost, and how often readers see news
TOLD_SECONDS = 30.0  # between two writes of the run's row; each is a commit of half a second
# A decoded token costs about three prefilled ones on CPU (1,233 against 453 a second); it only sizes a first wave.
DECODE_COST = 3
CHECKED_PROMPTS = 12  # in the first-use self check
JOB = "rescore"


@dataclass(frozen=True)
class Scoring:
    """What scores: a model folder that was looked at, the prompt it is asked with, and the engine's settings."""

    model: Model
    stage: str
    prompt: Prompt
    settings: EngineSettings
    load_engine: Callable[[EngineSettings], Engine] = load


def add_scoring_flags(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    """The flags that every job with an engine shares."""
    defaults = EngineSettings(model="")
    parser.add_argument(
        "--model", required=model_required, metavar="M", help="demo, a model folder, or a registered model_id"
    )
    parser.add_argument("--prompt", metavar="FILE", help="prompt.json (default: the one beside the model's weights)")
    parser.add_argument("--dtype", default=defaults.dtype, choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--head", default="float32", choices=("float32", "model"), help="number type of the logits")
    parser.add_argument("--max-model-len", type=_positive, default=defaults.max_model_len, help="tokens of a prompt")
    parser.add_argument("--kv-cache-gib", type=float, default=defaults.kv_cache_gib, help="KV cache on CPU, GiB")
    parser.add_argument("--gpu-memory", type=float, default=defaults.gpu_memory, help="share of a GPU's memory")
    parser.add_argument("--max-num-seqs", type=_positive, default=defaults.max_num_seqs, help="pairs in one step")
    parser.add_argument("--max-num-batched-tokens", type=_positive, default=defaults.max_num_batched_tokens)
    parser.add_argument("--tensor-parallel", type=_positive, default=1, help="GPUs that hold one copy of the model")
    parser.add_argument("--hang-seconds", type=_positive, default=defaults.hang_seconds, help="no answer so long: hung")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def scoring(args: argparse.Namespace, folder: str, stage: str) -> Scoring:
    """Looks at the model folder and reads the prompt, before Spark does any work. Raises ValueError with a sentence."""
    model = inspect(folder)
    source = args.prompt or model.prompt_file
    if source is None:
        raise ValueError(
            f"{folder} has no prompt.json and --prompt was not given; write one (demo/prompt.json is a template for "
            "ChatML models) and pass it with --prompt FILE"
        )
    settings = EngineSettings(
        model=model.path,
        dtype=args.dtype,
        fp32_head=args.head == "float32",
        max_model_len=min(args.max_model_len, model.max_positions),
        kv_cache_gib=args.kv_cache_gib,
        gpu_memory=args.gpu_memory,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        tensor_parallel=args.tensor_parallel,
        hang_seconds=args.hang_seconds,
    )
    return Scoring(model, stage, load_prompt(source, model.tokenizer_json, model.vocab_size), settings)


def model_folder(name: str) -> tuple[str, str] | None:
    """Folder of whole weights and stage of `--model NAME` where no table is needed to tell; None for a model_id."""
    if (folder := _folder(name)) is None:
        return None
    return whole_folder(folder), "base" if name == "demo-base" else "external"


def named_folder(spark: SparkSession, root: str, name: str) -> str:
    """The folder that `--model NAME` stands for, an adapter's where it is one. Raises ValueError for an unknown id."""
    return _folder(name) or registered(spark, root, name)[0]


def _folder(name: str) -> str | None:
    if name == "demo-base":
        return str(demo.model.demo_model())
    if name == "demo":
        return str(demo.model.demo_adapter())
    if len(name) == 16 and set(name) <= set("0123456789abcdef") and not Path(name).exists():
        return None
    return name


def whole_folder(folder: str) -> str:
    """The folder itself, or what an adapter and its base make together. Raises ValueError with a sentence."""
    if not adapter.is_adapter(folder):
        return folder
    if Path(folder) == demo.model.demo_adapter():  # a checkout may be read-only
        return adapter.merge(folder, base_folder(folder), str(demo.model.default_cache() / "demo-tuned"))
    return adapter.merge(folder, base_folder(folder), str(Path(folder) / adapter.MERGED))


def base_folder(folder: str) -> str:
    """Folder of an adapter's base, which its training.json names."""
    name = adapter.recipe(folder).get("base")
    if not isinstance(name, str):
        raise ValueError(
            f"adapter {folder} has no {adapter.RECIPE} that names its base; merge it (peft: merge_and_unload, then "
            "save_pretrained) and name the merged folder"
        )
    return str(demo.model.demo_model()) if name == "demo-base" else name


def registered_folder(spark: SparkSession, root: str, model_id: str) -> tuple[str, str]:
    """Folder of whole weights and stage of a model_id in `models`. Raises ValueError, naming the ones there are."""
    folder, stage = registered(spark, root, model_id)
    return whole_folder(folder), stage


def registered(spark: SparkSession, root: str, model_id: str) -> tuple[str, str]:
    """Path and stage of a model_id in `models`."""
    models = {m["model_id"]: m for m in delta.read(spark, root, "models").select("model_id", "path", "stage").collect()}
    if model_id not in models:
        known = ", ".join(sorted(models)) or "none yet"
        raise ValueError(f"--model {model_id}: no folder of that name, and no registered model either (known: {known})")
    return str(models[model_id]["path"]), str(models[model_id]["stage"])


def opened(
    args: argparse.Namespace, job: str, look: Callable[[argparse.Namespace, str, str], T]
) -> tuple[SparkSession, T]:
    """Spark over the tables `--tables`, and what `look` (flags, folder, stage) made of `--model`.

    A model that is named by its folder is looked at before Spark starts, so that a wrong one costs no time.
    """
    found = model_folder(args.model)
    seen = look(args, *found) if found else None
    spark = delta.session(job)
    delta.prepare(spark, args.tables)
    return spark, seen or look(args, *registered_folder(spark, args.tables, args.model))


def main(argv: list[str]) -> int:
    """Runs the stream; returns 0 when all changes are scored."""
    parser = argparse.ArgumentParser(prog=JOB, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--tables", required=True, type=delta.root, metavar="T", help="root folder or URI of the tables"
    )
    parser.add_argument("--every", metavar="INTERVAL", help='stay, and look for changes so often, such as "5 minutes"')
    add_scoring_flags(parser)
    args = parser.parse_args(argv)
    spark, what = opened(args, JOB, scoring)
    rescore(spark, args.tables, what, args.every)
    return 0


def rescore(spark: SparkSession, root: str, what: Scoring, every: str | None = None) -> runs.Run:
    """Scores what changed in `pairs` since this model and prompt last looked; returns the run's row.

    Without `every` it ends when there is nothing left (Trigger.AvailableNow); with it, it stays.
    """
    refuse_foreign_prompt(spark, root, what)
    night = Night(spark, root, what, runs.start(spark, root, JOB, what.model.model_id, what.prompt.prompt_id))
    checkpoint = f"{root}/_checkpoints/{JOB}/{what.model.model_id}-{what.prompt.prompt_id}"
    try:
        night.forget_removed_pairs()
        writer = delta.changes(spark, root, "pairs").writeStream.foreachBatch(night.batch)
        writer = writer.option("checkpointLocation", checkpoint)
        writer = writer.trigger(processingTime=every) if every else writer.trigger(availableNow=True)
        query = writer.start()
        try:
            query.awaitTermination()
        finally:
            query.stop()
    except BaseException as error:
        cause = night.error or error
        runs.fail(spark, root, night.run, cause)
        if isinstance(error, StreamingQueryException):
            raise RuntimeError(str(cause)) from error
        raise
    finally:
        delta.drop_scratch(spark, root, night.run.run_id)
    run = runs.finish(spark, root, night.run, "done")
    print(summary(run), flush=True)
    return run


def refuse_foreign_prompt(spark: SparkSession, root: str, what: Scoring) -> None:
    """Raises ValueError where the model was trained with another prompt; warns where it was trained with none."""
    row = delta.read(spark, root, "models").where(F.col("model_id") == what.model.model_id).select("prompt_id").head()
    trained = row["prompt_id"] if row else adapter.recipe(what.model.path).get("prompt_id")
    if trained not in (None, what.prompt.prompt_id):
        raise ValueError(
            f"model {what.model.model_id} was trained with prompt {trained}, not with {what.prompt.prompt_id}; leave "
            "--prompt away to use the one beside its weights"
        )
    if trained is None:
        print(f"model {what.model.model_id} was not trained with a prompt of this project; look at p_outside")


class Waves:
    """A run of engines over lines of prompts, wave by wave: plans, checks first use, keeps the run's row.

    What a wave asks and writes is its owner's; `done` is the outcome of a row that counts as done.
    """

    done = "scored"
    least: int | None = None  # tokens of work in a wave (HOT_TOKENS): below, a commit is dearer than what it saves

    def __init__(self, spark: SparkSession, root: str, what: Scoring, run: runs.Run) -> None:
        self.spark, self.root, self.what, self.run = spark, root, what, run
        self.settings_hash = what.settings.hash
        self._engines: set[str] = set()
        self._rate = 0.0  # tokens of work (of the line) per second and engine, as last measured
        self._outside: float | None = None  # sum of p_outside over scored rows
        self._told = time.monotonic()  # when the run's row was last written

    def ask(self, rows: DataFrame) -> DataFrame:
        """The plan that puts a wave's prompts (`ids`) to the engines and brings their answers."""
        raise NotImplementedError

    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Writes a wave's landed answers, in one commit."""
        raise NotImplementedError

    def land_line(self, prompts: DataFrame, name: str) -> prefix.Line:
        """Lines prompts (of `rendered`) up by prefix and lands the line, so that every wave cuts the same one."""
        landed = delta.scratch(self.root, self.run.run_id, f"{name}-line")
        parts = int(self.spark.conf.get("spark.sql.shuffle.partitions") or 4)
        prefix.lined_up(prompts, parts, self.what.settings.block_size).write.parquet(landed, mode="overwrite")
        return prefix.line(self.spark.read.parquet(files.literal(landed)), self.what.settings.block_size)

    def planned(self, line: prefix.Line, total: int, seconds: float) -> None:
        """Notes and tells what a line asks for; `total` are the pairs that were looked at."""
        self._add(prompt_tokens=line.prompt_tokens, trie_nodes=line.trie_nodes, block_floor=line.block_floor)
        print(
            f"{self.run.job}: {line.prompts:,} of {total:,} pairs to do · {line.prompt_tokens:,} prompt tokens, "
            f"{line.block_floor:,} to compute with shared prefixes · planned in {seconds:.0f} s",
            flush=True,
        )

    def check_first_use(self, line: prefix.Line) -> None:
        """Registers the model after its engine agreed with itself; raises RuntimeError, before a row, where not."""
        what, name = self.what, f"self_check_dp {self.what.settings.dtype} {self.what.settings.hash}"
        row = delta.read(self.spark, self.root, "models").where(F.col("model_id") == what.model.model_id).head()
        metrics = dict(row["metrics"] or {}) if row else {}
        if name in metrics:
            self._rate = metrics.get("tokens_per_second", 0.0)
            return
        fitting = line.rows.where(F.size("ids") < what.settings.max_model_len).select("ids").limit(CHECKED_PROMPTS)
        sample = [list(r["ids"]) for r in fitting.collect()]
        check = selfcheck.checker(
            what.settings, what.prompt.label_ids, sample, canaries(what.model, what.prompt), what.load_engine
        )
        with engines.own_workers(self.spark):
            found = (
                self.spark.range(1)
                .repartition(1)
                .mapInArrow(check, selfcheck.SCHEMA, profile=self._profile())
                .collect()[0]
            )
        allowed = selfcheck.NOISE[found["dtype"]]
        print(
            f"{self.run.job}: first use of model {what.model.model_id}: the engine agrees with itself within "
            f"{found['self_check_dp']:.1e} in {found['dtype']} (allowed {allowed:.0e})",
            flush=True,
        )
        for difference, than in ((found["self_check_dp"], "itself"), (found["canaries_dp"], "its canaries.json")):
            if difference is not None and not difference <= allowed:
                raise RuntimeError(
                    f"the engine ({found['engine_version']}, {found['dtype']}) does not agree with {than}: |Δp| is "
                    f"{difference:.2e}, allowed {allowed:.0e}. Nothing was written. Try --dtype float32, another "
                    "version of vllm, or look at the model with: check --parity --model " + what.model.path
                )
        self._rate = found["tokens_per_second"]
        self._register({name: found["self_check_dp"], "tokens_per_second": self._rate})

    def slow_down(self, line: prefix.Line, decoded: int) -> None:
        """Makes the rate a low guess for prompts with up to `decoded` tokens written after each, for the first wave."""
        self._rate *= line.length / (line.length + line.prompts * decoded * DECODE_COST)

    def run_line(self, line: prefix.Line, name: str) -> None:
        """Puts a line to the engines in waves of about `WAVE_SECONDS`; each is landed, checked, and written at once."""
        at, wave, done, began = 0, 0, 0, time.monotonic()
        while at < line.length:
            count = engines.count(self.spark, self.what.settings.tensor_parallel)
            width = max(self.least or prefix.HOT_TOKENS, int(self._rate * WAVE_SECONDS * count))
            # A last wave of a few rows would cost a commit of its own.
            end = line.length if line.length - at < 1.25 * width else at + width
            done += self.run_wave(line, at, end, count, f"{self.run.run_id}-{name}-{wave:04d}")
            at, wave = end, wave + 1
            seconds = time.monotonic() - began
            print(progress(self.run.job, done, line.prompts, at, line.length, seconds), flush=True)
        if done != line.prompts:
            raise RuntimeError(f"{line.prompts:,} pairs were planned but {done:,} came back; this is a bug, report it")

    def run_wave(self, line: prefix.Line, begin: int, end: int, shards: int, wave_id: str) -> int:
        """Puts the interval [begin, end) of the line to the engines in so many shards; returns its rows."""
        landed = delta.scratch(self.root, self.run.run_id, wave_id)
        with engines.own_workers(self.spark):
            self.ask(line.shards(begin, end, shards)).write.parquet(landed, mode="overwrite")
        answered = self.spark.read.parquet(files.literal(landed))
        figures = self._figures(answered)
        if not figures["rows"]:
            return 0
        self.write(answered, wave_id)
        self._tally(figures)
        if figures["seconds"]:
            self._rate = (end - begin) / figures["seconds"]
        delta.drop_scratch(self.spark, self.root, self.run.run_id, wave_id)
        return int(figures["rows"])

    def _figures(self, answered: DataFrame) -> dict[str, Any]:
        done = F.col("outcome") == self.done
        there = answered.columns
        row = answered.agg(
            F.count("*").alias("rows"),
            F.count_if(done).alias("done"),
            F.sum("p_outside" if "p_outside" in there else F.lit(None)).alias("outside"),
            F.sum("answer_tokens" if "answer_tokens" in there else F.lit(None)).alias("generated"),
            F.sum(F.when(done, F.col("prompt_tokens") - F.col("cached_tokens"))).alias("computed"),
            F.sum("tokens_cut").alias("cut"),
            F.sum("engine_seconds").alias("seconds"),
            F.collect_set("engine_id").alias("engines"),
            F.first("engine_version").alias("version"),
            F.first("dtype").alias("dtype"),
        ).collect()[0]
        return row.asDict()

    def _tally(self, figures: dict[str, Any]) -> None:
        """Adds a written wave to the run's row, and writes it now and then: a killed run shows how far it came."""
        rows, done = int(figures["rows"]), int(figures["done"])
        self._count(**{self.done: done}, refused=rows - done)
        seconds = float(figures["seconds"])
        self._add(tokens_cut=int(figures["cut"]), waves=1)
        for name in ("computed", "generated"):
            if figures[name] is not None:
                self._add(**{f"{name}_tokens": int(figures[name])})
        self._engines |= set(figures["engines"])
        if figures["outside"] is not None:
            self._outside = (self._outside or 0.0) + float(figures["outside"])
        all_done = self.run.counts[self.done]
        self.run = replace(
            self.run,
            engine_seconds=(self.run.engine_seconds or 0.0) + seconds,
            engine_loads=len(self._engines),
            p_outside=self._outside / all_done if all_done and self._outside is not None else None,
            dtype=str(figures["dtype"]),
            engine_version=str(figures["version"]),
            settings_hash=self.settings_hash,
        )
        if time.monotonic() - self._told > TOLD_SECONDS:
            runs.write(self.spark, self.root, self.run)
            self._told = time.monotonic()

    def _count(self, **more: int) -> None:
        counts = self.run.counts | {k: self.run.counts.get(k, 0) + v for k, v in more.items()}
        self.run = replace(self.run, counts=counts)

    def _add(self, **more: int) -> None:
        sums: dict[str, Any] = {name: (getattr(self.run, name) or 0) + value for name, value in more.items()}
        self.run = replace(self.run, **sums)

    def _profile(self) -> ResourceProfile | None:
        return engines.profile(self.spark, self.what.settings.tensor_parallel)

    def _register(self, metrics: dict[str, float]) -> None:
        """What is known of the model stays; a folder that was trained elsewhere tells its story in training.json."""
        model, recipe = self.what.model, adapter.recipe(self.what.model.path)
        row = delta.read(self.spark, self.root, "models").where(F.col("model_id") == model.model_id).head()
        known = row.asDict() if row else {
            "model_id": model.model_id,
            "base": recipe.get("base", model.architecture),
            "stage": recipe.get("stage", self.what.stage),
            "weights_hash": model.weights_hash,
            "created_at": datetime.now(UTC),
            **{name: recipe.get(name) for name in ("prompt_id", "parent_id", "data_hash", "trained_on")},
            "config": {name: str(value) for name, value in recipe.get("settings", {}).items()},
        }  # fmt: skip
        measured = {**recipe.get("metrics", {}), **(known.get("metrics") or {}), **metrics}
        # A merged folder lies inside its adapter's, which a later stage goes on with.
        path = known.get("path")
        known |= {"path": path if path and Path(model.path).is_relative_to(path) else model.path, "metrics": measured}
        values = [known.get(name) for name in tables.MODELS.names]
        delta.upsert(self.spark, self.root, "models", delta.rows(self.spark, "models", [values]))


def likeliest() -> Column:
    """The label with the highest probability; of equals the worse one; null where there are no probabilities."""
    best = F.greatest(*P_COLUMNS)
    by_worth = zip(reversed(LABELS), reversed(P_COLUMNS), strict=True)
    return F.coalesce(*[F.when(F.col(p) == best, F.lit(label)) for label, p in by_worth])


class Night(Waves):
    """One run over the change feed: scores each batch, and forgets pairs that are gone."""

    def __init__(self, spark: SparkSession, root: str, what: Scoring, run: runs.Run) -> None:
        super().__init__(spark, root, what, run)
        self.error: BaseException | None = None
        self._version = 0  # of pairs, at which the batch was read

    def forget_removed_pairs(self) -> None:
        """Removes label_probs rows, of all models, whose pair is gone."""
        pairs = delta.read(self.spark, self.root, "pairs").select("pair_id")
        judged = delta.read(self.spark, self.root, "label_probs").select("pair_id")
        orphans = judged.join(pairs, "pair_id", how="left_anti")
        if not orphans.isEmpty():
            gone = delta.delete(self.spark, self.root, "label_probs", orphans, ("pair_id",))
            self._count(removed=gone)
            print(f"{JOB}: removed {gone:,} rows of pairs that are gone", flush=True)

    def batch(self, changes: DataFrame, batch_id: int) -> None:
        """One micro-batch of the change feed (foreachBatch)."""
        try:
            kinds = {row["_change_type"] for row in changes.select("_change_type").distinct().collect()}
            if "delete" in kinds:
                self.forget_removed_pairs()
            if kinds & {"insert", "update_postimage"}:
                changed = changes.where(F.col("_change_type").isin("insert", "update_postimage"))
                self.score_changed(changed.select("pair_id").distinct(), f"{batch_id:04d}")
        except BaseException as error:
            self.error = error  # Spark wraps it in a page of Java
            raise

    def score_changed(self, changed: DataFrame, name: str) -> None:
        """Scores those of the changed pairs (column pair_id) whose present text this model has not judged yet."""
        self._version = delta.version(self.spark, self.root, "pairs")
        seen = delta.read(self.spark, self.root, "pairs", self._version).join(changed, "pair_id", how="left_semi")
        judged = delta.read(self.spark, self.root, "label_probs").where(
            (F.col("model_id") == self.what.model.model_id) & (F.col("prompt_id") == self.what.prompt.prompt_id)
        )
        todo = seen.join(judged.select("pair_id", "content_hash"), ["pair_id", "content_hash"], how="left_anti")
        started = time.monotonic()
        line = self.land_line(rendered(todo, self.what.prompt), name)
        total = seen.count()
        self._count(seen=total, skipped=total - line.prompts)
        if not line.prompts:
            return
        self.planned(line, total, time.monotonic() - started)
        self.check_first_use(line)
        self.run_line(line, name)

    def ask(self, rows: DataFrame) -> DataFrame:
        """Label probabilities for the wave's prompts."""
        score = scorer(self.what.settings, self.what.prompt.label_ids, self.what.load_engine)
        return rows.mapInArrow(score, scored_schema(rows.schema), profile=self._profile())

    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Merges the wave into `label_probs`."""
        what = self.what
        new = answered.select(
            "pair_id",
            F.lit(what.model.model_id).alias("model_id"),
            F.lit(what.prompt.prompt_id).alias("prompt_id"),
            "query",
            "product_id",
            "locale",
            *P_COLUMNS,
            "p_outside",
            "outcome",
            "content_hash",
            F.lit(self._version).cast("bigint").alias("pairs_version"),
            F.lit(wave_id).alias("wave_id"),
            "prompt_tokens",
            "tokens_cut",
            F.lit(self.run.run_id).alias("run_id"),
            F.current_timestamp().alias("scored_at"),
        )
        # A writer that slept must not put old text over new; and what another run scored meanwhile stays.
        newer = "new.pairs_version >= old.pairs_version AND new.content_hash <> old.content_hash"
        delta.upsert(self.spark, self.root, "label_probs", new, newer)


def canaries(model: Model, prompt: Prompt) -> list[tuple[list[int], list[float]]]:
    """Prompts and expected p (labels 4, 3, 2, 1) of the model folder's canaries.json; empty where it has none.

    The file: a list of objects with query, title, whatever else of the product, and `p`. Raises ValueError.
    """
    if model.canaries_file is None:
        return []
    render = renderer(prompt)
    expected = []
    for canary in json.loads(Path(model.canaries_file).read_text(encoding="utf-8")):
        try:
            product = render.product(**product_text(canary))
            p = [float(x) for x in canary["p"]]
            expected.append((render.join(product, render.query(canary["query"])), p))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{model.canaries_file}: {error!r}; each entry needs query, title, and p (four probabilities of "
                "labels 4, 3, 2, 1). Mend the file or remove it."
            ) from error
    return expected


def progress(job: str, done: int, pairs: int, at: int, length: int, seconds: float) -> str:
    """One line for people: pairs done of all, pairs and tokens a second, when it will be done."""
    left = seconds / at * (length - at) if at else 0
    return (
        f"{job}: {done:,} of {pairs:,} pairs · {done / seconds:,.1f} pairs/s · {at / seconds:,.0f} tokens/s · "
        f"{f'{left / 60:,.1f} min left' if at < length else f'{seconds:,.0f} s'}"
    )


def summary(run: runs.Run) -> str:
    """What the run did, for people."""
    counts = run.counts
    text = (
        f"{JOB}: done · {counts.get('seen', 0):,} seen, {counts.get('skipped', 0):,} skipped, "
        f"{counts.get('scored', 0):,} scored, {counts.get('refused', 0):,} refused"
    )
    if not counts.get("scored"):
        return text
    return text + (
        f" · {run.prompt_tokens:,} prompt tokens, {run.computed_tokens:,} computed (block floor {run.block_floor:,}, "
        f"trie {run.trie_nodes:,}), {run.tokens_cut:,} cut · engine {run.engine_seconds:,.0f} s, {run.engine_loads} "
        f"load(s), {run.dtype} · mean mass outside the labels {run.p_outside:.4f}"
    )
