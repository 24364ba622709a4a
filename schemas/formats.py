"""Input files as rows, each judged by `schemas.canonical`: JSON Lines, CSV and Parquet.

Text is read as lines of raw bytes and parsed in Python workers, batch by batch: Spark's own JSON and CSV readers
replace bytes that are not UTF-8 in silence, take the last of two equal keys, and cannot tell a row's line.
"""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import groupby
from typing import Any

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T
from pyspark.sql.pandas.types import from_arrow_schema

from schemas import canonical
from schemas.canonical import MAX_ROW_BYTES, Accept, Accepted
from schemas.files import File, literal

# A line beyond this is skipped by Hadoop's reader instead of filling the memory; `lost_bytes` finds that it was.
LONGEST_LINE = 32 << 20
REFUSED = "refused file: "  # what the reason begins with where it is of a whole file
_BEGINNING = 1000  # letters of each text of a Parquet row that is too large
_ORIGINAL_BYTES = 64 << 10  # of a refused row, kept in quarantine
REREAD_LINES = 10_000_000  # of a CSV file with records that do not end; some ten seconds
_BATCH_ROWS, _BATCH_BYTES = 1_000, 16 << 20

# What every reader below returns. `n` orders the rows of one block of a file (it is not yet a line number), `size` is
# their size there, `raw` the row as it came. A row is accepted (reason null), refused (with a reason), or blank: a
# header or an empty line.
ROW = pa.schema(
    {
        "file": pa.string(),
        "block": pa.int64(),
        "n": pa.int64(),
        "size": pa.int64(),
        "blank": pa.bool_(),
        "raw": pa.string(),
        "reason": pa.string(),
        "ignored": pa.list_(pa.string()),
        "product_id": pa.string(),
        "locale": pa.string(),
        "query": pa.string(),
        "title": pa.string(),
        "brand": pa.string(),
        "description": pa.string(),
        "attributes": pa.map_(pa.string(), pa.string()),
        "category": pa.string(),
        "label": pa.int32(),
        "rater_labels": pa.list_(pa.int32()),
        "weight": pa.float64(),
        "gold_weight": pa.float64(),
        "split": pa.string(),
        "chain": pa.string(),
        "given": pa.list_(pa.string()),
        "normalised": pa.string(),
        "drawn_split": pa.string(),
    }
)
ROW_TYPE = from_arrow_schema(ROW)


@dataclass(frozen=True)
class Wanted:
    """What a job reads: the fields it knows, those a file must have, and the rule for a row."""

    fields: tuple[str, ...]
    required: tuple[str, ...]
    accept: Accept


PAIRS = Wanted(canonical.PAIR_FIELDS, ("query", "product_id", "title"), canonical.accept)
PRODUCTS = Wanted(canonical.PRODUCT_FIELDS, ("product_id",), canonical.accept_product)
DELETIONS = Wanted(canonical.DELETE_FIELDS, ("product_id",), canonical.accept_deletion)
CHAINS = Wanted(canonical.CHAIN_FIELDS, ("query", "product_id", "label", "chain"), canonical.accept_chain)


_INTEGERS = (T.ByteType, T.ShortType, T.IntegerType, T.LongType)
_NUMBERS = (*_INTEGERS, T.FloatType, T.DoubleType, T.DecimalType)


def _fits(name: str, found: T.DataType) -> str | None:
    """None where a Parquet column may hold the field `name`, else what it must be."""
    if isinstance(found, T.NullType):
        return None
    if name == "attributes":
        flat: list[T.DataType] = [found]
        if isinstance(found, T.MapType):
            flat = [found.keyType, found.valueType]
        elif isinstance(found, T.StructType):
            flat = [f.dataType for f in found.fields]
        nested = flat != [found] and all(isinstance(t, T.StringType) for t in flat)
        return None if nested else "map<string,string> or a struct of strings"
    if name == "rater_labels":
        return None if isinstance(found, T.ArrayType) and isinstance(found.elementType, _INTEGERS) else "array<int>"
    if name == "label":
        return None if isinstance(found, _INTEGERS) else "int"
    if name in ("weight", "gold_weight"):
        return None if isinstance(found, _NUMBERS) else "double"
    return None if isinstance(found, T.StringType) else "string"


