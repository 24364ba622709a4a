"""Does it scale: with executors, with the number of pairs, with commits, with writers?

python -m bench.scaling executors [--pairs 30000]           (a standalone cluster of one worker, then of two)
python -m bench.scaling pairs [--sizes 10000 100000 1000000]
python -m bench.scaling commits [--count 1440]              (a day of a stream that commits a row a minute)
python -m bench.scaling writers [--count 200]               (so many waves of each of two drivers at once)

executors: a backfill with an engine that needs no model and takes a fixed time a token (it sleeps, so two of them fit
on one core). Printed is the time of the waves with one and with two executors, and their ratio.

pairs: plans a night of so many pairs, and merges 10,000 rows into as many judged ones: seconds, seconds a pair ×
log2(pairs) against the smallest size, the memory of the driver's Python, and the live heap of its JVM, in which local
Spark's tasks run too. Nothing is scored.

commits: so many waves of one row into `label_probs`, and as many writes of their run's row, as a stream with
--every "1 minute" makes them: the most files that either table had, and the seconds of the first and last commits.

writers: two drivers, each a process with a Spark of its own, merge waves of 20 of their 100 pairs into one
`label_probs` as fast as they can; half of the pairs are both drivers'. Meanwhile delta-rs, DuckDB and Polars read it
again and again. Every version of the table and every read are held against the invariants of docs/operations.md, the
last one against the newest wave of each pair.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import resource
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests import invariants
from tests.engines import FakeEngine
from udfs.engine import Answer, Engine, EngineSettings

REPO = Path(__file__).resolve().parent.parent
SECONDS_A_TOKEN = 2e-4


class PacedEngine(FakeEngine):
    """Takes the same time for each token that its perfect cache does not hold."""

    def answers(
        self, prompts: Iterator[Sequence[int] | None], label_ids: Sequence[int], ahead: int | None = None
    ) -> Iterator[Answer]:
        """As the fake engine, but slowly."""
        owed, asked = 0.0, []

        def noted() -> Iterator[Sequence[int] | None]:
            for prompt in prompts:
                if prompt is not None:
                    asked.append(len(prompt))
                yield prompt

        for answer in super().answers(noted(), label_ids, ahead):
            owed += SECONDS_A_TOKEN * (asked[answer.index] - answer.cached)
            if owed > 0.05:
                time.sleep(owed)
                owed = 0.0
            yield answer


_loaded: dict[EngineSettings, PacedEngine] = {}


def load_paced(settings: EngineSettings) -> Engine:
    """The paced engine of this worker process."""
    if settings not in _loaded:
        _loaded[settings] = PacedEngine(settings)
    return _loaded[settings]


def main() -> int:
    """Measures the one or the other; returns 1 where an invariant was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("executors", "pairs", "commits", "writers"))
    parser.add_argument("--pairs", type=int, default=30_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--count", type=int, help="of commits, or of a writer's waves")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = str(REPO)  # of the workers
    with tempfile.TemporaryDirectory() as folder:
        if args.what == "executors":
            executors(Path(folder), args.pairs)
        elif args.what == "commits":
            day(folder, args.count or 1440)
        elif args.what == "writers":
            return writers(folder, args.count or 200)
        else:
            sizes(Path(folder), args.sizes)
    return 0


def executors(folder: Path, pairs: int) -> None:
    """Times the waves of the same backfill on one executor and on two."""
    from jobs.backfill import backfill
    from partitioner import waves
    from schemas import delta
    from tests.cluster import cluster
    from tests.pairs import put, scoring

    took = {}
    for count in (1, 2):
        with cluster(folder / f"cluster{count}", workers=count, cores=1) as running:
            conf = {"spark.master": running.master, "spark.executor.memory": "1g", "spark.ui.enabled": "false"}
            spark = delta.session("scaling", conf)
            root, what = str(folder / f"tables{count}"), replace(scoring(), load_engine=load_paced)
            put(spark, root, kettles(10), [f"warm {i}" for i in range(10)])
            backfill(spark, root, what)
            put(spark, root, kettles(pairs // 10), [f"kettle {i}" for i in range(10)])
            waves.WAVE_SECONDS = 30.0
            run = backfill(spark, root, what)
            took[count] = run.figures["seconds_scoring"]
            print(
                f"{count} executor(s): {run.counts['scored']:,} pairs, {run.waves} waves, scoring {took[count]:.1f} s, "
                f"engines at work {run.engine_seconds:.1f} s, {run.engine_loads} loads",
                flush=True,
            )
            spark.stop()
    print(f"speed-up of two executors: {took[1] / took[2]:.2f}")


def day(folder: str, count: int) -> None:
    """Commits as a stream does that stays for a day."""
    from schemas import delta

    spark = delta.session("scaling")
    delta.prepare(spark, folder, new=True)
    took, most = commits(spark, folder, count)
    few = max(1, min(100, count // 4))
    first, last = (sum(some) / few for some in (took[:few], took[-few:]))
    files = ", ".join(f"{number} of {name}" for name, number in most.items())
    print(f"{count:,} commits: at most {files} files; a commit took {first:.2f} s at first, {last:.2f} s at last")
    spark.stop()


def commits(spark: Any, root: str, count: int) -> tuple[list[float], dict[str, int]]:
    """Seconds of each of `count` waves of one row and their run's row, and the most files that a table had."""
    from schemas import delta, runs
    from tests import judged

    run, took, most = runs.start(spark, root, "scaling"), [], {"label_probs": 0, "runs": 0}
    for n in range(count):
        row = judged.rows(spark, "label_probs", [judged.scored(n, "q", [0.7, 0.1, 0.1, 0.1], wave_id=f"w{n}")])
        began = time.monotonic()
        delta.upsert(spark, root, "label_probs", row)
        took.append(time.monotonic() - began)
        runs.write(spark, root, replace(run, waves=n + 1))
        if n % 10 == 0:
            most = {name: max(files, delta.size(spark, root, name)[0]) for name, files in most.items()}
    runs.finish(spark, root, replace(run, waves=count), "done")
    return took, most


def writers(folder: str, count: int) -> int:
    """Lets two drivers write and three kinds of readers read; prints what was found, returns 1 for a breach."""
    from schemas import delta

    spark = delta.session("scaling")
    delta.prepare(spark, folder, new=True)
    spark.stop()
    ended, reads = threading.Event(), Counter[str]()
    breaches: list[str] = []

    def look(name: str, read: Callable[[str], invariants.Rows]) -> None:
        most = 0
        while not ended.is_set():
            try:
                rows = read(folder)
            except Exception as error:
                breaches.append(f"{name}: {error!r}")
                break
            found = invariants.one_row_a_key(rows) + invariants.simplex_or_null(rows)
            if len(rows) < most:
                found.append(f"{most} rows, then {len(rows)}")
            most = max(most, len(rows))
            reads[name] += 1
            breaches.extend(f"{name}: {breach}" for breach in found)
            ended.wait(1.0)

    readers = [threading.Thread(target=look, args=reader) for reader in READERS.items()]
    for reader in readers:
        reader.start()
    try:
        with ProcessPoolExecutor(DRIVERS, mp_context=get_context("spawn")) as processes:
            took = list(processes.map(writer, [folder] * DRIVERS, range(DRIVERS), [count] * DRIVERS))
    finally:
        ended.set()
        for reader in readers:
            reader.join()
    breaches += [f"{name} has read nothing" for name in READERS if not reads[name]]
    breaches += invariants.audit(folder)  # also of how many rows each driver was told that it wrote
    last = {row["pair_id"]: row["wave_id"] for row in invariants.table(folder, "label_probs")}
    newest: dict[str, set[str]] = {}
    for number in range(count):
        both = [row for driver in range(DRIVERS) for row in wave(driver, number)]
        newest |= {row["pair_id"]: {r["wave_id"] for r in both if r["pair_id"] == row["pair_id"]} for row in both}
    breaches += [f"{pair} is of {last.get(pair)}, not of {w}" for pair, w in newest.items() if last.get(pair) not in w]
    few = max(1, min(20, count // 4))
    for driver, seconds in enumerate(took):
        first, then = sum(seconds[:few]) / few, sum(seconds[-few:]) / few
        print(
            f"driver {driver}: {count:,} waves; a commit, with the wait for the other driver's, took {first:.2f} s at "
            f"first, {then:.2f} s at last"
        )
    told = ", ".join(f"{number:,} by {name}" for name, number in reads.items())
    print(f"reads meanwhile: {told}; pairs: {len(last)}; breaches: {len(breaches)}", *breaches[:20], sep="\n")
    return int(bool(breaches))


def wave(driver: int, number: int) -> list[dict[str, Any]]:
    """The rows of a driver's wave, always the same ones."""
    from tests import judged

    drawn = random.Random(f"{driver} {number}")  # noqa: S311 (made-up rows)
    p = drawn.choice([[0.7, 0.1, 0.1, 0.1], [0.25] * 4, [0.0, 0.0, 0.5, 0.5]])
    told = {"wave_id": f"w{driver}-{number}", "run_id": f"r{driver}", "pairs_version": number}
    pairs = drawn.sample(range(SHARED * driver, SHARED * driver + 2 * SHARED), 20)
    return [judged.scored(pair, "q", p, content_hash=f"{driver} {number}", **told) for pair in pairs]


def writer(folder: str, driver: int, count: int) -> list[float]:
    """One driver's waves; returns the seconds of each commit."""
    from partitioner.night import NEWER
    from schemas import delta
    from tests import judged

    spark, took, told = delta.session("writer", {"spark.ui.showConsoleProgress": "false"}), [], 0
    run, mine = f"r{driver}", {"model_id": judged.MODEL, "prompt_id": judged.PROMPT}
    for number in range(count):
        rows = delta.land(spark, folder, run, "wave", judged.rows(spark, "label_probs", wave(driver, number)))
        began = time.monotonic()
        written = delta.upsert(spark, folder, "label_probs", rows, NEWER, mine)
        took.append(time.monotonic() - began)
        told += written["inserted"] + written["updated"]
    judged.fill(spark, folder, "runs", [judged.run(run) | {"figures": {"rows_written": float(told)}}])
    spark.stop()
    return took


def by_duckdb(root: str) -> list[dict[str, Any]]:
    """All rows, as DuckDB reads them over delta-rs' Arrow."""
    import duckdb
    from deltalake import DeltaTable

    with duckdb.connect() as lake:
        lake.register("label_probs", DeltaTable(f"{root}/label_probs").to_pyarrow_dataset())
        rows: list[dict[str, Any]] = lake.sql("SELECT * FROM label_probs").to_arrow_table().to_pylist()
        return rows


def by_polars(root: str) -> list[dict[str, Any]]:
    """All rows, as Polars reads them."""
    import polars

    return polars.read_delta(f"{root}/label_probs").to_dicts()


DRIVERS, SHARED = 2, 50  # pairs that two drivers share; each has as many of its own
READERS: dict[str, Callable[[str], invariants.Rows]] = {
    "delta-rs": lambda root: invariants.table(root, "label_probs"),
    "DuckDB": by_duckdb,
    "Polars": by_polars,
}


def kettles(count: int) -> list[Any]:
    """Products with some text."""
    text = "Boils water for four cups of tea in three minutes. " * 5
    return [(f"k{i}", f"Steel kettle {i}", {"litres": str(i % 30)}, text) for i in range(count)]


def sizes(folder: Path, wanted: Sequence[int]) -> None:
    """Times planning, and the commit of a wave, at each number of pairs."""
    from pyspark.sql import functions as F

    from partitioner.night import Night
    from schemas import delta, runs, tables
    from tests.judged import PROMPT
    from tests.pairs import scoring

    spark = delta.session("scaling", {"spark.driver.memory": "6g"})
    first: dict[str, float] = {}
    for count in wanted:
        root = str(folder / f"tables{count}")
        delta.prepare(spark, root, new=True)
        made = spark.range(count).select(
            F.concat(F.lit("kettle for "), F.col("id") % 30, F.lit(" cups")).alias("query"),
            F.concat(F.lit("k"), F.floor(F.col("id") / 30)).alias("product_id"),
            F.lit("en").alias("locale"),
            F.concat(F.lit("Steel kettle "), F.floor(F.col("id") / 30)).alias("title"),
            F.lit("Boils water for four cups of tea in three minutes. " * 5).alias("description"),
        )
        made = made.withColumn("pair_id", tables.pair_id(F.col("locale"), F.col("query"), F.col("product_id")))
        given = {"content_hash": F.md5("title"), "updated_at": F.current_timestamp()}
        there = made.withColumns(given).columns
        missing = [
            F.lit(None).cast(column.type).alias(column.name)
            for column in tables.PAIRS.columns
            if column.name not in there
        ]
        delta.append(spark, root, "pairs", made.withColumns(given).select("*", *missing).select(*tables.PAIRS.names))
        what = scoring()
        night = Night(spark, root, what, runs.start(spark, root, "scaling", what.model.model_id))
        began = time.monotonic()
        line, total = night.plan(night.pairs(), "line", night.judged())
        seconds = {"planning": time.monotonic() - began}
        if not line.prompts == total == count:
            raise RuntimeError(f"{line.prompts} prompts of {total} pairs were planned, not {count}")
        rows = night.pairs().select(
            "pair_id", F.lit(what.model.model_id).alias("model_id"), F.lit(PROMPT).alias("prompt_id"), "query",
            "product_id", "locale", *[F.lit(0.25).alias(p) for p in ("p_excellent", "p_related", "p_mismatch")],
            F.lit(0.25).alias("p_irrelevant"), F.lit(0.0).alias("p_outside"), F.lit("scored").alias("outcome"),
            "content_hash", F.lit(0).cast("bigint").alias("pairs_version"), F.lit("w").alias("wave_id"),
            F.lit(9).alias("prompt_tokens"), F.lit(0).alias("tokens_cut"), F.lit("r").alias("run_id"),
            F.current_timestamp().alias("scored_at"),
        ).select(*tables.LABEL_PROBS.names)  # fmt: skip
        delta.append(spark, root, "label_probs", rows.limit(max(0, count - 10_000)))
        wave = f"{folder}/wave{count}"
        rows.join(delta.read(spark, root, "label_probs").select("pair_id"), "pair_id", "left_anti").write.parquet(wave)
        began = time.monotonic()
        delta.upsert(spark, root, "label_probs", spark.read.parquet(wave).select(*tables.LABEL_PROBS.names))
        seconds["commit"] = time.monotonic() - began
        delta.drop_scratch(spark, root, night.run.run_id)
        runs.finish(spark, root, night.run, "done")
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        java: Any = spark._jvm.java.lang.Runtime.getRuntime()  # type: ignore[union-attr]
        java.gc()
        heap = (java.totalMemory() - java.freeMemory()) / 2**20
        for name, took in seconds.items():
            each = took / (count * math.log2(count))
            first.setdefault(name, each)
            print(f"{count:>9,} pairs: {name:<8} {took:7.1f} s, {each / first[name]:5.2f} × n log n", end="  ")
        print(f"driver's Python {memory:,.0f} MiB, live heap {heap:,.0f} MiB, {len(line.starts)} parts", flush=True)
    spark.stop()


if __name__ == "__main__":
    sys.exit(main())
