"""Fits the cuts of CumPT on human judgements: label_probs and gold make a candidate version of thresholds.

fit_thresholds --tables T [--model-id M] [--rule one|boundary] [--by category] [--objective macro_f1]
    [--require "precision of Excellent at least 0.95"] [--require "Irrelevant shown as Related at most 2%"]

The judged rows of split test are left for reporting, and what the model was trained on is left out. What to expect of
new pairs comes from cross-validation by query: one pooled out-of-fold confusion matrix, with a bootstrap by query. It
stands beside what CumPT replaces: the likeliest label, and a weighted score whose cuts are fitted just as exactly.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

import jobs
from partitioner import measures, models, thresholds, tiers
from partitioner.measures import Floats
from partitioner.thresholds import Fit, Impossible, Objective, Requirement, Values
from schemas import delta, runs
from schemas.canonical import normalised
from schemas.labels import LABELS, NAMES, P_COLUMNS
from schemas.tables import SEGMENT_COLUMNS, THRESHOLDS

JOB = "fit_thresholds"
LOCAL_ROWS = 200_000  # more are fitted on the workers; cross-validation and bootstrap then take whole queries of them
MIN_QUERIES = 10  # a segment needs, beside `--min-gold` judgements
ANOTHER_SCALE = 200  # judgements of a source without ever using one of the labels: it has another scale
_SEGMENTS_TOLD = 50
_FALLEN_TOLD = 20


@dataclass(frozen=True)
class Wanted:
    """What the owner asks for."""

    rule: str
    by: str | None
    objective: Objective
    requirements: tuple[Requirement, ...]
    temperature: bool = False
    raters: str = "fractions"
    sources: tuple[str, ...] = ()
    allow_train: bool = False
    min_gold: int = 200
    folds: int = 5
    replicates: int = 1000
    refits: int = 100
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its cuts in measures."""
        return f"{self.rule}_by_{self.by}" if self.by else self.rule

    @property
    def flags(self) -> str:
        """How it is asked for; kept with the run, so that a version can be fitted again as it was."""
        aim = self.objective
        words = ["--rule", self.rule, *(["--by", self.by] if self.by else [])]
        words += ["--objective", aim.name if aim.label is None else f"{aim.name}:{NAMES[aim.label]}"]
        words += ["--costs", json.dumps(aim.costs)] if aim.costs else []
        words += [word for r in self.requirements for word in ("--require", str(r))]
        words += ["--temperature", "fit"] if self.temperature else []
        words += ["--raters", self.raters, *(word for name in self.sources for word in ("--gold-source", name))]
        words += ["--allow-train"] if self.allow_train else []
        words += ["--min-gold", str(self.min_gold), "--folds", str(self.folds), "--replicates", str(self.replicates)]
        return shlex.join([*words, "--refits", str(self.refits), "--seed", str(self.seed)])


@dataclass(frozen=True)
class Rows:
    """Judged rows on the driver: probabilities and weights [n, 4] by label, query (a number) and segment of each."""

    p: Floats
    weights: Floats
    queries: NDArray[np.int64]
    segments: NDArray[np.object_]

    def where(self, chosen: NDArray[Any]) -> Rows:
        """Some of them."""
        return Rows(self.p[chosen], self.weights[chosen], self.queries[chosen], self.segments[chosen])

    def __len__(self) -> int:
        return len(self.p)


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser(JOB, __doc__)
    parser.add_argument("--model-id", metavar="M", help="whose probabilities (needed where several models scored)")
    parser.add_argument("--prompt-id", metavar="P", help="asked with which prompt (where there are several)")
    parser.add_argument(
        "--rule", choices=thresholds.RULES, default="one", help="one tau (the paper), or one a boundary"
    )
    parser.add_argument("--by", choices=SEGMENT_COLUMNS, help="cuts of their own for each value of a column of pairs")
    parser.add_argument(
        "--min-gold", type=jobs.at_least(1), default=Wanted.min_gold, metavar="N",
        help=f"a segment with fewer judgements, or under {MIN_QUERIES} queries, takes the cuts of all (default "
        f"{Wanted.min_gold})",
    )  # fmt: skip
    parser.add_argument(
        "--objective", default="macro_f1", metavar="O",
        help="macro_f1, accuracy, kappa (quadratic), cost (with --costs), or recall:Excellent (then accuracy)",
    )  # fmt: skip
    parser.add_argument(
        "--costs", metavar="JSON", help="4 rows (label 4..1) of 4 costs (tier 4..1): '[[0,1,2,3],[1,0,1,2],…]'"
    )
    parser.add_argument(
        "--require", action="append", default=[], metavar="TEXT",
        help='may be given again; "precision of Excellent at least 0.95", "recall of Related at least 90%%" (or\n'
        'better, both), "Irrelevant shown as Related at most 2%%" (or better)',
    )  # fmt: skip
    parser.add_argument("--temperature", choices=("off", "fit"), default="off", help="scale probabilities first")
    parser.add_argument(
        "--raters", choices=("fractions", "median"), default="fractions",
        help="a pair with raters counts by the share of them at each label, or as its median label",
    )  # fmt: skip
    parser.add_argument(
        "--gold-source", action="append", default=[], metavar="NAME", help="only these; may be given again"
    )
    parser.add_argument("--allow-train", action="store_true", help="also judgements that the model was trained on")
    parser.add_argument(
        "--folds", type=jobs.at_least(2), default=Wanted.folds, help=f"of the cross-validation (default {Wanted.folds})"
    )
    parser.add_argument(
        "--replicates",
        type=jobs.at_least(0),
        default=Wanted.replicates,
        help=f"of the bootstrap (default {Wanted.replicates})",
    )
    parser.add_argument(
        "--refits",
        type=jobs.at_least(0),
        default=Wanted.refits,
        help=f"for the spread of tau (default {Wanted.refits})",
    )
    parser.add_argument("--seed", type=jobs.seed, default=0)
    return parser


