"""Streams a partition of prompts through the engine: Arrow batches in, the same rows with what the engine said out.

Runs inside Spark's `mapInArrow`. A feeder thread reads ahead a few batches, so that the engine finds its next prompts
in memory while Spark is still shuffling; results leave batch by batch, so that neither side ever holds a partition.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import pyarrow as pa
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructType

from udfs.engine import Engine, EngineSettings

Batches = Iterator[pa.RecordBatch]
Prompts = Iterator[Sequence[int] | None]
A = TypeVar("A")

# What every row gets beside its answer; `ids` (the prompt) is what it loses. engine_seconds: of the row's batch, shared
# out over its rows. startup_seconds: what the task waited for its engine to load, likewise, in its first batch.
_COST = pa.schema(
    [
        pa.field("prompt_tokens", pa.int32()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("engine_seconds", pa.float64()),
        pa.field("startup_seconds", pa.float64()),
        *[pa.field(name, pa.string()) for name in ("engine_id", "engine_version", "dtype")],
    ]
)
_READ_AHEAD = 4  # batches; each is spark.sql.execution.arrow.maxRecordsPerBatch rows
# Rows that leave together. Spark ends a worker that says nothing for half an hour: a slow engine must speak sooner.
_TOGETHER = 64  # of one answer each


@dataclass(frozen=True)
class Question(Generic[A]):
    """What is asked of the engine for each prompt.

    ask: prompts to (prompt number, answer, cached tokens where known), in any order. room: tokens of an answer; a
    prompt that leaves less in the model's context is answered with `too_long` and never reaches the engine. columns:
    the answers of a batch as columns of `schema`. failed: the answer of every prompt of a task whose engine died.
    answers: to each prompt; so many fewer rows of it leave together.
    """

    ask: Callable[[Engine, Prompts], Iterator[tuple[int, A, int | None]]]
    room: int
    too_long: A
    columns: Callable[[list[A]], list[list[object]]]
    schema: pa.Schema
    failed: A
    answers: int = 1


def answered_schema(prompts: StructType, answer: pa.Schema) -> StructType:
    """Schema of what `answerer` returns for rows of schema `prompts` and answers of schema `answer`."""
    added = from_arrow_schema(pa.schema([*answer, *_COST])).fields
    return StructType([f for f in prompts.fields if f.name != "ids"] + added)


def answerer(
    settings: EngineSettings, question: Question[A], load_engine: Callable[[EngineSettings], Engine]
) -> Callable[[Batches], Batches]:
    """The function for `mapInArrow`. Input rows hold `ids` (prompt token ids); other columns pass through.

    `load_engine` is handed in because nothing that is patched on the driver reaches a worker.
    """

    def answer(batches: Batches) -> Batches:
        first = next((b for b in batches if b.num_rows), None)
        if first is None:
            return  # an empty shard loads no engine
        began = time.monotonic()
        engine, shard = load_engine(settings), _chain(first, batches)
        startup = time.monotonic() - began
        if _died_before(first.num_rows):
            # The engine above is fresh and stays for what the driver asks next: the halves of this shard.
            yield from (_given_up(batch, question, question.failed) for batch in shard)
        else:
            yield from answered(engine, shard, question, startup)

    return answer


def loader(settings: EngineSettings, load_engine: Callable[[EngineSettings], Engine]) -> Callable[[Batches], Batches]:
    """The function for `mapInArrow` that loads the worker's engine for the tasks to come; rows pass through."""

    def load(batches: Batches) -> Batches:
        for batch in batches:
            if batch.num_rows:
                load_engine(settings)
                yield batch

    return load


def _died_before(rows: int) -> bool:
    """Whether this task was tried before, and is not to be asked again as it is: a prompt alone gets a second try."""
    from pyspark import TaskContext

    context = TaskContext.get()
    return context is not None and context.attemptNumber() >= (1 if rows > 1 else 2)


def _given_up(batch: pa.RecordBatch, question: Question[A], failed: A) -> pa.RecordBatch:
    given_up: _Batch[A] = _Batch(batch)
    for row in range(batch.num_rows):
        given_up.answer(row, failed, 0)
    return given_up.result(question, None, 0.0, 0.0)


