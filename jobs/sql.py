"""Asks the tables in SQL.

sql --tables T "SELECT pairs.query, title, p_excellent FROM pairs JOIN label_probs USING (pair_id) LIMIT 10"
sql --tables T          (a prompt: one statement a line, empty line or Ctrl-D ends)

The names are views; a table itself is changed by its full path: UPDATE delta.`/full/path/of/T/gold` SET split = 'test'
WHERE … A query needs to read T only, and waits for no writer.
The statements are the operator's own, with all that Spark's SQL can do, writing and reading files too: no sandbox.
"""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from typing import Any

from py4j.java_gateway import is_instance_of
from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

import jobs
from partitioner import tiers
from schemas import delta, runs


def flags() -> jobs.Parser:
    """The flags of this job."""
    parser = jobs.parser("sql", __doc__)
    parser.add_argument("--rows", type=int, default=100, help="print at most so many rows (default 100)")
    parser.add_argument("--width", type=int, default=40, help="cut columns at so many characters, 0: not at all")
    parser.add_argument("statement", nargs="?", help="one SQL statement; without it, a prompt")
    return parser


def main(argv: list[str]) -> int:
    """Runs one statement, or reads them one a line; a statement that fails is printed and, alone, gives exit code 2."""
    args = flags().parse_args(argv)
    spark = delta.session("sql")
    there = tiers.register(spark, args.tables)
    if not there:
        raise ValueError(
            f"there are no tables under {args.tables!r}; make them: ingest --tables {args.tables} --pairs FILE"
        )
    if args.statement is not None:
        return 0 if _ask(spark, args.tables, args.statement, args.rows, args.width) else 2
    print(f"tables: {', '.join(there)}")
    while True:
        print("sql> ", end="", flush=True)
        statement = sys.stdin.readline().strip()
        if not statement:
            return 0
        _ask(spark, args.tables, statement, args.rows, args.width)


def _ask(spark: SparkSession, root: str, statement: str, rows: int, width: int) -> bool:
    statement = statement.rstrip().rstrip(";")
    try:
        writes = _writes(spark, statement)
        if writes:
            delta.refuse_silent_loss(spark, root)
            if delta.log_store(spark, root):
                runs.close_lost(spark, root)
                runs.refuse_second_driver(spark, root)
        with delta.alone(spark, root) if writes else nullcontext():
            asked: Any = spark.sql(statement)  # what changes a table does so at once; a query is answered below
        print(jobs.printable(asked._jdf.showString(rows, width, False)))
    except (PySparkException, Py4JJavaError, ValueError) as error:
        # The first line says it; the plan and the JVM's stack do not help whoever wrote the SQL.
        print(f"sql: {jobs.printable(runs.in_a_line(error))}", file=sys.stderr)
        return False
    return True


def _writes(spark: SparkSession, statement: str) -> bool:
    """Whether a statement may change something; queries, and what tells of tables and plans, do not."""
    plan: Any = spark._jsparkSession.sessionState().sqlParser().parsePlan(statement)
    if re.search(
        "InsertInto|DeleteFrom|UpdateTable|MergeInto|RestoreTable|CloneTable|ExecuteImmediate", plan.toString()
    ):  # also behind a WITH
        return True
    if re.match("Explain|Describe|Show", plan.getClass().getSimpleName()):
        return False
    gateway = spark.sparkContext._gateway
    return bool(is_instance_of(gateway, plan, "org.apache.spark.sql.catalyst.plans.logical.Command"))