def main(argv: list[str]) -> int:
    """Runs the job; returns 0."""
    args = flags().parse_args(argv)
    wanted = Wanted(
        rule=args.rule,
        by=args.by,
        objective=objective(args.objective, args.costs),
        requirements=tuple(map(requirement, args.require)),
        temperature=args.temperature == "fit",
        raters=args.raters,
        sources=tuple(args.gold_source),
        allow_train=args.allow_train,
        min_gold=args.min_gold,
        folds=args.folds,
        replicates=args.replicates,
        refits=args.refits,
        seed=args.seed,
    )
    spark = delta.session(JOB)
    delta.prepare(spark, args.tables)
    fit_thresholds(spark, args.tables, wanted, args.model_id, args.prompt_id)
    return 0


def objective(text: str, costs: str | None = None) -> Objective:
    """The objective of `--objective` and `--costs`. Raises ValueError."""
    name, _, label = text.partition(":")
    if (name == "cost") != (costs is not None):
        raise ValueError("--objective cost and --costs belong together: --objective cost --costs '[[0,1,2,3],…]'")
    if name == "cost" and costs is not None:
        try:
            table = tuple(tuple(float(x) for x in row) for row in json.loads(costs))
        except (ValueError, TypeError) as error:
            raise ValueError(f"--costs is no JSON list of 4 lists of 4 numbers: {error}") from error
        if [len(row) for row in table] != [4] * 4 or not all(math.isfinite(x) for row in table for x in row):
            raise ValueError("--costs needs 4 rows (label 4, 3, 2, 1) of 4 finite numbers (tier 4, 3, 2, 1)")
        return Objective("cost", costs=table)
    if name == "recall":
        return Objective("recall", label=boundary(label or "Excellent", f"--objective {text}"))
    if text not in ("macro_f1", "accuracy", "kappa"):
        raise ValueError(f"--objective {text}: there are macro_f1, accuracy, kappa, cost, recall:Excellent")
    return Objective(text)


def requirement(text: str) -> Requirement:
    """A requirement from its sentence. Raises ValueError with the sentences there are."""
    number = r"([0-9.]+)\s*(%?)"
    least = re.fullmatch(rf"(precision|recall) of (\w+)(?: or better)? at least {number}", text.strip())
    most = re.fullmatch(rf"(\w+) shown as (\w+)(?: or better)? at most {number}", text.strip())
    try:
        if least:
            kind, name, value, percent = least.groups()
            found = Requirement(kind, boundary(name, text), float(value) / (100 if percent else 1))
        elif most:
            worse, name, value, percent = most.groups()
            k = boundary(name, text)
            of = next((y for y in LABELS if NAMES[y].lower() == worse.lower()), 4)
            if of >= k:
                raise ValueError(f"{worse} is not worse than {name}")
            found = Requirement("shown", k, float(value) / (100 if percent else 1), of)
        else:
            raise ValueError("it is none of these sentences")
        if not 0 <= found.bound <= 1:
            raise ValueError(f"{found.bound:g} is not between 0 and 1")
    except ValueError as error:
        raise ValueError(
            f"--require {text!r}: {error}. Write 'precision of Excellent at least 0.95', 'recall of Related at least "
            "90%' or 'Irrelevant shown as Related at most 2%' (each means: or better)"
        ) from error
    return found


def boundary(name: str, text: str) -> int:
    """The tier that a boundary opens, by its name. Raises ValueError."""
    for label in tiers.BOUNDARIES:
        if NAMES[label].lower() == name.lower():
            return label
    raise ValueError(f"{text}: {name!r} is none of Excellent, Related, Mismatch")


