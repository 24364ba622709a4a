"""Does this engine agree with itself on this model? Asked once, before a model's first row is written.

A prefix cache that mixes blocks up, or a kernel that depends on its batch, gives plausible numbers that are wrong. So
the same prompts are scored batched from an empty cache, batched again from a full one, and one by one uncached; the
largest difference must stay within the noise of the number type. A model folder may also bring `canaries.json`, pairs
with the probabilities its maker measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.labels import LABELS
from udfs.decode import label_probs
from udfs.engine import Engine, EngineSettings, load
from udfs.model import Model
from udfs.prompt import Prompt, renderer
from udfs.render import product_text

# Largest |Δp| between two ways of computing the same prompt that counts as noise, by number type. float32 stays below
# 1e-5 on the demo model. bfloat16 has a long tail: of 1,223 real pairs (Icecat) that this model was asked twice, in
# another order and company, half moved by 0.003, one in a hundred by 0.033, the worst by 0.076, and in a plain
# transformers forward as much; a prompt that is given another one's cache moves by more than this, as a rule. float16
# has three bits more, so an eighth of the noise.
NOISE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 0.2}
# Of the prompts' own largest |Δp| the mean (0.005 there): what is a little wrong everywhere shows here first.
MEAN_NOISE = {"float32": 2e-4, "float16": 4e-3, "bfloat16": 3e-2}

SCHEMA = pa.schema(
    [
        *[pa.field(name, pa.float64()) for name in ("self_check_dp", "mean_dp", "canaries_dp", "canaries_mean_dp")],
        pa.field("tokens_per_second", pa.float64()),
        pa.field("alone", pa.list_(pa.list_(pa.float64()))),  # p of each prompt, asked one by one and uncached
        *[pa.field(name, pa.string()) for name in ("dtype", "engine_version")],
        pa.field("attempt", pa.int32()),
    ]
)


def probabilities(
    engine: Engine, prompts: Sequence[Sequence[int]], label_ids: Sequence[int], ahead: int | None = None
) -> list[list[float]]:
    """p of labels 4, 3, 2, 1 for each prompt, in the order of the prompts; NaN where there is none."""
    found: dict[int, list[float]] = {}
    for answer in engine.answers(iter(prompts), label_ids, ahead):
        p = label_probs(answer.logprobs).p
        found[answer.index] = list(p) if p else [float("nan")] * len(LABELS)
    return [found[i] for i in range(len(prompts))]


def largest_difference(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float:
    """max |Δp| over all rows and labels; infinity where a number is missing on either side."""
    return max(differences(a, b), default=0.0)


def differences(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> list[float]:
    """max |Δp| over the labels of each row; infinity where a number is missing on either side."""
    moved = [[abs(x - y) for x, y in zip(row_a, row_b, strict=True)] for row_a, row_b in zip(a, b, strict=True)]
    return [max((float("inf") if d != d else d for d in row), default=0.0) for row in moved]


def check_engine(
    engine: Engine, prompts: Sequence[Sequence[int]], label_ids: Sequence[int]
) -> tuple[float, float, list[list[float]]]:
    """|Δp| between batched from nothing, batched from the cache, and one by one from nothing: the largest, and the mean
    of each prompt's largest; and the last probabilities."""
    engine.forget()
    batched = probabilities(engine, prompts, label_ids)
    cached = probabilities(engine, prompts, label_ids)
    single = []
    for prompt in prompts:
        engine.forget()
        single += probabilities(engine, [prompt], label_ids, ahead=1)
    moved = [max(both) for both in zip(differences(batched, cached), differences(batched, single), strict=True)]
    return max(moved, default=0.0), sum(moved) / max(1, len(moved)), single


def asked(prompts: Sequence[Any], attempt: int) -> Sequence[Any]:
    """What the check asks at a try of its task: all, and where the engine died on that a third, another each time, so
    that a few prompts that kill an engine do not keep a model from its first use."""
    return prompts[attempt - 1 :: 3] if attempt else prompts


def checker(
    settings: EngineSettings,
    label_ids: Sequence[int],
    prompts: Sequence[Sequence[int]],
    canaries: Sequence[tuple[Sequence[int], Sequence[float]]],
    load_engine: Callable[[EngineSettings], Engine] = load,
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The check as a function for `mapInArrow` on a one-row DataFrame; returns one row of `SCHEMA`.

    `canaries`: prompts with the p of labels 4, 3, 2, 1 that are expected; their differences are null without any.
    """

    def check(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        for batch in batches:
            if not batch.num_rows:
                continue
            engine = load_engine(settings)
            context = TaskContext.get()
            attempt = context.attemptNumber() if context else 0
            some = asked(prompts, attempt)
            engine.forget()
            probabilities(engine, some, label_ids)  # the first steps compile kernels
            busy = engine.busy_seconds
            difference, mean, alone = check_engine(engine, some, label_ids)
            tokens = sum(len(p) for p in some)
            seconds = engine.busy_seconds - busy
            known = probabilities(engine, [ids for ids, _ in canaries], label_ids) if canaries else []
            off = differences(known, [list(p) for _, p in canaries])
            row: dict[str, Any] = {
                "self_check_dp": difference,
                "mean_dp": mean,
                "canaries_dp": max(off, default=None),
                "canaries_mean_dp": sum(off) / len(off) if off else None,
                # Prompts were computed one by one in two of three passes, so this is a low guess: waves start small.
                "tokens_per_second": 2 * tokens / max(1e-6, seconds),
                "alone": alone,
                "dtype": engine.dtype,
                "engine_version": engine.version,
                "attempt": attempt,
            }
            engine.forget()
            yield pa.RecordBatch.from_pylist([row], schema=SCHEMA)

    return check


def canaries(model: Model, prompt: Prompt) -> list[tuple[list[int], list[float]]]:
    """Prompts and expected p (labels 4, 3, 2, 1) of the model folder's canaries.json; empty where it has none.

    The file: a list of objects with query, title, whatever else of the product, and `p`. Raises ValueError.
    """
    if model.canaries_file is None:
        return []
    render = renderer(prompt)
    expected = []
    try:
        for canary in json.loads(Path(model.canaries_file).read_text(encoding="utf-8")):
            product = render.product(**product_text(canary))
            p = [float(x) for x in canary["p"]]
            if len(p) != len(LABELS) or not abs(sum(p) - 1) < 1e-3:
                raise ValueError(f"p = {p}")
            expected.append((render.join(product, render.query(canary["query"])), p))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{model.canaries_file}: {error!r}; each entry needs query, title, and p (four probabilities of "
            "labels 4, 3, 2, 1, that sum to 1). Mend the file or remove it."
        ) from error
    return expected
