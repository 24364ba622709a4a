"""The only file that speaks to Delta: sessions, creating and checking tables, reading, upserting, deleting.

Every write is one Delta commit. A commit that loses a race against another writer is tried again, a bounded number of
times. Tables are addressed by the root folder or URI and their name in `schemas.tables`; no value of data ever becomes
part of an SQL text.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, TypeVar

from delta.exceptions import (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    DeltaConcurrentModificationException,
    MetadataChangedException,
    ProtocolChangedException,
)
from delta.tables import DeltaMergeBuilder, DeltaTable
from py4j.protocol import Py4JError
from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException
from pyspark.logger import PySparkLogger
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql.types import StructType

from schemas import files
from schemas.crash import crash
from schemas.tables import TABLES, Table

PACKAGE = "io.delta:delta-spark_4.2_2.13:4.4.0"
# What Spark must be told before it starts; spark-submit.sh prints this very list.
CONF = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    # Times in the tables are UTC, whoever reads them.
    "spark.sql.session.timeZone": "UTC",
    # Prompts are some hundred tokens a row; answers leave a worker every few seconds, which shows that it is alive.
    "spark.sql.execution.arrow.maxRecordsPerBatch": "512",
    # Tasks of the engines (a pool of their own, see partitioner/engines.py) come between those of a long planning.
    "spark.scheduler.mode": "FAIR",
    # A shard does not wait three seconds for the machine where most of its rows lie while an engine is free.
    "spark.locality.wait": "0s",
    # Putting files of a clustered table together leaves cubes of so many bytes as they are (default: 100 GB).
    "spark.databricks.delta.optimize.clustering.mergeStrategy.minCubeSize.threshold": str(2**30),
    # A commit writes the files anew in which it changes a row (readers of protocol 1 know no deletion vectors).
    "spark.databricks.delta.optimize.maxFileSize": str(2**27),
    "spark.redaction.regex": "(?i)secret|password|token|(access|account|private)[._]?key|credential|[.]sas[.]",
    # A Python worker that says nothing for half an hour is told to end.
    "spark.python.worker.idleTimeoutSeconds": "1800",
    "spark.python.worker.killOnIdleTimeout": "true",
    # One that crashes outside of Python (an engine's kernel) says where it stood.
    "spark.python.worker.faulthandler.enabled": "true",
}
LOCAL_CONF = {
    # One machine, small tables: Spark's default of 200 shuffle partitions and 50 log partitions only costs here.
    "spark.sql.shuffle.partitions": "4",
    "spark.databricks.delta.snapshotPartitions": "2",
    # A VACUUM lists the folder in that many tasks (default 10,000): 119 s or 4 s for a table of five files.
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "4",
    "spark.ui.enabled": "false",
    # Nothing is kept there; without this a folder spark-warehouse appears wherever a job is started.
    "spark.sql.warehouse.dir": os.path.join(tempfile.gettempdir(), "spark-warehouse"),
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
}
# Whatever spark-submit was told.
ALWAYS = {
    # A speculative copy of a slow shard would pass for a second try of it, and be answered `engine_failed` at once.
    "spark.speculation": "false",
    # A lost commit response must not append twice (off by default in 4.4.0).
    "spark.databricks.delta.commit.idempotencyCheck.enabled": "true",
}
_COMMIT_TRIES = 10
# A stream that stays commits a few rows a minute: after so many versions of a table its small files are put together.
# Delta's own way (autoCompact) counts a session's files, and once it has joined others' too it joins after each commit.
JOINED_EVERY = 50
LOCK = "_commit.lock"
ONE_DRIVER = "S3SingleDriverLogStore"  # a log store that sees the commits of its own process alone
KEPT_DAYS = 7  # files of older versions may be gone (`maintain`), whoever still points at them
LOCK_SECONDS = 3600.0  # a commit takes seconds, an OPTIMIZE minutes: its holder was stopped, or its disk is gone
_alone = threading.Lock()
# In Delta's Python these have no common base but PySparkException.
_LOST_RACES = (
    ConcurrentAppendException,
    ConcurrentDeleteDeleteException,
    ConcurrentDeleteReadException,
    ConcurrentTransactionException,
    ConcurrentWriteException,
    DeltaConcurrentModificationException,
    MetadataChangedException,
    ProtocolChangedException,
)
_R = TypeVar("_R")


class GaveUp(RuntimeError):
    """A fault that did not go away however often it was tried; nothing half is written."""


def session(app: str, conf: Mapping[str, str] | None = None) -> SparkSession:
    """The Spark session of a job: the one spark-submit prepared, or an embedded local one.

    A task may fail three times before the job does, in local mode too (`local[*,4]`): a worker whose engine died exits,
    and the next try gets a fresh one. Without spark-submit the Delta jar is resolved through `spark.jars.packages`.
    `conf` and this project's settings give way to what spark-submit was told, but for `ALWAYS`.
    """
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder, given = SparkSession.builder.appName(app), None
    if os.environ.keys() & {"PYSPARK_GATEWAY_PORT", "PYSPARK_SUBMIT_ARGS"}:
        SparkContext._ensure_initialized()
        given = SparkConf()  # what the operator said on the command line comes first
        wanted = CONF | (LOCAL_CONF if str(given.get("spark.master", "")).startswith("local") else {})
    else:
        wanted = CONF | LOCAL_CONF | {"spark.master": "local[*,4]", "spark.jars.packages": PACKAGE}
    for key, value in {**wanted, **(conf or {})}.items():
        if given is None or not given.contains(key):
            builder = builder.config(key, value)
    for key, value in ALWAYS.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    PySparkLogger.getLogger("SQLQueryContextLogger").disabled = True  # says each error of SQL once more, as JSON
    return spark


@cache
def for_few_rows(spark: SparkSession) -> SparkSession:
    """A session beside this one that does not compile its queries to Java, which for a few rows takes longer than it
    saves: a row of `runs` is merged in 3 s instead of 4 on two slow cores. Its temporary views are its own."""
    few = spark.newSession()
    few.conf.set("spark.sql.codegen.wholeStage", "false")
    few.conf.set("spark.sql.codegen.factoryMode", "NO_CODEGEN")
    return few


def root(tables: str) -> str:
    """What `--tables` means: a URI as it is, a folder by its full path (Delta takes no other).

    Raises ValueError for a blank one, which would be the folder one stands in, and for control characters.
    """
    if not tables.strip() or any(ord(c) < 32 or 127 <= ord(c) < 160 for c in tables):
        raise ValueError(f"{tables!r}: a path may not be empty or hold control characters")
    return tables.rstrip("/") if files.is_uri(tables) else os.path.abspath(tables)


def path(root: str, name: str) -> str:
    """Where table `name` lies under `root`; only names of the contract are let through."""
    return f"{root.rstrip('/')}/{TABLES[name].name}"


def _quoted(root: str, name: str) -> str:
    return "delta.`" + path(root, name).replace("`", "``") + "`"


def _literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def exists(spark: SparkSession, root: str, name: str) -> bool:
    """Whether the table is there."""
    return DeltaTable.isDeltaTable(spark, path(root, name))


def prepare(spark: SparkSession, root: str, new: bool = False) -> None:
    """Creates the tables that are missing under `root`, in one commit each, and checks those that are there.

    Raises ValueError with every difference where a table does not fit: tables are never changed on the side. And where
    two jobs at once could lose each other's commits without noticing; and, but for a job that brings the first rows
    (`new`), where there is no table of pairs: a mistyped folder is not to be filled with tables.
    """
    refuse_silent_loss(spark, root)
    if not new:
        read(spark, root, "pairs")
    for table in TABLES.values():
        if not exists(spark, root, table.name):
            with alone(spark, root), suppress(*_LOST_RACES):  # another job made it at the same moment
                spark.sql(ddl(root, table))
        differences = misfits(spark, root, table)
        if differences:
            raise ValueError(
                f"table {path(root, table.name)} does not fit this version of the project: "
                + "; ".join(differences)
                + ". Nothing was written. Mend it as named, or use another --tables folder."
            )


def log_store(spark: SparkSession, root: str) -> tuple[str, str | None] | None:
    """On S3 the conf that says how Delta commits there, and its value; None elsewhere."""
    # A plain path may be of S3 too; and an S3 path is to be refused also where its classes are missing.
    scheme = root.partition(":")[0].lower() if files.is_uri(root) else str(storage_of(spark, root)[0].getScheme())
    key = f"spark.delta.logStore.{scheme}.impl"
    return (key, spark.sparkContext.getConf().get(key)) if scheme in ("s3", "s3a", "s3n") else None


def refuse_silent_loss(spark: SparkSession, root: str) -> None:
    """S3 takes the place of an object without a word, so there Delta sees no second writer unless it is told how."""
    key, store = log_store(spark, root) or ("", "none is needed")
    if not store:
        raise ValueError(
            f"{root}: on S3 two jobs at once can overwrite each other's commits, and nothing would tell. Start with "
            f"--conf {key}=io.delta.storage.S3DynamoDBLogStore (with --packages "
            f"io.delta:delta-storage-s3-dynamodb:{PACKAGE.rsplit(':', 1)[1]} and its table; Delta's documentation, "
            "Multi-cluster setup). If you see to it that only one job writes at a time, say so: "
            f"--conf {key}=io.delta.storage.{ONE_DRIVER}"
        )


def try_to_write(spark: SparkSession, root: str) -> None:
    """Makes the folder and a file under it, and removes what it made. Raises what the storage says."""
    storage, file = storage_of(spark, f"{root.rstrip('/')}/_written")
    made, folder = [file], file.getParent()
    while folder is not None and not storage.exists(folder):
        made.append(folder)
        folder = folder.getParent()
    storage.create(file, True).close()
    for one in made:
        storage.delete(one, False)


def storage_of(spark: SparkSession, where: str) -> tuple[Any, Any]:
    """Hadoop's file system of a path, and the path as it takes it."""
    jvm: Any = spark._jvm
    path = jvm.org.apache.hadoop.fs.Path(where)
    return path.getFileSystem(spark._jsc.hadoopConfiguration()), path


