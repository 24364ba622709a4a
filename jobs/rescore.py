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
from collections.abc import Sequence
from datetime import datetime, timedelta

from pyspark.errors import StreamingQueryException
from pyspark.sql import SparkSession

import jobs
from partitioner import engines, models, waves
from partitioner.night import Night
from partitioner.waves import Stopped
from schemas import delta, runs
from schemas.crash import crash
from udfs.score import Scoring

MAX_REFUSED = 1000  # rows of a run
FOLLOWED_SECONDS = 20  # between two looks at which model is in force
UNREAD = 15  # looks in a row that may fail
JOB = "rescore"


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument(
        "--every", type=_interval, metavar="INTERVAL", help='stay, and look for changes so often, such as "5 minutes"'
    )
    parser.add_argument("--also", action="append", default=[], metavar="M2", help="keep this model current too")
    add_night_flags(parser)
    jobs.add_scoring_flags(parser, model_required=False)
    return parser


def main(argv: list[str]) -> int:
    """Runs the stream; returns 0 when all changes are scored, 3 where a gate failed, 5 at the deadline."""
    args = flags().parse_args(argv)
    follow = args.model in (None, models.ACTIVE)
    end_when_told()
    others = [argparse.Namespace(**{**vars(args), "model": name}) for name in args.also]
    ahead = [jobs.seen(other, jobs.scoring_beside) for other in others]  # before Spark starts
    spark, what = jobs.opened(args, JOB, jobs.scoring)
    beside = [
        one or jobs.registered(spark, other, jobs.scoring_beside) for one, other in zip(ahead, others, strict=True)
    ]
    candidates = {one.regime: one for one in beside}
    code = 0
    while True:
        if follow:
            models.refuse_other_prompt(spark, args.tables, what)
        also = [one for regime, one in candidates.items() if regime != what.regime]  # one may have come into force
        run = rescore(
            spark, args.tables, what, args.every, args.retry_failed, args.max_refused, args.deadline, also, follow
        )
        code = code or exit_code(run)  # a gate that failed before a promotion has failed
        if run.status != "done" or not (follow and args.every):
            return code
        what = candidates.get(models.in_force(spark, args.tables)) or jobs.in_force(spark, args)


def add_night_flags(parser: argparse.ArgumentParser) -> None:
    """What rescore and backfill share beside the engine."""
    parser.add_argument("--retry-failed", action="store_true", help="ask again for pairs without probabilities")
    parser.add_argument(
        "--max-refused", type=jobs.positive, default=MAX_REFUSED, metavar="N",
        help="stop after more rows without an answer; a stream that stays: within an hour",
    )  # fmt: skip
    parser.add_argument(
        "--deadline", type=next_time, metavar="HH:MM", help="begin no wave after it (this machine's time); exit code 5"
    )


def _interval(text: str) -> str:
    if not re.fullmatch(r"\s*[1-9]\d*\s+(second|minute|hour|day)s?\s*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no interval: write '5 minutes' (seconds, minutes, hours, days)")
    return text


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
    now = jobs.began or datetime.now()
    today = datetime.combine(now.date(), at)
    return today if today > now else today + timedelta(days=1)


def exit_code(run: runs.Run) -> int:
    """0 done, 3 where a gate failed, of this run or of one beside it (--also), else 5 where it stopped early."""
    if run.counts.get("gates_failed"):
        return jobs.GATE_FAILED
    return jobs.STOPPED if run.status == "stopped" else jobs.DONE


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
    checkpoint = delta.checkpoint(root, what.model.model_id, what.prompt.prompt_id)
    status = "done"
    message: str | None = None
    try:
        try:
            _stream(night, checkpoint, every, retry_failed, follow)
        except Stopped as stopped:
            print(f"{JOB}: {stopped}", flush=True)
            status, message = "stopped", str(stopped)
        closed = closed_nights(night, status, message)
    except BaseException as error:
        for one in reversed((night, *night.also)):  # the first one's row is the one to tell of
            one.fail(error)
        raise
    finally:
        for one in nights:
            delta.drop_scratch(spark, root, one.run.run_id)
    crash("finished")
    return closed


def _stream(night: Night, checkpoint: str, every: str | None, retry_failed: bool, follow: bool) -> None:
    """Lets the night, and those beside it, work the change feed off. Raises Stopped, and what went wrong in a batch."""
    spark, root, what = night.spark, night.root, night.what
    night.forget_removed_pairs()
    night.follow_pairs()
    if delta.days_since(spark, f"{checkpoint}/commits") > delta.KEPT_DAYS:
        # It points at changes whose files may be gone. Without it all pairs are looked at; judged ones are skipped.
        print(f"{JOB}: {checkpoint} rested for more than {delta.KEPT_DAYS} days and is begun anew", flush=True)
        delta.drop(spark, checkpoint)
    elif delta.follows_another(spark, root, "pairs", checkpoint):
        print(f"{JOB}: pairs was made anew, so {checkpoint} is too", flush=True)
        delta.drop(spark, checkpoint)
    writer = delta.changes(spark, root, "pairs").writeStream.foreachBatch(night.batch)
    writer = writer.option("checkpointLocation", checkpoint)
    writer = writer.trigger(processingTime=every) if every else writer.trigger(availableNow=True)
    with engines.kept_alive(spark, what.settings.tensor_parallel):
        if retry_failed:
            night.with_candidates(Night.retry_failed)
        query = writer.start()
        promoted, unread = False, 0
        try:
            while not query.awaitTermination(FOLLOWED_SECONDS):
                if follow and every:
                    promoted, unread = _promoted(spark, root, what, unread)
                if (why := night.asked_to_stop()) or promoted:
                    with night.between:  # after the batch at work
                        night.ending = True
                    query.stop()  # joins the stream's thread, which may wait for the lock with another batch
                    if night.error:  # of the batch that was waited for; a query that is stopped does not tell
                        raise night.error
                    if why:
                        raise Stopped(why)
                    break
        except BaseException as error:
            for one in (night, *night.also):
                one.left = True
                one.abandon()  # or the stream's thread would be waited for
            if night.error and night.error is not error and not isinstance(error, KeyboardInterrupt):
                raise night.error from error  # Spark wraps it in a page of Java
            if isinstance(error, StreamingQueryException):
                raise RuntimeError(
                    f"the stream's checkpoint cannot be read, if this speaks of an offset or a log file: "
                    f"{runs.in_a_line(error)} Then delete {checkpoint} and start again; nothing is lost or scored "
                    f"twice: what is judged is known from label_probs.\n{error}"
                ) from error
            raise
        finally:
            query.stop()
        if not every:
            night.score_left()
    crash("streamed")


def _promoted(spark: SparkSession, root: str, what: Scoring, unread: int) -> tuple[bool, int]:
    """Whether another model than `what` is in force by now, and how often in a row that could not be read: `unread` and
    this time. Raises what the storage says when that goes on for some minutes."""
    try:
        return models.in_force(spark, root) != what.regime, 0
    except Exception as error:
        if unread + 1 >= UNREAD:
            raise
        print(f"{JOB}: the model in force could not be read, it goes on ({runs.in_a_line(error)})", flush=True)
        return False, unread + 1


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
        models.refuse_as_scorer(spark, root, what)
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
