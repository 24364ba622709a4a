"""A run of engines over lines of prompts, wave by wave.

A line (partitioner/prefix.py) is cut into waves of about a minute of engine work. Each is put to the engines, landed,
looked at (canaries, dead engines, answers that are no numbers), and written in one commit while the engines go on with
the next; so a kill costs the wave that is being written and what was asked behind it, and readers see news every
minute; every few where a commit is dear, into a large table or on the cores of an engine on CPUs. What a wave asks and
what it writes is the owner's: `Night` in partitioner/night.py, and the jobs that probe, sample, explain, write chains.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from partitioner import engines, models, prefix
from schemas import delta, files, runs
from schemas.crash import crash
from schemas.delta import GaveUp
from schemas.labels import P_COLUMNS
from udfs import selfcheck
from udfs.answer import Form
from udfs.engine import EngineSettings, Sampling, silent_seconds
from udfs.sample import sampled_schema, sampler
from udfs.score import Scoring, scored_schema, scorer
from udfs.stream import loader

WAVE_SECONDS = 60.0  # of engine work: two or three of them are what a kill can cost; how often readers see news
COMMIT_SECONDS = 45.0  # of a wave's commit: where one takes longer, waves grow, or engines would wait for it
# The same for engines on CPUs, on whose cores commits are made: a thread that waits its turn keeps the others waiting,
# so a commit costs an engine about its own time, and is to take no more than 2 % of a wave.
COMMIT_SECONDS_ON_CPU = 0.02 * WAVE_SECONDS
MOST_WAVES = 5.0  # as long as so many a wave may grow
TOLD_SECONDS = 30.0  # between two writes of the run's row; each is a commit of half a second
# A decoded token costs about three prefilled ones on CPU (1,233 against 453 a second); it only sizes a first wave.
DECODE_COST = 3
CHECKED_PROMPTS = 12  # in the first-use self check
POISONS = 8  # pairs in one wave that may kill their engine; more is the engine's or the machine's own fault
CANARIES = 5  # known prompts in a shard, as far as their share of the tokens allows
CANARY_SHARE = 0.005  # of the tokens of work
NOT_FINITE_SHARE = 0.1  # of a wave's answers: more is a broken engine, not odd pairs
stop_asked = threading.Event()  # by a signal


@dataclass(frozen=True)
class Canary:
    """A prompt, and the p of labels 4, 3, 2, 1 that the engine gave it when it was asked alone, uncached."""

    ids: list[int]
    p: list[float]


@dataclass(frozen=True)
class _Wave:
    """An interval [begin, end) of a line that was put to the engines, and its answers to come."""

    wave_id: str
    rows: DataFrame
    begin: int
    end: int
    shards: int
    canaries: bool
    unlooked: tuple[str, ...]  # searches that were merged by then, and not behind a canary
    loaded: int  # how often this run had ended its engines by then
    landed: Future[DataFrame]


@dataclass(frozen=True)
class _Found:
    """What a search for the prompts that engines die of came to: the landed answers of all that was asked alone or
    lives, how many engines died, and why it was given up, where it was."""

    answered: DataFrame | None
    deaths: int
    gave_up: GaveUp | None


@dataclass(frozen=True)
class _Search:
    """Shards on which an engine died, and what comes of them."""

    wave_id: str
    shards: int
    of: int  # rows of the wave
    loaded: int  # as of a wave
    begin: Callable[[], Future[_Found]]
    found: Future[_Found]
    again: bool = False  # its first answers were no numbers


class Stopped(Exception):
    """The run ends early, as asked; what is merged is kept, and the next run goes on from there."""


class TooManyRefused(RuntimeError):
    """More rows without an answer than the operator allows."""


def about_engine(what: Scoring) -> str:
    """What a model's first use is known by: other settings, another prompt or another build of the engine are another
    engine, with its own noise and pace; and other canaries in the model's folder want a look of their own."""
    about = f"{what.settings.dtype} {what.settings.hash} {what.prompt.prompt_id} {engines.package()}"
    if what.model.canaries_file is None:
        return about
    return f"{about} {hashlib.sha256(Path(what.model.canaries_file).read_bytes()).hexdigest()[:12]}"


