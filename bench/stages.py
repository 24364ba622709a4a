"""What each stage of training brought, on queries that no stage has seen: one table, with intervals by query.

    python -m bench.stages --tables T --models demo-base DIR/sft DIR/dpo DIR/grpo [--split test] [--sampled PAIRS]

Each model scores the pairs of the split (`backfill`) and answers them eight times (`sample`; with --sampled so many of
them, the same for all models) where it has not done so yet; then all figures are read off the tables, for pairs that
all models have scored, and that all have answered. Labels are arg-max of the scores. With the label first, pass@1 at
temperature 1 is p(gold), read off the scores; beside it stands the unbiased estimate over the samples, which also tells
how often label and chain are both right. Intervals are 95 % percentiles over 1,000 resamples of whole queries, since
pairs of a query are not independent; two models are compared on the same resamples, which is sharper than two
intervals. Uniform guessing reaches pass@1 0.250 and pass@4 0.684.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

import demo.catalogue
from jobs.sample import pass_at_k
from partitioner import measures, models
from partitioner.measures import Floats
from schemas import delta, gold
from schemas.labels import LABELS, NAMES, P_COLUMNS
from udfs.model import inspect
from udfs.prompt import load

REPO = Path(__file__).resolve().parent.parent
N = 8
NAMED = 3000  # pairs that one command names
RESAMPLES = 1000
BINS = 10  # of the calibration error
Columns = dict[str, Any]
PASSES = ("label 1", "label 4", "label and chain 1", "label and chain 4")  # what and k of PASS_AT_K


def main(argv: list[str]) -> int:
    """Prints the tables; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", required=True, type=delta.root)
    parser.add_argument("--models", required=True, nargs="+", help="demo-base, folders or adapters, in order")
    parser.add_argument("--split", default="test", choices=("dev", "test"))
    parser.add_argument("--sampled", type=int, metavar="PAIRS", help="sample so many pairs, always the same; 0: none")
    args = parser.parse_args(argv)
    limit = ["--limit", str(args.sampled)] if args.sampled else []
    for model in args.models:
        score(args.tables, model, args.split)
        if args.sampled == 0:
            continue
        spoken(["sample", "--tables", args.tables, "--model", model, "--split", args.split, "--n", str(N), *limit])
    spark = delta.session("stages")
    read_off = [read(spark, args.tables, *identity(spark, args.tables, model), args.split) for model in args.models]
    measured = dict(zip(named(args.models), common(read_off), strict=True))
    print(overall(measured))
    print()
    print(by_kind(measured))
    print()
    print(differences(measured))
    return 0


def spoken(command: list[str]) -> None:
    """Runs a job of the project, its output on standard error."""
    subprocess.run([str(REPO / "spark-submit.sh"), *command], check=True, stdout=sys.stderr)  # noqa: S603


def score(tables: str, model: str, *splits: str) -> None:
    """Scores the judged pairs of these splits."""
    for condition in of_splits(tables, *splits):
        spoken(["backfill", "--tables", tables, "--model", model, "--where", condition])


def of_splits(tables: str, *splits: str) -> list[str]:
    """Conditions of SQL that choose the judged pairs of these splits between them: an argument holds 128 KiB."""
    judged = DeltaTable(f"{tables}/gold").to_pyarrow_table(columns=["pair_id", "split"]).to_pylist()
    # Digits of a hash: nothing to escape.
    ids = sorted({f"'{row['pair_id']}'" for row in judged if row["split"] in splits})
    return [f"pair_id IN ({', '.join(ids[begin : begin + NAMED])})" for begin in range(0, len(ids), NAMED)]


def identity(spark: SparkSession, root: str, name: str) -> tuple[str, str]:
    """model_id and prompt_id of `--model NAME` with the prompt beside its weights."""
    folder, _ = models.folder_of(name) or models.registered_folder(spark, root, name)
    model = inspect(folder)
    if model.prompt_file is None:
        raise ValueError(f"{folder} has no prompt.json beside its weights; copy the one that it is asked with there")
    return model.model_id, load(model.prompt_file, model.tokenizer_json, model.vocab_size).prompt_id


def named(models: Sequence[str]) -> list[str]:
    """A column's name for each model: its folder's, or the whole path where two folders are called alike."""
    short = [Path(model).name for model in models]
    return [name if short.count(name) == 1 else model for name, model in zip(short, models, strict=True)]