def text_of(jvm: Any, storage: Any, path: Any) -> str:
    """What a small file holds."""
    stream = storage.open(path)
    try:
        return str(jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))
    finally:
        stream.close()


@contextmanager
def alone(spark: SparkSession, root: str) -> Iterator[None]:
    """Where the tables lie in a local folder: no other driver commits meanwhile. Elsewhere the storage itself sees.

    Delta's own log store looks whether a local log file exists and then renames onto it, which two processes can do at
    once. The lock is the JVM's on ROOT/_commit.lock, so it ends with the process that commits, however that ends.
    Raises GaveUp where another process holds it for an hour.
    """
    jvm: Any = spark._jvm
    storage, where = storage_of(spark, root)
    if storage.getScheme() != "file":  # a plain path may be of HDFS
        yield
        return
    folder = str(where.toUri().getPath())
    with _alone:  # the JVM's lock is between processes; inside one it raises
        os.makedirs(folder, exist_ok=True)
        file = jvm.java.io.RandomAccessFile(os.path.join(folder, LOCK), "rw")
        try:
            until = time.monotonic() + LOCK_SECONDS
            while file.getChannel().tryLock() is None:
                if time.monotonic() > until:
                    raise GaveUp(
                        f"another process holds {os.path.join(folder, LOCK)} for {LOCK_SECONDS:.0f} s: a job that was "
                        f"stopped inside a commit (see: fuser {os.path.join(folder, LOCK)}). Let it go on or end it; "
                        "nothing of this commit was written."
                    )
                time.sleep(0.05)
            yield
        finally:
            file.close()