def scored_by(spark: SparkSession, root: str, model_id: str | None, prompt_id: str | None) -> tuple[str, str]:
    """The model and prompt whose probabilities are meant. Raises ValueError, naming the ones there are."""
    rows = delta.read(spark, root, "label_probs").groupBy("model_id", "prompt_id").count().collect()
    found = [r for r in rows if model_id in (None, r["model_id"]) and prompt_id in (None, r["prompt_id"])]
    if len(found) == 1:
        return str(found[0]["model_id"]), str(found[0]["prompt_id"])
    known = ", ".join(f"--model-id {r['model_id']} --prompt-id {r['prompt_id']} ({r['count']:,} rows)" for r in rows)
    if not rows:
        raise ValueError(f"label_probs is empty; score pairs first: rescore --tables {root} --model M")
    raise ValueError(f"{'several models fit' if found else 'no model fits'}; name one of: {known}")


def engines_of(spark: SparkSession, root: str, model_id: str, prompt_id: str) -> list[str]:
    """Number type and engine of every run that brought probabilities of a model, sorted."""
    mine = models.of(model_id, prompt_id)
    by = delta.read(spark, root, "label_probs").where(mine).select("run_id").distinct()
    told = delta.read(spark, root, "runs").select("run_id", "dtype", "engine_version")
    name = F.concat_ws(", ", F.coalesce("dtype", F.lit("unknown type")), F.coalesce("engine_version", F.lit("unknown")))
    return sorted(row[0] for row in by.join(told, "run_id", how="left").select(name).distinct().collect())


def judged(spark: SparkSession, root: str, wanted: Wanted, model_id: str, prompt_id: str) -> DataFrame:
    """Every judgement with its probabilities, and in `use` what becomes of it: fit, test, or why it is left out."""
    gold = delta.read(spark, root, "gold")
    scales = gold.groupBy("source").agg(F.count("*").alias("n"), F.collect_set("label").alias("used")).collect()
    known = {row["source"] for row in scales}
    if missing := sorted(set(wanted.sources) - known):
        raise ValueError(f"--gold-source {missing[0]}: gold has no such source (there are: {', '.join(sorted(known))})")
    other = [r["source"] for r in scales if r["n"] >= ANOTHER_SCALE and len(r["used"]) < 4 and not wanted.sources]
    seen = models.row(spark, root, model_id)
    trained = list(seen["trained_on"] or []) if seen else []
    # By pair, not by row: a second source's judgement of a pair may not let it in.
    source, held_out = F.col("source"), F.col("split") == "test"
    learnt = (F.col("split") == "train") & source.isin(*trained)
    parts = gold.groupBy("pair_id").agg(F.bool_or(learnt).alias("learnt"), F.bool_or(held_out).alias("held_out"))
    mine = models.of(model_id, prompt_id)
    probs = delta.read(spark, root, "label_probs").where(mine)
    probs = probs.select("pair_id", *P_COLUMNS, "outcome", F.col("content_hash").alias("scored_hash"))
    pairs = delta.read(spark, root, "pairs").select("pair_id", "query", "content_hash", *SEGMENT_COLUMNS)
    rows = gold.join(parts, "pair_id").join(probs, "pair_id", how="left").join(pairs, "pair_id", how="left")
    use = (
        F.when(F.lit(bool(wanted.sources)) & ~source.isin(*wanted.sources), "source not asked for")
        .when(source.isin(*other), "source with another scale")
        .when(F.col("content_hash").isNull(), "judged pair is not in pairs")
        .when(F.col("outcome").isNull(), "pair not scored by this model")
        .when(F.col("outcome") != "scored", F.concat(F.lit("no probability: "), F.col("outcome")))
        .when(F.col("scored_hash") != F.col("content_hash"), "scored with an older text")
        .when(F.col("learnt") & ~F.lit(wanted.allow_train), "model was trained on it")
        .when(held_out, "test")
        .when(F.col("held_out"), "kept for test by another source")
        .otherwise("fit")
    )
    segment = F.coalesce(F.col(wanted.by), F.lit("")) if wanted.by else F.lit("")
    asked = F.udf(normalised, "string", useArrow=True)(F.coalesce("query", F.lit("")))  # one query, as for its split
    return rows.select(
        "pair_id", "source", "split", _label().alias("label"), use.alias("use"), segment.alias("segment"),
        F.xxhash64(asked).alias("query"), F.size(F.split(F.trim("query"), r"\s+")).alias("words"),
        *P_COLUMNS, *_weights(wanted.raters),
    )  # fmt: skip


def _label() -> Column:
    """The single label of a judgement: the lower median of its raters, where these are known."""
    middle = F.floor((F.size("rater_labels") - 1) / 2).cast("int")
    return F.when(F.size("rater_labels") > 0, F.get(F.array_sort("rater_labels"), middle)).otherwise(F.col("label"))


def _weights(raters: str) -> list[Column]:
    """The weight of a judgement at each label: its raters' shares, or all at its label."""
    split = (F.size("rater_labels") > 0) & F.lit(raters == "fractions")
    found = []
    for y in LABELS:
        share = F.size(F.expr(f"filter(rater_labels, x -> x = {y})")) / F.size("rater_labels")
        whole = (_label() == y).cast("double")
        found.append((F.col("weight") * F.when(split, share).otherwise(whole)).alias(f"w{y}"))
    return found


