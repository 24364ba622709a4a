"""The record of a run: one row in `runs`, written when a job starts and again when it ends, however it ends.

A run that was killed cannot write its end. So each holds a lease, a small file under T/_leases that its driver renews
while it lives, and who starts next writes `lost` into the rows whose lease has lapsed and removes what they had landed.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JJavaError
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from schemas import delta
from schemas.tables import RUNS

RENEWED_SECONDS = 30.0
LAPSED_SECONDS = 300.0  # a driver that swaps, or a storage that throttles, may miss a few renewals


@dataclass(frozen=True)
class Run:
    """The columns of `runs`; `counts` are rows by what became of them. Times are UTC."""

    run_id: str
    job: str
    status: str
    started_at: datetime
    message: str | None = None
    model_id: str | None = None
    prompt_id: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    waves: int | None = None
    prompt_tokens: int | None = None
    computed_tokens: int | None = None
    generated_tokens: int | None = None
    trie_nodes: int | None = None
    block_floor: int | None = None
    tokens_cut: int | None = None
    engine_seconds: float | None = None
    engine_loads: int | None = None
    p_outside: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    dtype: str | None = None
    engine_version: str | None = None
    settings_hash: str | None = None
    finished_at: datetime | None = None


overtaken: set[str] = set()  # runs of this process that another driver closed as lost: it slept too long
last: Run | None = None  # the newest run of this process, for the line that a job ends with


def start(
    spark: SparkSession,
    root: str,
    job: str,
    model_id: str | None = None,
    prompt_id: str | None = None,
    settings_hash: str | None = None,
    alone: bool = False,
) -> Run:
    """Writes the row of a run that begins now, and returns it; runs that died before are closed as `lost`.

    `alone`: raises ValueError where another run of this job, model and prompt is alive.
    """
    global last
    close_lost(spark, root)
    refuse_second_driver(spark, root)
    before = delta.version(spark, root, "runs")
    if alone:
        refuse_second(spark, root, job, model_id, prompt_id)
    now = datetime.now(UTC)
    run_id = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    run = Run(run_id, job, "running", now, model_id=model_id, prompt_id=prompt_id, settings_hash=settings_hash)
    _lease(spark, root, run_id).take()
    delta.append(spark, root, "runs", _row(spark, run))
    last = run
    if alone and (newest := delta.version(spark, root, "runs")) > before + 1:
        try:  # of two that looked at the same moment, the one whose row came second gives way
            refuse_second(spark, root, job, model_id, prompt_id, run_id, range(before + 1, newest + 1))
        except ValueError as error:
            fail(spark, root, run, error)
            last = None
            raise
    return run


def begin(spark: SparkSession, root: str, job: str, model_id: str, prompt_id: str, settings_hash: str) -> Run:
    """The row of a run that begins now, or goes on: the last one of this job, model, prompt and settings runs again.

    Raises ValueError where that one is alive.
    """
    global last
    wanted = {"job": job, "model_id": model_id, "prompt_id": prompt_id, "settings_hash": settings_hash}
    close_lost(spark, root)
    rows = table(spark, root).where(reduce(and_, (F.col(c) == value for c, value in wanted.items())))
    row = rows.orderBy(F.desc("started_at"), F.desc("run_id")).head()
    if row is None:
        return start(spark, root, job, model_id, prompt_id, settings_hash, alone=True)
    refuse_second_driver(spark, root)
    refuse_second(spark, root, job, model_id, prompt_id)
    run = replace(Run(**row.asDict()), status="running", message=None, finished_at=None, counts={})
    lease = _lease(spark, root, run.run_id)
    lease.take()  # before the row says that it runs: one that does without a lease is closed as lost
    if not _put(spark, root, run, "old.status <> 'running'"):
        # Another one went on with it at the same moment; where that has ended since, it is this one's turn.
        lease.leave()
        return begin(spark, root, job, model_id, prompt_id, settings_hash)
    last = run
    return run


def finish(spark: SparkSession, root: str, run: Run, status: str, message: str | None = None) -> Run:
    """Writes how the run ended (`done`, `stopped` or `failed`, with a sentence) and returns the row."""
    global last
    run = replace(run, status=status, message=message, finished_at=datetime.now(UTC))
    write(spark, root, run)
    _lease(spark, root, run.run_id).give_up()
    last = run
    return run


class Unmet(ValueError):
    """What was asked cannot be had of these tables, as a run found out; a sentence for people, no mistake of ours."""


def fail(spark: SparkSession, root: str, run: Run, error: BaseException) -> Run:
    """Writes that the run ended by an error, with what it says in a line, and returns the row.

    What it had landed goes first: where the disk is full, that makes room for the row. Where the tables do not take it
    all the same, the first error is still the one to tell of, and the next start closes the run as lost.
    """
    global last
    try:
        delta.drop_scratch(spark, root, run.run_id)
        return finish(spark, root, run, "failed", in_a_line(error))
    except Exception as second:
        print(f"{run.job}: that run {run.run_id} failed could not be written: {in_a_line(second)}", flush=True)
        with suppress(Exception):
            _lease(spark, root, run.run_id).give_up()
        last = replace(run, status="failed", message=in_a_line(error), finished_at=datetime.now(UTC))
        return last


@contextmanager
def recorded(spark: SparkSession, root: str, now: Callable[[], Run]) -> Iterator[None]:
    """An error in here ends the run's row, as `now` gives it; what the run landed is removed in any case."""
    try:
        yield
    except BaseException as error:
        fail(spark, root, now(), error)
        raise
    finally:
        delta.drop_scratch(spark, root, now().run_id)