def ddl(root: str, table: Table) -> str:
    """The CREATE TABLE statement, constraints included, so that the table is born with them."""
    columns = ", ".join(
        f"{c.name} {c.type}{' NOT NULL' if c.required else ''} COMMENT {_literal(c.comment)}" for c in table.columns
    )
    cluster = f" CLUSTER BY ({', '.join(table.cluster_by)})" if table.cluster_by else ""
    properties = ", ".join(f"{_literal(k)} = {_literal(v)}" for k, v in table.properties.items())
    return (
        f"CREATE TABLE IF NOT EXISTS {_quoted(root, table.name)} ({columns}) USING delta "
        f"COMMENT {_literal(table.comment)}{cluster} TBLPROPERTIES ({properties})"
    )


def misfits(spark: SparkSession, root: str, table: Table) -> list[str]:
    """How the table on disk differs from the contract, one sentence a difference with the SQL that mends it."""
    where = _quoted(root, table.name)
    snapshot = _snapshot(spark, root, table.name)
    found = {f.name: f for f in StructType.fromJson(json.loads(snapshot.metadata().schemaString())).fields}
    # Delta cannot make a column NOT NULL that may be null.
    anew = f"move the folder of {where} away, start maintain, which makes it anew, and insert the old rows"
    differences = []
    for column in table.columns:
        if column.name not in found:
            mend = (
                anew
                if column.required
                else (f"ALTER TABLE {where} ADD COLUMN {column.name} {column.type} COMMENT {_literal(column.comment)}")
            )
            differences.append(f"column {column.name} is missing ({mend})")
            continue
        has = found[column.name]
        if has.dataType.simpleString().upper() != column.type:
            differences.append(
                f"column {column.name} is {has.dataType.simpleString()}, wanted {column.type.lower()} ({anew})"
            )
        if column.required and has.nullable:
            differences.append(f"column {column.name} may be null ({anew})")
    differences += [f"column {name} is not in the contract ({anew})" for name in found if name not in table.names]
    properties, entries = {}, snapshot.metadata().configuration().iterator()
    while entries.hasNext():
        entry = entries.next()
        properties[entry._1()] = entry._2()
    for key, value in table.properties.items():
        # Delta drops properties that were set to their default; constraints and the change feed must be there.
        has = properties.get(key, value if key in ("delta.columnMapping.mode",) else "")
        if key.startswith("delta.constraints."):
            # Delta writes a constraint that is added with a blank between all its words.
            if "".join(has.split()) != "".join(value.split()):
                alter, name = f"ALTER TABLE {where}", key.removeprefix("delta.constraints.")
                mend = f"{alter} DROP CONSTRAINT IF EXISTS {name}, then {alter} ADD CONSTRAINT {name} CHECK ({value})"
                mend = anew if "->" in value else mend  # which becomes "- >", and no SQL
                differences.append(f"property {key} is not {value!r} ({mend})")
        elif has != value:
            mend = f"ALTER TABLE {where} SET TBLPROPERTIES ('{key}' = '{value}')"
            differences.append(f"property {key} is not {value!r} ({mend})")
    if (reader := snapshot.protocol().minReaderVersion()) > 1:
        differences.append(f"reader protocol is {reader}, wanted 1, for other readers ({anew})")
    return differences


