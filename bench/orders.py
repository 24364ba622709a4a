"""Label first or reasoning first: what post-CoT and pre-CoT models get right on the same pairs, and what it costs.

    python -m bench.orders --tables T --post DIR --pre DIR [--split dev] [--pairs 300] [--max-tokens 64]

DIR are models that differ in `train_sft --order` alone. Both give one greedy answer to each pair (`sample --n 1
--temperature 0`; the same pairs, those that both have answered). A pre-CoT model must write all of its answer before
its label is known; of a post-CoT model the first token is enough, so its cost stands there twice. An answer without a
label counts as a wrong one. Intervals are 95 % percentiles over resamples of whole queries.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bench import stages
from partitioner import models
from schemas import delta


def main(argv: list[str]) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", required=True, type=delta.root)
    parser.add_argument("--post", required=True, metavar="DIR")
    parser.add_argument("--pre", required=True, metavar="DIR")
    parser.add_argument("--split", default="dev", choices=("dev", "test"))
    parser.add_argument("--pairs", type=int, default=300, help="so many, always the same ones (default 300)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of an answer")
    args = parser.parse_args(argv)
    asked = ["--split", args.split, "--n", "1", "--temperature", "0", "--limit", str(args.pairs)]
    for model in (args.post, args.pre):
        command = ["sample", "--tables", args.tables, "--model", model, *asked, "--max-tokens", str(args.max_tokens)]
        stages.spoken(command)
    spark = delta.session("orders")
    found = [
        read(spark, args.tables, *stages.identity(spark, args.tables, model), args.split)
        for model in (args.post, args.pre)
    ]
    print(table(*found))
    return 0


def read(spark: SparkSession, root: str, model_id: str, prompt_id: str, split: str) -> stages.Columns:
    """Columns of equal length, a row an answered pair by pair_id: query, gold, said, written, and computed, a mean."""
    mine = models.of(model_id, prompt_id)
    greedy = delta.read(spark, root, "samples").where(mine & (F.col("split") == split) & (F.col("temperature") == 0))
    pairs = delta.read(spark, root, "pairs").select("pair_id", "query")
    drawn = stages.of_fullest_run(greedy, 1)
    rows = drawn.join(pairs, "pair_id", how="inner").orderBy("pair_id").collect()
    if not rows:
        raise ValueError(f"model {model_id} has answered no pair of the split {split}")
    (run,) = delta.read(spark, root, "runs").where(F.col("run_id") == rows[0]["run_id"]).collect()
    return {
        "pair_id": np.array([row["pair_id"] for row in rows]),
        "query": np.array([row["query"] for row in rows]),
        "gold": np.array([row["gold"] for row in rows]),
        "said": np.array([said(row["label"], row["gold"]) for row in rows]),
        "labelled": np.array([float(row["label"] is not None) for row in rows]),
        "written": np.array([float(row["tokens"]) for row in rows]),
        "computed": np.full(len(rows), run["computed_tokens"] / len(rows)),
    }


def said(label: int | None, gold: int) -> int:
    """The label of an answer; one without counts as the label farthest from gold."""
    return label or (1 if gold > 2 else 4)


def table(post: stages.Columns, pre: stages.Columns) -> str:
    """A Markdown table of the pairs that both have answered."""
    both = np.intersect1d(post["pair_id"], pre["pair_id"])
    columns: list[dict[str, Any]] = []
    for rows in (post, pre):
        mine = np.isin(rows["pair_id"], both)
        columns.append({name: column[mine] for name, column in rows.items()})
    lines = [f"| {len(both):,} pairs | post-CoT | pre-CoT |", "|---|---|---|"]
    for name in ("macro-F1", "accuracy"):
        cells = [stages.cell(rows, stages.MEASURES[name]) for rows in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| answers with a label | " + " | ".join(f"{rows['labelled'].mean():.3f}" for rows in columns) + " |")
    prompt = [float(rows["computed"].mean()) for rows in columns]
    written = [float(rows["written"].mean()) for rows in columns]
    lines.append("| prompt tokens computed a pair | " + " | ".join(f"{x:.1f}" for x in prompt) + " |")
    lines.append("| tokens written a pair | " + " | ".join(f"{x:.1f}" for x in written) + " |")
    cost = (prompt[0] + 1, prompt[1] + written[1])
    lines.append("| tokens a pair until its label is known | " + " | ".join(f"{x:.1f}" for x in cost) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
