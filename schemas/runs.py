"""The record of a run: one row in `runs`, written when a job starts and again when it ends, however it ends."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import reduce
from operator import and_

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from schemas import delta
from schemas.tables import RUNS


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
    dtype: str | None = None
    engine_version: str | None = None
    settings_hash: str | None = None
    finished_at: datetime | None = None


def start(
    spark: SparkSession,
    root: str,
    job: str,
    model_id: str | None = None,
    prompt_id: str | None = None,
    settings_hash: str | None = None,
) -> Run:
    """Writes the row of a run that begins now, and returns it."""
    now = datetime.now(UTC)
    run_id = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    run = Run(run_id, job, "running", now, model_id=model_id, prompt_id=prompt_id, settings_hash=settings_hash)
    delta.append(spark, root, "runs", _row(spark, run))
    return run


def begin(spark: SparkSession, root: str, job: str, model_id: str, prompt_id: str, settings_hash: str) -> Run:
    """The row of a run that begins now, or goes on: the last one of this job, model, prompt and settings runs again."""
    wanted = {"job": job, "model_id": model_id, "prompt_id": prompt_id, "settings_hash": settings_hash}
    rows = delta.read(spark, root, "runs").where(reduce(and_, (F.col(c) == value for c, value in wanted.items())))
    row = rows.orderBy(F.desc("started_at"), F.desc("run_id")).head()
    if row is None:
        return start(spark, root, job, model_id, prompt_id, settings_hash)
    run = replace(Run(**row.asDict()), status="running", message=None, finished_at=None, counts={})
    write(spark, root, run)
    return run


def finish(spark: SparkSession, root: str, run: Run, status: str, message: str | None = None) -> Run:
    """Writes how the run ended (`done` or `failed`, with a sentence) and returns the row."""
    run = replace(run, status=status, message=message, finished_at=datetime.now(UTC))
    write(spark, root, run)
    return run


def fail(spark: SparkSession, root: str, run: Run, error: BaseException) -> Run:
    """Writes that the run ended by an error, with the error's first line, and returns the row."""
    return finish(spark, root, run, "failed", (str(error) or repr(error)).splitlines()[0])


def write(spark: SparkSession, root: str, run: Run) -> None:
    """Writes the row as it is now."""
    delta.upsert(spark, root, "runs", _row(spark, run))


def _row(spark: SparkSession, run: Run) -> DataFrame:
    values = asdict(run)
    return delta.rows(spark, "runs", [[values[name] for name in RUNS.names]])
