"""Finds the cuts of CumPT (the rule is partitioner/tiers.py) that are best by an objective, under requirements.

A tier is k or better exactly where c_k ≥ τ_k, so what is shown as k or better depends on τ_k alone, and a matrix of
worths (accuracy, costs) is a sum of one term a boundary: the best ordered triple is found exactly by one scan over the
sorted values. Kappa is a ratio of two such sums (Dinkelbach 1967:
a few scans). Macro-F1 chains neighbours (F1 of Related needs τ4 and τ3), so it is exact by dynamic programming, in the
square of the cuts, up to `EXACT_CUTS`; beyond that a grid of them, and then each τ in turn over all cuts.

Every value in the data is a cut, and all τ between two neighbouring values cut alike: such an interval (low, high] is
what is searched, its middle is what is chosen; of several that are as good, the widest. Weights are rounded to 2^-20,
so that sums are exact in any order, and intervals are joined over the borders of partitions: the same cuts come out
whatever the order of rows and however they lie in partitions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from partitioner import measures
from partitioner.measures import Floats
from partitioner.tiers import BOUNDARIES
from schemas import runs
from schemas.labels import LABELS, NAMES

WEIGHTS = [f"w{y}" for y in LABELS]
_CHUNK = f"k TINYINT, top DOUBLE, {', '.join(f'{w} DOUBLE' for w in WEIGHTS)}, value BINARY, sums BINARY"
RULES = ("one", "boundary")
EXACT_CUTS = 4096  # values a boundary: 17 million combinations of two cuts, under a second
GRID_CUTS = 1024
THINNED_CUTS = 256  # of a piece
PIECE_VALUES = 2_000_000  # a worker holds at a time, at 40 bytes and a few copies
CHUNK_VALUES = 100_000  # in a row of Spark: 4 MB
_SKETCHED = 0.1  # of the rows, to balance pieces by
_ZOOMS = 6
_ALIKE = 1e-14  # objectives nearer than this (of their largest) are one: the noise of adding up costs

# What is made best


@dataclass(frozen=True)
class Objective:
    """macro_f1, accuracy, kappa, cost (`costs` [label, tier], 4 first: as little as can be), or recall (of `label` or
    better; of the cuts with the most of it those with the most accuracy)."""

    name: str = "macro_f1"
    costs: tuple[tuple[float, ...], ...] | None = None
    label: int | None = None

    def __str__(self) -> str:
        if self.costs is not None:
            return f"{self.name} {json.dumps(self.costs)}"
        return self.name if self.label is None else f"recall of {NAMES[self.label]} or better, then accuracy"

    @classmethod
    def read(cls, text: str) -> Objective:
        """The objective from its text, as `thresholds.objective` begins with it."""
        name, _, rest = text.partition(" ")
        if name == "cost":
            return cls(name, costs=tuple(tuple(row) for row in json.loads(rest)))
        return cls(name, label=next((y for y in LABELS if NAMES[y] in rest), None))

    def value(self, confusion: Floats) -> Floats:
        """The objective of confusion matrices [..., label, tier], the more the better; cost is negative."""
        if self.name == "macro_f1":
            return measures.macro_f1(confusion)
        if self.name == "kappa":
            return measures.kappa(confusion)
        if self.name == "recall":
            recall = measures.recall(confusion, self.label or 4)
            return np.where(np.isnan(recall), 0.0, recall)
        total = np.maximum(confusion.sum((-1, -2)), 1e-300)
        found: Floats = (confusion * self.worth()).sum((-1, -2)) / total
        return found

    def shown(self, confusion: Floats) -> Floats:
        """What people read of it: costs as costs."""
        return -self.value(confusion) if self.name == "cost" else self.value(confusion)

    def worth(self) -> Floats:
        """The worth of a tier for a label, [label, tier], where the objective is a sum of them."""
        if self.name == "accuracy":
            return np.eye(4)
        if self.name == "cost":
            return -np.asarray(self.costs, dtype=np.float64)
        if self.name == "recall":
            k = LABELS.index(self.label or 4) + 1
            right = np.zeros((4, 4))
            right[:k, :k] = 1
            return right
        raise AssertionError(f"{self.name} is no sum of worths")


@dataclass(frozen=True)
class Requirement:
    """A bound on what one boundary shows: precision or recall of `label` or better, or how much `of` is shown so."""

    kind: str
    label: int
    bound: float
    of: int | None = None

    def __str__(self) -> str:
        better = NAMES[self.label] if self.label == 4 else f"{NAMES[self.label]} or better"
        bound = np.format_float_positional(self.bound, trim="-")  # as it can be asked for again
        if self.of is not None:
            return f"{NAMES[self.of]} shown as {better} at most {bound}"
        return f"{self.kind} of {better} at least {bound}"

    def measured(self, shown: Floats, gold: Floats) -> Floats:
        """The bounded figure where `shown` [..., 4] (by label) is what boundary `label` shows; NaN: nothing shown."""
        k = LABELS.index(self.label) + 1
        if self.of is not None:
            y = LABELS.index(self.of)
            part, whole = shown[..., y], gold[..., y]
        elif self.kind == "recall":
            part, whole = shown[..., :k].sum(-1), gold[..., :k].sum(-1)
        else:
            part, whole = shown[..., :k].sum(-1), shown.sum(-1)
        return np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan)

    def of_confusion(self, confusion: Floats) -> Floats:
        """The bounded figure of confusion matrices [..., label, tier]."""
        k = LABELS.index(self.label) + 1
        return self.measured(confusion[..., :, :k].sum(-1), confusion.sum(-1))

    def met(self, shown: Floats, gold: Floats) -> NDArray[np.bool_]:
        """Where it holds; showing nothing has no precision and does not meet one."""
        found = self.measured(shown, gold)
        if self.of is not None:
            return ~(found > self.bound + 1e-12)
        return np.asarray(found >= self.bound - 1e-12)

    def relaxed(self, nearest: float) -> Requirement | None:
        """The requirement as near as it can be met, where `nearest` is the best bound; None where nothing can."""
        if math.isnan(nearest):
            return None
        return replace(self, bound=max(self.bound, nearest) if self.of is not None else min(self.bound, nearest))

    def best(self, bound: float) -> str:
        """The requirement beside the best bound that can be met, which is told so that it can be asked for."""
        if math.isnan(bound):
            return f"{self}: no judgement is {NAMES[self.label]}{'' if self.label == 4 else ' or better'}"
        at_most = self.of is not None
        nearest = math.ceil(bound * 1e4 - 1e-8) / 1e4 if at_most else math.floor(bound * 1e4 + 1e-8) / 1e4
        return f"{self}: the best alone is {nearest:g}"


class Impossible(runs.Unmet):
    """No cut meets a requirement; says the best that can be had."""


# The cuts of a part of the values


@dataclass(frozen=True)
class Piece:
    """All cuts τ in (low, high]. For boundaries 4, 3, 2: where its cuts change, and the weight by label at or above.

    `uppers[b]`: ascending, the last is `high`; τ in (uppers[b][i-1], uppers[b][i]] shows `above[b][i]` [4]. The first
    of these intervals begins at `begins[b]`, maybe in a lower piece; where `open[b]`, the last ends in a higher one.
    """

    low: float
    high: float
    uppers: tuple[Floats, ...]
    above: tuple[Floats, ...]
    begins: tuple[float, ...] = (-1.0, -1.0, -1.0)
    open: tuple[bool, ...] = (False, False, False)

    @cached_property
    def merged(self) -> tuple[Floats, Floats, Floats]:
        """The cuts of all boundaries on one scale: lows [m], highs [m], above [m, boundary, label]."""
        order, starts, highs = _ranked(np.concatenate(self.uppers))
        above, end = np.empty((len(self.uppers), len(highs), 4)), 0
        for b, uppers in enumerate(self.uppers):
            begin, end = end, end + len(uppers)
            mine = (order >= begin) & (order < end)
            first: NDArray[np.int64] = (np.cumsum(mine) - mine)[starts]  # of its own, that is not less
            np.take(self.above[b], first, axis=0, out=above[b], mode="clip")
        return np.concatenate(([self.low], highs[:-1])), highs, above.swapaxes(0, 1)

    def cells(self, b: int) -> tuple[Floats, Floats, Floats]:
        """The cuts of one boundary that end here, whole: lows [m], highs [m], above [m, label]."""
        m = len(self.uppers[b]) - self.open[b]
        highs = self.uppers[b][:m]
        return np.concatenate(([self.begins[b]], highs))[:m], highs, self.above[b][:m]


def rounded(weights: Floats) -> Floats:
    """Weights as whole multiples of 2^-20: their sums are exact, whatever the order, up to 8 thousand million."""
    return np.round(weights * 2**20) / 2**20


Ranked = tuple[NDArray[np.int64], NDArray[np.int64], Floats]


def _ranked(values: Floats) -> Ranked:
    """Their order, where each distinct one starts in it, and the distinct ones ascending."""
    order = np.argsort(values)
    ranked = values[order]
    starts = np.flatnonzero(np.concatenate(([True], ranked[1:] != ranked[:-1]))[: len(ranked)])
    return order, starts, ranked[starts]


def _summed(ranked: Ranked, weights: Floats) -> Floats:
    """The weights [n, 4] summed up for each distinct value."""
    order, starts, _ = ranked
    weights = np.take(weights, order, axis=0)
    return np.add.reduceat(weights, starts) if len(starts) < len(weights) else weights


def _cuts(values: Floats, sums: Floats, high: float, beyond: Floats) -> tuple[Floats, Floats]:
    """One boundary's `uppers` and `above`, from its distinct values and their weights; `beyond` [4] is above `high`."""
    above = np.cumsum(sums[::-1], axis=0)[::-1] + beyond
    if not len(values) or values[-1] < high:
        return np.append(values, high), np.vstack([above, beyond])
    return values, above