def sampled(frame: DataFrame, n: int) -> DataFrame:
    """Of n judgements whole queries, by a hash, with about as many as the driver takes."""
    if n <= LOCAL_ROWS:
        return frame
    share = int(1_000_000 * LOCAL_ROWS / n)
    return frame.where(F.pmod(F.xxhash64("query", F.lit("sample")), F.lit(1_000_000)) < share)


def local_rows(frame: DataFrame) -> Rows:
    """Judged rows, brought to the driver in an order that does not depend on partitions."""
    table = frame.select("query", "segment", "pair_id", "source", *P_COLUMNS, *thresholds.WEIGHTS).toArrow()
    table = table.sort_by([("query", "ascending"), ("pair_id", "ascending"), ("source", "ascending")])
    stack = [
        np.stack([table[c].to_numpy() for c in names], axis=1).astype(np.float64)
        for names in (P_COLUMNS, thresholds.WEIGHTS)
    ]
    _, queries = np.unique(table["query"].to_numpy(), return_inverse=True)
    return Rows(stack[0], stack[1], queries.astype(np.int64), np.array(table["segment"].to_pylist(), dtype=object))


# Fitting


@dataclass(frozen=True)
class Cutter:
    """A way to make tiers, fitted: the likeliest label, or cuts by segment over cumulative values or a score."""

    name: str
    fits: dict[str, Fit]
    temperature: float = 1.0

    def tiers(self, rows: Rows) -> NDArray[np.int64]:
        """The tier of each row."""
        if self.name == "argmax":
            return tiers.argmax(rows.p)
        return tiers.cut(self.values(rows), self.taus(rows))

    def values(self, rows: Rows) -> Floats:
        """What is cut of each row."""
        return values(self.name, rows.p, self.temperature)

    def taus(self, rows: Rows) -> Floats:
        """The three cuts of each row's segment, [n, 3]."""
        return np.array([self.fits.get(s, self.fits[""]).taus for s in rows.segments]).reshape(-1, 3)


def values(name: str, p: Floats, temperature: float) -> Floats:
    """What is cut: the weighted score, or the cumulative probabilities."""
    return tiers.weighted_score(p) if name == "score" else tiers.cumulative(p, temperature)


Sizes = dict[str, tuple[int, int]]  # judgements and queries by segment


def own_segments(sizes: Sizes, wanted: Wanted) -> list[str]:
    """The segments with enough judgements for cuts of their own.

    A stated minimum, and not shrinkage towards the cut of all: what is in force is then the best cut of a stated set of
    judgements, which its owner can check, and the constraint that was asked for holds on it.
    """
    enough = (name for name, (n, queries) in sizes.items() if n >= wanted.min_gold and queries >= MIN_QUERIES)
    return sorted(name for name in enough if name)


def cutter(name: str, rows: Rows, wanted: Wanted, segments: Sequence[str] = (), relax: bool = True) -> Cutter:
    """Fits `name` (argmax, score, one, boundary, or the wanted one by segment) on rows."""
    if name == "argmax":
        return Cutter(name, {})
    rule = "boundary" if name == "score" else name.partition("_by_")[0]
    temperature = measures.temperature(rows.p, rows.weights) if wanted.temperature else 1.0
    c = values(name, rows.p, temperature)

    def found(here: NDArray[np.bool_] | slice, relax: bool) -> Fit:
        pieces = Values(c[here]).cuts(rows.weights[here])
        return thresholds.fit(pieces, rule, wanted.objective, wanted.requirements, relax=relax)

    fits = {"": found(slice(None), relax)}
    for segment in segments if "_by_" in name else ():
        here = rows.segments == segment
        with suppress(Impossible):  # it takes the cut of all, as one of which no row was drawn
            if here.any():
                fits[segment] = found(here, False)
    return Cutter(name, fits, temperature)


def fold_of(rows: Rows, wanted: Wanted) -> NDArray[np.int64]:
    """The fold of each row; all rows of a query are in one."""
    count = int(rows.queries.max()) + 1
    drawn = np.random.default_rng(wanted.seed).permutation(count)
    found: NDArray[np.int64] = drawn[rows.queries] % min(wanted.folds, count)
    return found


def out_of_fold(
    rows: Rows, wanted: Wanted, names: Sequence[str], segments: Sequence[str]
) -> dict[str, NDArray[np.int64]]:
    """For each way the tier of each row by cuts that were fitted without the row's query."""
    place = fold_of(rows, wanted)
    found = {name: np.zeros(len(rows), dtype=np.int64) for name in names}
    for fold in np.unique(place):
        train, held = rows.where(place != fold), rows.where(place == fold)
        for name in names:
            found[name][place == fold] = cutter(name, train, wanted, segments).tiers(held)
    return found