class Waves(ABC):
    """A run of engines over lines of prompts, wave by wave: plans, checks first use, keeps the run's row.

    What a wave asks and writes is its owner's; `done` is the outcome of a row that counts as done.
    """

    done = "scored"
    max_refused: float = math.inf  # rows of a run without an answer
    deadline: datetime | None = None  # no wave begins after it; local time
    rides = False  # whether canaries ride along: only where labels are asked for
    stays = False  # whether it is a stream that does not end; max_refused is then of a batch
    least: int | None = None  # tokens of work in a wave (HOT_TOKENS): below, a commit is dearer than what it saves
    _held: ClassVar[EngineSettings | None] = None  # what the workers' engines were last loaded with

    def __init__(self, spark: SparkSession, root: str, what: Scoring, run: runs.Run) -> None:
        self.spark, self.root, self.what, self.run = spark, root, what, run
        self.settings_hash = what.settings.hash
        self.label_ids: Sequence[int] = what.prompt.label_ids  # of which the probabilities are asked
        self.known: list[Canary] = []  # prompts with known answers, which ride along
        # Wall time by what it went to; a run that goes on goes on counting.
        begun = {name.removeprefix("seconds_"): s for name, s in run.figures.items() if name.startswith("seconds_")}
        before = begun.pop("total", None)
        self._since = run.started_at if before is None else datetime.now(UTC) - timedelta(seconds=before)
        self.seconds: dict[str, float] = defaultdict(float, begun)
        self._clock, self._ticked, self._at_work = threading.Lock(), 0.0, 0  # of the waves that are being asked
        self._asked: deque[_Wave] = deque()  # not looked at yet
        self._searches: deque[_Search] = deque()  # not over yet
        self._groups: set[str] = set()  # of Spark's jobs in which engines are asked now
        self._mark = secrets.token_hex(3)  # a name that was cancelled stays cancelled, also for a run that goes on
        self.left = False  # the run was given up from another thread
        self._committed = 0.0  # seconds that the last wave's commit took, and the run's row behind it
        self._loaded = 0  # how often the engines were ended because a wave was wrong
        self._checked: float | None = None  # the rate found when the engine agreed with itself, now or in another run
        self.engine_names: set[str] = set()  # that answered
        self.loads = run.engine_loads or 0  # of a run that goes on: those before
        self._rate = 0.0  # tokens of work (of the line) per second and engine, as last measured
        self._work = run.figures.get("tokens_per_second", 0.0) * (run.engine_seconds or 0.0)  # tokens of work done
        self._outside: float | None = None  # sum of p_outside over scored rows
        self._owed = 0.0  # tokens that canaries may still cost
        self._ridden = False  # whether any was asked in this run
        self._unlooked: list[str] = []  # waves that were merged since a canary was last right
        self._unlooked_searches: list[str] = []  # likewise; their engines may be younger than the wave's at work
        self._loading: Future[None] | None = None
        self._merging: tuple[str, dict[str, Any], Future[None]] | None = None
        self._told = time.monotonic()  # when the run's row was last written
        self._refused_before = 0  # of a stream that stays, an hour ago: they count no more
        self._end: Exception | None = None  # why the run ends behind the wave at work

    @property
    def same(self) -> dict[str, str]:
        """The columns of a key that have one value in all rows that this run writes (see `delta.upsert`)."""
        return dict(zip(("model_id", "prompt_id"), self.what.regime, strict=True))

    def ask(self, rows: DataFrame) -> DataFrame:
        """The plan that puts a wave's prompts (`ids`) to the engines and brings their answers: label probabilities,
        where the owner asks for nothing else."""
        score = scorer(self.what.settings, self.label_ids, self.what.load_engine)
        return rows.mapInArrow(score, scored_schema(rows.schema), profile=self._profile())

    @abstractmethod
    def write(self, answered: DataFrame, wave_id: str) -> None:
        """Writes a wave's landed answers, in one commit. Runs while the engines are at the next wave."""

    def judged(self) -> DataFrame:
        """What this model and prompt have judged."""
        return delta.read(self.spark, self.root, "label_probs").where(models.of(*self.what.regime))

    def asked_to_stop(self) -> str | None:
        """Why no more work is to begin; None where it may."""
        if stop_asked.is_set():
            return "asked to end (SIGTERM)"
        if self.run.run_id in runs.overtaken:
            return "another driver took this one for dead, and has gone on with its work"
        if self.deadline and datetime.now() >= self.deadline:
            return f"the deadline {self.deadline:%H:%M} is reached"
        return None

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Adds the wall time spent in here to `seconds`."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] += time.monotonic() - began

    def land_line(self, prompts: DataFrame, name: str) -> prefix.Line:
        """Lines prompts (of `rendered`) up by prefix and lands the line, so that every wave cuts the same one."""
        with self.timed("planning"):
            parts, block = int(self.spark.conf.get("spark.sql.shuffle.partitions") or 4), self.what.settings.block_size
            rows = prefix.lined_up(prompts, parts, block)
            return prefix.line(delta.land(self.spark, self.root, self.run.run_id, self.line_name(name), rows), block)

    @staticmethod
    def line_name(name: str) -> str:
        """Under which the line of a batch is landed."""
        return f"{name}-line"

    def planned(self, line: prefix.Line, total: int, seconds: float) -> None:
        """Notes and tells what a line asks for; `total` are the pairs that were looked at."""
        self._add(prompt_tokens=line.prompt_tokens, trie_nodes=line.trie_nodes, block_floor=line.block_floor)
        print(
            f"{self.run.job}: {line.prompts:,} of {total:,} pairs to do · {line.prompt_tokens:,} prompt tokens, "
            f"{line.block_floor:,} to compute with shared prefixes · planned in {seconds:.0f} s",
            flush=True,
        )

    def take_engines(self) -> None:
        """Ends the workers' engines where they were loaded with other settings: two do not fit beside each other."""
        if Waves._held not in (None, self.what.settings):
            engines.end(self.spark, self.what.settings.tensor_parallel)
        Waves._held = self.what.settings
        engines.may_be_silent(self.spark, silent_seconds(self.what.settings))

    def begin_loading(self) -> None:
        """Has the engines loaded while the driver plans; there must be something to do for them."""
        self.take_engines()
        settings = self.what.settings

        def load_all() -> None:
            with self.timed("loading"), self.cancellable("load"):
                engines.each(self.spark, settings.tensor_parallel, loader(settings, self.what.load_engine))

        once = ThreadPoolExecutor(1, "load")
        self._loading = once.submit(load_all)
        once.shutdown(wait=False)

    def check_first_use(self, line: prefix.Line) -> None:
        """Registers the model after its engine agreed with itself; raises RuntimeError, before a row, where not."""
        self.take_engines()
        if self._loading is not None:  # a task beside it would load another engine
            with self.timed("loading_waited"):
                self._loading.result()
            self._loading = None
        if self._checked is not None:
            self._rate = min(self._rate, self._checked)  # a batch before may have found its prefixes cached
            return
        what = self.what
        about = about_engine(what)
        row = models.row(self.spark, self.root, what.model.model_id)
        metrics, config = (dict((row[name] if row else None) or {}) for name in ("metrics", "config"))
        if f"self_check_dp {about}" in metrics:
            self._rate = self._checked = metrics.get(f"tokens_per_second {about}", 0.0)
            self.known = [Canary(**canary) for canary in json.loads(config.get(f"canaries {about}", "[]"))]
            return
        try:
            known = selfcheck.canaries(what.model, what.prompt)
        except ValueError as error:
            raise runs.Unmet(str(error)) from error
        if (longest := max((len(ids) for ids, _ in known), default=0)) >= what.settings.max_model_len:
            raise runs.Unmet(
                f"{what.model.canaries_file} has a prompt of {longest:,} tokens, and --max-model-len is "
                f"{what.settings.max_model_len:,}: give a larger one, or shorten that canary"
            )
        # From all over the line: its first prompts are of one product, which may be the one that kills engines.
        fitting = line.rows.where(F.size("ids") < what.settings.max_model_len)
        chosen = fitting.orderBy(F.xxhash64("ids")).select("ids").limit(CHECKED_PROMPTS)
        sample = [list(r["ids"]) for r in chosen.collect()]
        kept = models.keep_prompt(what.prompt)
        if not sample:
            models.register(self.spark, self.root, what.model, what.stage, config=kept)  # and the next batch checks
            return
        check = selfcheck.checker(what.settings, what.prompt.label_ids, sample, known, what.load_engine)
        with self.timed("check"), self.cancellable("check"), engines.own_workers(self.spark, beside=True):
            found = (
                self.spark.range(1)
                .repartition(1)
                .mapInArrow(check, from_arrow_schema(selfcheck.SCHEMA), profile=self._profile())
                .collect()[0]
            )
        sample = list(selfcheck.asked(sample, found["attempt"]))
        if not sample:  # the engine died on the few there are
            models.register(self.spark, self.root, what.model, what.stage, config=kept)
            return
        allowed, of_mean = selfcheck.NOISE[found["dtype"]], selfcheck.MEAN_NOISE[found["dtype"]]
        print(
            f"{self.run.job}: first use of model {what.model.model_id}: the engine agrees with itself within "
            f"{found['self_check_dp']:.1e} in {found['dtype']} (allowed {allowed:.0e}), in the mean within "
            f"{found['mean_dp']:.1e} ({of_mean:.0e})",
            flush=True,
        )
        for difference, limit, than in (
            (found["self_check_dp"], allowed, "itself"),
            (found["mean_dp"], of_mean, "itself in the mean"),
            (found["canaries_dp"], allowed, "its canaries.json"),
            (found["canaries_mean_dp"], of_mean, "its canaries.json in the mean"),
        ):
            if difference is not None and not difference <= limit:
                raise RuntimeError(
                    f"the engine ({found['engine_version']}, {found['dtype']}) does not agree with {than}: |Δp| is "
                    f"{difference:.2e}, allowed {limit:.0e}. Nothing was written. Try --dtype float32, another "
                    "version of vllm, or look at the model with: check --parity --model " + what.model.path
                )
        self._rate = found["tokens_per_second"]
        alone = [Canary(ids, list(p)) for ids, p in zip(sample, found["alone"], strict=True)]
        self.known = sorted((c for c in alone if not any(map(math.isnan, c.p))), key=lambda c: len(c.ids))[:CANARIES]
        models.register(
            self.spark,
            self.root,
            what.model,
            what.stage,
            metrics={f"self_check_dp {about}": found["self_check_dp"], f"tokens_per_second {about}": self._rate},
            config=kept | {f"canaries {about}": json.dumps([asdict(canary) for canary in self.known])},
        )
        self._checked = self._rate

    def run_through(self, line: prefix.Line, name: str, total: int, started: float, decoded: int = 0) -> None:
        """All that is done with a line for which `total` pairs were looked at since `started`; nothing if it is empty.

        `decoded`: tokens that are written behind each prompt, at most.
        """
        if line.prompts:
            self.planned(line, total, time.monotonic() - started)
            self.check_first_use(line)
            # A low guess, for the first wave.
            self._rate *= line.length / (line.length + line.prompts * decoded * DECODE_COST)
            self.run_line(line, name)

    def run_line(self, line: prefix.Line, name: str) -> None:
        """Puts a line to the engines in waves of about `WAVE_SECONDS`, each when an engine is free of the one before,
        so that none waits for the slowest or for the driver. A wave is looked at and merged while the next is asked.

        Raises Stopped at the deadline, GaveUp where faults do not end, RuntimeError beyond `max_refused`.
        """
        at, done, began = 0, 0, time.monotonic()
        numbers = count()
        asked, searches = self._asked, self._searches
        with (
            ThreadPoolExecutor(2, "ask") as asker,
            ThreadPoolExecutor(1, "search") as searcher,
            ThreadPoolExecutor(1, "merge") as merger,
        ):

            def wave_id() -> str:
                return f"{self.run.run_id}-{name}-{next(numbers):04d}"

            def merge(wave: str, answered: DataFrame, figures: dict[str, Any]) -> None:
                nonlocal done
                self._settle()
                if not figures["rows"]:
                    self._drop_landed(wave)
                    return
                self._tell_engine(figures)
                self._merging = (wave, figures, merger.submit(self._merge, answered, wave))
                done += int(figures["rows"])

            def search(died: DataFrame, of: int) -> None:
                suspects, wave = list(prefix.stretches(died).values()), wave_id()
                print(f"{self.run.job}: an engine died; looking for the prompt in {len(suspects)} shard(s)", flush=True)

                def begin() -> Future[_Found]:
                    return searcher.submit(self._searched, line, suspects, died.schema, wave)

                searches.append(_Search(wave, len(suspects), of, self._loaded, begin, begin()))

            def merge_found(at_most: int) -> None:
                """What searches found; waits while more shards than `at_most` are being searched."""
                while searches and (searches[0].found.done() or sum(one.shards for one in searches) > at_most):
                    found, one = searches[0].found.result(), searches[0]
                    self._count(engine_deaths=found.deaths)
                    figures = self._figures(found.answered) if found.answered is not None else None
                    if figures and one.loaded == self._loaded and (wrong := _mostly_no_numbers(figures, one.of)):
                        self._drop(wrong, one.again)
                        one = replace(one, again=True)
                    if one.loaded != self._loaded:  # its engines were found wrong
                        searches[0] = replace(one, loaded=self._loaded, found=one.begin())
                        continue
                    searches.popleft()
                    self._end = self._end or found.gave_up
                    if found.answered is not None and figures:
                        if self.rides:
                            self._unlooked_searches.append(one.wave_id)
                        merge(one.wave_id, found.answered, figures)

            try:
                while at < line.length and not (self._end and not asked):
                    if self.left:
                        raise RuntimeError("the run was given up")
                    # As many shards as there are engines keep them all busy: no wave would find one free.
                    merge_found(min(POISONS, engines.count(self.spark)) - 1)
                    if not asked:
                        if self._end or self.asked_to_stop():
                            break
                        asked.append(self._put(line, at, wave_id(), asker))
                    wave = asked[0]
                    self._until_one_is_free(wave)
                    if wave.end < line.length and not (self._end or self.asked_to_stop()):
                        asked.append(self._put(line, wave.end, wave_id(), asker))
                    answered, figures = self._looked_at(wave)
                    if figures["dead"]:
                        died = F.col("outcome") == "engine_failed"
                        search(answered.where(died), int(figures["rows"]))
                        answered = answered.where(~died)
                        figures = self._figures(answered, figures["canaries"])
                    merge(wave.wave_id, answered, figures)
                    at = asked.popleft().end
                    seconds = time.monotonic() - began
                    print(progress(self.run.job, done, line.prompts, at, line.length, seconds), flush=True)
                if not self._end:
                    merge_found(0)
                if self._end:
                    raise self._end
                if done != line.prompts and (why := self.asked_to_stop()):
                    left = f"{line.prompts - done:,} of {line.prompts:,} pairs are left"
                    raise Stopped(f"{why}; {left} for the next run")
            except (Stopped, GaveUp, TooManyRefused):
                self.abandon()
                self._not_reached(line, at)
                raise
            except KeyboardInterrupt:
                self.abandon()
                with suppress(Exception):  # of a merge that was cancelled with all else
                    self._settle()
                raise
            finally:
                self.abandon()
                asked.clear()
                searches.clear()
                self._settle()
        if done != line.prompts:
            raise RuntimeError(f"{line.prompts:,} pairs were planned but {done:,} came back; this is a bug, report it")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """All that a run does: an error ends its row and what engines are asked; what it landed goes in any case."""
        try:
            yield
        except BaseException as error:
            self.abandon()
            self.fail(error)
            raise
        finally:
            delta.drop_scratch(self.spark, self.root, self.run.run_id)

    def fail(self, error: BaseException) -> None:
        """Writes that the run ended by an error."""
        self.run = runs.fail(self.spark, self.root, self.run, error)

    def abandon(self) -> None:
        """Cancels what the engines are being asked; where a thread waits for it, that fails."""
        asked = [wave.wave_id for wave in self._asked] + [search.wave_id for search in self._searches]
        for name in self._groups | set(map(self._group, asked)):
            engines.cancel(self.spark, name)

    @contextmanager
    def cancellable(self, name: str) -> Iterator[None]:
        """Spark's jobs that this thread begins in here are a group, which `abandon` cancels."""
        group = self._group(name)
        self._groups.add(group)
        try:
            with engines.group(self.spark, group):
                yield
        finally:
            self._groups.discard(group)

    def _group(self, name: str) -> str:
        return f"{name} {self._mark}"

    def _put(self, line: prefix.Line, begin: int, wave_id: str, asker: ThreadPoolExecutor) -> _Wave:
        """Has the next wave of the line put to the engines, from `begin` on."""
        shards = engines.count(self.spark)
        bearable = COMMIT_SECONDS_ON_CPU if engines.on_cpu() else COMMIT_SECONDS
        seconds = WAVE_SECONDS * min(MOST_WAVES, max(1.0, self._committed / bearable))
        if self.deadline:  # what is asked is waited for
            seconds = min(seconds, max(WAVE_SECONDS, (self.deadline - datetime.now()).total_seconds()))
        width = max(self.least or prefix.HOT_TOKENS, int(self._rate * seconds * shards))
        # A last wave of a few rows would cost a commit of its own.
        end = line.length if line.length - begin < 1.25 * width else begin + width
        riders = self._riders(line, end - begin, shards)
        rows = line.shards(begin, end, shards, riders)
        landed = asker.submit(self._land, rows, wave_id)
        unlooked = tuple(self._unlooked_searches)
        return _Wave(wave_id, rows, begin, end, shards, riders is not None, unlooked, self._loaded, landed)

    def _land(self, rows: DataFrame, wave_id: str) -> DataFrame:
        """Asks the engines for a wave, beside the last answers of the one before; returns what was landed."""
        with self.cancellable(wave_id), engines.own_workers(self.spark, beside=True), self._asking():
            landed = delta.land(self.spark, self.root, self.run.run_id, wave_id, self.ask(rows))
        crash("landed")
        return landed

    def _until_one_is_free(self, wave: _Wave) -> None:
        """Waits until an engine has nothing left to do for this wave. Raises what the wave failed of."""
        while not wave.landed.done() and not (
            wave.shards > 1 and engines.one_is_free(self.spark, self._group(wave.wave_id))
        ):
            wait([wave.landed], timeout=0.5)
        if wave.landed.done():
            wave.landed.result()

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Counts the wall time in which engines are asked: once where two waves are."""
        self._tick(1)
        try:
            yield
        finally:
            self._tick(-1)

    def _tick(self, more: int = 0) -> None:
        with self._clock:
            now = time.monotonic()
            if self._at_work:
                self.seconds["scoring"] += now - self._ticked
            self._ticked, self._at_work = now, self._at_work + more

    def _looked_at(self, wave: _Wave) -> tuple[DataFrame, dict[str, Any]]:
        """A wave's landed answers and their figures, when all of them are there; those of dead engines too.

        A wave in which a canary is off, or which is mostly no answers, is dropped and asked once more, of engines that
        are loaded anew; raises GaveUp where that does not help. One that was asked of the engines which were found
        wrong behind it is asked once more in any case: it may have no canaries.
        """
        answered, canaries = wave.landed.result(), None
        if wave.loaded != self._loaded:
            answered = self._land(wave.rows, f"{wave.wave_id}-anew")
        for again in (False, True):
            wrong = None
            if wave.canaries:
                wrong, canaries = self._off(answered.where("pair_id IS NULL"))
                answered = answered.where("pair_id IS NOT NULL")
            if wrong is None:
                figures = self._figures(answered, canaries)
                wrong = _mostly_no_numbers(figures, figures["rows"])
            if wrong is None:
                break
            self._drop(wrong, again)
            answered = self._land(wave.rows, f"{wave.wave_id}-again")
        if canaries is not None:
            self._unlooked.clear()
            self._unlooked_searches = [one for one in self._unlooked_searches if one not in wave.unlooked]
            self._measure(canaries_tokens=self.run.figures.get("canaries_tokens", 0.0) + canaries)
        elif self.rides:
            if figures["rows"] > figures["dead"]:
                self._unlooked.append(wave.wave_id)
            self._ridden = self._ridden and not wave.canaries  # those that rode died: the next wave has some
        crash("checked")
        if figures["seconds"]:
            self._rate = figures["work"] / figures["seconds"]
        return answered, figures

    def _drop(self, wrong: str, again: bool) -> None:
        """Ends the engines of a wave whose answers are wrong, so that it is asked again of fresh ones; raises GaveUp
        where that was done already."""
        if again:
            self._count(waves_failed=1)
            raise GaveUp(
                f"gave up: {wrong}, with engines loaded anew too. Nothing of this wave was written, earlier waves "
                f"are kept.{self._in_doubt()} Look at the machine's memory and GPU, and at: check --parity --model "
                + self.what.model.path
            )
        print(
            f"{self.run.job}: {wrong}; the wave is dropped and asked again of fresh engines.{self._in_doubt()}",
            flush=True,
        )
        self._count(waves_dropped=1)
        self._loaded += 1
        self._settle()  # a merge would keep the tasks that end the engines waiting
        engines.end(self.spark, self.what.settings.tensor_parallel)

    def _riders(self, line: prefix.Line, work: int, shards: int) -> DataFrame | None:
        """Canaries for each shard of a wave, as many as `CANARY_SHARE` of the tokens of work pays for: one before the
        shard's rows, the others behind them, where a cache that went wrong on the way shows. A run's first wave has one
        that is paid for later, so that no engine writes without having been looked at."""
        if not (self.rides and self.known):
            return None
        self._owed += CANARY_SHARE * work
        cost = shards * sum(len(canary.ids) for canary in self.known) / len(self.known)
        each = min(len(self.known), max(int(self._owed / cost), int(not self._ridden)))
        if not each:
            return None
        self._ridden = True
        self._owed -= each * cost
        first, last = -1, 2**31 - 1  # parts of the line
        rows = [
            (canary.ids, len(canary.ids), 0, first if n == 0 else last, n, shard)
            for shard in range(shards)
            for n, canary in enumerate(self.known[:each])
        ]
        columns = "ids ARRAY<INT>, group_tokens INT, tokens_cut INT, part INT, position BIGINT, shard INT"
        riders = self.spark.createDataFrame(rows, columns)
        there = set(riders.columns)
        others = [F.lit(None).cast(f.dataType).alias(f.name) for f in line.rows.schema if f.name not in there]
        return riders.select("*", *others)

    def _in_doubt(self) -> str:
        """A sentence about the waves that were merged without a look at their engines since a canary was last right."""
        unlooked = self._unlooked + self._unlooked_searches
        if not unlooked:
            return ""
        waves = ", ".join(f"'{wave_id}'" for wave_id in unlooked)
        theirs = f"run_id = '{self.run.run_id}' AND wave_id IN ({waves})"
        # For people to paste: a shell would run what stands between backticks.
        forget = f"DELETE FROM delta.\\`{self.root}/label_probs\\` WHERE {theirs}"  # noqa: S608
        again = "the same command once more" if self.run.job == "backfill" else f"backfill --model {self.run.model_id}"
        return (
            f" No canary rode in {len(unlooked):,} merged waves before it; to have those asked anew: "
            f'sql --tables {self.root} "{forget}", then {again} (with the same --prompt, where one was named).'
        )

    def _off(self, riders: DataFrame) -> tuple[str | None, int | None]:
        """A sentence where an engine answered a canary otherwise than when it was alone, None where all is well; and
        the tokens that the canaries cost, None where all their engines died."""
        wrong, worst, computed = None, self.run.figures.get("canaries_max_dp", 0.0), 0
        columns = ("position", "dtype", "prompt_tokens", "cached_tokens", *P_COLUMNS)
        answered = riders.where("outcome <> 'engine_failed'").select(*columns).collect()
        if not answered:
            return None, None
        for row in answered:
            got, known = [row[p] for p in P_COLUMNS], self.known[row["position"]].p
            off = selfcheck.largest_difference([[float("nan") if p is None else p for p in got]], [known])
            off = min(off, 1.0)  # no answer is as far off as can be
            worst, computed = max(worst, off), computed + row["prompt_tokens"] - (row["cached_tokens"] or 0)
            if not off <= (allowed := selfcheck.NOISE[row["dtype"]]):
                wrong = f"a canary's probabilities are off by {off:.2e} (allowed {allowed:.0e})"
        self._measure(canaries_max_dp=worst)
        return wrong, computed

    def _tell_engine(self, figures: dict[str, Any]) -> None:
        """Writes which engine answers, before the first of its answers are: a kill may be the next thing."""
        before = self.run.dtype, self.run.engine_version, self.run.settings_hash
        told = (figures["dtype"] or before[0], figures["version"] or before[1], self.settings_hash)
        if told != before:
            self.run = replace(self.run, dtype=told[0], engine_version=told[1], settings_hash=told[2])
            self._tell()

    def _not_reached(self, line: prefix.Line, at: int) -> None:
        """Takes what a run that ends early has not asked for out of the tokens that it planned."""
        tokens, nodes, in_blocks = line.behind(at)
        self._add(prompt_tokens=-tokens, trie_nodes=-nodes, block_floor=-in_blocks)

    def _merge(self, answered: DataFrame, wave_id: str) -> None:
        began = time.monotonic()
        with self.timed("commit"):
            self.write(answered, wave_id)
        self._committed = time.monotonic() - began
        crash("merged")

    def _settle(self) -> None:
        """Waits for the wave that is being merged, and tells it. Raises RuntimeError beyond `max_refused`."""
        if self._merging is None:
            return
        wave_id, figures, merged = self._merging
        self._tick()
        began, asked = time.monotonic(), self.seconds["scoring"]
        wait([merged])  # a Ctrl-C in here leaves the wave to be told
        self._merging = None
        merged.result()
        self._tick()
        self.seconds["commit_waited"] += time.monotonic() - began - (self.seconds["scoring"] - asked)
        self._tally(figures)
        crash("told")
        self._drop_landed(wave_id)
        if self.run.counts.get("refused", 0) > self.max_refused + self._refused_before:
            raise TooManyRefused(
                f"stopped: {self.run.counts['refused']:,} pairs were refused, more than --max-refused "
                f"{self.max_refused:,}. What was judged is kept; column outcome of label_probs says why. Mend the "
                "pairs or raise the limit, and start again."
            )

    def _drop_landed(self, wave_id: str) -> None:
        """Removes what a wave landed: also what was asked again, and a search's pieces."""
        for name in delta.inside(self.spark, delta.scratch(self.root, self.run.run_id, "")):
            if name.startswith(wave_id):
                delta.drop_scratch(self.spark, self.root, self.run.run_id, name)

    def _searched(self, line: prefix.Line, suspects: list[prefix.Stretch], schema: StructType, wave_id: str) -> _Found:
        """Asks again where an engine died on its shard, in ever smaller halves: what dies alone is `engine_failed`.

        A worker that dies takes its shard's answers along, and Spark's next try of the task answers all of it with
        `engine_failed` and keeps a fresh engine. Here such shards are cut in halves, each a task of its own, until a
        half lives or is one prompt; that one is asked twice, and once more where executors were lost meanwhile. So a
        poisonous prompt costs about log2(rows) engines, a death by chance two tasks, and a prompt that kills in company
        only is scored. On a cluster it runs beside the waves, which need the other engines meanwhile. Few shards are
        searched at a time, so that prompts are found early: where more dies than a few prompts can explain, or the time
        is over, what was found and what lives is written, and the run ends behind it; the next start has so much less
        before it.
        """
        died = F.col("outcome") == "engine_failed"
        rows = sum(prefix.length(stretch) for stretch in suspects)
        allowed = POISONS * (max(1, math.ceil(math.log2(rows))) + 1)
        deaths, level, few = len(suspects), 0, max(1, POISONS // 2)
        spared: list[prefix.Stretch] = []  # prompts that were alone when executors were lost
        answered: DataFrame | None = None
        gave_up: GaveUp | None = None
        with self.cancellable(wave_id):
            while suspects and not gave_up and not self.asked_to_stop():
                now, later = suspects[:few], suspects[few:]
                pieces = dict(enumerate(half for stretch in now for half in prefix.halves(stretch)))
                landed = delta.scratch(self.root, self.run.run_id, f"{wave_id}-{level}")
                gone = engines.lost(self.spark)
                # In local mode nothing but this keeps two pieces, and so two engines, from running side by side.
                at_once = 1 if engines.is_local(self.spark) else len(pieces)
                with engines.own_workers(self.spark, beside=True), self._asking():
                    for first in range(0, len(pieces), at_once):
                        some = {number: pieces[number] for number in range(first, min(first + at_once, len(pieces)))}
                        mode = "append" if first else "overwrite"  # what an earlier search landed
                        self.ask(line.pieces(some)).write.parquet(landed, mode=mode)
                asked = self.spark.read.schema(schema).parquet(files.literal(landed))
                dead = prefix.stretches(asked.where(died))
                alone = [number for number, stretch in dead.items() if prefix.length(stretch) == 1]
                if engines.lost(self.spark) - gone:  # their end may have taken engines along: they are asked once more
                    alone = [number for number in alone if dead[number] in spared]
                    spared += [stretch for stretch in dead.values() if prefix.length(stretch) == 1]
                known = asked.where(~died | F.col("shard").isin(alone))
                answered = known if answered is None else answered.unionByName(known)
                suspects = [stretch for number, stretch in dead.items() if number not in alone] + later
                deaths, level = deaths + len(dead) + len(alone), level + 1
                if suspects and deaths > allowed:
                    gave_up = GaveUp(
                        f"gave up: engines died {deaths} times on {rows:,} pairs, more than {POISONS} bad ones "
                        "explain. What was scored and found bad is written; the next start goes on with the rest. The "
                        "executors' logs say what the engine died of; often it is memory (--max-num-seqs; on a GPU "
                        "--max-num-batched-tokens and --gpu-memory, on CPUs --max-model-len and --kv-cache-gib)."
                    )
        return _Found(answered, deaths, gave_up)

    def _figures(self, answered: DataFrame, canaries: int | None = None) -> dict[str, Any]:
        """Of landed answers; the tokens that canaries beside them cost are computed too."""
        done = F.col("outcome") == self.done
        there = answered.columns
        row = answered.agg(
            F.count("*").alias("rows"),
            F.count_if(done).alias("done"),
            F.count_if(F.col("outcome") == "not_finite").alias("not_finite"),
            F.count_if(F.col("outcome") == "engine_failed").alias("dead"),
            F.sum("p_outside" if "p_outside" in there else F.lit(None)).alias("outside"),
            F.sum("answer_tokens" if "answer_tokens" in there else F.lit(None)).alias("generated"),
            F.sum(F.when(done, F.col("prompt_tokens") - F.col("cached_tokens"))).alias("computed"),
            F.sum("tokens_cut").alias("cut"),
            F.sum(F.when(F.col("outcome") != "engine_failed", F.col("new_nodes"))).alias("work"),
            F.sum("engine_seconds").alias("seconds"),
            F.sum("startup_seconds").alias("startup"),
            F.collect_set("engine_id").alias("engines"),
            F.first("engine_version", ignorenulls=True).alias("version"),
            F.first("dtype", ignorenulls=True).alias("dtype"),
        ).collect()[0]
        figures = row.asDict() | {"canaries": canaries}
        if canaries:
            figures["computed"] = (figures["computed"] or 0) + canaries
        return figures

    def _tally(self, figures: dict[str, Any]) -> None:
        """Adds a written wave to the run's row, and writes it now and then: a killed run shows how far it came."""
        rows, done = int(figures["rows"]), int(figures["done"])
        self._work += figures["work"] if figures["seconds"] else 0
        self._count(**{self.done: done}, refused=rows - done)
        self._add(tokens_cut=int(figures["cut"]), waves=1)
        for name in ("computed", "generated"):
            if figures[name] is not None:
                self._add(**{f"{name}_tokens": int(figures[name])})
        self.engine_names |= set(figures["engines"])
        if figures["outside"] is not None:
            self._outside = (self._outside or 0.0) + float(figures["outside"])
        all_done = self.run.counts[self.done]
        self.run = replace(
            self.run,
            engine_seconds=(self.run.engine_seconds or 0.0) + float(figures["seconds"]),
            engine_loads=self.loads + len(self.engine_names),
            p_outside=self._outside / all_done if all_done and self._outside is not None else None,
        )
        self.seconds["startup"] += float(figures["startup"] or 0.0) / max(1, len(figures["engines"]))
        self._split()
        if time.monotonic() - self._told > TOLD_SECONDS:
            self._tell()

    def _tell(self) -> None:
        """Writes the run's row."""
        began = time.monotonic()
        runs.write(self.spark, self.root, self.run)
        self._told = time.monotonic()
        self._committed += self._told - began

    def _split(self) -> None:
        """Wall time by what it went to, into the run's figures. seconds_scoring is all the time that engines were
        asked; of it, a mean engine was loading (startup), at work (engine), or waiting (idle). commit_waited is the
        part of commit that did not overlap with scoring. other: the driver's own time between these, engines idle."""
        self._tick()
        busy = (self.run.engine_seconds or 0.0) / max(1, engines.count(self.spark))
        idle = max(0.0, self.seconds["scoring"] - self.seconds["startup"] - busy)
        # A time that is read back is this machine's, without a zone.
        total = (datetime.now(UTC) - self._since.astimezone(UTC)).total_seconds()
        waited = ("planning", "loading_waited", "check", "scoring", "commit_waited")
        other = total - sum(self.seconds.get(name, 0.0) for name in waited)
        told = {**self.seconds, "engine": busy, "idle": idle, "other": other, "total": total}
        self._measure(**{f"seconds_{k}": v for k, v in told.items()})
        if self.run.engine_seconds:
            self._measure(tokens_per_second=self._work / self.run.engine_seconds)

    def _count(self, **more: int) -> None:
        counts = self.run.counts | {k: self.run.counts.get(k, 0) + v for k, v in more.items()}
        self.run = replace(self.run, counts=counts)

    def _add(self, **more: int) -> None:
        sums: dict[str, Any] = {name: (getattr(self.run, name) or 0) + value for name, value in more.items()}
        self.run = replace(self.run, **sums)

    def _measure(self, **figures: float) -> None:
        self.run = replace(self.run, figures=self.run.figures | {name: float(value) for name, value in figures.items()})

    def _profile(self) -> ResourceProfile | None:
        return engines.profile(self.spark, self.what.settings.tensor_parallel)


def _mostly_no_numbers(figures: dict[str, Any], rows: int) -> str | None:
    """A sentence where too many answers of a wave of `rows` are no numbers: a broken engine, not odd pairs."""
    if figures["not_finite"] <= max(3, NOT_FINITE_SHARE * rows):
        return None
    return f"{figures['not_finite']:,} of {rows:,} answers are not numbers"


class Drawing(Waves):
    """A run in which answers are written behind the prompts, all of a prompt in one row (`samples`)."""

    done = "sampled"
    begun = 0  # tokens of its answer that a prompt ends with
    form: Form
    sampling: Sampling

    def ask(self, rows: DataFrame) -> DataFrame:
        """The wave's answers."""
        settings, load = self.what.settings, self.what.load_engine
        draw = sampler(settings, self.form, self.sampling, begun=self.begun, load_engine=load)
        return rows.mapInArrow(draw, sampled_schema(rows.schema), profile=self._profile())


def progress(job: str, done: int, pairs: int, at: int, length: int, seconds: float) -> str:
    """One line for people: pairs done of all, pairs and tokens a second, when it will be done."""
    left = seconds / at * (length - at) if at else 0
    return (
        f"{job}: {done:,} of {pairs:,} pairs · {done / seconds:,.1f} pairs/s · {at / seconds:,.0f} tokens/s · "
        f"{f'{left / 60:,.1f} min left' if at < length else f'{seconds:,.0f} s'}"
    )