def misfit(file: File, fields: Sequence[str], required: Sequence[str]) -> str | None:
    """Why a Parquet file's columns cannot be read as `fields`, or None; text files are judged row by row instead."""
    if file.schema is None:
        return None
    names = file.schema.names
    if len({name.lower() for name in names}) < len(names):
        return "wrong columns: two names differ only in upper and lower case"
    if absent := [name for name in required if name not in names]:
        return f"wrong columns: {', '.join(absent)} missing, there are: {', '.join(names)[:200]}"
    for column in file.schema.fields:
        must = _fits(column.name, column.dataType) if column.name in fields else None
        if must:
            has = column.metadata.get("parquet") or column.dataType.simpleString()
            return f"wrong type: column {column.name} is {has[:100]}, it must be {must}"
    return None


def canonical_rows(spark: SparkSession, files: Sequence[File], wanted: Wanted) -> DataFrame:
    """All rows of canonical files: columns of `ROW`."""
    parts = []
    of = {kind: [f for f in files if f.kind == kind] for kind in ("jsonl", "csv", "parquet")}
    if of["jsonl"]:
        parts.append(judged(lines(spark, of["jsonl"]), _json_records, wanted))
    if of["csv"]:
        parts.append(judged(in_order(lines(spark, of["csv"])), _csv_parser(wanted.required), wanted))
    for group in alike(of["parquet"]):
        # Not united before: a column that one file lacks would come as null, and null clears a product's text.
        parts.append(judged(columns(spark, group, wanted.fields), _parquet_records, wanted))
    return reduce(DataFrame.unionByName, parts)


def judged(frame: DataFrame, parse: Parse, wanted: Wanted) -> DataFrame:
    """What a reader brought, parsed and judged on the workers: columns of `ROW`."""
    return frame.mapInArrow(_worker(parse, wanted), ROW_TYPE)


def _place() -> list[Column]:
    """Where a row stands: file, block of the file, and a number that rises by one from row to row within the block."""
    return [
        F.col("_metadata.file_path").alias("file"),
        F.col("_metadata.file_block_start").alias("block"),
        F.monotonically_increasing_id().alias("n"),
    ]


def lines(spark: SparkSession, files: Sequence[File]) -> DataFrame:
    """Lines as raw bytes: file, block, n, size, raw; a line beyond MAX_ROW_BYTES comes with its beginning only."""
    reader = spark.read.option("lineSep", "\n")
    reader = reader.option("mapreduce.input.linerecordreader.line.maxlength", str(LONGEST_LINE))
    line, size = F.col("value").cast("binary"), F.octet_length("value")
    cut = F.when(size <= MAX_ROW_BYTES, line).otherwise(F.substring(line, 1, _ORIGINAL_BYTES))
    return reader.text([literal(f.path) for f in files]).select(
        *_place(), (size + 1).cast("bigint").alias("size"), cut.alias("raw")
    )


def lost_bytes(file: File, read: int) -> int:
    """Bytes of a text file that no line brought, given the sum of `size` over its lines; 0 where all is well."""
    # The last line may have no newline; Hadoop's reader drops a byte order mark (3 bytes).
    return max((file.text_bytes or 0) - 3 - read, 0)


def in_order(lines: DataFrame) -> DataFrame:
    """Whole files in the order of their lines, for CSV, whose quoted fields run over line ends."""
    return lines.repartition("file").sortWithinPartitions("file", "block", "n")


def alike(files: Sequence[File]) -> list[list[File]]:
    """Parquet files in groups of one schema."""

    def schema(file: File) -> str:
        return file.schema.json() if file.schema else ""

    return [list(group) for _, group in groupby(sorted(files, key=schema), key=schema)]