def spread(rows: Rows, wanted: Wanted, segments: Sequence[str], temperature: float) -> dict[str, tuple[Floats, Floats]]:
    """The 2.5 and 97.5 percentiles of τ4, τ3, τ2 over refits on resampled queries, for each segment that has rows, ''
    for all."""
    random = np.random.default_rng(wanted.seed + 1)
    found = {}
    for segment in ("", *segments):
        here = rows if segment == "" else rows.where(rows.segments == segment)
        if not len(here):  # of whole queries that were drawn, none was asked for it
            continue
        sorted_once = Values(tiers.cumulative(here.p, temperature))
        _, place = np.unique(here.queries, return_inverse=True)
        taus = []
        for drawn in measures.draws(int(place.max()) + 1, wanted.refits, random):
            pieces = sorted_once.cuts(here.weights * drawn[place][:, None])
            fit = thresholds.fit(pieces, wanted.rule, wanted.objective, wanted.requirements, cuts=256, relax=True)
            taus.append(fit.taus)
        low, high = np.percentile(np.array(taus), [2.5, 97.5], axis=0)
        found[segment] = low, high
    return found


# The job


def fit_thresholds(
    spark: SparkSession, root: str, wanted: Wanted, model_id: str | None = None, prompt_id: str | None = None
) -> int:
    """Fits, measures, and stores a candidate version; returns its number. Raises ValueError where it cannot."""
    model_id, prompt_id = scored_by(spark, root, model_id, prompt_id)
    frame = judged(spark, root, wanted, model_id, prompt_id).persist()
    run = runs.start(spark, root, JOB, model_id, prompt_id)
    try:
        with runs.recorded(spark, root, lambda: run):
            version, counts = _fitted(spark, root, wanted, frame, run)
    finally:
        frame.unpersist()
    told = f"version {version}: --model-id {model_id} --prompt-id {prompt_id} {wanted.flags}"
    runs.finish(spark, root, replace(run, counts=counts), "done", told)
    return version


def _fitted(
    spark: SparkSession, root: str, wanted: Wanted, frame: DataFrame, run: runs.Run
) -> tuple[int, dict[str, int]]:
    counts = _told(spark, root, frame)
    n = counts.get("fit", 0)
    if not n:
        why = "; ".join(f"{use}: {count:,}" for use, count in sorted(counts.items())) or "gold is empty"
        raise runs.Unmet(
            f"no judgement is left to fit on ({why}). Bring some with ingest, score their pairs with rescore"
            + (", or let in what it was trained on with --allow-train" if "model was trained on it" in counts else "")
        )
    fitting = frame.where("use = 'fit'")
    rows = local_rows(sampled(fitting, n))
    if n > LOCAL_ROWS:
        print(
            f"{JOB}: cuts are fitted on all {n:,} judgements; temperature, cross-validation, bootstrap and the other "
            f"ways to cut on whole queries with {len(rows):,} of them: the intervals are wider than all would give"
        )
    if not len(rows) or not rows.queries.max():
        raise runs.Unmet("judgements of at least 2 queries are needed: figures come from cross-validation by query")

    queries = fitting.select("query").distinct().count()
    sizes = _sizes(fitting) if wanted.by else {}
    segments = own_segments(sizes, wanted)
    began = time.monotonic()
    if n > LOCAL_ROWS:
        final, confusion = _fitted_on_workers(fitting, n, rows, wanted, segments)
    else:
        final = cutter(wanted.name, rows, wanted, segments, relax=False)
        confusion = measures.confusions(thresholds.rounded(rows.weights), final.tiers(rows))
    if wanted.by:
        _told_segments(sizes, segments, wanted, final)
        _must_hold(confusion, wanted)
    took = time.monotonic() - began
    names = list(dict.fromkeys([wanted.name, "one", "boundary", "score", "argmax"]))
    given = out_of_fold(rows, wanted, names, segments)
    found = _figures(wanted, names, "out_of_fold", rows, given, segments)
    found += _calibration(rows, wanted)
    found += _guard(spark, root, run, rows, final)
    finals = [final, *(cutter(name, rows, wanted) for name in names[1:])]
    test = local_rows(sampled(frame.where("use = 'test'"), counts.get("test", 0)))
    if len(test) < counts.get("test", 0):
        print(f"{JOB}: split test: whole queries with {len(test):,} of its {counts['test']:,} judgements")
    if len(test):
        found += _figures(wanted, names, "test", test, {c.name: c.tiers(test) for c in finals}, segments)
    wide = spread(rows, wanted, [s for s in segments if s in final.fits], final.temperature) if wanted.refits else {}
    _store_figures(spark, root, run.run_id, found)
    value = float(wanted.objective.shown(confusion))
    n_gold = {s: size for s, (size, _) in sizes.items()} | {"": n}
    version = _store(spark, root, wanted, final, value, wide, run, n_gold, frame)
    print(_table(wanted, names, "out_of_fold", found))
    if len(test):
        print(_table(wanted, names, "test", found))
    print(_verdicts(wanted, names, found))
    for segment, fit in final.fits.items():
        print(_cuts_told(segment, fit, wide.get(segment)))
    print(
        f"{JOB}: version {version} is a candidate: {wanted.objective} {value:.4f} on {n:,} judgements of {queries:,} "
        f"queries, temperature {final.temperature:.4g}, fitted in {took:.1f} s\n"
        f"{JOB}: put it into force with: promote_thresholds --tables {root} --version {version}",
        flush=True,
    )
    return version, counts


