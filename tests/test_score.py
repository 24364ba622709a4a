"""Streaming batches through an engine, without Spark."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest

from tests.engines import FakeEngine, logprobs
from udfs.decode import label_probs
from udfs.engine import EngineSettings
from udfs.score import question
from udfs.stream import answered

SETTINGS = EngineSettings(model="/nowhere", max_model_len=64)


def batch(*prompts: list[int], start: int = 0) -> pa.RecordBatch:
    names = pa.array([f"pair{start + i}" for i in range(len(prompts))])
    return pa.RecordBatch.from_arrays([names, pa.array(prompts, pa.list_(pa.int32()))], ["pair_id", "ids"])


def rows(batches: Iterator[pa.RecordBatch]) -> dict[str, dict[str, object]]:
    return {row["pair_id"]: row for b in batches for row in b.to_pylist()}


def test_each_row_gets_the_answer_to_its_own_prompt_however_the_batches_are_cut() -> None:
    prompts = [[i, i + 1, 7] * (1 + i % 4) for i in range(30)]
    for size in (1, 4, 30):
        batches = [batch(*prompts[i : i + size], start=i) for i in range(0, 30, size)]
        found = rows(answered(FakeEngine(SETTINGS), batches, question([4, 3, 2, 1])))
        for i, ids in enumerate(prompts):
            expected = label_probs(logprobs(ids))
            row = found[f"pair{i}"]
            got = (row["p_excellent"], row["p_related"], row["p_mismatch"], row["p_irrelevant"])
            assert (got, row["outcome"], row["prompt_tokens"]) == (expected.p, "scored", len(ids))
        assert len(found) == 30


def test_the_prompt_itself_does_not_travel_back() -> None:
    (out,) = answered(FakeEngine(SETTINGS), [batch([1, 2])], question([4, 3, 2, 1]))
    assert "ids" not in out.schema.names


def test_prompts_beyond_the_models_context_never_reach_the_engine() -> None:
    engine = FakeEngine(SETTINGS)
    found = rows(answered(engine, [batch([1] * 64), batch([1] * 63, [2] * 64, start=1)], question([4, 3, 2, 1])))
    assert [found[f"pair{i}"]["outcome"] for i in range(3)] == ["too_long", "scored", "too_long"]
    assert found["pair0"]["p_excellent"] is None
    assert max(map(len, engine.seen)) < 64


def test_no_more_than_a_few_batches_are_read_ahead_of_the_engine() -> None:
    read = 0

    def source() -> Iterator[pa.RecordBatch]:
        nonlocal read
        for i in range(1000):
            read += 1
            yield batch([i, 1], start=i)

    out = answered(FakeEngine(SETTINGS), source(), question([4, 3, 2, 1]))
    for _ in range(3):
        next(out)
    assert read < 20
    out.close()  # type: ignore[attr-defined]


def test_an_error_of_the_source_reaches_the_task() -> None:
    def source() -> Iterator[pa.RecordBatch]:
        yield batch([1, 2])
        raise OSError("shuffle block lost")

    with pytest.raises(OSError, match="shuffle block lost"):
        list(answered(FakeEngine(SETTINGS), source(), question([4, 3, 2, 1])))


def test_no_reading_thread_is_left_when_the_task_ends_early() -> None:
    out = answered(FakeEngine(SETTINGS), (batch([i]) for i in range(100)), question([4, 3, 2, 1]))
    next(out)
    out.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name == "read-ahead":
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_settings_with_another_model_folder_have_the_same_hash_and_another_dtype_has_not() -> None:
    assert SETTINGS.hash == dataclasses.replace(SETTINGS, model="/elsewhere").hash
    assert SETTINGS.hash != dataclasses.replace(SETTINGS, dtype="float32").hash
