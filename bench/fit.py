"""How long fitting takes against sorting the same rows in Spark.

python -m bench.fit [--rows 1000000] [--rounds 3] [--objectives macro_f1 accuracy kappa]

Rows: probabilities of four labels and one judgement each. `ORDER BY c4` to nowhere is the yardstick: it reads the rows,
sorts them by one value, and passes all their columns on. A fit looks at three values a row. Both read the same cached
rows. Each runs once before anything is timed, so that workers and code are warm; then each round times all of them, one
after the other, and a ratio is the median over rounds of the fit against the sort of its own round. Bootstrap and
cross-validation are not part of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing

from pyspark.sql import functions as F

from partitioner import thresholds, tiers
from partitioner.thresholds import Objective
from partitioner.tiers import BOUNDARIES
from schemas import delta
from schemas.labels import LABELS, P_COLUMNS

OBJECTIVES = ("macro_f1", "accuracy", "kappa")


def main(argv: list[str]) -> int:
    """Prints one JSON object: seconds of each, and the ratios to the sort; medians over the rounds."""
    parser = argparse.ArgumentParser(prog="bench.fit", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="10000000 take some 8 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES, choices=OBJECTIVES)
    args = parser.parse_args(argv)
    memory = f"{max(4, args.rows // 2_000_000)}g"
    spark = delta.session("bench.fit", {"spark.driver.memory": memory, "spark.ui.showConsoleProgress": "false"})
    rows = spark.range(args.rows)
    draws = [-F.log(F.lit(1e-12) + F.rand(seed)) for seed in (1, 2, 3, 4)]
    rows = rows.select("id", F.rand(9).alias("u"), *[d.alias(f"d{i}") for i, d in enumerate(draws)])
    total = sum((F.col(f"d{i}") for i in range(1, 4)), F.col("d0"))
    rows = rows.select("u", *[(F.col(f"d{i}") / total).alias(p) for i, p in enumerate(P_COLUMNS)])
    rows = tiers.cumulated(rows, 1.0)
    label = F.when(F.col("u") < F.col("c4"), 4).when(F.col("u") < F.col("c3"), 3).when(F.col("u") < F.col("c2"), 2)
    rows = rows.withColumn("label", label.otherwise(1))
    weights = [(F.col("label") == y).cast("double").alias(f"w{y}") for y in LABELS]
    rows = rows.select(*[f"c{k}" for k in BOUNDARIES], *weights).persist()
    rows.count()

    partitions = thresholds.partitions(spark, args.rows)

    def sort() -> None:
        rows.orderBy("c4").write.format("noop").mode("overwrite").save()

    def fit(rule: str, objective: Objective) -> None:
        with closing(thresholds.Spread(rows, partitions)) as pieces:
            thresholds.fit(pieces, rule, objective)

    jobs: dict[str, Callable[[], None]] = {"sort": sort}
    for rule in thresholds.RULES:
        for name in args.objectives:
            jobs[f"{rule} {name}"] = lambda rule=rule, name=name: fit(rule, Objective(name))  # type: ignore[misc]
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            began = time.monotonic()
            job()
            seconds[name].append(time.monotonic() - began)

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds["sort"], strict=True))

    medians = {name: round(statistics.median(s), 2) for name, s in seconds.items()}
    ratios = {name: round(ratio(name), 2) for name in jobs}
    print(json.dumps({"rows": args.rows, "rounds": args.rounds, "seconds": medians, "ratio": ratios}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