def _told(spark: SparkSession, root: str, frame: DataFrame) -> dict[str, int]:
    """Counts judgements by what becomes of them, and tells them by source."""
    by = frame.groupBy("use", "source").agg(F.count("*").alias("n"), F.collect_set("label").alias("labels"))
    rows = by.orderBy("use", "source").collect()
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["use"]] = counts.get(row["use"], 0) + row["n"]
        print(f"{JOB}: {row['n']:,} judgements of {row['source']}: {row['use']}")
    pairs = delta.read(spark, root, "pairs").select("pair_id")
    counts["pairs without a judgement"] = pairs.join(
        frame.select("pair_id").distinct(), "pair_id", how="left_anti"
    ).count()
    print(f"{JOB}: {counts['pairs without a judgement']:,} pairs have no judgement")
    for source in sorted({row["source"] for row in rows}):
        mine = [row for row in rows if row["source"] == source]
        labels = sorted({label for row in mine for label in row["labels"]}, reverse=True)
        uses = {row["use"] for row in mine}
        if len(labels) < 4 and uses != {"source not asked for"}:
            then = f"fitted on all the same: under {ANOTHER_SCALE} judgements do not show another scale"
            if "source with another scale" in uses:
                then = "left out as another scale; name it with --gold-source to fit on it"
            elif sum(row["n"] for row in mine) >= ANOTHER_SCALE:
                then = "fitted on as asked for with --gold-source"
            print(f"{JOB}: {source} uses only labels {', '.join(map(str, labels))} of 4, 3, 2, 1; {then}")
    return counts


def _sizes(fitting: DataFrame) -> Sizes:
    rows = fitting.groupBy("segment").agg(F.count("*").alias("n"), F.countDistinct("query").alias("queries")).collect()
    return {row["segment"]: (row["n"], row["queries"]) for row in rows}


def _told_segments(sizes: Sizes, segments: Sequence[str], wanted: Wanted, final: Cutter) -> None:
    """Tells which segments take the cuts of all, and why."""
    own = [name for name in segments if name in final.fits]
    print(f"{JOB}: {len(own)} of {len(sizes)} values of {wanted.by} get cuts of their own")
    fallen = [
        f"{name[:60] or '(none)'} ("
        + ("what is required cannot be had there" if name in segments else f"{n:,} judgements of {queries:,} queries")
        + ")"
        for name, (n, queries) in sorted(sizes.items(), key=lambda item: (-item[1][0], item[0]))
        if name not in own
    ]
    if fallen:
        more = f" and {len(fallen) - _FALLEN_TOLD:,} more" if len(fallen) > _FALLEN_TOLD else ""
        print(f"{JOB}: these take the cuts of all: {', '.join(fallen[:_FALLEN_TOLD])}{more}")


def _must_hold(confusion: Floats, wanted: Wanted) -> None:
    """Each part may meet what is required, and the values that take the cuts of all yet spoil it for the whole."""
    for required in wanted.requirements:
        shown = confusion[:, : tiers.BOUNDARIES.index(required.label) + 1].sum(1)
        if not required.met(shown, confusion.sum(1)):
            found = float(required.of_confusion(confusion))
            raise Impossible(
                f"with cuts by {wanted.by}, all judgements together come to {found:.4f}, not to {required}: the values "
                "that take the cuts of all do not meet it. Give more of them cuts of their own with a smaller "
                "--min-gold, fit without --by, or require a little more of all"
            )


def _fitted_on_workers(
    fitting: DataFrame, n: int, sample: Rows, wanted: Wanted, segments: Sequence[str]
) -> tuple[Cutter, Floats]:
    """The same cuts from all n rows, without bringing them to the driver; and the confusion matrix of these rows."""
    temperature = measures.temperature(sample.p, sample.weights) if wanted.temperature else 1.0
    frame = tiers.cumulated(fitting, temperature)
    frame = frame.select("segment", *[f"c{k}" for k in tiers.BOUNDARIES], *thresholds.WEIGHTS)
    partitions = thresholds.partitions(fitting.sparkSession, n)
    fits: dict[str, Fit] = {}
    for segment in ("", *segments):
        rows = frame.where(F.col("segment") == segment) if segment else frame
        with closing(thresholds.Spread(rows, partitions)) as pieces:
            try:
                fits[segment] = thresholds.fit(pieces, wanted.rule, wanted.objective, wanted.requirements)
            except Impossible:
                if not segment:
                    raise
    own = [segment for segment in fits if segment]
    confusion = fits[""].confusion
    if own:
        with closing(thresholds.Spread(frame.where(~F.col("segment").isin(own)), partitions)) as rest:
            others = thresholds.confusion_at(rest, fits[""].taus)
        confusion = sum((fits[segment].confusion for segment in own), others)
    return Cutter(wanted.name, fits, temperature), confusion