def _snapshot(spark: SparkSession, root: str, name: str) -> Any:
    """The JVM's view of a table's newest version: its metadata, without a Spark job (`detail()` and `history()` run
    one each, a second on a small machine)."""
    log = spark._jvm.org.apache.spark.sql.delta.DeltaLog  # type: ignore[union-attr]
    return log.forTableWithSnapshot(spark._jsparkSession, path(root, name))._2()


def read(spark: SparkSession, root: str, name: str, version: int | None = None) -> DataFrame:
    """A table as it is now, or as it was at a Delta version. Raises ValueError where there is none."""
    if not exists(spark, root, name):
        raise ValueError(
            f"there is no table {name!r} under {root!r}; make it with: ingest --tables {root} --pairs FILE"
        )
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    return reader.load(path(root, name))


def read_few(spark: SparkSession, root: str, name: str, version: int | None = None) -> DataFrame:
    """As `read`, of a small table, in the session for few rows: not to be joined with a frame of another one."""
    return read(for_few_rows(spark), root, name, version)


def changes(spark: SparkSession, root: str, name: str) -> DataFrame:
    """A stream over a table's changes: first all its rows as inserts, then what is inserted, updated, deleted."""
    return spark.readStream.format("delta").option("readChangeFeed", "true").load(path(root, name))