def in_a_line(error: BaseException) -> str:
    """What an error says, without its pages: where a worker failed what that one said; else what Java said, and what
    it was caused by, such as a storage that is full."""
    text = str(error.java_exception) if isinstance(error, Py4JJavaError) else str(error)
    told = (text.strip() or repr(error)).splitlines()[0]
    _, there, trace = text.rpartition("Traceback (most recent call last):\n")
    if there:
        return next((line for line in trace.splitlines() if line.strip() == line != ""), told)
    *_, cause = ["", *(line.removeprefix("Caused by: ") for line in text.splitlines() if line[:11] == "Caused by: ")]
    return told if cause in told else f"{told} ({cause})"


def table(spark: SparkSession, root: str, version: int | None = None) -> DataFrame:
    """The table `runs` (`delta.read_few`)."""
    return delta.read_few(spark, root, "runs", version)


def write(spark: SparkSession, root: str, run: Run) -> None:
    """Writes the row as it is now; one that was closed as lost stays so."""
    _put(spark, root, run, "old.status <> 'lost'")


def close_lost(spark: SparkSession, root: str) -> list[str]:
    """Writes `lost` into the rows of runs whose driver is gone, and removes what they had landed; returns their ids."""
    running = table(spark, root).where("status = 'running'").collect()
    leases = {name: _lease(spark, root, name) for name in _signed(spark, root)}
    lost = []
    for row in running:
        if _lease(spark, root, row["run_id"]).held():
            continue
        delta.drop_scratch(spark, root, row["run_id"])
        what = "its driver ended without a word (killed, or out of memory); what it had merged is kept"
        run = replace(Run(**row.asDict()), status="lost", message=what, finished_at=datetime.now(UTC))
        closed = _put(spark, root, run, "old.status = 'running'")
        _lease(spark, root, run.run_id).give_up()
        if not closed:  # it had ended this moment
            continue
        lost.append(run.run_id)
        began = run.started_at.astimezone(UTC)  # read back it is this machine's time, without a zone
        print(f"{run.job}: run {run.run_id}, of {began:%d %b %H:%M} UTC, is closed as lost", flush=True)
    for name in leases.keys() - {row["run_id"] for row in running}:
        if not leases[name].held():  # killed between its lease and its row
            leases[name].give_up()
    for name in delta.inside(spark, f"{root.rstrip('/')}/_scratch"):
        if not _lease(spark, root, name).held():  # killed between its end and its clearing up
            delta.drop_scratch(spark, root, name)
    return lost


