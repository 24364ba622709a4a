"""Streams a partition of prompts through the engine: Arrow batches in, the same rows with label probabilities out.

Runs inside Spark's `mapInArrow`. A feeder thread reads ahead a few batches, so that the engine finds its next prompts
in memory while Spark is still shuffling; results leave batch by batch, so that neither side ever holds a partition.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import pyarrow as pa
from pyspark.sql.types import (
    DoubleType,
    IntegerType,
    StringType,
    StructField,
    StructType,
)

from schemas.labels import P_COLUMNS
from udfs.decode import LabelProbs, label_probs
from udfs.engine import Engine, EngineSettings, load

Batches = Iterator[pa.RecordBatch]

# What scoring adds to a row; `ids` (the prompt) is what it takes away.
ANSWER = StructType(
    [
        *[StructField(p, DoubleType()) for p in P_COLUMNS],
        StructField("p_outside", DoubleType()),
        StructField("outcome", StringType(), nullable=False),
        StructField("prompt_tokens", IntegerType(), nullable=False),
        StructField("cached_tokens", IntegerType(), nullable=False),
        StructField("engine_seconds", DoubleType(), nullable=False),  # of the row's batch, shared out over its rows
        StructField("engine_id", StringType(), nullable=False),
        StructField("engine_version", StringType(), nullable=False),
        StructField("dtype", StringType(), nullable=False),
    ]
)
_ARROW = pa.schema(
    [
        *[pa.field(p, pa.float64()) for p in (*P_COLUMNS, "p_outside")],
        pa.field("outcome", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("cached_tokens", pa.int32()),
        pa.field("engine_seconds", pa.float64()),
        *[pa.field(name, pa.string()) for name in ("engine_id", "engine_version", "dtype")],
    ]
)
_READ_AHEAD = 4  # batches; each is spark.sql.execution.arrow.maxRecordsPerBatch rows


def scored_schema(prompts: StructType) -> StructType:
    """Schema of what `scorer` returns for rows of schema `prompts`."""
    return StructType([f for f in prompts.fields if f.name != "ids"] + ANSWER.fields)


def scorer(
    settings: EngineSettings, label_ids: Sequence[int], load_engine: Callable[[EngineSettings], Engine] = load
) -> Callable[[Batches], Batches]:
    """The function for `mapInArrow`. Input rows hold `ids` (prompt token ids); other columns pass through.

    `load_engine` is handed in because nothing that is patched on the driver reaches a worker.
    """

    def score(batches: Batches) -> Batches:
        first = next((b for b in batches if b.num_rows), None)
        if first is None:
            return  # an empty shard loads no engine
        yield from score_batches(load_engine(settings), _chain(first, batches), label_ids)

    return score


def score_batches(engine: Engine, batches: Iterable[pa.RecordBatch], label_ids: Sequence[int]) -> Batches:
    """Scores batches in order; a batch is yielded as soon as its last row is answered."""
    waiting: dict[int, _Batch] = {}
    where: dict[int, tuple[int, int]] = {}  # prompt number -> batch number, row

    def prompts() -> Iterator[Sequence[int] | None]:
        asked = 0
        for number, batch in enumerate(_read_ahead(batches)):
            if batch is None:
                yield None
                continue
            waiting[number] = opened = _Batch(batch)
            for row, ids in enumerate(opened.prompts()):
                # One over-long prompt would make the engine refuse the whole call.
                if len(ids) + 1 > engine.max_model_len:
                    opened.refuse(row, "too_long")
                    continue
                where[asked] = (number, row)
                asked += 1
                yield ids

    busy = engine.busy_seconds
    for answer in engine.answers(prompts(), label_ids):
        number, row = where.pop(answer.index)
        waiting[number].answer(row, label_probs(answer.logprobs), answer.cached)
        for done in [n for n, b in waiting.items() if not b.missing]:
            yield waiting.pop(done).result(engine, engine.busy_seconds - busy)
            busy = engine.busy_seconds
    for batch in waiting.values():  # batches of which every row was refused
        if batch.missing:
            raise RuntimeError(f"the engine ended with {batch.missing} prompts unanswered")
        yield batch.result(engine, engine.busy_seconds - busy)
        busy = engine.busy_seconds


class _Batch:
    """An input batch and the answers to its rows, as they come."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._batch = batch
        self._ids = batch.column(batch.schema.get_field_index("ids"))
        self._answers: list[LabelProbs | None] = [None] * batch.num_rows
        self._cached = [0] * batch.num_rows
        self.missing = batch.num_rows

    def prompts(self) -> Iterator[list[int]]:
        for ids in self._ids:
            yield ids.values.to_numpy().tolist()

    def answer(self, row: int, answer: LabelProbs, cached: int) -> None:
        if self._answers[row] is not None:
            raise RuntimeError("the engine answered one prompt twice")
        self._answers[row] = answer
        self._cached[row] = cached
        self.missing -= 1

    def refuse(self, row: int, outcome: str) -> None:
        self.answer(row, LabelProbs(None, None, outcome), 0)

    def result(self, engine: Engine, seconds: float) -> pa.RecordBatch:
        answers = [a for a in self._answers if a is not None]
        rows = len(answers)
        lengths = self._ids.value_lengths().to_pylist()
        columns = [
            *([a.p[i] if a.p else None for a in answers] for i in range(4)),
            [a.p_outside for a in answers],
            [a.outcome for a in answers],
            lengths,
            self._cached,
            [seconds / rows] * rows,
            [engine.id] * rows,
            [engine.version] * rows,
            [engine.dtype] * rows,
        ]
        kept = self._batch.drop_columns(["ids"])
        arrays = [pa.array(values, type=f.type) for values, f in zip(columns, _ARROW, strict=True)]
        return pa.RecordBatch.from_arrays([*kept.columns, *arrays], schema=pa.schema([*kept.schema, *_ARROW]))


def _chain(first: pa.RecordBatch, rest: Batches) -> Batches:
    yield first
    yield from (b for b in rest if b.num_rows)


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
