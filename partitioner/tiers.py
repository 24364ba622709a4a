"""The rule of CumPT: probabilities into tiers, and the version of thresholds in force. ≥ is written in this file only.

With c4 = p4, c3 = p4 + p3, c2 = (p4 + p3) + p2 the tier is the highest k with c_k ≥ τ_k, else 1 (TaoSR1, section 3.5:
one τ for all). With τ4 ≥ τ3 ≥ τ2 a tier is k or better exactly where c_k ≥ τ_k, since c4 ≤ c3 ≤ c2. How the cuts are
found is partitioner/thresholds.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from partitioner.measures import Floats
from schemas import delta
from schemas.labels import LABELS, NAMES, P_COLUMNS
from schemas.tables import SEGMENT_COLUMNS

BOUNDARIES = LABELS[:3]

# The rule, for readers: SQL that Spark, DuckDB and Polars understand; docs/labels.sql is this text.

_RAISED = {
    f"q{y}": f"CASE WHEN temperature = 1 THEN {p} ELSE POWER({p}, 1.0 / temperature) END"
    for y, p in zip(LABELS, P_COLUMNS, strict=True)
}
_TOTAL = "CASE WHEN temperature = 1 THEN 1.0 ELSE ((q4 + q3) + q2) + q1 END"
_CUMULATIVE = {"c4": "q4 / total", "c3": "(q4 + q3) / total", "c2": "((q4 + q3) + q2) / total"}
_TIER = "WHEN c4 >= tau4 THEN 4 WHEN c3 >= tau3 THEN 3 WHEN c2 >= tau2 THEN 2"
_SEGMENT = "CASE g.segment_by " + " ".join(f"WHEN '{c}' THEN p.{c}" for c in SEGMENT_COLUMNS) + " END"


def _columns(named: dict[str, str]) -> str:
    return ",\n           ".join(f"{sql} AS {name}" for name, sql in named.items())


LABELS_SQL = f"""\
WITH cut AS (
    SELECT version, segment, segment_by, model_id, prompt_id, temperature,
           MAX(CASE WHEN boundary = 4 THEN tau END) AS tau4,
           MAX(CASE WHEN boundary = 3 THEN tau END) AS tau3,
           MAX(CASE WHEN boundary = 2 THEN tau END) AS tau2
    FROM thresholds
    WHERE status = 'active'
    GROUP BY version, segment, segment_by, model_id, prompt_id, temperature
), judged AS (
    SELECT l.pair_id, l.query, l.product_id, l.locale, {", ".join(f"l.{p}" for p in P_COLUMNS)},
           l.outcome, l.content_hash <> p.content_hash AS stale, g.version, g.model_id, g.prompt_id, g.temperature,
           g.tau4 AS other4, g.tau3 AS other3, g.tau2 AS other2,
           {_SEGMENT} AS segment
    FROM label_probs AS l
    JOIN cut AS g ON l.model_id = g.model_id AND l.prompt_id = g.prompt_id
    JOIN pairs AS p ON l.pair_id = p.pair_id
    WHERE g.segment = ''
), raised AS (
    SELECT judged.*,
           COALESCE(s.tau4, other4) AS tau4, COALESCE(s.tau3, other3) AS tau3, COALESCE(s.tau2, other2) AS tau2,
           {_columns(_RAISED)}
    FROM judged
    LEFT JOIN (SELECT segment AS of_segment, tau4, tau3, tau2 FROM cut) AS s ON judged.segment = s.of_segment
), summed AS (
    SELECT *, {_TOTAL} AS total
    FROM raised
), cumulated AS (
    SELECT *, {", ".join(f"{sql} AS {name}" for name, sql in _CUMULATIVE.items())}
    FROM summed
), tiered AS (
    SELECT *, CASE WHEN c4 IS NULL THEN NULL {_TIER} ELSE 1 END AS tier
    FROM cumulated
)
SELECT pair_id, query, product_id, locale, tier,
       CASE tier {" ".join(f"WHEN {k} THEN '{NAMES[k]}'" for k in LABELS)} END AS tier_name,
       {", ".join(P_COLUMNS)}, outcome, stale, segment, version, model_id, prompt_id
