"""Asks the engine for the label probabilities of a partition of prompts, inside Spark's `mapInArrow`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from pyspark.sql.types import StructType

from schemas.labels import P_COLUMNS
from udfs.decode import LabelProbs, label_probs
from udfs.engine import Engine, EngineSettings, load
from udfs.model import Model
from udfs.prompt import Prompt
from udfs.stream import Batches, Prompts, Question, answered_schema, answerer

# What scoring adds to a row, beside what it cost.
_ANSWER = pa.schema([*[pa.field(p, pa.float64()) for p in (*P_COLUMNS, "p_outside")], pa.field("outcome", pa.string())])


@dataclass(frozen=True)
class Scoring:
    """What scores: a model folder that was looked at, the prompt it is asked with, and the engine's settings."""

    model: Model
    stage: str
    prompt: Prompt
    settings: EngineSettings
    load_engine: Callable[[EngineSettings], Engine] = load

    @property
    def regime(self) -> tuple[str, str]:
        """model_id and prompt_id, by which rows and thresholds belong together."""
        return self.model.model_id, self.prompt.prompt_id


def scored_schema(prompts: StructType) -> StructType:
    """Schema of what `scorer` returns for rows of schema `prompts`."""
    return answered_schema(prompts, _ANSWER)


def scorer(
    settings: EngineSettings, label_ids: Sequence[int], load_engine: Callable[[EngineSettings], Engine] = load
) -> Callable[[Batches], Batches]:
    """The function for `mapInArrow`. Input rows hold `ids` (prompt token ids); other columns pass through."""
    return answerer(settings, question(label_ids), load_engine)


def question(label_ids: Sequence[int]) -> Question[LabelProbs]:
    """The probabilities of the labels, read off the first token after the prompt."""

    def ask(engine: Engine, prompts: Prompts) -> Iterator[tuple[int, LabelProbs, int | None]]:
        for answer in engine.answers(prompts, label_ids):
            yield answer.index, label_probs(answer.logprobs), answer.cached

    def columns(answers: list[LabelProbs]) -> list[list[object]]:
        by_label: list[list[object]] = [[a.p[i] if a.p else None for a in answers] for i in range(len(P_COLUMNS))]
        return [*by_label, [a.p_outside for a in answers], [a.outcome for a in answers]]

    return Question(
        ask, 1, LabelProbs(None, None, "too_long"), columns, _ANSWER, LabelProbs(None, None, "engine_failed")
    )
