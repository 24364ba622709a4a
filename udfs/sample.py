"""Asks the engine for sampled answers to a partition of prompts, inside Spark's `mapInArrow`, and reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
from pyspark.sql.types import StructType

from udfs.answer import Form, conclusion
from udfs.engine import Engine, EngineSettings, Sampling, load
from udfs.stream import Batches, Prompts, Question, answered_schema, answerer

# What sampling adds to a row, beside what it cost. `samples`: in the order of their seeds.
_SAMPLE = pa.struct(
    [
        ("label", pa.int32()),  # 4..1; null where the answer has none
        ("chain", pa.string()),
        ("conclusion", pa.int32()),  # the label that the chain concludes by itself
        ("tokens", pa.int32()),
        ("finished", pa.bool_()),
    ]
)
_ANSWER = pa.schema(
    [
        pa.field("samples", pa.list_(_SAMPLE)),
        pa.field("answer_tokens", pa.int32()),
        pa.field("outcome", pa.string()),  # sampled, too_long or engine_failed
    ]
)
Sampled = tuple[list[dict[str, object]], str]


def sampled_schema(prompts: StructType) -> StructType:
    """Schema of what `sampler` returns for rows of schema `prompts`."""
    return answered_schema(prompts, _ANSWER)


def sampler(
    settings: EngineSettings,
    form: Form,
    sampling: Sampling,
    begun: int = 0,
    load_engine: Callable[[EngineSettings], Engine] = load,
) -> Callable[[Batches], Batches]:
    """The function for `mapInArrow`. Input rows hold `ids` (prompt token ids); other columns pass through.

    `begun`: so many ids at a prompt's end are the beginning of its answer, such as a label that was chosen before.
    """

    def ask(engine: Engine, prompts: Prompts) -> Iterator[tuple[int, Sampled, int | None]]:
        beginnings: dict[int, Sequence[int]] = {}

        def noted() -> Prompts:
            asked = 0
            for prompt in prompts:
                if prompt is not None:
                    beginnings[asked] = prompt[len(prompt) - begun :]
                    asked += 1
                yield prompt

        for found in engine.samples(noted(), sampling):
            beginning = beginnings.pop(found.index)
            yield found.index, ([_read(form, [*beginning, *ids]) for ids in found.ids], "sampled"), found.cached

    def columns(answers: list[Sampled]) -> list[list[object]]:
        tokens = [sum(int(str(one["tokens"])) for one in samples) for samples, _ in answers]
        return [[samples for samples, _ in answers], list(tokens), [outcome for _, outcome in answers]]

    too_long: Sampled = ([], "too_long")
    failed: Sampled = ([], "engine_failed")
    question = Question(ask, sampling.max_tokens, too_long, columns, _ANSWER, failed, sampling.n)
    return answerer(settings, question, load_engine)


def questioner(form: Form, schema: pa.Schema) -> Callable[[Batches], Batches]:
    """The function for `mapInArrow` that puts each row's findings (of `chain`) behind its prompt (`ids`).

    Returns the columns of `schema`; rows whose chain has no findings are left out.
    """

    def ask(batches: Batches) -> Batches:
        for batch in batches:
            rows = batch.to_pylist()
            asked = [(row, form.question(row["chain"])) for row in rows]
            made = [{**row, "ids": [*row["ids"], *question]} for row, question in asked if question]
            yield pa.RecordBatch.from_pylist(made, schema=schema)

    return ask


def _read(form: Form, ids: Sequence[int]) -> dict[str, object]:
    read = form.read(ids)
    return {
        "label": read.label,
        "chain": read.chain,
        "conclusion": conclusion(read.chain),
        "tokens": len(ids),
        "finished": read.finished,
    }