Figure = tuple[str, str, str, str, float, float, float, int]  # cuts, split, segment, measure, value, low, high, n


def _figures(
    wanted: Wanted,
    names: Sequence[str],
    split: str,
    rows: Rows,
    given: dict[str, NDArray[np.int64]],
    segments: Sequence[str],
) -> list[Figure]:
    """All measures of each way with their intervals, the differences from the wanted one, and its segments."""
    costs = np.asarray(wanted.objective.costs) if wanted.objective.costs else None
    of = measures.named(costs) | {str(r): r.of_confusion for r in wanted.requirements}
    found: list[Figure] = []

    def interval(values: Floats) -> tuple[float, float]:
        return measures.interval(values) if wanted.replicates else (float("nan"), float("nan"))

    def measure(here: Rows, names: Sequence[str], tiers: list[NDArray[np.int64]], segment: str) -> None:
        _, place = np.unique(here.queries, return_inverse=True)
        count = int(place.max()) + 1
        each = np.stack([measures.by_query(here.weights, t, place, count) for t in tiers], axis=1)
        whole, n = each.sum(0), len(here)
        drawn = measures.bootstrap(each, wanted.replicates, wanted.seed) if wanted.replicates else whole[None]
        for i, name in enumerate(names):
            for key, function in of.items():
                values = function(drawn[:, i])
                found.append((name, split, segment, key, float(function(whole[i])), *interval(values), n))
                if i:
                    apart = function(drawn[:, 0]) - values
                    value = float(function(whole[0]) - function(whole[i]))
                    found.append((names[0], split, segment, f"{key}_minus_{name}", value, *interval(apart), n))
            for y, label in enumerate(LABELS):
                for t, tier in enumerate(LABELS):
                    cell = drawn[:, i, y, t]
                    key = f"confusion_{label}_{tier}"
                    found.append((name, split, segment, key, float(whole[i, y, t]), *interval(cell), n))

    measure(rows, names, [given[name] for name in names], "")
    for segment in segments[:_SEGMENTS_TOLD]:
        here = rows.segments == segment
        if here.any():
            measure(rows.where(here), names[:1], [given[names[0]][here]], segment)
    return found


def _calibration(rows: Rows, wanted: Wanted) -> list[Figure]:
    """Calibration error and log-loss of the probabilities as they are; and scaled, each row by a temperature that was
    fitted without its query."""
    nan, found, kinds = float("nan"), [], {("raw", "fit"): rows.p}
    if wanted.temperature:
        place, scaled = fold_of(rows, wanted), np.zeros_like(rows.p)
        for fold in np.unique(place):
            rest, held = place != fold, place == fold
            scaled[held] = tiers.scaled(rows.p[held], measures.temperature(rows.p[rest], rows.weights[rest]))
        kinds["scaled", "out_of_fold"] = scaled
    for (name, split), p in kinds.items():
        told = {key: measures.ece(bins) for key, bins in measures.calibration(p, rows.weights).items()}
        told["log_loss"] = measures.likelihood_loss(p, rows.weights)
        found += [(name, split, "", key, value, nan, nan, len(rows)) for key, value in told.items()]
    return found


def _guard(spark: SparkSession, root: str, run: runs.Run, rows: Rows, final: Cutter) -> list[Figure]:
    """How far a cumulative probability of this model moves when a pair is asked again (`noise_max_dp` of its runs), and
    the share of the judgements that lie so near to a cut: their tier may differ from one run to the next."""
    mine = models.of(run.model_id, run.prompt_id)
    noise = delta.read(spark, root, "runs").where(mine).agg(F.max(F.col("figures")["noise_max_dp"])).collect()[0][0]
    if noise is None:
        return []
    band, nan = 2 * float(noise), float("nan")  # c3 is a sum of two
    near = (np.abs(final.values(rows) - final.taus(rows)) <= band).any(axis=1)
    share = float(near.mean())
    print(f"{JOB}: asked again, cumulative probabilities move by up to {band:.1e}; {share:.2%} lie so near to a cut")
    told = {"guard_band": band, "guard_share": share}
    return [(final.name, "fit", "", key, value, nan, nan, len(rows)) for key, value in told.items()]


def _store_figures(spark: SparkSession, root: str, run_id: str, found: list[Figure]) -> None:
    """Writes the figures, first: a version that is seen has them."""
    rows = [
        (run_id, *names, *(None if math.isnan(x) else x for x in (value, low, high)), n)
        for *names, value, low, high, n in found
    ]
    delta.append(spark, root, "measures", delta.rows(spark, "measures", rows))