def answered(engine: Engine, batches: Iterable[pa.RecordBatch], question: Question[A], startup: float = 0.0) -> Batches:
    """Answers batches in order; a batch is yielded as soon as its last row is answered. startup: seconds of loading."""
    waiting: dict[int, _Batch[A]] = {}
    where: dict[int, tuple[int, int]] = {}  # prompt number -> batch number, row

    def prompts() -> Prompts:
        asked = 0
        for number, batch in enumerate(_pieces(_read_ahead(batches), max(1, _TOGETHER // question.answers))):
            if batch is None:
                yield None
                continue
            opened: _Batch[A] = _Batch(batch)
            waiting[number] = opened
            for row, ids in enumerate(opened.prompts()):
                # One over-long prompt would make the engine refuse the whole call.
                if len(ids) + question.room > engine.max_model_len:
                    opened.answer(row, question.too_long, 0)
                    continue
                where[asked] = (number, row)
                asked += 1
                yield ids

    busy = engine.busy_seconds
    for index, answer, cached in question.ask(engine, prompts()):
        number, row = where.pop(index)
        waiting[number].answer(row, answer, cached)
        for done in [n for n, b in waiting.items() if not b.missing]:
            yield waiting.pop(done).result(question, engine, engine.busy_seconds - busy, startup)
            busy, startup = engine.busy_seconds, 0.0
    for batch in waiting.values():  # batches of which every row was refused
        if batch.missing:
            raise RuntimeError(f"the engine ended with {batch.missing} prompts unanswered")
        yield batch.result(question, engine, engine.busy_seconds - busy, startup)
        busy, startup = engine.busy_seconds, 0.0


class _Batch(Generic[A]):
    """An input batch and the answers to its rows, as they come."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._ids = batch.column(batch.schema.get_field_index("ids"))
        self._answers: dict[int, A] = {}
        self._cached: list[int | None] = [None] * batch.num_rows

    @property
    def missing(self) -> int:
        return int(self._batch.num_rows) - len(self._answers)

    def prompts(self) -> Iterator[list[int]]:
        for ids in self._ids:
            yield ids.values.to_numpy().tolist()

    def answer(self, row: int, answer: A, cached: int | None) -> None:
        if row in self._answers:
            raise RuntimeError("the engine answered one prompt twice")
        self._answers[row] = answer
        self._cached[row] = cached

    def result(self, question: Question[A], engine: Engine | None, seconds: float, startup: float) -> pa.RecordBatch:
        rows = self._batch.num_rows
        columns = [
            *question.columns([self._answers[row] for row in range(rows)]),
            self._ids.value_lengths().to_pylist(),
            self._cached,
            [seconds / rows] * rows,
            [startup / rows] * rows,
            *[[engine and getattr(engine, name)] * rows for name in ("id", "version", "dtype")],
        ]
        kept = self._batch.drop_columns(["ids"])
        fields = [*question.schema, *_COST]
        arrays = [pa.array(values, type=f.type) for values, f in zip(columns, fields, strict=True)]
        return pa.RecordBatch.from_arrays([*kept.columns, *arrays], schema=pa.schema([*kept.schema, *fields]))


def _chain(first: pa.RecordBatch, rest: Batches) -> Batches:
    yield first
    yield from (b for b in rest if b.num_rows)


def _pieces(batches: Iterable[pa.RecordBatch | None], rows: int) -> Iterator[pa.RecordBatch | None]:
    for batch in batches:
        if batch is None:
            yield None
            continue
        yield from (batch.slice(at, rows) for at in range(0, batch.num_rows, rows))


def _read_ahead(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch | None]:
    """The batches, read by a thread of their own; None while the next one is not here yet."""
    ready: queue.Queue[pa.RecordBatch | BaseException | None] = queue.Queue(_READ_AHEAD)
    stopped = threading.Event()

    def put(item: pa.RecordBatch | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=1)
            except queue.Full:
                continue

    def read() -> None:
        last: BaseException | None = None
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
        except BaseException as error:  # carried over to the thread that scores
            last = error
        put(last)

    thread = threading.Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item = ready.get(timeout=0.001)
            except queue.Empty:
                yield None
                continue
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
    finally:
        stopped.set()
