"""The sql job, as an analyst meets it."""

from __future__ import annotations

import io

import pytest
from pyspark.sql import SparkSession

from jobs import main as dispatcher
from jobs import sql
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


def test_a_folder_without_tables_is_an_error_that_names_the_next_command(
    spark: SparkSession, tmp_path: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dispatcher.main(["sql", "--tables", str(tmp_path), "SELECT 1"]) == 2
    assert "ingest --tables" in capsys.readouterr().err