def alive(spark: SparkSession, root: str, model_id: str) -> str | None:
    """A run that scores with this model now (call `close_lost` first)."""
    scores = F.col("job").isin("rescore", "backfill") & (F.col("status") == "running")
    row = table(spark, root).where(scores & (F.col("model_id") == model_id)).head()
    return str(row["run_id"]) if row else None


def refuse_second(
    spark: SparkSession,
    root: str,
    job: str,
    model_id: str | None,
    prompt_id: str | None,
    mine: str = "",
    versions: Iterable[int] = (),
) -> None:
    """Raises ValueError where a run of this job, model and prompt is alive (call `close_lost` first).

    One of another machine or container is waited for until it renews its lease, or that has lapsed: a driver that is
    started again elsewhere goes on where it was killed. mine: the run that asks, in one of these `versions` of the
    table; only rows that were there before its own count.
    """
    same = (F.col("status") == "running") & (F.col("job") == job) & F.col("model_id").eqNullSafe(F.lit(model_id))
    same &= F.col("prompt_id").eqNullSafe(F.lit(prompt_id))
    told = table(spark, root)
    for version in versions:
        told = table(spark, root, version)
        if not told.where(F.col("run_id") == mine).isEmpty():
            break
    for row in told.where(same & (F.col("run_id") != mine)).collect():
        lease = _lease(spark, root, row["run_id"])
        if not lease.lives(f"{job}: run {row['run_id']}"):
            close_lost(spark, root)
            continue
        holder = lease.holder()
        alike = " with this model and prompt" if model_id else ""
        raise ValueError(
            f"run {row['run_id']} of {job}{alike} is alive, in process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')}. Two would do the same work twice, or undo each other's. Wait for it, or end "
            f"that process; if it is gone, its lease lapses {LAPSED_SECONDS / 60:.0f} minutes after its last sign of "
            "life."
        )


def refuse_second_driver(spark: SparkSession, root: str) -> None:
    """Raises ValueError where another driver is at work, and commits are such that neither would see the other's (call
    `close_lost` first)."""
    key, store = delta.log_store(spark, root) or ("", "")
    if not (store or "").endswith(delta.ONE_DRIVER):
        return
    me = {**_here(), "pid": os.getpid()}
    for row in table(spark, root).where("status = 'running'").select("run_id", "job").collect():
        holder = _lease(spark, root, row["run_id"]).holder()
        if not me.items() <= holder.items():
            raise ValueError(
                f"run {row['run_id']} of {row['job']} is at work in {root}, in process {holder.get('pid', '?')} on "
                f"{holder.get('host', '?')}, and {store} sees one driver's commits alone: wait for it, or start both "
                f"with --conf {key}=io.delta.storage.S3DynamoDBLogStore"
            )


def _signed(spark: SparkSession, root: str) -> list[str]:
    """The runs that hold a lease, or did and died."""
    names = delta.inside(spark, f"{root.rstrip('/')}/_leases")
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def _lease(spark: SparkSession, root: str, run_id: str) -> Lease:
    return Lease(spark, f"{root.rstrip('/')}/_leases/{run_id}.json")