def _store(
    spark: SparkSession,
    root: str,
    wanted: Wanted,
    final: Cutter,
    value: float,
    wide: dict[str, tuple[Floats, Floats]],
    run: runs.Run,
    n_gold: dict[str, int],
    frame: DataFrame,
) -> int:
    """Writes the version under the next free number, in one commit; returns the number."""
    model_id, prompt_id = str(run.model_id), str(run.prompt_id)
    engines = engines_of(spark, root, model_id, prompt_id)
    if len(engines) > 1:
        print(f"{JOB}: the probabilities come from {len(engines)} engines, and the cuts fit their mixture: {engines}")
    sources = sorted(r["source"] for r in frame.where("use = 'fit'").select("source").distinct().collect())
    median = ["raters by their median"] if wanted.raters == "median" else []
    aim = "; ".join([str(wanted.objective), *map(str, wanted.requirements), *median])
    while True:
        last = delta.read(spark, root, "thresholds").agg(F.max("version")).collect()[0][0]
        version, now, rows = (last or 0) + 1, datetime.now(UTC), []
        for segment, fit in final.fits.items():
            for b, k in enumerate(tiers.BOUNDARIES):
                # The rows of segment '' stand for the whole version, also for segments that take its cuts.
                own = float(wanted.objective.shown(fit.confusion)) if segment else value
                low, high = (float(x[b]) for x in wide[segment]) if segment in wide else (None, None)
                cells = {
                    "version": version, "segment": segment, "boundary": k, "tau": fit.taus[b],
                    "optimal_low": fit.lows[b], "optimal_high": fit.highs[b], "tau_low": low, "tau_high": high,
                    "segment_by": wanted.by, "temperature": final.temperature, "rule": wanted.rule, "objective": aim,
                    "value": own, "n_gold": n_gold[segment],
                    "gold_sources": sources, "allow_train": wanted.allow_train,
                    "model_id": model_id, "prompt_id": prompt_id, "engines": engines, "run_id": run.run_id,
                    "status": "candidate", "fitted_at": now,
                }  # fmt: skip
                rows.append([cells.get(name) for name in THRESHOLDS.names])
        if delta.claim(spark, root, "thresholds", delta.rows(spark, "thresholds", rows), "version"):
            return int(version)


# What people read


def _by_key(found: list[Figure], split: str) -> dict[tuple[str, str], tuple[float, float, float]]:
    return {(f[0], f[3]): (f[4], f[5], f[6]) for f in found if f[1] == split and not f[2]}


def _shown(figure: tuple[float, float, float], sign: str = "") -> str:
    value, low, high = figure
    if np.isnan(low):
        return f"{value:{sign}.4f}"
    return f"{value:{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


def _columns(wanted: Wanted) -> list[str]:
    own = ["cost"] if wanted.objective.costs else []
    own += [f"recall_{NAMES[wanted.objective.label].lower()}_or_better"] if wanted.objective.label else []
    return ["macro_f1", "accuracy", "kappa", *own]


def _table(wanted: Wanted, names: Sequence[str], split: str, found: list[Figure]) -> str:
    """Ways and measures side by side, each with its interval."""
    by, columns = _by_key(found, split), _columns(wanted)
    rows = next(f[7] for f in found if f[1] == split)
    title = "out of fold, by query" if split == "out_of_fold" else "split test, not seen by the fit"
    intervals = ", 95 % intervals from a bootstrap by query" if wanted.replicates else ""
    lines = [f"{JOB}: {title}, {rows:,} judgements{intervals}"]
    lines.append(f"    {'cuts':<24}" + "".join(f"{c:<28}" for c in columns))
    for name in names:
        shown = {"score": "weighted score", "argmax": "likeliest label"}.get(name, f"CumPT {name}")
        lines.append(f"    {shown:<24}" + "".join(f"{_shown(by[name, c]):<28}" for c in columns))
    for asked in map(str, wanted.requirements):
        lines.append(f"    required: {asked}; {', '.join(f'{name} {_shown(by[name, asked])}' for name in names)}")
    return "\n".join(lines)


def _verdicts(wanted: Wanted, names: Sequence[str], found: list[Figure]) -> str:
    """Which wins, in words: the wanted cuts against each other way."""
    by, lines = _by_key(found, "out_of_fold"), []
    for name in names[1:]:
        for column in _columns(wanted):
            _, low, high = figure = by[names[0], f"{column}_minus_{name}"]
            if column == "cost":
                low, high = -high, -low
            verdict = "wins" if low > 0 else "loses" if high < 0 else "cannot be told apart"
            lines.append(f"    {names[0]} against {name}, {column}: {_shown(figure, '+')} {verdict}")
    return "\n".join(lines)


def _cuts_told(segment: str, fit: Fit, wide: tuple[Floats, Floats] | None) -> str:
    parts = []
    for b, k in enumerate(tiers.BOUNDARIES):
        spread = f", spread {wide[0][b]:.4f} to {wide[1][b]:.4f}" if wide else ""
        parts.append(f"τ{k} = {fit.taus[b]:.6f} (as good from {fit.lows[b]:.6f} to {fit.highs[b]:.6f}{spread})")
    return f"    {segment[:60] or 'all':<24}" + "  ".join(parts)