# How a field crosses to Python; text crosses as bytes, so that what is not UTF-8 is found there.
_CROSSING = {
    "label": "bigint",
    "rater_labels": "array<bigint>",
    "weight": "double",
    "gold_weight": "double",
    "attributes": "map<binary,binary>",
}


def columns(spark: SparkSession, files: Sequence[File], fields: Sequence[str]) -> DataFrame:
    """Rows of Parquet files of one schema: file, block, n, size, ignored, and those of `fields` that are there.

    `ignored`: names of the other columns. A row beyond MAX_ROW_BYTES comes with the beginning of its texts alone.
    """
    schema = files[0].schema or T.StructType()
    wanted = T.StructType([f for f in schema.fields if f.name in fields])
    ignored = F.array(*[F.lit(name) for name in schema.names if name not in fields]).cast("array<string>")
    size = reduce(lambda one, other: one + other, map(_octets, wanted.fields))
    placed = spark.read.schema(wanted).parquet(*[literal(f.path) for f in files])
    placed = placed.select(*_place(), size.alias("size"), ignored.alias("ignored"), *wanted.names)
    values = []
    for field in wanted.fields:
        value = F.when(F.col("size") <= MAX_ROW_BYTES, _flat(field))
        if field.dataType == T.StringType():
            value = value.otherwise(F.substring(field.name, 1, _BEGINNING))
        values.append(value.cast(_CROSSING.get(field.name, "binary")).alias(field.name))
    return placed.select("file", "block", "n", "size", "ignored", *values)


def _flat(column: T.StructField) -> Column:
    """A column; a struct of strings as the map it stands for."""
    value = F.col(column.name)
    if not isinstance(column.dataType, T.StructType):
        return value
    names = column.dataType.names
    as_map = F.map_from_arrays(F.array(*map(F.lit, names)), F.array(*[value[name] for name in names]))
    return F.when(value.isNotNull(), as_map)


def _octets(column: T.StructField) -> Column:
    """Bytes of a Parquet value, 0 for null."""
    value = _flat(column)
    if isinstance(column.dataType, T.MapType | T.StructType):
        texts = F.concat(F.map_keys(value), F.map_values(value))
    else:
        texts = F.array(value.cast("string"))
    size = F.aggregate(texts, F.lit(0).cast("bigint"), lambda sum, one: sum + F.coalesce(F.octet_length(one), F.lit(0)))
    return F.coalesce(size, F.lit(0).cast("bigint"))


@dataclass(frozen=True)
class Line:
    """A row of a file as bytes, or, from Parquet, as its JSON."""

    file: str
    block: int
    n: int
    size: int
    raw: bytes


# A row of a file, the record that was read from it, and why it is refused; with neither of these it is blank.
Read = tuple[Line, Mapping[str, object] | None, str | None]
Parse = Callable[[Iterator[pa.RecordBatch]], Iterator[Read]]
_Work = Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]