def common(measured: Sequence[Columns]) -> list[Columns]:
    """The rows of pairs that all models have scored, and the answers to those that all have answered.

    Raises ValueError where there is no such pair.
    """
    pairs = reduce(np.intersect1d, (rows["pair_id"] for rows in measured))
    if not len(pairs):
        raise ValueError("there is no pair that all of the models have scored; are they all of one split?")
    kept = []
    for rows in measured:
        mine = np.isin(rows["pair_id"], pairs)
        kept.append({name: column[mine] for name, column in rows.items()})
    unanswered = reduce(np.logical_or, (np.isnan(rows["agrees"]) for rows in kept))
    for rows in kept:
        rows |= {name: np.where(unanswered, np.nan, rows[name]) for name in ("agrees", *PASSES)}
    return kept


def of_fullest_run(samples: DataFrame, n: int) -> DataFrame:
    """The rows of the run that drew `n` answers of most pairs, of equals the newest; none without such a run."""
    drawn = samples.groupBy("run_id").agg((F.max("sample") + 1).alias("n"), F.count_distinct("pair_id").alias("pairs"))
    fullest = drawn.where(F.col("n") == n).orderBy(F.desc("pairs"), F.desc("run_id")).head()
    return samples.where(F.col("run_id") == F.lit(fullest["run_id"] if fullest else None))


def read(spark: SparkSession, root: str, model_id: str, prompt_id: str, split: str) -> Columns:
    """Columns of equal length, a row a judged pair by pair_id: query, gold, p [n, 4], and what its sampled answers came
    to (NaN where it was not sampled).
    """
    mine = models.of(model_id, prompt_id)
    kinds = demo.catalogue.query_kinds()
    judged = gold.judged(spark, root, split).where("label IS NOT NULL").select("pair_id", F.col("label").alias("gold"))
    scores = delta.read(spark, root, "label_probs").where(mine & (F.col("outcome") == "scored"))
    samples = delta.read(spark, root, "samples").where(mine & (F.col("split") == split) & (F.col("temperature") == 1))
    # Other runs may have drawn another number of answers.
    samples = of_fullest_run(samples, N)
    agrees = samples.groupBy("pair_id").agg(F.avg(F.col("agrees").cast("int")).alias("agrees"))
    passes = pass_at_k(spark, samples)
    passes = passes.withColumn("way", F.concat("what", F.lit(" "), "k"))
    way = passes.groupBy("pair_id").pivot("way", list(PASSES)).agg(F.first("pass"))
    answers = way.join(agrees, "pair_id", how="inner")
    rows = judged.join(scores, "pair_id", how="inner").join(answers, "pair_id", how="left").orderBy("pair_id").collect()
    if not rows:
        raise ValueError(f"model {model_id} has scored no pair of the split {split}")
    p = np.array([[row[name] for name in P_COLUMNS] for row in rows])
    inside = 1 - np.array([row["p_outside"] for row in rows])
    return {
        "pair_id": np.array([row["pair_id"] for row in rows]),
        "query": np.array([row["query"] for row in rows]),
        "gold": np.array([row["gold"] for row in rows]),
        **{name: np.array([row[name] for row in rows], dtype=float) for name in ("agrees", *PASSES)},
        "p": p,
        # The label is the first token, so at temperature 1 this is the chance that a sampled answer is right.
        "p_gold": inside * p[np.arange(len(rows)), [LABELS.index(row["gold"]) for row in rows]],
        "kind": np.array([kinds.get(row["query"], "other") for row in rows]),
    }


def confusion(rows: Columns) -> Floats:
    """Confusion matrix [label, arg-max]."""
    gold = (rows["gold"][:, None] == np.array(LABELS)).astype(np.float64)
    return measures.confusions(gold, said(rows))


def said(rows: Columns) -> np.ndarray:
    """The label given to each pair: the likeliest one, where `rows` does not hold another choice as `said`."""
    return np.asarray(rows["said"] if "said" in rows else np.array(LABELS)[rows["p"].argmax(axis=1)])


def ece(rows: Columns) -> float:
    """Expected calibration error of the likeliest label."""
    right = (rows["gold"] == said(rows)).astype(np.float64)
    return measures.ece(measures.reliability(rows["p"].max(axis=1), right, np.ones(len(right)), BINS))