class Lease:
    """A file that says who is at work. Held while its process lives (same host), or was renewed lately (another)."""

    _renewed: dict[str, list[threading.Event]] = {}  # noqa: RUF012 (of this process, by file)

    def __init__(self, spark: SparkSession, file: str) -> None:
        self._file = file
        self._jvm: Any = spark._jvm
        self._storage, self._path = delta.storage_of(spark, file)

    def take(self) -> None:
        """Takes the lease and renews it from a thread until `give_up` or the end of this process."""
        self._sign()
        overtaken.discard(run_id := os.path.basename(self._file).removesuffix(".json"))
        ended = threading.Event()
        self._renewed.setdefault(self._file, []).append(ended)

        def renew() -> None:
            others = 0  # looks in a row at which another driver had signed
            while not ended.wait(RENEWED_SECONDS):
                try:
                    # One that came second to the same run signs once; one that took this for dead goes on to.
                    others = others + 1 if self._foreign() else 0
                    if others > 1 or not self._storage.exists(self._path):
                        if not ended.is_set():  # else it was given up just now
                            overtaken.add(run_id)
                        return
                    self._sign()
                except Exception as error:  # the run goes on; at worst another one takes it for lost
                    print(f"runs: the lease {self._file} was not renewed ({error!r})", flush=True)

        threading.Thread(target=renew, name="lease", daemon=True).start()

    def _foreign(self) -> bool:
        """Whether another process has signed it last."""
        return self.holder() not in ({}, self._me())

    @staticmethod
    def _me() -> dict[str, Any]:
        return {**_here(), "pid": os.getpid(), "born": _born(os.getpid())}

    def _sign(self) -> None:
        stream = self._storage.create(self._path, True)
        try:
            stream.write(bytearray(json.dumps(self._me()), "utf-8"))
        finally:
            stream.close()

    def leave(self) -> None:
        """Leaves it to another holder, who signs it when it is renewed next."""
        self._renewed[self._file].pop().set()

    def give_up(self) -> None:
        """Ends it; one that another driver has taken over meanwhile is that one's."""
        mine = self._renewed.pop(self._file, [])
        for ended in mine:
            ended.set()
        if not (mine and self._foreign()):
            self._storage.delete(self._path, False)

    def holder(self) -> dict[str, Any]:
        """Who signed it last: host, pid, born (start of the process); empty where nobody, or right now."""
        try:
            found: dict[str, Any] = json.loads(delta.text_of(self._jvm, self._storage, self._path))
            return found
        except (Py4JJavaError, ValueError):  # no file, or it is being written at this moment: Java's side, or half JSON
            return {}

    def held(self) -> bool:
        """Whether its run is alive. Of another host, or a container beside this one, only the storage's clock tells,
        which is one for all."""
        who = self.holder()
        if _here().items() <= who.items():
            return bool(_born(int(who["pid"])) == who["born"])
        renewed, looked = self._times()
        return bool(renewed and looked - renewed < 1000 * LAPSED_SECONDS)

    def lives(self, whose: str) -> bool:
        """As `held`, but of another host it waits until the lease is renewed once more, or has lapsed."""
        if _here().items() <= self.holder().items():
            return self.held()
        first, looked = self._times()
        if left := LAPSED_SECONDS - (looked - first) / 1000 if first else 0.0:
            print(
                f"{whose} is of another machine; in {max(0.0, left):.0f} s at most it shows whether it lives",
                flush=True,
            )
        while self.held():
            if self._times()[0] != first:
                return True
            time.sleep(min(1.0, RENEWED_SECONDS / 10))
        return False

    def _times(self) -> tuple[int, int]:
        """When it was signed last (0: never), and now, by the storage's clock; milliseconds."""
        now = self._path.suffix(f".look-{secrets.token_hex(4)}")  # others may be looking too
        try:
            self._storage.create(now, True).close()
            renewed, looked = (self._storage.getFileStatus(p).getModificationTime() for p in (self._path, now))
        except Py4JJavaError as error:
            if error.java_exception.getClass().getName() != "java.io.FileNotFoundException":
                raise  # a storage that does not answer is no sign that a run is dead
            return 0, 0
        finally:
            self._storage.delete(now, False)
        return int(renewed), int(looked)


def _here() -> dict[str, str | None]:
    """The machine since it was started, and its numbering of processes: names of hosts and pids are not unique."""
    pids = boot = None
    with suppress(OSError):
        pids = os.readlink("/proc/self/ns/pid")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return {"host": socket.gethostname(), "boot": boot, "pids": pids}


def _born(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks; None where there is none. A pid comes again."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *rest = file.read().rpartition(")")[2].split()
        return None if state == "Z" else rest[18]
    except OSError:
        return None


def _put(spark: SparkSession, root: str, run: Run, changed: str = "true") -> int:
    """Writes the row where `changed` (SQL over `old` and `new`); returns how many there were already, 0 or 1."""
    return delta.upsert(spark, root, "runs", _row(spark, run), changed)["updated"]


def _row(spark: SparkSession, run: Run) -> DataFrame:
    values = asdict(run)
    return delta.rows(spark, "runs", [[values[name] for name in RUNS.names]])