def version(spark: SparkSession, root: str, name: str) -> int:
    """The table's newest Delta version."""
    return int(_snapshot(spark, root, name).version())


def register(spark: SparkSession, root: str) -> list[str]:
    """Makes every table that is there a view of its name in the session; each query reads its newest version."""
    there = [name for name in TABLES if exists(spark, root, name)]
    for name in there:
        # The name is from the contract's closed list, the path an identifier in backticks.
        view = f"CREATE OR REPLACE TEMPORARY VIEW {name} AS SELECT * FROM {_quoted(root, name)}"  # noqa: S608
        spark.sql(view)
    return there


def rows(spark: SparkSession, name: str, values: Sequence[Sequence[Any]]) -> DataFrame:
    """A few rows of a table, made on the driver, each with all columns in order, in the session for few rows."""
    columns = ", ".join(f"{c.name} {c.type}" for c in TABLES[name].columns)
    return for_few_rows(spark).createDataFrame([tuple(v) for v in values], columns)


def scratch(root: str, run_id: str, name: str) -> str:
    """Where a run lands `name` before it is merged; below the tables, so that every executor reaches it.

    Raises ValueError for a run_id, which may come out of a table, that would lead elsewhere.
    """
    if "/" in run_id or run_id in ("", ".", ".."):
        raise ValueError(f"run_id {run_id!r} of table runs is none that this project gave")
    return f"{root.rstrip('/')}/_scratch/{run_id}/{name}"


def land(spark: SparkSession, root: str, run_id: str, name: str, frame: DataFrame) -> DataFrame:
    """Writes a step's rows once below the run's scratch: what reads them twice, as a MERGE does, reads the same."""
    frame.write.mode("overwrite").parquet(scratch(root, run_id, name))
    return spark.read.schema(frame.schema).parquet(files.literal(scratch(root, run_id, name)))


def checkpoint(root: str, model_id: str = "", prompt_id: str = "") -> str:
    """Where the nightly stream of a model and prompt keeps how far it looked; without them, where all of them do."""
    return f"{root.rstrip('/')}/_checkpoints/rescore" + (f"/{model_id}-{prompt_id}" if model_id else "")


def follows_another(spark: SparkSession, root: str, name: str, checkpoint: str) -> bool:
    """Whether the stream of a checkpoint follows a table that lay in the place of this one, and was made anew since:
    Delta refuses to go on with it."""
    offsets = f"{checkpoint}/offsets"
    last = max((int(name) for name in inside(spark, offsets) if name.isdecimal()), default=None)
    if last is None:
        return False
    text = text_of(spark._jvm, *storage_of(spark, f"{offsets}/{last}"))
    followed = set(re.findall(r'"reservoirId":"([^"]+)"', text))
    return bool(followed) and str(_snapshot(spark, root, name).metadata().id()) not in followed


def drop_scratch(spark: SparkSession, root: str, run_id: str, name: str = "") -> None:
    """Removes what a run landed: `name`, or all of it."""
    drop(spark, scratch(root, run_id, name).rstrip("/"))


def inside(spark: SparkSession, folder: str) -> list[str]:
    """Names in a folder that is no table, such as checkpoints; none where there is no such folder."""
    return [found.getPath().getName() for found in _listed(spark, folder)]


def days_since(spark: SparkSession, folder: str) -> float:
    """Days since something was last written into a folder that is no table; 0 where there is no such folder."""
    written = [found.getModificationTime() for found in _listed(spark, folder)]
    return (time.time() - max(written) / 1000) / 86_400 if written else 0.0


def _listed(spark: SparkSession, folder: str) -> list[Any]:
    storage, where = storage_of(spark, folder)
    return list(storage.listStatus(where)) if storage.exists(where) else []