class Values:
    """Sorted values c [n, 3] of rows; gives their cuts for one set of weights after another without sorting anew."""

    def __init__(self, c: Floats) -> None:
        self._ranked = [_ranked(np.minimum(c[:, b], 1.0)) for b in range(3)]

    def cuts(self, weights: Floats) -> Local:
        """The cuts for weights [n, 4] by label."""
        weights = rounded(weights)
        cuts = [_cuts(ranked[2], _summed(ranked, weights), 1.0, np.zeros(4)) for ranked in self._ranked]
        uppers, above = zip(*cuts, strict=True)
        return Local(Piece(-1.0, 1.0, uppers, above), weights.sum(0))


Step = Callable[[Piece], list[float]]


class Pieces(Protocol):
    """All cuts there are, in pieces by ascending value, and the weight of each label [4]."""

    gold: Floats

    def each(self, step: Step) -> list[list[float]]:
        """What `step` says of each piece, in order."""


class Local:
    """All cuts of rows that this process holds: one piece."""

    def __init__(self, piece: Piece, gold: Floats) -> None:
        self.piece, self.gold = piece, gold

    def each(self, step: Step) -> list[list[float]]:
        """One answer."""
        return [step(self.piece)]


def partitions(spark: SparkSession, rows: int) -> int:
    """In how many pieces that many rows lie well: two for each core, more where a worker could not hold one."""
    return max(2 * spark.sparkContext.defaultParallelism, -(-3 * rows // PIECE_VALUES))


class Spread:
    """All cuts of rows that Spark holds: their values, sorted into ranges, one piece a partition.

    Values and weights travel and are kept as NumPy's own bytes, some hundred thousand in a row of Spark: made into rows
    and back they would cost ten times the sort itself. Nothing but a few numbers a partition comes to the driver.
    `close` lets go of what is cached.
    """

    def __init__(self, rows: DataFrame, partitions: int) -> None:
        """`rows`: columns c4, c3, c2, w4, w3, w2, w1."""
        columns = [f"c{k}" for k in BOUNDARIES]
        rows = rows.select(*[F.least(c, F.lit(1.0)).alias(c) for c in columns], *WEIGHTS)
        # Where pieces end is nothing but balance: the cuts that are found are the same.
        shares = [n / partitions for n in range(1, partitions)]
        sketch = rows.sample(_SKETCHED, seed=0).approxQuantile(columns, shares, 0.01) if shares else []
        bounds = np.unique(sorted(value for values in sketch for value in values)[1 :: len(columns)])
        self._spark = rows.sparkSession
        with _batches(self._spark, CHUNK_VALUES):
            parted = rows.mapInArrow(_parted(bounds), f"{_CHUNK}, at INT")
            self._frame = parted.repartitionById(len(bounds) + 1, "at").mapInArrow(_joined, _CHUNK).persist()
            of = [F.max(F.when(F.col("k") == k, F.col("top"))).alias(f"top{k}") for k in BOUNDARIES]
            of += [F.sum(F.when(F.col("k") == k, F.col(w))).alias(f"{w}_{k}") for k in BOUNDARIES for w in WEIGHTS]
            found = self._frame.groupBy(F.spark_partition_id().alias("at")).agg(F.max("top").alias("top"), *of)
            parts = sorted(found.collect(), key=lambda r: r["top"])
        begins: list[tuple[float, ...]] = [(-1.0, -1.0, -1.0)]
        lows = [-1.0, *(float(part["top"]) for part in parts[:-1])]
        for part in parts:
            tops = [part[f"top{k}"] for k in BOUNDARIES]
            begins.append(tuple(b if top is None else top for b, top in zip(begins[-1], tops, strict=True)))
        beyond, self._place = np.zeros((3, 4)), {}
        for i in range(len(parts) - 1, -1, -1):
            last = i == len(parts) - 1
            high = 1.0 if last else float(parts[i]["top"])
            goes_on = tuple(not last and top < high for top in begins[i + 1])
            self._place[int(parts[i]["at"])] = (lows[i], high, beyond, begins[i], goes_on)
            beyond = beyond + [[parts[i][f"{w}_{k}"] or 0.0 for w in WEIGHTS] for k in BOUNDARIES]
        self.gold = beyond[0]

    def each(self, step: Step) -> list[list[float]]:
        """Runs `step` on the workers, one task a piece."""
        place = self._place

        def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            chunks = _chunks(batches)
            context = TaskContext.get()
            at = context.partitionId() if context else -1
            if any(chunks.values()):
                low, high, beyond, begins, goes_on = place[at]
                cuts = [_cuts(*_whole(chunks[k]), high, beyond[b]) for b, k in enumerate(BOUNDARIES)]
                uppers, above = zip(*cuts, strict=True)
                said = step(Piece(low, high, uppers, above, begins, goes_on))
                yield pa.RecordBatch.from_pydict({"low": [low], "said": [said]})

        with _batches(self._spark, 16):
            kept = self._frame.select("k", "value", "sums")
            said = kept.mapInArrow(run, "low DOUBLE, said ARRAY<DOUBLE>").collect()
        return [list(row["said"]) for row in sorted(said, key=lambda r: r["low"])]

    def close(self) -> None:
        """Frees what is cached."""
        self._frame.unpersist()


Chunks = dict[int, list[tuple[Floats, Floats]]]  # by boundary: ascending distinct values [n], their weights [n, 4]


def _parted(bounds: Floats) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Rows -> chunks, each for the piece `at` whose range its values are in: above `bounds[at - 1]`, up to its own."""

    def part(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            weights = rounded(np.stack([batch.column(w).to_numpy() for w in WEIGHTS], axis=1))
            for k in BOUNDARIES:
                ranked = _ranked(batch.column(f"c{k}").to_numpy())
                value, sums = ranked[2], _summed(ranked, weights)
                ends = [*np.searchsorted(value, bounds, side="right"), len(value)]
                for at, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
                    if end > begin:
                        chunk = _chunk(k, value[begin:end], sums[begin:end])
                        yield chunk.append_column("at", pa.array([at], pa.int32()))

    return part


def _joined(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The chunks of a piece -> the same once for all steps: each distinct value once, ascending."""
    for k, chunks in _chunks(batches).items():
        value, weights = _whole(chunks)
        ranked = _ranked(value)
        sums = _summed(ranked, weights)
        for begin in range(0, len(sums), CHUNK_VALUES):
            yield _chunk(k, ranked[2][begin : begin + CHUNK_VALUES], sums[begin : begin + CHUNK_VALUES])


def _chunk(k: int, value: Floats, sums: Floats) -> pa.RecordBatch:
    """One row: a chunk of boundary `k`, its largest value and the sums of its weights by label."""
    total = {w: [float(x)] for w, x in zip(WEIGHTS, sums.sum(0), strict=True)}
    told = {"k": pa.array([k], pa.int8()), "top": [float(value[-1])], **total}
    return pa.RecordBatch.from_pydict({**told, "value": [value.tobytes()], "sums": [sums.tobytes()]})


def _chunks(batches: Iterable[pa.RecordBatch]) -> Chunks:
    found: Chunks = {k: [] for k in BOUNDARIES}
    for batch in batches:
        for k, value, sums in zip(*(batch.column(c).to_pylist() for c in ("k", "value", "sums")), strict=True):
            found[k].append((np.frombuffer(value), np.frombuffer(sums).reshape(-1, 4)))
    return found


def _whole(chunks: list[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    if not chunks:
        return np.zeros(0), np.zeros((0, 4))
    values, sums = zip(*chunks, strict=True)
    return np.concatenate(values), np.concatenate(sums)


@contextmanager
def _batches(spark: SparkSession, rows: int) -> Iterator[None]:
    """How many rows go to a worker at a time: prompts by 512, judgements by many more, chunks by few."""
    rows_a_batch = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(rows_a_batch)
    spark.conf.set(rows_a_batch, str(rows))
    try:
        yield
    finally:
        spark.conf.set(rows_a_batch, str(before))


# Finding them


@dataclass(frozen=True)
class Fit:
    """τ4, τ3, τ2; the interval (low, high] of each in which nothing better can be had; what they do to the rows."""

    taus: tuple[float, float, float]
    lows: tuple[float, float, float]
    highs: tuple[float, float, float]
    value: float
    confusion: Floats


def fit(
    pieces: Pieces,
    rule: str,
    objective: Objective,
    requirements: Sequence[Requirement] = (),
    cuts: int = EXACT_CUTS,
    relax: bool = False,
) -> Fit:
    """The best cuts that meet the requirements: one τ (`rule` "one") or τ4 ≥ τ3 ≥ τ2 ("boundary").

    `cuts`: up to how many values a boundary macro-F1 is exact. `relax`: what cannot be met is met as nearly as can be.
    Raises ValueError where there are no rows, and `Impossible` with the best that can be had.
    """
    if not pieces.gold.sum() > 0:
        raise ValueError("there are no judged rows to fit on")

    def search(objective: Objective, requirements: tuple[Requirement, ...]) -> Intervals | None:
        if rule == "one":
            found = _one(pieces, objective, requirements)
        else:
            found = _boundaries(pieces, objective, requirements, cuts)
        if found is None or objective.name != "recall":
            return found
        label, most = objective.label or 4, _settled(pieces, objective, *found).value
        as_much = (Requirement("recall", label, most),) if most > 0 else ()
        return search(Objective("accuracy"), (*requirements, *as_much))

    found = search(objective, tuple(requirements))
    if found is None and relax:
        nearest = [r.relaxed(_nearest(pieces, r)) for r in requirements]
        kept = [r for r in nearest if r is not None]
        # What was asked for first is given up last.
        tries = (search(objective, tuple(kept[:n])) for n in range(len(kept), -1, -1))
        found = next((one for one in tries if one is not None), None)
    if found is None:
        best = "; ".join(r.best(_nearest(pieces, r)) for r in requirements)
        together = "" if len(requirements) == 1 and rule == "boundary" else " (they must hold together)"
        raise Impossible(f"no cuts meet what is required{together}. {best}. Ask for that, or for less")
    return _settled(pieces, objective, *found)


Intervals = tuple[list[float], list[float]]


def _settled(pieces: Pieces, objective: Objective, lows: list[float], highs: list[float]) -> Fit:
    """The middles of the intervals, after each is cut to where the order of the τ leaves it."""
    l4, l3, l2 = (max(0.0, *lows[b:]) for b in range(3))
    h4, h3, h2 = (min(highs[: b + 1]) for b in range(3))
    taus = (_middle(l4, h4), _middle(l3, h3), _middle(l2, h2))
    confusion = confusion_at(pieces, taus)
    return Fit(taus, (l4, l3, l2), (h4, h3, h2), float(objective.value(confusion)), confusion)


def _middle(low: float, high: float) -> float:
    middle = (low + high) / 2
    return middle if middle > low else high  # two neighbours among doubles have nothing between them


def confusion_at(pieces: Pieces, taus: Sequence[float]) -> Floats:
    """The confusion matrix [label, tier] of given cuts."""

    def step(piece: Piece) -> list[float]:
        said: list[float] = []
        for tau, uppers, above in zip(taus, piece.uppers, piece.above, strict=True):
            here = piece.low < tau <= piece.high
            said += [float(here), *(above[np.searchsorted(uppers, tau)] if here else np.zeros(4))]
        return said

    shown = np.zeros((3, 4))
    for said in pieces.each(step):
        for b in range(3):
            if said[5 * b]:
                shown[b] = said[5 * b + 1 : 5 * b + 5]
    return _confusion(shown, pieces.gold)


def _confusion(shown: Floats, gold: Floats) -> Floats:
    """[..., boundary, label] at or above each boundary -> [..., label, tier]."""
    s4, s3, s2 = shown[..., 0, :], shown[..., 1, :], shown[..., 2, :]
    return np.stack([s4, s3 - s4, s2 - s3, gold - s2], axis=-1)


def _nearest(pieces: Pieces, requirement: Requirement) -> float:
    """The best bound that can be met; NaN where the figure is not defined."""
    gold, b = pieces.gold, BOUNDARIES.index(requirement.label)

    def step(piece: Piece) -> list[float]:
        found = requirement.measured(piece.above[b], gold)
        found = found[~np.isnan(found)]
        return [float(found.min() if requirement.of is not None else found.max())] if len(found) else []

    found = [x for said in pieces.each(step) for x in said]
    return (min if requirement.of is not None else max)(found) if found else float("nan")


def _widest(
    pieces: Pieces, of: Callable[[Piece], tuple[Floats, Floats | float]], size: float, limit: float = 1.0
) -> tuple[float, float, float] | None:
    """The widest run of cuts that are best, as (low, high], and the first best cut in it; None where no cut may be.

    `of` gives for each merged cut what it is worth by itself and by what it leaves to lower boundaries; best is the
    most of the sum up to `limit`, and a run is where the first stays as it is. `size`: the largest worth there can be.
    A piece says its first run, its last, and the widest best one between: the others end inside it and are narrower.
    """
    near = _ALIKE * size

    def step(piece: Piece) -> list[float]:
        lows, highs, _ = piece.merged
        own, rest = of(piece)
        value = np.where(highs <= limit, own + rest, -np.inf)
        most = float(value.max())
        with np.errstate(invalid="ignore"):
            other = (own[1:] != own[:-1]) & ~(np.abs(np.diff(own)) <= near)
        starts = np.flatnonzero(np.concatenate(([True], other)))
        ends = np.append(starts[1:], len(own)) - 1
        best = np.flatnonzero(value >= most - near) if most > -np.inf else np.zeros(0, np.int64)
        runs, at = np.unique(np.searchsorted(starts, best, side="right") - 1, return_index=True)
        first = np.full(len(starts), np.nan)
        first[runs] = highs[best[at]]
        told = {0, len(starts) - 1}
        inner = runs[(runs > 0) & (runs < len(starts) - 1)]
        if len(inner):
            told.add(int(inner[(highs[ends[inner]] - np.maximum(lows[starts[inner]], 0)).argmax()]))
        said = [most]
        for run in sorted(told):
            begin, end = starts[run], ends[run]
            said += [float(x) for x in (lows[begin], highs[end], own[begin], own[end], first[run])]
        return said

    said = pieces.each(step)
    best = max(most for most, *_ in said)
    if best == -np.inf:
        return None
    joined: list[tuple[float, float, float, float]] = []  # low, high, worth at its end, its first best cut or NaN
    for most, *told in said:
        for low, high, worth, at_end, first in zip(*[iter(told)] * 5, strict=True):
            if most < best - near:
                first = math.nan
            if joined and joined[-1][1] == low and (joined[-1][2] == worth or abs(joined[-1][2] - worth) <= near):
                low, _, _, before = joined.pop()
                first = first if math.isnan(before) else before
            joined.append((low, high, at_end, first))
    low, high, _, first = max((r for r in joined if not math.isnan(r[3])), key=lambda r: r[1] - max(r[0], 0))
    return low, high, first


def _one(pieces: Pieces, objective: Objective, requirements: tuple[Requirement, ...]) -> Intervals | None:
    """The interval of the best single τ."""
    gold = pieces.gold

    def of(piece: Piece) -> tuple[Floats, float]:
        _, _, shown = piece.merged
        value = objective.value(_confusion(shown, gold))
        for requirement in requirements:
            value = np.where(requirement.met(shown[:, BOUNDARIES.index(requirement.label)], gold), value, -np.inf)
        return value, 0.0

    found = _widest(pieces, of, float(np.abs(objective.worth()).max()) if objective.costs else 1.0)
    return found and ([found[0]] * 3, [found[1]] * 3)


def _boundaries(
    pieces: Pieces, objective: Objective, requirements: tuple[Requirement, ...], cuts: int
) -> Intervals | None:
    if objective.name == "macro_f1":
        return _macro_f1(pieces, requirements, cuts)
    if objective.name != "kappa":
        return _ordered(pieces, objective.worth(), requirements)
    # 1 - kappa = off / chance, both sums of worths: the least ratio r has min(off - r chance) = 0 (Dinkelbach 1967).
    chance = pieces.gold @ measures.QUADRATIC / pieces.gold.sum()

    def least(pieces: Pieces, ratio: float) -> tuple[Intervals | None, float]:
        while True:
            found = _ordered(pieces, ratio * chance - measures.QUADRATIC, requirements)
            if found is None:
                return None, 0.0
            confusion = _settled(pieces, objective, *found).confusion
            off, by_chance = float((confusion * measures.QUADRATIC).sum()), float(confusion.sum(0) @ chance)
            if off <= _ALIKE * pieces.gold.sum() or off >= ratio * by_chance * (1 - 1e-12) > 0:
                return found, ratio
            ratio = off / by_chance

    # A few cuts of each piece come near, and leave few scans of all.
    near = 0.0 if isinstance(pieces, Local) else least(_thinned(pieces), 0.0)[1]
    return least(pieces, near)[0]


def _thinned(pieces: Pieces) -> Local:
    """Some cuts of each piece."""

    def some(piece: Piece) -> list[Floats]:
        each = [np.column_stack([u, a]) for u, a in zip(piece.uppers, piece.above, strict=True)]
        return [cuts[np.unique(np.linspace(0, len(cuts) - 1, THINNED_CUTS).astype(int))] for cuts in each]

    cuts = _gathered(pieces, some, 5)
    return Local(Piece(-1.0, 1.0, tuple(c[:, 0] for c in cuts), tuple(c[:, 1:] for c in cuts)), pieces.gold)


def _gathered(pieces: Pieces, of: Callable[[Piece], Sequence[Floats]], width: int) -> list[Floats]:
    """For each boundary, what `of` says of the pieces, [m, width] each, one below the other."""

    def step(piece: Piece) -> list[float]:
        said: list[float] = []
        for rows in of(piece):
            said += [float(len(rows)), *rows.ravel().tolist()]
        return said

    found: list[list[Floats]] = [[], [], []]
    for said in pieces.each(step):
        for b in range(3):
            end = 1 + width * int(said[0])
            found[b].append(np.array(said[1:end]).reshape(-1, width))
            said = said[end:]
    return [np.concatenate(group) for group in found]


def _ordered(pieces: Pieces, worth: Floats, requirements: tuple[Requirement, ...]) -> Intervals | None:
    """The best τ4 ≥ τ3 ≥ τ2 where each boundary adds its own worth: scans by ascending value.

    The first says, for each piece and each run of boundaries (2, 2..3, 2..4, 3, 3..4, 4), the most that they add if
    they are cut in it, so that each piece then knows the most that lower boundaries add below it. With that τ4 is
    found, then τ3 at or below it, then τ2.
    """
    gold = pieces.gold
    gain = worth[:, :3] - worth[:, 1:]  # [label, boundary]: tier k instead of k - 1
    size = float(gold.sum() * np.abs(gain).max())

    def added(piece: Piece, b: int) -> Floats:
        shown = piece.merged[2][:, 2 - b]  # b ascending: boundaries 2, 3, 4
        value: Floats = shown @ gain[:, 2 - b]
        return np.where(_met(requirements, 2 - b, shown, gold), value, -np.inf)

    def most(piece: Piece) -> list[float]:
        said = [piece.low]
        each = [added(piece, b) for b in range(3)]
        for first in range(3):
            so_far: Floats | float = 0.0
            for last in range(first, 3):
                value = each[last] + so_far
                said.append(float(value.max()))
                so_far = np.maximum.accumulate(value)
        return said

    below: dict[float, list[float]] = {}  # by a piece's low: the most of no boundary, 2, 2..3 in lower pieces
    reached = [0.0, -np.inf, -np.inf]
    for low, b2, b23, _, b3, *_ in pieces.each(most):
        below[low] = reached
        reached = [0.0, max(reached[1], b2), max(reached[2], b23, reached[1] + b3)]

    lows, highs, limit = [], [], 1.0
    for b in (2, 1, 0):

        def of(piece: Piece, b: int = b) -> tuple[Floats, Floats | float]:
            so_far: Floats | float = 0.0
            for lower in range(b):
                value = added(piece, lower) + so_far
                so_far = np.maximum(np.maximum.accumulate(value), below[piece.low][lower + 1])
            return added(piece, b), so_far

        found = _widest(pieces, of, size, limit)
        if found is None:
            return None
        low, high, limit = found
        lows.append(low)
        highs.append(high)
    return lows, highs


Cells = tuple[Floats, Floats, Floats]  # of one boundary: lows [m], highs [m], shown [m, label]


def _macro_f1(pieces: Pieces, requirements: tuple[Requirement, ...], cuts: int) -> Intervals | None:
    """The best τ4 ≥ τ3 ≥ τ2 for macro-F1: exact where all cuts are few enough.

    Else the best of a grid of them, of a grid between its neighbours, and so on, and then each τ in turn over all cuts.
    """
    gold = pieces.gold
    windows = [(-1.0, 1.0)] * 3
    best: tuple[float, list[Floats]] | None = None
    for _ in range(_ZOOMS):
        tables, whole = _cells(pieces, requirements, windows, cuts)
        chosen = _chained([(t[:, 0], t[:, 1], t[:, 2:]) for t in tables], gold) if all(map(len, tables)) else None
        if chosen is None:
            break
        now = [table[i] for table, i in zip(tables, chosen, strict=True)]
        value = float(measures.macro_f1(_confusion(np.stack([c[2:] for c in now]), gold)))
        if best is None or value > best[0]:
            best = value, now
        if whole:
            break
        windows = [
            (float(t[max(0, i - 2), 0]), float(t[min(len(t) - 1, i + 2), 1]))
            for t, i in zip(tables, chosen, strict=True)
        ]
    if best is None:
        return None
    return _climbed(pieces, requirements, *best)


def _cells(
    pieces: Pieces, requirements: tuple[Requirement, ...], windows: list[tuple[float, float]], cuts: int
) -> tuple[list[Floats], bool]:
    """Cells [m, low high and shown by label] of each boundary within its window, and whether these are all.

    Where a boundary has more than `cuts` of them, those of a grid by rank.
    """
    gold = pieces.gold

    def within(piece: Piece, b: int) -> Floats:
        lows, highs, shown = piece.cells(b)
        kept = (lows >= windows[b][0]) & (highs <= windows[b][1]) & _met(requirements, b, shown, gold)
        return np.column_stack([lows[kept], highs[kept], shown[kept]])

    counted = pieces.each(lambda piece: [piece.low, *(float(len(within(piece, b))) for b in range(3))])
    counts = np.array(counted)[:, 1:]
    before = {low: ranks for (low, *_), ranks in zip(counted, np.cumsum(counts, axis=0) - counts, strict=True)}
    totals = counts.sum(0).astype(int)
    wanted = max(3, min(cuts, GRID_CUTS))
    ranks = [np.unique(np.linspace(0, n - 1, n if n <= cuts else wanted).round().astype(int)) for n in totals]

    def chosen(piece: Piece) -> list[Floats]:
        said = []
        for b in range(3):
            cells, at = within(piece, b), ranks[b] - int(before[piece.low][b])
            said.append(cells[at[(at >= 0) & (at < len(cells))]])
        return said

    return _gathered(pieces, chosen, 6), bool((totals <= cuts).all())


def _met(requirements: tuple[Requirement, ...], b: int, shown: Floats, gold: Floats) -> NDArray[np.bool_]:
    met = np.ones(len(shown), dtype=bool)
    for requirement in requirements:
        if requirement.label == BOUNDARIES[b]:
            met &= requirement.met(shown, gold)
    return met


def _chained(cells: list[Cells], gold: Floats) -> tuple[int, int, int] | None:
    """The best cell of each boundary 4, 3, 2 for macro-F1; None where the order leaves none.

    F1 of 4 needs the cell of boundary 4; of 3 those of 4 and 3; of 2 those of 3 and 2; of 1 that of 2. So for each cell
    of boundary 3 the best partners on either side are found alone, among those that the order allows. A label without
    gold counts only where it is given: each set of such labels that shall not be given is tried.
    """
    (_, b4, _), (a3, b3, _), (a2, _, _) = cells
    bounds = np.unique(np.concatenate([highs for _, highs, _ in cells]))
    s = np.searchsorted(b3, bounds)
    inside = s < len(b3)
    inside[inside] &= a3[s[inside]] < bounds[inside]
    s, bounds = s[inside], bounds[inside]
    last2, first4 = np.searchsorted(a2, bounds) - 1, np.searchsorted(b4, bounds)
    fits = (last2 >= 0) & (first4 < len(b4))
    s, last2, first4 = s[fits], last2[fits], first4[fits]
    if not len(s):
        return None
    absent = [y for y in range(4) if gold[y] <= 0]
    best, found = -np.inf, None
    for size in range(len(absent) + 1):
        for banned in combinations(absent, size):
            value, chosen = _partners(cells, gold, banned, s, last2, first4)
            if size < 4 and value / (4 - size) > best * (1 + _ALIKE):
                best, found = value / (4 - size), chosen
    return found


def _partners(
    cells: list[Cells],
    gold: Floats,
    banned: tuple[int, ...],
    s: NDArray[np.int64],
    last2: NDArray[np.int64],
    first4: NDArray[np.int64],
) -> tuple[float, tuple[int, int, int]]:
    """The largest sum of F1 over combinations where boundary 3 is at s, 2 at or below last2, 4 at or above first4."""
    shown4, shown3, shown2 = (shown for _, _, shown in cells)
    total = gold.sum()

    def part(y: int, right: Floats, given: Floats) -> Floats:
        given = np.where(given > measures._NONE * total, given, 0.0)
        value = 2 * np.maximum(right, 0) / np.maximum(given + gold[y], 1e-300)
        return np.where(given > 0, -np.inf, 0.0) if y in banned else value

    all4, all3, all2 = shown4.sum(1), shown3.sum(1), shown2.sum(1)
    alone4 = part(0, shown4[:, 0], all4)
    alone1 = part(3, gold[3] - shown2[:, 3], total - all2)

    def above(at: NDArray[np.int64]) -> Floats:
        return part(1, shown3[at, None, 1] - shown4[None, :, 1], all3[at, None] - all4[None, :]) + alone4

    def below(at: NDArray[np.int64]) -> Floats:
        return part(2, shown2[None, :, 2] - shown3[at, None, 2], all2[None, :] - all3[at, None]) + alone1

    best, best_at = -np.inf, 0
    rows = max(1, 2**21 // max(len(all4), len(all2)))
    for begin in range(0, len(all3), rows):
        here = np.arange(begin, min(begin + rows, len(all3)))
        at = np.flatnonzero((s >= begin) & (s < begin + rows))
        if not len(at):
            continue
        up = np.maximum.accumulate(above(here)[:, ::-1], axis=1)[:, ::-1]
        down = np.maximum.accumulate(below(here), axis=1)
        value = up[s[at] - begin, first4[at]] + down[s[at] - begin, last2[at]]
        if value.max() > best:
            best, best_at = float(value.max()), int(at[value.argmax()])
    here = s[best_at : best_at + 1]
    i4 = int(first4[best_at] + above(here)[0, first4[best_at] :].argmax())
    i2 = int(below(here)[0, : last2[best_at] + 1].argmax())
    return best, (i4, int(here[0]), i2)


def _climbed(pieces: Pieces, requirements: tuple[Requirement, ...], value: float, now: list[Floats]) -> Intervals:
    """From cells of boundaries 4, 3, 2 to better ones, each boundary in turn over all cuts, until none is better."""
    gold = pieces.gold
    at, idle = 0, 0
    while idle < 3:
        b = at % 3
        least = max([-1.0, *(float(c[0]) for c in now[b + 1 :])])
        most = min([1.0, *(float(c[1]) for c in now[:b])])
        others = [c[2:] for c in now]

        def step(
            piece: Piece, b: int = b, least: float = least, most: float = most, others: list[Floats] = others
        ) -> list[float]:
            lows, highs, shown = piece.cells(b)
            fits = (np.maximum(lows, least) < np.minimum(highs, most)) & _met(requirements, b, shown, gold)
            kept = np.flatnonzero(fits)
            if not len(kept):
                return []
            each = np.stack(
                [shown[kept] if i == b else np.broadcast_to(others[i], (len(kept), 4)) for i in range(3)], axis=1
            )
            found = measures.macro_f1(_confusion(each, gold))
            i = int(found.argmax())
            return [float(found[i]), float(lows[kept[i]]), float(highs[kept[i]]), *shown[kept[i]].tolist()]

        said = [x for x in pieces.each(step) if x]
        best = max(said, key=lambda x: x[0]) if said else [-np.inf]
        if best[0] > value + 1e-12:
            value, now[b], idle = best[0], np.array(best[1:]), 0
        else:
            idle += 1
        at += 1
    return [float(c[0]) for c in now], [float(c[1]) for c in now]