def f1(place: int) -> Callable[[Columns], float]:
    """F1 of a label by its place in LABELS."""
    return lambda rows: float(measures.f1(confusion(rows))[place])


def mean(column: str) -> Callable[[Columns], float]:
    """Mean of a column over the pairs that were sampled; NaN where none was."""

    def found(rows: Columns) -> float:
        there = rows[column][~np.isnan(rows[column])]
        return float(there.mean()) if there.size else float("nan")

    return found


MEASURES: dict[str, Callable[[Columns], float]] = {
    "macro-F1": lambda rows: float(measures.macro_f1(confusion(rows))),
    **{f"F1 {NAMES[label]}": f1(place) for place, label in enumerate(LABELS)},
    "accuracy": lambda rows: float(measures.accuracy(confusion(rows))),
    "pass@1": mean("p_gold"),
    "pass@4": lambda rows: float((1 - (1 - rows["p_gold"]) ** 4).mean()),
    "pass@1, sampled": mean("label 1"),
    "pass@4, sampled": mean("label 4"),
    "pass@1 with chain": mean("label and chain 1"),
    "pass@4 with chain": mean("label and chain 4"),
    "chain agrees": mean("agrees"),
    "ECE": ece,
}


def interval(rows: Columns, measure: Callable[[Columns], float], seed: int = 0) -> tuple[float, float]:
    """95 % of the measure over resamples of whole queries."""
    queries = np.unique(rows["query"])
    of_query = {query: np.flatnonzero(rows["query"] == query) for query in queries}
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([of_query[query] for query in generator.choice(queries, len(queries))])
        found.append(measure({name: column[chosen] for name, column in rows.items()}))
    return measures.interval(np.array(found))


def overall(measured: dict[str, Columns]) -> str:
    """A Markdown table of all measures, and how many pairs were sampled."""
    cells = [f"{(~np.isnan(rows['agrees'])).sum():,} of {len(rows['gold']):,}" for rows in measured.values()]
    return "\n".join([*table(measured, MEASURES), "| pairs sampled | " + " | ".join(cells) + " |"])


def table(measured: dict[str, Columns], wanted: dict[str, Callable[[Columns], float]]) -> list[str]:
    """Lines of a Markdown table: a row a measure, a column a model, intervals in brackets."""
    lines = ["| | " + " | ".join(measured) + " |", "|---" * (len(measured) + 1) + "|"]
    for name, measure in wanted.items():
        cells = [cell(rows, measure) for rows in measured.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def cell(rows: Columns, measure: Callable[[Columns], float]) -> str:
    """A measure with its interval; a dash where nothing was sampled, or no pair has or was given this label."""
    if np.isnan(found := measure(rows)):
        return "–"
    low, high = interval(rows, measure)
    return f"{found:.3f} [{low:.3f}, {high:.3f}]"


def by_kind(measured: dict[str, Columns]) -> str:
    """A Markdown table: macro-F1 for each kind of query, with intervals."""
    lines = ["| macro-F1 by kind | pairs | " + " | ".join(measured) + " |", "|---" * (len(measured) + 2) + "|"]
    kinds = next(iter(measured.values()))["kind"]
    for kind in [k for k in (*demo.catalogue.KINDS, "other") if k in kinds]:
        cells = []
        for rows in measured.values():
            mine = {name: column[rows["kind"] == kind] for name, column in rows.items()}
            cells.append(cell(mine, MEASURES["macro-F1"]))
        lines.append(f"| {kind} | {(kinds == kind).sum()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(measured: dict[str, Columns]) -> str:
    """A Markdown table: how much better each model is than each one before it, in macro-F1, on the same pairs."""
    names = list(measured)
    lines = ["| macro-F1, column less row | " + " | ".join(names[1:]) + " |", "|---" * len(names) + "|"]
    for place, before in enumerate(names[:-1]):
        cells = ["" for _ in names[1 : place + 1]]
        for after in names[place + 1 :]:
            both = {name: measured[after][name] for name in ("query", "gold")}
            both |= {"said": said(measured[after]), "before": said(measured[before])}
            low, high = interval(both, gain)
            cells.append(f"{gain(both):+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {before} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gain(both: Columns) -> float:
    """Macro-F1 of `said` less that of `before`."""
    measure = MEASURES["macro-F1"]
    return measure(both) - measure(both | {"said": both["before"]})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