FROM tiered
"""  # noqa: S608 (names of the contract only)


def cumulated(rows: DataFrame, temperature: float) -> DataFrame:
    """Adds c4, c3, c2 to rows with the four probabilities, as the view does."""
    rows = rows.withColumn("temperature", F.lit(temperature))
    rows = rows.withColumns({name: F.expr(sql) for name, sql in _RAISED.items()})
    rows = rows.withColumn("total", F.expr(_TOTAL))
    return rows.withColumns({name: F.expr(sql) for name, sql in _CUMULATIVE.items()})


def cumulative(p: Floats, temperature: float = 1.0) -> Floats:
    """c4, c3, c2 of probabilities of labels 4, 3, 2, 1: [n, 4] -> [n, 3], bit for bit as in SQL at temperature 1."""
    q = p if temperature == 1 else p ** (1 / temperature)
    c: Floats = np.stack([q[:, 0], q[:, 0] + q[:, 1], (q[:, 0] + q[:, 1]) + q[:, 2]], axis=1)
    return c if temperature == 1 else c / (c[:, 2] + q[:, 3])[:, None]


def scaled(p: Floats, temperature: float) -> Floats:
    """Probabilities [n, 4] at a temperature; they sum to 1."""
    raised = p ** (1 / temperature)
    found: Floats = raised / raised.sum(1, keepdims=True)
    return found


def weighted_score(p: Floats) -> Floats:
    """What CumPT replaces: Σ w_k p_k with w = 3, 2, 1, 0, over 3; [n, 3], the same at each boundary."""
    return np.repeat((((3 * p[:, 0] + 2 * p[:, 1]) + p[:, 2]) / 3)[:, None], 3, axis=1)


def cut(c: Floats, taus: Sequence[float] | Floats) -> NDArray[np.int64]:
    """The rule: c [n, 3] and τ4, τ3, τ2 (or whatever triples numpy sets against them) -> tiers [n]."""
    met = c >= np.asarray(taus)
    return np.where(met[..., 0], 4, np.where(met[..., 1], 3, np.where(met[..., 2], 2, 1))).astype(np.int64)


def argmax(p: Floats) -> NDArray[np.int64]:
    """The likeliest label, of equals the better one."""
    found: NDArray[np.int64] = (4 - p.argmax(1)).astype(np.int64)
    return found


def likeliest() -> Column:
    """The label with the highest probability; of equals the better one; null where there are
    no probabilities. A column of rows of `label_probs`."""
    best = F.greatest(*P_COLUMNS)
    return F.coalesce(*[F.when(F.col(p) == best, F.lit(k)) for k, p in zip(LABELS, P_COLUMNS, strict=True)])


def labels(spark: SparkSession, label_probs: DataFrame, pairs: DataFrame, thresholds: DataFrame) -> DataFrame:
    """The view's rule over given tables: one row for each row of label_probs of the active version's model."""
    sql = LABELS_SQL
    for name in ("label_probs", "pairs", "thresholds"):
        sql = sql.replace(f"FROM {name}", f"FROM {{{name}}}").replace(f"JOIN {name} ", f"JOIN {{{name}}} ")
    return spark.sql(sql, label_probs=label_probs, pairs=pairs, thresholds=thresholds)


def labels_under(
    spark: SparkSession, version: int, stored: DataFrame, label_probs: DataFrame, pairs: DataFrame
) -> DataFrame:
    """The view's rows as if this version, of those in `stored`, were in force."""
    cuts = stored.where(F.col("version") == version).withColumn("status", F.lit("active"))
    return labels(spark, label_probs, pairs, cuts)


def register(spark: SparkSession, root: str) -> list[str]:
    """Registers the tables and, where its tables are there, the view `labels`; returns their names."""
    there = delta.register(spark, root)
    if {"thresholds", "label_probs", "pairs"} <= set(there):
        spark.sql(f"CREATE OR REPLACE TEMPORARY VIEW labels AS {LABELS_SQL}")
        there.append("labels")
    return there


@dataclass(frozen=True)
class Version:
    """A version of thresholds. `cuts`: τ4, τ3, τ2 by segment, '' for all others."""

    version: int
    model_id: str
    prompt_id: str
    segment_by: str | None
    temperature: float
    cuts: dict[str, tuple[float, float, float]]


def active(spark: SparkSession, root: str) -> Version | None:
    """The version in force, None before the first promotion. Raises RuntimeError where the table holds two."""
    rows = delta.read_few(spark, root, "thresholds").where("status = 'active'").collect()
    if not rows:
        return None
    if len({row["version"] for row in rows}) > 1:
        raise RuntimeError(f"thresholds has two active versions: {sorted({row['version'] for row in rows})}")
    return version_of(rows)


def version_of(rows: Sequence[Any]) -> Version:
    """The version whose rows these are. Raises ValueError for one that is not whole or not in order."""
    cuts: dict[str, dict[int, float]] = {}
    for row in rows:
        cuts.setdefault(row["segment"], {})[row["boundary"]] = row["tau"]
    triples = {}
    for segment, taus in cuts.items():
        if set(taus) != set(BOUNDARIES) or not 1 >= taus[4] >= taus[3] >= taus[2] >= 0:
            raise ValueError(
                f"version {rows[0]['version']} is not whole: segment {segment!r} has the cuts {taus}, wanted one for "
                "each of 4, 3, 2 with 1 ≥ τ4 ≥ τ3 ≥ τ2 ≥ 0; fit another one with fit_thresholds"
            )
        triples[segment] = (taus[4], taus[3], taus[2])
    names = {(r["model_id"], r["prompt_id"], r["segment_by"], r["temperature"]) for r in rows}
    if "" not in triples or len(names) != 1:
        raise ValueError(f"version {rows[0]['version']} is not whole: it needs cuts for all others, and one model")
    model_id, prompt_id, by, temperature = names.pop()
    return Version(rows[0]["version"], model_id, prompt_id, by, temperature, triples)
