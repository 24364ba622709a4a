"""The sql job, as an analyst meets it."""

from __future__ import annotations

import io

import pytest
from pyspark.sql import SparkSession

from jobs import main as dispatcher
from jobs import sql
from schemas import delta
from tests.pairs import PRODUCTS, put


def test_a_statement_prints_its_rows(spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(spark, root, PRODUCTS)
    assert (
        sql.main(["--tables", root, "SELECT title, count(*) AS pairs FROM pairs GROUP BY title ORDER BY title;"]) == 0
    )
    assert "|        Blue towel|    4|" in capsys.readouterr().out


def test_wrong_sql_is_one_line_and_exit_code_2(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sql.main(["--tables", root, "SELECT nothing FROM pairs"]) == 2
    said = capsys.readouterr().err
    assert "nothing" in said
    assert len(said.strip().splitlines()) == 1


def test_without_a_statement_it_reads_them_one_a_line(
    root: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("SELEC 1\nSELECT 40 + 2 AS answer\n\n"))
    assert sql.main(["--tables", root]) == 0
    said = capsys.readouterr()
    assert "|    42|" in said.out
    assert "label_probs" in said.out
    assert "SELEC" in said.err


def test_what_breaks_a_tables_rule_is_one_line_and_what_a_row_holds_moves_no_cursor(
    spark: SparkSession, root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(spark, root, PRODUCTS)
    wrong = f"INSERT INTO delta.`{root}/gold` (pair_id, source, label) VALUES ('a', 'b', 7)"
    assert sql.main(["--tables", root, wrong]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1
    assert sql.main(["--tables", root, "SELECT concat('a', char(27), '[2J', char(155)) AS hostile"]) == 0
    said = capsys.readouterr().out
    assert r"a\x1b[2J\x9b" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("statement", "writes"),
    [
        ("SELECT 'x' FROM pairs", False),
        ("WITH a AS (SELECT 1) SELECT * FROM a", False),
        ("DESCRIBE pairs", False),
        ("SHOW TABLES", False),
        ("EXPLAIN SELECT 1", False),
        ("VALUES (1)", False),
        ("WITH a AS (SELECT 1 AS x) INSERT INTO gold SELECT * FROM a", True),
        ("FROM pairs INSERT INTO a SELECT 1 INSERT INTO b SELECT 2", True),
        ("UPDATE delta.`/t/gold` SET split = 'test'", True),
        ("DELETE FROM gold", True),
        ("MERGE INTO gold USING a ON true WHEN MATCHED THEN DELETE", True),
        ("CREATE TABLE x USING delta AS SELECT 1 AS a", True),
        ("OPTIMIZE delta.`/t/gold`", True),
        ("RESTORE TABLE delta.`/t/gold` TO VERSION AS OF 1", True),
        ("CREATE TABLE x SHALLOW CLONE delta.`/t/gold`", True),
        ("EXECUTE IMMEDIATE 'DELETE FROM gold'", True),
        ("VACUUM delta.`/t/gold`", True),
        ("ALTER TABLE delta.`/t/gold` DROP CONSTRAINT c", True),
    ],
)
def test_a_query_waits_for_no_writer(spark: SparkSession, statement: str, writes: bool) -> None:
    assert sql._writes(spark, statement) == writes


def test_a_statement_that_writes_is_refused_where_its_commit_could_get_lost(
    spark: SparkSession, root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("on S3 two jobs at once")

    monkeypatch.setattr(delta, "refuse_silent_loss", refuse)
    assert sql.main(["--tables", root, f"DELETE FROM delta.`{root}/gold`"]) == 2
    assert "on S3 two jobs at once" in capsys.readouterr().err
    assert sql.main(["--tables", root, "SELECT 1"]) == 0


def test_a_folder_without_tables_is_an_error_that_names_the_next_command(
    spark: SparkSession, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatcher.main(["sql", "--tables", str(tmp_path), "SELECT 1"]) == 2
    assert "ingest --tables" in capsys.readouterr().err
