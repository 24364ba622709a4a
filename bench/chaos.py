"""Nightly and backfill together, killed at random, until every kill has fired: is the end that of an undisturbed run?

python -m bench.chaos --folder F [--kills 200] [--least 30] [--pairs 500] [--seed 7] [--minutes 150]
                      [--cluster] [--real]

Two drivers, `rescore` and `backfill`, work on one folder of tables with a fast engine that needs no model, or with
--real with vLLM and a tiny random model (its engine lives in the Python worker and dies with it). This process kills at
random: a driver (its Python, and in half of the cases all below it, as a machine that dies), an executor (its JVM,
which in local mode is the driver's; with --cluster there is a standalone cluster of two workers, and executors are
processes of their own), a Python worker, an engine (which exits in the middle of a prompt, as a broken one does), and
starts again what died. When both drivers are done, a fresh model's turn begins, and before each night some products get
another text. Each kill that fired is a line of F/journal.jsonl, from which an interrupted run goes on. A reader
(delta-rs) looks at `label_probs` all the while. At the end of each turn, every version of the tables is audited
(tests/invariants.py), and the rows are compared with those that the engine must have given: the fast one is a pure
function of the prompt, vLLM is held against plain transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MARK = "TAOSR1_CHAOS"  # in the environment of all that a run starts: its folder
KINDS = ("driver", "executor", "worker", "engine")
JOBS = ("rescore", "backfill")
REPO = Path(__file__).resolve().parent.parent


def main() -> int:
    """Runs until the kills have fired, or the minutes are over; returns 0 where nothing was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--least", type=int, default=30, help="of each kind")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=150.0)
    parser.add_argument("--cluster", nargs="?", const="", help="on a standalone cluster of two workers")
    parser.add_argument("--real", action="store_true", help="vLLM in float32 with a tiny random model")
    parser.add_argument("--job", choices=JOBS, help="(for the drivers that this one starts)")
    parser.add_argument("--turn", type=int, default=0, help="(likewise)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ[MARK] = str(args.folder)
    if args.job:
        drive(args)
        return 0
    if args.real and not (args.folder / "model" / "prompt.json").exists():
        from tests.models import tiny_model

        tiny_model(args.folder / "model")
    if args.cluster is None:
        return Chaos(args).run()
    from tests.cluster import cluster

    # Workers import the tests' engine from the checkout.
    os.environ["PYTHONPATH"] = str(REPO)
    with cluster(args.folder / "cluster", cores=2) as running:
        args.cluster = running.master
        return Chaos(args, running.workers).run()


class Chaos:
    """The killer, and what it keeps: a journal, the turn it is at."""

    def __init__(self, args: argparse.Namespace, workers: Sequence[int] = ()) -> None:
        self.workers = workers  # of a cluster
        self.kinds = [kind for kind in KINDS if kind != "engine" or not args.real]
        self.args, self.folder = args, args.folder
        self.journal = self.folder / "journal.jsonl"
        self.random = random.Random(args.seed + len(self.fired()))  # noqa: S311 (a schedule)
        self.drivers: dict[str, subprocess.Popen[bytes]] = {}
        self.before: dict[str, int] = {}  # kills before a driver began
        self.lives: dict[str, float] = {}  # until when a driver is spared
        self.alone: set[int] = set()  # drivers (pid) that were killed themselves
        self.gave_up: Counter[str] = Counter()  # the others that ended with an error, after a kill elsewhere
        self.reads = 0
        self.breaches: list[str] = []
        self.ended = threading.Event()

    def fired(self) -> list[dict[str, Any]]:
        """The kills so far."""
        if not self.journal.exists():
            return []
        return [json.loads(line) for line in self.journal.read_text().splitlines()]

    def wanted(self) -> list[str]:
        """The kinds that are still to be killed, those that lack most more often."""
        count = Counter(kill["kind"] for kill in self.fired())
        if sum(count.values()) < self.args.kills:
            return [kind for kind in self.kinds for _ in range(max(1, self.args.least - count[kind]))]
        return [kind for kind in self.kinds for _ in range(max(0, self.args.least - count[kind]))]

    def run(self) -> int:
        """Turn after turn; 1 where anything was broken."""
        until = time.monotonic() + 60 * self.args.minutes
        turn_file = self.folder / "turn"
        reader = threading.Thread(target=self.read, daemon=True)
        reader.start()
        while self.wanted() and time.monotonic() < until and not self.breaches:
            turn = int(turn_file.read_text()) if turn_file.exists() else 0
            self.turn(turn, until)
            if time.monotonic() < until:
                self.audit(turn)
                turn_file.write_text(str(turn + 1))
            count = Counter(kill["kind"] for kill in self.fired())
            print(f"chaos: turn {turn} over, killed so far: {dict(count)}; breaches: {len(self.breaches)}", flush=True)
        self.ended.set()
        reader.join()
        merged = self.merged()
        if merged and not self.reads:
            self.breaches.append("the reader never read the table")
        if self.fired() and not merged:
            self.breaches.append("no wave was merged: kills came too close to each other to test anything")
        print(f"chaos: {merged} commits of label_probs, read {self.reads} times", *self.breaches[:20], sep="\n")
        if self.gave_up:
            print(f"chaos: ended with an error when something else was killed: {dict(self.gave_up)}")
        if recovered := self.recoveries():
            middle = statistics.median(recovered)
            print(
                f"chaos: from a kill to the next commit of label_probs: median {middle:.0f} s, most {recovered[-1]:.0f}"
            )
        if wanted := self.wanted():
            print(f"chaos: the minutes are over, still to kill: {dict(Counter(wanted))}; start again to go on")
        return 1 if self.breaches or wanted else 0

    def merged(self) -> int:
        """Commits of label_probs."""
        from deltalake import DeltaTable

        return DeltaTable(f"{self.folder}/tables/label_probs").version()

    def recoveries(self) -> list[float]:
        """Seconds from each kill to the next commit of label_probs, sorted."""
        from deltalake import DeltaTable

        table = DeltaTable(f"{self.folder}/tables/label_probs")
        commits = sorted(commit["timestamp"] / 1000 for commit in table.history())
        after = [next((c - kill["at"] for c in commits if c > kill["at"]), None) for kill in self.fired()]
        return sorted(seconds for seconds in after if seconds is not None)

    def turn(self, turn: int, until: float) -> None:
        """Lets both drivers work on one model, killing, until both came to their end."""
        done: set[str] = set()
        while done != set(JOBS) and time.monotonic() < until:
            for job in JOBS:
                if job not in done and (job not in self.drivers or self.drivers[job].poll() is not None):
                    if job in self.drivers and self.drivers[job].returncode == 0:
                        done.add(job)
                        del self.drivers[job]
                        continue
                    if job in self.drivers and len(self.fired()) == self.before[job]:
                        self.breaches.append(f"{job} failed by itself, see {self.folder}/{job}.log")
                        return
                    if job in self.drivers and self.drivers[job].pid not in self.alone:
                        self.gave_up[f"{job}, exit {self.drivers[job].returncode}"] += 1
                    self.before[job] = len(self.fired())
                    self.drivers[job] = self.start(job, turn)
            wanted = self.wanted()
            at_work = self.drivers and (self.folder / f"put-{turn}").exists()
            if wanted and at_work and self.kill(self.random.choice(wanted)):
                self.rest()
            time.sleep(0.5)
        for driver in self.drivers.values():  # the time is over
            os.killpg(driver.pid, signal.SIGKILL)
        self.drivers.clear()

    def rest(self) -> None:
        """Between two kills; now and then until something was committed: kills that leave no time for a wave would test
        the start alone."""
        before, until, patient = self.merged(), time.monotonic() + 60, self.random.random() < 0.3
        time.sleep(self.random.uniform(2, 30))
        while patient and self.merged() == before and time.monotonic() < until:
            time.sleep(1)

    def start(self, job: str, turn: int) -> subprocess.Popen[bytes]:
        """A driver, in a process group of its own."""
        # A start that is killed tests nothing: whole drivers die when they had time to get to work.
        self.lives[job] = time.monotonic() + self.random.uniform(25, 120)
        words = [sys.executable, "-m", "bench.chaos", "--folder", str(self.folder), "--job", job, "--turn", str(turn)]
        words += ["--pairs", str(self.args.pairs), *(["--cluster", self.args.cluster] if self.args.cluster else [])]
        words += ["--real"] if self.args.real else []
        log = open(self.folder / f"{job}.log", "ab")  # noqa: SIM115 (the child's)
        return subprocess.Popen(words, cwd=REPO, stdout=log, stderr=log, start_new_session=True)  # noqa: S603

    def kill(self, kind: str) -> bool:
        """Kills one process of a kind, where there is one at work; an engine gets a word that its next prompt reads."""
        job = self.random.choice(list(self.drivers))
        below = descendants(self.drivers[job].pid)
        at_work = [process for worker in self.workers for process in descendants(worker)] or below
        takes_driver = kind == "driver" or (kind == "executor" and not self.workers)
        if takes_driver and time.monotonic() < self.lives[job]:
            return False
        if kind == "driver":
            found = [self.drivers[job].pid]
        elif kind == "executor":
            executors = [pid for pid, words in at_work if "CoarseGrainedExecutorBackend" in words]
            found = executors if self.workers else [pid for pid, words in below if "java" in words.split(" -", 1)[0]]
        elif kind == "worker":
            # Its parent is the daemon that forks workers, and that one's the JVM.
            daemons = {pid for pid, words in at_work if "pyspark.daemon" in words}
            found = [pid for pid in daemons if parent(pid) in daemons]
        else:
            word = self.folder / "die"
            if not word.exists():
                word.write_text("")
            for _ in range(40):
                if not word.exists():
                    return True
                time.sleep(0.1)
            return False
        if not found:
            return False
        victim = self.random.choice(found)
        if takes_driver:
            self.alone.add(self.drivers[job].pid)
        try:
            os.kill(victim, signal.SIGKILL)
            for pid, _ in below if kind == "driver" and self.random.random() < 0.5 else []:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        note(self.folder, kind, job)
        return True

    def read(self) -> None:
        """Reads the table again and again: no key twice, no half probabilities; a count that falls is told apart."""
        from tests import invariants

        root = str(self.folder / "tables")
        most = 0
        while not self.ended.wait(1.0):
            try:
                rows = invariants.table(root, "label_probs")
            except Exception as error:
                if self.reads:  # before, it is not made yet
                    self.breaches.append(f"read: {error!r}")
                continue
            self.reads += 1
            found = invariants.one_row_a_key(rows) + invariants.simplex_or_null(rows)
            if len(rows) < most:
                found.append(f"a reader saw {most} rows, then {len(rows)}")
            most = len(rows)
            self.breaches += [f"read: {breach}" for breach in found]

    def audit(self, turn: int) -> None:
        """Every version, and the end against what the engine must have said."""
        from tests import invariants

        root = str(self.folder / "tables")
        found = invariants.audit(root, model_id(turn)) + invariants.left(root)
        for row in invariants.table(root, "label_probs"):
            if row["model_id"] == model_id(turn) and row["outcome"] != "scored":
                found.append(f"{row['pair_id']} is {row['outcome']}")
        found += wrong_answers(root, turn, what_scores(self.args, turn), self.args.real)
        found += [f"process {pid} is left, with an engine" for pid in self.engines_left()]
        self.breaches += [f"turn {turn}: {breach}" for breach in found]

    def engines_left(self) -> list[str]:
        """Processes of engines that are there half a minute after the drivers have ended: each bears its run's mark."""
        until, left = time.monotonic() + 30, [""]
        while left and time.monotonic() < until:
            time.sleep(1)
            left = []
            for process in Path("/proc").glob("[0-9]*/environ"):
                with contextlib.suppress(OSError):  # it ended meanwhile
                    told = process.read_bytes().split(b"\0")
                    if {b"TAOSR1_WORKER=engine", f"{MARK}={self.folder}".encode()} <= set(told):
                        left.append(process.parent.name)
        return left


def note(folder: Path, kind: str, job: str) -> None:
    """A kill has fired."""
    with open(folder / "journal.jsonl", "a") as file:
        file.write(json.dumps({"kind": kind, "job": job, "at": time.time()}) + "\n")


def descendants(pid: int) -> list[tuple[int, str]]:
    """Processes below one, with their command lines."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True)  # noqa: S607
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    below, found = {pid}, []
    for _ in range(8):
        for words in rows:
            if len(words) == 3 and int(words[1]) in below and int(words[0]) not in below:
                below.add(int(words[0]))
                found.append((int(words[0]), words[2]))
    return found


def parent(pid: int) -> int:
    """The process that started one; 0 where that one is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def model_id(turn: int) -> str:
    """The model of a turn."""
    return f"{turn:016x}"


def what_scores(args: argparse.Namespace, turn: int) -> Any:
    """The model of a turn, with an engine that may be told to die, or the real one."""
    from dataclasses import replace

    from tests.engines import load_doomed
    from tests.pairs import scoring
    from udfs.engine import EngineSettings
    from udfs.model import inspect
    from udfs.prompt import load
    from udfs.score import Scoring

    if args.real:
        model = inspect(str(args.folder / "model"))
        prompt = load(model.prompt_file or "", model.tokenizer_json, model.vocab_size)
        settings = EngineSettings(model=str(args.folder / "model"), dtype="float32", kv_cache_gib=0.25)
        what = Scoring(model, "external", prompt, settings)
    else:
        what = scoring()
        what = replace(what, settings=replace(what.settings, model=str(args.folder)), load_engine=load_doomed)
    return replace(what, model=replace(what.model, model_id=model_id(turn)))


def products(count: int, text: int) -> list[Any]:
    """Products of ten pairs each; some of them say `text`."""
    random_ = random.Random(text)  # noqa: S311
    changed = set(random_.sample(range(count), max(1, count // 5))) if text else set()
    return [
        (f"k{i}", f"Steel kettle {i}", {"text": str(text)} if i in changed else {}, "Boils water. " * 20)
        for i in range(count)
        if not text or i in changed
    ]


def drive(args: argparse.Namespace) -> None:
    """One driver's life."""
    from jobs import rescore as night
    from jobs.backfill import backfill
    from partitioner import prefix, waves
    from schemas import delta
    from tests.conftest import QUICK
    from tests.pairs import put

    waves.WAVE_SECONDS, prefix.HOT_TOKENS = 0.0, 1500
    root = str(args.folder / "tables")
    conf = dict(QUICK)
    if args.cluster:
        conf |= {"spark.master": args.cluster, "spark.cores.max": "2", "spark.executor.cores": "1"}
        conf |= {"spark.executor.memory": "1g"}
    spark = delta.session(args.job, conf)
    queries = [f"kettle {i}" for i in range(10)]
    if args.job == "rescore":
        text = args.turn if (Path(root) / "pairs").exists() else 0
        put(spark, root, products(args.pairs // 10, text), queries)
        (args.folder / f"put-{args.turn}").touch()
    while not delta.exists(spark, root, "gates") or not delta.version(spark, root, "pairs"):
        time.sleep(0.5)
    (night.rescore if args.job == "rescore" else backfill)(spark, root, what_scores(args, args.turn))
    spark.stop()


def wrong_answers(root: str, turn: int, what: Any, real: bool) -> list[str]:
    """Rows of a turn whose probabilities are not those of their pair's prompt."""
    import math

    from jobs import check
    from schemas.labels import P_COLUMNS
    from tests import invariants
    from tests.engines import logprobs

    text = {row["pair_id"]: row for row in invariants.table(root, "pairs")}
    for pair in text.values():
        pair["attributes"] = dict(pair["attributes"] or {})
    rows = [row for row in invariants.table(root, "label_probs") if row["model_id"] == model_id(turn)]
    rows = [row for row in rows if row["outcome"] == "scored"]
    asked = check.prompts(what.prompt, [text[row["pair_id"]] for row in rows])
    if real:
        expected = check.in_own_process(check.plain_model, what.settings.model, asked, what.prompt.label_ids)
    else:
        expected = [[math.exp(x) / 0.9 for x in logprobs(ids)] for ids in asked]
    allowed = check.ALLOWED if real else 1e-9
    return [
        f"{row['pair_id']} has another prompt's probabilities"
        for row, own in zip(rows, expected, strict=True)
        if max(abs(row[p] - e) for p, e in zip(P_COLUMNS, own, strict=True)) > allowed
    ]


if __name__ == "__main__":
    sys.exit(main())