def _worker(parse: Parse, wanted: Wanted) -> _Work:
    """Batches of a reader's rows to batches of `ROW`; memory is bounded by rows and by bytes."""

    def work(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        known = set(wanted.fields)
        rows = ((line.size, _judged(line, record, why, wanted, known)) for line, record, why in parse(batches))
        yield from batched(rows, ROW)

    return work


def batched(rows_of: Iterable[tuple[int, dict[str, object]]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows with their sizes in bytes as batches of at most 1,000 rows and about 16 MiB."""
    done: list[dict[str, object]] = []
    total = 0
    for size, row in rows_of:
        done.append(row)
        total += min(size, MAX_ROW_BYTES)
        if len(done) >= _BATCH_ROWS or total >= _BATCH_BYTES:
            yield pa.RecordBatch.from_pylist(done, schema=schema)
            done, total = [], 0
    yield pa.RecordBatch.from_pylist(done, schema=schema)


def _judged(
    line: Line, record: Mapping[str, object] | None, reason: str | None, wanted: Wanted, known: set[str]
) -> dict[str, object]:
    """One row of `ROW`. `known` grows by the unknown names met, so that each is told once a task, 100 at most."""
    row: dict[str, object] = {"file": line.file, "block": line.block, "n": line.n, "size": line.size}
    row |= {"blank": record is None and reason is None, "raw": _original(line)}
    if record is None:
        return row | {"reason": reason}
    verdict = reason or wanted.accept(record)
    if isinstance(verdict, Accepted):
        row |= vars(verdict) | {"attributes": list((verdict.attributes or {}).items()) or None}
        if verdict.query:
            row |= {"normalised": canonical.normalised(verdict.query), "drawn_split": canonical.split(verdict.query)}
    else:
        row["reason"] = verdict
        if found := canonical.identity(record):
            row["query"], row["product_id"], row["locale"] = found
    if len(known) < len(wanted.fields) + 100 and not known.issuperset(record):
        new = [name for name in record if name not in known][:100]
        known.update(new)
        row["ignored"] = canonical.unknown(new, wanted.fields)
    return row


def _original(line: Line) -> str:
    text = line.raw[:_ORIGINAL_BYTES].decode("utf-8", "backslashreplace")
    whole = max(len(line.raw), line.size - 1) <= _ORIGINAL_BYTES
    return text if whole else f"{text} … cut, the row has {line.size:,} bytes"


def too_large(line: Line) -> str | None:
    """The reason where a row is too large to be parsed."""
    return f"too large: {line.size:,} bytes, a row may have {MAX_ROW_BYTES:,}" if line.size > MAX_ROW_BYTES else None


def _either(line: Line, found: Mapping[str, object] | str) -> Read:
    return (line, None, found) if isinstance(found, str) else (line, found, None)


def _raw_lines(batches: Iterator[pa.RecordBatch]) -> Iterator[Line]:
    for batch in batches:
        columns = [batch.column(name).to_pylist() for name in ("file", "block", "n", "size", "raw")]
        for values in zip(*columns, strict=True):
            yield Line(*values)


def _json_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Read]:
    for line in _raw_lines(batches):
        if not line.raw.strip():
            yield line, None, None
        else:
            yield _either(line, too_large(line) or canonical.from_json(line.raw))


def _csv_parser(required: Sequence[str]) -> Parse:
    def parse(batches: Iterator[pa.RecordBatch]) -> Iterator[Read]:
        for line, cells, reason in csv_rows(batches, ",", required):
            yield _either(line, canonical.from_csv(cells)) if cells is not None else (line, None, reason)

    return parse


def csv_rows(
    batches: Iterator[pa.RecordBatch], delimiter: str, required: Sequence[str]
) -> Iterator[tuple[Line, dict[str, str] | None, str | None]]:
    """The rows of CSV files, each under its file's header; the headers and empty lines come as blank."""
    for _, lines in groupby(_raw_lines(batches), key=lambda line: line.file):
        header: list[str] | None = None
        drawn, passed = [0], 0  # bytes that were read, and those of the rows that came of them
        for line, cells, reason in _csv_cells(_counted(lines, drawn), delimiter):
            passed += line.size
            if cells is None:
                yield line, None, reason
            elif header is None:
                header = [name.strip() for name in cells]
                header[0] = header[0].removeprefix("\ufeff")
                absent = [name for name in required if name not in header]
                named = [name for name in header if name]  # a spreadsheet leaves empty columns behind the last one
                if absent or len(set(named)) < len(named):
                    wrong = f"{', '.join(absent)} missing" if absent else "a name stands twice"
                    rest = drawn[0] + sum(other.size for other in lines) - passed
                    apart = "tabs" if delimiter == "\t" else "commas"
                    alone = f"; columns are separated by {apart}" if len(header) == 1 else ""
                    found = delimiter.join(header)[:200]
                    reason = f"{REFUSED}wrong columns: {wrong} in the header {found!r}{alone}"
                    yield replace(line, size=line.size + rest), None, reason
                    break
                yield line, None, None
            elif len(cells) != len(header):
                yield line, None, f"wrong number of columns: {len(cells)}, the header has {len(header)}"
            elif reason := canonical.not_utf8(line.raw):
                yield line, None, reason
            else:
                yield line, {name: cell for name, cell in zip(header, cells, strict=True) if name}, None


def _counted(lines: Iterator[Line], total: list[int]) -> Iterator[Line]:
    for line in lines:
        total[0] += line.size
        yield line


def _csv_cells(lines: Iterator[Line], delimiter: str) -> Iterator[tuple[Line, list[str] | None, str | None]]:
    """Records of a CSV file, numbered by their first line.

    Where a record cannot be parsed (a quote that is never closed swallows what follows) its first line alone is refused
    and parsing begins again at the next, so that the rows behind it are not lost. A file in which that happens on and
    on would be read as often as it has lines: beyond REREAD_LINES all lines of such a record are refused.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    again: deque[Line] = deque()
    taken: list[Line] = []
    held = reread = 0
    numbered = (replace(line, block=0, n=n) for n, line in enumerate(lines, start=1))

    def following() -> Iterator[str]:
        nonlocal held
        while (line := again.popleft() if again else next(numbered, None)) is not None:
            taken.append(line)
            held += line.size
            if held > 2 * MAX_ROW_BYTES and len(taken) > 1:
                raise csv.Error(f"no end of a record within {2 * MAX_ROW_BYTES:,} bytes")
            yield line.raw.decode("utf-8", "surrogateescape") + "\n"

    ended = False
    while not ended:
        try:
            for cells in csv.reader(following(), delimiter=delimiter, strict=True):
                raw, size = b"\n".join(line.raw for line in taken), sum(line.size for line in taken)
                whole = replace(taken[0], size=size, raw=raw)
                taken.clear()
                held = 0
                reason = too_large(whole)
                yield whole, (cells if raw.strip() and not reason else None), reason
            ended = True
        except csv.Error as error:
            first, *rest = taken
            taken.clear()
            held = 0
            yield first, None, too_large(first) or f"broken CSV: {error}"
            reread += len(rest)
            if reread <= REREAD_LINES:
                again.extendleft(reversed(rest))
                continue
            for line in rest:
                yield line, None, f"broken CSV: behind line {first.n}, as were too many before it: {error}"


def parquet_rows(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Rows that `columns` brought, each with its values; what it was is shown as JSON."""
    for batch in batches:
        for row in batch.to_pylist():
            file, block, n, size, ignored = (row.pop(name) for name in ("file", "block", "n", "size", "ignored"))
            shown = json.dumps(_printable(row), ensure_ascii=False)
            yield Line(file, block, n, size, shown.encode()), row | dict.fromkeys(ignored or ())


def _parquet_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Read]:
    for line, row in parquet_rows(batches):
        yield _either(line, too_large(line) or row)


def _printable(value: object) -> object:
    """A Parquet value as JSON can hold it; bytes that are not UTF-8 as \\xNN."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {name: _printable(one) for name, one in value.items()}
    if isinstance(value, list) and value and all(isinstance(one, tuple) for one in value):
        return {str(_printable(name)): _printable(one) for name, one in value}
    return value


def unreadable(spark: SparkSession, file: File, fields: Sequence[str]) -> str | None:
    """The reason where Spark cannot read all of a file (a damaged page, say); for when reading all files failed."""
    try:
        frame = lines(spark, [file]) if file.kind != "parquet" else columns(spark, [file], fields)
        frame.write.format("noop").mode("overwrite").save()
    except Exception as error:
        causes = [line for line in str(error).splitlines() if line.strip()]
        return f"cannot be read: {causes[0][:300] if causes else type(error).__name__}"
    return None