def drop(spark: SparkSession, folder: str) -> None:
    """Removes a folder that is no table."""
    storage, where = storage_of(spark, folder)
    storage.delete(where, True)


def append(spark: SparkSession, root: str, name: str, rows: DataFrame) -> None:
    """Adds rows whose keys are new, in one commit; a third of the time of an `upsert`."""
    _committed(spark, root, name, lambda: rows.write.format("delta").mode("append").save(path(root, name)))


def upsert(
    spark: SparkSession,
    root: str,
    name: str,
    rows: DataFrame,
    changed: str = "true",
    same: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """Brings `rows` into a table by its key, in one commit; returns how many were inserted and updated.

    `rows`: the table's columns, at most one row a key. It is read twice, so it must not be the plan of expensive or
    non-repeatable work: land or persist that first. `changed`: SQL over `old` and `new` that says whether a row that
    is there already is rewritten; unchanged rows are not touched. `same`: columns of the key that have one value in all
    of `rows`; files without it are then not read. Delta commits even where nothing changes.
    """

    def build() -> DeltaMergeBuilder:
        values: dict[str, str | Column] = {c: f"new.{c}" for c in TABLES[name].names}
        merge = _merge(root, name, rows.select(*values), TABLES[name].key, same)
        return merge.whenMatchedUpdate(changed, values).whenNotMatchedInsert(values=values)

    return _merged(spark, root, name, build)


def delete(spark: SparkSession, root: str, name: str, keys: DataFrame, on: tuple[str, ...]) -> int:
    """Removes the rows whose columns `on` are among `keys`, in one commit; returns how many."""

    def build() -> DeltaMergeBuilder:
        return _merge(root, name, keys.select(*on).distinct(), on).whenMatchedDelete()

    return _merged(spark, root, name, build)["deleted"]


def remove(spark: SparkSession, root: str, name: str, where: Column) -> None:
    """Removes the rows `where`, in one commit; files without such rows are not read."""
    _committed(spark, root, name, lambda: DeltaTable.forPath(spark, path(root, name)).delete(where))


def claim(spark: SparkSession, root: str, name: str, rows: DataFrame, on: str) -> bool:
    """Adds rows that share one value of column `on`, in one commit; False, with nothing written, where it is taken."""

    def build() -> DeltaMergeBuilder:
        return _merge(root, name, rows.select(*TABLES[name].names), (on,)).whenNotMatchedInsertAll()

    return _merged(spark, root, name, build)["inserted"] > 0


def update(spark: SparkSession, root: str, name: str, where: Column, values: dict[str, str | Column]) -> None:
    """Sets columns of the rows `where`, in one commit. A value may be `raise_error`: then nothing is written.

    So a row can be compared and swapped: what another writer has committed first is what `where` and `values` see.
    """
    _committed(spark, root, name, lambda: DeltaTable.forPath(spark, path(root, name)).update(where, values))


def size(spark: SparkSession, root: str, name: str) -> tuple[int, int]:
    """Files of the table's newest version, and their bytes."""
    row = DeltaTable.forPath(spark, path(root, name)).detail().select("numFiles", "sizeInBytes").head()
    return (int(row[0]), int(row[1])) if row else (0, 0)


def optimize(spark: SparkSession, root: str, name: str) -> int:
    """Joins small files, and sorts them by the clustering columns; returns how many were joined."""
    table = DeltaTable.forPath(spark, path(root, name))
    found = _committed(spark, root, name, lambda: table.optimize().executeCompaction())
    return sum(int(row[0]) for row in found.select("metrics.numFilesRemoved").collect())


def join_small_files(spark: SparkSession, root: str, name: str, before: int) -> None:
    """Where a table has come past a multiple of `JOINED_EVERY` versions since version `before`: joins its files below
    64 MB into some of 128 MB (of a clustered table all that are not in a cube of 1 GB, see CONF), in one commit of its
    own, as Delta's autoCompact would. A fault in it is told and harms nothing: `maintain` joins them too."""
    jvm: Any = spark._jvm
    try:
        if before // JOINED_EVERY == version(spark, root, name) // JOINED_EVERY:
            return
        hook = getattr(getattr(jvm.org.apache.spark.sql.delta.hooks, "AutoCompact$"), "MODULE$")
        log = jvm.org.apache.spark.sql.delta.DeltaLog.forTable(spark._jsparkSession, path(root, name))
        defaults = [getattr(hook, f"compact$default${place}")() for place in (4, 5, 6)]
        with alone(spark, root):
            hook.compact(spark._jsparkSession, log, jvm.scala.Option.empty(), *defaults)
    except (GaveUp, Py4JError, PySparkException) as error:
        told = str(getattr(error, "java_exception", error)).strip() or repr(error)
        print(f"delta: the small files of {name} were not joined ({told.splitlines()[0]})", flush=True)


def vacuum(spark: SparkSession, root: str, name: str, keep_days: int) -> int:
    """Deletes files that no version of the last days needs; returns how many (Delta names no more than 1,000)."""
    hours = 24 * keep_days
    going = spark.sql(f"VACUUM {_quoted(root, name)} RETAIN {hours:d} HOURS DRY RUN").count()
    if going:
        _committed(spark, root, name, lambda: DeltaTable.forPath(spark, path(root, name)).vacuum(hours))
    return going


def sync(spark: SparkSession, root: str, name: str, changes: DataFrame) -> dict[str, int]:
    """Brings `changes` into a table by its key, in one commit: rows to write, and where `gone` is true, to remove.

    `changes`: the table's columns and `gone` BOOLEAN, at most one row a key; read twice, so land it first.
    """

    def build() -> DeltaMergeBuilder:
        values: dict[str, str | Column] = {c: f"new.{c}" for c in TABLES[name].names}
        merge = _merge(root, name, changes, TABLES[name].key)
        merge = merge.whenMatchedDelete("new.gone").whenMatchedUpdate(set=values)
        return merge.whenNotMatchedInsert("NOT new.gone", values)

    return _merged(spark, root, name, build)


def _merge(
    root: str,
    name: str,
    rows: DataFrame,
    on: Sequence[str],
    same: Mapping[str, str] | None = None,
) -> DeltaMergeBuilder:
    """The beginning of a MERGE of rows (`new`) into a table (`old`), in the session of the rows; columns `same` have
    that value in all of them."""
    matched = [f"old.{column} = new.{column}" for column in on]
    matched += [f"old.{column} = {_literal(value)}" for column, value in (same or {}).items()]
    old = DeltaTable.forPath(rows.sparkSession, path(root, name)).alias("old")
    return old.merge(rows.alias("new"), " AND ".join(matched))


def _merged(spark: SparkSession, root: str, name: str, build: Callable[[], DeltaMergeBuilder]) -> dict[str, int]:
    """Runs a MERGE and reads its own row of figures."""
    (row,) = _committed(spark, root, name, lambda: build().execute().collect())
    return {
        "inserted": int(row["num_inserted_rows"]),
        "updated": int(row["num_updated_rows"]),
        "deleted": int(row["num_deleted_rows"]),
    }


def _committed(spark: SparkSession, root: str, name: str, commit: Callable[[], _R]) -> _R:
    """Runs a commit again when another writer was faster, up to ten times, each wait longer than the last."""
    for attempt in range(1, _COMMIT_TRIES + 1):
        try:
            crash("commit")
            with alone(spark, root):
                before = version(spark, root, name)
                done = commit()
            crash("committed")
            join_small_files(spark, root, name, before)
            return done
        except _LOST_RACES as conflict:
            if attempt == _COMMIT_TRIES:
                raise GaveUp(
                    f"gave up after {attempt} tries to commit: another job keeps writing the same rows. Nothing of "
                    "this commit was written; start the job again when the other one has ended."
                ) from conflict
            time.sleep(random.uniform(0.1, 0.3) * 2 ** min(attempt, 6))  # noqa: S311 (spread, not secrecy)
    raise AssertionError("unreachable")
