"""Tables of judged and scored pairs without a model: probabilities and labels as the test wants them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from pyspark.sql import DataFrame, SparkSession

from schemas import delta
from schemas.tables import TABLES

MODEL, PROMPT = "0123456789abcdef", "fedcba9876543210"
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def rows(spark: SparkSession, name: str, of: Sequence[dict[str, Any]]) -> DataFrame:
    """Rows of a table; columns that are not given are null."""
    values = [[float(x) if isinstance(x, np.floating) else x for x in map(row.get, TABLES[name].names)] for row in of]
    return delta.rows(spark, name, values)


def fill(spark: SparkSession, root: str, name: str, of: Sequence[dict[str, Any]]) -> None:
    """Appends rows to a table; columns that are not given are null."""
    delta.append(spark, root, name, rows(spark, name, of))


def pair_key(i: int) -> str:
    return f"{i:032x}"


def pair(i: int, query: str, category: str | None = None, **more: Any) -> dict[str, Any]:
    row = {"pair_id": pair_key(i), "query": query, "product_id": f"p {i}", "locale": "en", "title": f"Product {i}"}
    return {**row, "category": category, "content_hash": "c1", "updated_at": NOW, **more}


def scored(i: int, query: str, p: Sequence[float] | None, **more: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "pair_id": pair_key(i), "model_id": MODEL, "prompt_id": PROMPT, "query": query, "product_id": f"p {i}",
        "locale": "en", "outcome": "scored" if p is not None else "too_long", "content_hash": "c1",
        "pairs_version": 1, "wave_id": "w", "prompt_tokens": 9, "tokens_cut": 0, "run_id": "r0", "scored_at": NOW,
    }  # fmt: skip
    if p is not None:
        names = ("p_excellent", "p_related", "p_mismatch", "p_irrelevant")
        row |= {**dict(zip(names, map(float, p), strict=True)), "p_outside": 0.0}
    return {**row, **more}


def gold(i: int, label: int, split: str = "dev", source: str = "raters", **more: Any) -> dict[str, Any]:
    row = {"pair_id": pair_key(i), "source": source, "label": label, "weight": 1.0, "split": split, "judged_at": NOW}
    return {**row, **more}


def sample(pair_id: str, gold: int, label: int, chain: str, **more: Any) -> dict[str, Any]:
    """An answer that came to its end, its chain concluding its own label."""
    return {
        "pair_id": pair_id, "model_id": MODEL, "prompt_id": PROMPT, "run_id": "r", "sample": 0, "label": label,
        "chain": chain, "gold": gold, "correct": label == gold, "conclusion": label, "agrees": True, "tokens": 20,
        "finished": True, "split": "train", "temperature": 1.0, "seed": 0, "content_hash": "h", "created_at": NOW,
        **more,
    }  # fmt: skip


def run(run_id: str = "r0", dtype: str = "float32", engine: str = "fake 1") -> dict[str, Any]:
    return {
        "run_id": run_id, "job": "rescore", "status": "done", "counts": {}, "figures": {}, "dtype": dtype,
        "engine_version": engine, "started_at": NOW,
    }  # fmt: skip


def cuts(
    version: int,
    taus: Mapping[str, Sequence[float]],
    status: str = "candidate",
    segment_by: str | None = None,
    temperature: float = 1.0,
    **more: Any,
) -> list[dict[str, Any]]:
    """The rows of a version: τ4, τ3, τ2 by segment."""
    return [
        {
            "version": version, "segment": segment, "boundary": k, "tau": tau, "optimal_low": tau, "optimal_high": tau,
            "segment_by": segment_by, "temperature": temperature, "rule": "boundary", "objective": "macro_f1",
            "value": 0.5, "n_gold": 10, "gold_sources": ["raters"], "allow_train": False, "model_id": MODEL,
            "prompt_id": PROMPT, "engines": ["float32, fake 1"], "run_id": "f0", "status": status, "fitted_at": NOW,
            "activated_at": None if status == "candidate" else NOW, **more,
        }
        for segment, three in taus.items()
        for k, tau in zip((4, 3, 2), three, strict=True)
    ]  # fmt: skip


def tables(spark: SparkSession, root: str, queries: int = 30, each: int = 8, seed: int = 0, **kinds: Any) -> None:
    """Pairs of some queries in two categories, scored by a fair model and judged: by three raters, or by one label."""
    random = np.random.default_rng(seed)
    pairs, probs, judgements = [], [], []
    for i in range(queries * each):
        query = f"query {i // each}"
        p = random.dirichlet([0.6] * 4)
        p = p / p.sum()
        raters = sorted(int(4 - random.choice(4, p=p)) for _ in range(3))
        pairs.append(pair(i, query, category="Kettles" if i // each % 3 else "Towels"))
        probs.append(scored(i, query, p))
        split = ("train", "dev", "dev", "test")[i // each % 4]
        judgements.append(gold(i, raters[1], split, rater_labels=raters, **kinds))
    fill(spark, root, "pairs", pairs)
    fill(spark, root, "label_probs", probs)
    fill(spark, root, "gold", judgements)
    fill(spark, root, "runs", [run()])
