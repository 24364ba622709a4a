"""Which input files may be read: listing them, and looking at each before Spark opens it.

A file that must not be read (a pipe, a link out of its folder, a bomb, half a Parquet file) is refused as a whole, with
a reason, and the others go on. Listing and looking run on the driver; anything but a plain local path goes through
Hadoop's file systems, so any URI that this Spark can read will do.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession
from pyspark.sql import types as T

from schemas.canonical import PAIR_FIELDS

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}
_ALLOWED = ".jsonl, .ndjson, .json, .csv (each also with .gz) and .parquet"
# Bombs. Real catalogues shrink 5 to 20 times under gzip, and up to 100 times in Parquet.
_BOMB_RATIO, _BOMB_FLOOR, _BOMB_ROWS = 200, 64 << 20, 100_000


@dataclass(frozen=True)
class File:
    """A file that may be read; `path` as Hadoop writes it."""

    path: str
    kind: str
    size: int
    modified: int
    text_bytes: int | None = None  # after decompression; None for Parquet
    schema: T.StructType | None = None  # of Parquet


def is_uri(where: str) -> bool:
    """Whether it names a place by its scheme, as Hadoop does with one slash or two, and not a path."""
    return bool(re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", where))


def local_path(where: str) -> str | None:
    """The path on this machine that `where` names, plainly or as a file: URI; None for any other URI."""
    if not is_uri(where):
        return where
    uri = urlparse(where)
    return unquote(uri.path) if uri.scheme.lower() == "file" and uri.netloc in ("", "localhost") else None


def literal(path: str) -> str:
    """A path in which Spark's glob characters stand for themselves."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", path)


def shown(path: str) -> str:
    """A path as people write it: without the scheme of local files, which Hadoop spells in two ways."""
    return re.sub(r"^file:/+", "/", path)


def kind(name: str) -> str | None:
    """Format of a file by its name; None where it is none of ours."""
    stem = name.lower().removesuffix(".gz") if name.endswith(".gz") else name.lower()
    found = KINDS.get(PurePosixPath(stem).suffix)
    return None if found == "parquet" and name.endswith(".gz") else found


_PASSED_OVER = "Spark passes over files whose names begin with _ or .; rename it"


def refuse_wrong_path(flag: str, where: str, names: Sequence[str] = ()) -> None:
    """Raises ValueError where a local input is missing, is no regular file, or lacks `names`; before Spark starts."""
    if not where.strip() or re.search(r"[\x00-\x1f\x7f-\x9f]", where):
        raise ValueError(f"{flag} {where!r}: a path may not be empty or hold control characters")
    path = local_path(where)
    if path is None:
        return
    for part in [os.path.join(path, name) for name in names] or [path]:
        if not os.path.exists(part):
            raise ValueError(f"{flag} {part}: there is no such file or folder")
    if names or os.path.isdir(path):
        return
    if _hidden(os.path.basename(path)):
        raise ValueError(f"{flag} {path}: {_PASSED_OVER}")
    if reason := _irregular(path, os.path.realpath(os.path.dirname(path) or ".")):
        raise ValueError(f"{flag} {path}: {reason}")
    if kind(path) is None:
        raise ValueError(f"{flag} {path}: its format is told by its name, which must end in {_ALLOWED}")


def listing(spark: SparkSession, where: str) -> tuple[list[File], dict[str, str], list[str]]:
    """Files under `where` (a file, or a folder with its subfolders), refused ones with their reason, skipped names.

    Names that begin with `_` or `.` are passed over without a word, as Spark does. Raises ValueError where there is
    nothing to read, and for a Delta table, whose files are not its rows.
    """
    found = _local_listing(where) if local_path(where) is not None else _remote_listing(spark, where)
    files: list[File] = []
    refused: dict[str, str] = {}
    skipped: list[str] = []
    for path, reason in found:
        name = path.rsplit("/", 1)[-1]
        if _hidden(name):
            raise ValueError(f"{path}: {_PASSED_OVER}")
        if reason is None and name.endswith(".parquet.gz"):
            reason = "Parquet is compressed inside; decompress the file first"
        if reason is None and kind(name) is None:
            skipped.append(name)
        elif reason is None:
            try:
                files.append(_looked_at(spark, _stated(spark, path, str(kind(name)))))
            except _Unfit as unfit:
                refused[path] = str(unfit)
        else:
            refused[path] = reason
    if not files and not refused:
        raise ValueError(f"{where}: no file to read there; names must end in {_ALLOWED}")
    return files, refused, skipped


class _Unfit(Exception):
    """Carries the reason why a whole file is refused."""


def _hidden(name: str) -> bool:
    return name.startswith(("_", "."))


def _partitioned(folders: Sequence[str]) -> str | None:
    """Why a file in a folder that says one of its fields, field=value, is refused: read by itself it lacks it."""
    part = next((folder for folder in folders if folder.partition("=")[0] in PAIR_FIELDS and "=" in folder), None)
    return part and f"lies in the partition folder {part}; write the value into its rows and take the file out of there"


def _irregular(path: str, folder: str) -> str | None:
    """Why a local path is not to be opened, or None. `folder`: a resolved folder that links may not leave."""
    if os.path.islink(path) and os.path.commonpath([os.path.realpath(path), folder]) != folder:
        return "is a symbolic link out of its folder; give the file itself, or copy it there"
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return "is no regular file (a pipe, a device or a socket); write its content to a file first"
    return None


def _local_listing(where: str) -> list[tuple[str, str | None]]:
    path = os.path.abspath(local_path(where) or where)
    if not os.path.isdir(path):
        return [(path, _irregular(path, os.path.realpath(os.path.dirname(path))))]
    found: list[tuple[str, str | None]] = []

    def unreadable(error: OSError) -> None:
        raise ValueError(f"{error.filename} cannot be listed: {error.strerror}")

    for folder, folders, names in os.walk(path, onerror=unreadable):
        if "_delta_log" in folders:
            raise ValueError(_delta_table(folder))
        links = [name for name in folders if not _hidden(name) and os.path.islink(os.path.join(folder, name))]
        found += [(os.path.join(folder, name), "is a symbolic link to a folder") for name in links]
        folders[:] = sorted(name for name in folders if not _hidden(name))
        for name in sorted(name for name in names if not _hidden(name)):
            file = os.path.join(folder, name)
            reason = _irregular(file, os.path.realpath(path)) if os.path.exists(file) else "is a broken symbolic link"
            reason = reason or _partitioned(os.path.relpath(folder, path).split("/"))
            said = file.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            if said != file and kind(name):  # Java cannot be told of it
                reason = "has a name that is not UTF-8; rename it"
            found.append((said, reason))
    return found


def _remote_listing(spark: SparkSession, where: str) -> list[tuple[str, str | None]]:
    jvm: Any = spark._jvm
    found: list[tuple[str, str | None]] = []
    try:
        path = jvm.org.apache.hadoop.fs.Path(where)
        system = path.getFileSystem(_hadoop(spark))
        base = system.makeQualified(path).toString()
        remaining = system.listFiles(path, True)
        while remaining.hasNext():
            name = remaining.next().getPath().toString()
            below = name.removeprefix(base).split("/")
            if "_delta_log" in below:
                raise ValueError(_delta_table(where))
            if not any(_hidden(part) for part in below):
                found.append((name, _partitioned(below[:-1])))
    except Py4JJavaError as error:
        raise ValueError(f"{where} cannot be listed: {_message(error)}") from error
    return sorted(found)


def _delta_table(where: str) -> str:
    return f"{where} is a Delta table, whose files also hold removed rows; write the rows you mean as Parquet"


def _hadoop(spark: SparkSession) -> Any:
    return spark._jsc.hadoopConfiguration()


def _hadoop_path(spark: SparkSession, path: str) -> Any:
    jvm: Any = spark._jvm
    # A plain path goes through java.io.File: a Hadoop Path would read `a:b` as a scheme.
    return jvm.org.apache.hadoop.fs.Path(jvm.java.io.File(path).toURI() if path.startswith("/") else path)


def _message(error: Py4JJavaError) -> str:
    cause = error.java_exception
    return str(cause.getMessage() or cause.getClass().getSimpleName()).splitlines()[0][:300]


def _stated(spark: SparkSession, path: str, of_kind: str) -> File:
    where = _hadoop_path(spark, path)
    try:
        status = where.getFileSystem(_hadoop(spark)).getFileStatus(where)
    except Py4JJavaError as error:
        raise _Unfit(f"cannot be read: {_message(error)}") from error
    return File(status.getPath().toString(), of_kind, status.getLen(), status.getModificationTime())


def changed(spark: SparkSession, file: File) -> str | None:
    """The reason where a file is not what it was when it was listed."""
    try:
        now = _stated(spark, file.path, file.kind)
    except _Unfit as unfit:
        return str(unfit)
    if (now.size, now.modified) != (file.size, file.modified):
        return "changed while it was read; run ingest again when its writer is done"
    return None


def _looked_at(spark: SparkSession, file: File) -> File:
    """The file with what is known of its inside. Raises _Unfit for what must not be read."""
    try:
        if file.kind == "parquet":
            return replace(file, schema=_footer(spark, file))
        if file.path.endswith(".gz"):
            return replace(file, text_bytes=_decompressed(spark, file))
    except Py4JJavaError as error:
        raise _Unfit(f"cannot be read: {_message(error)}") from error
    return replace(file, text_bytes=file.size)


def _bomb(file: File, unpacked: int) -> bool:
    return unpacked > max(_BOMB_FLOOR, _BOMB_RATIO * file.size)


def _decompressed(spark: SparkSession, file: File) -> int:
    """Bytes of a .gz file's content, by decompressing it once as a stream, no further than a bomb's limit."""
    jvm: Any = spark._jvm
    path = _hadoop_path(spark, file.path)
    packed = path.getFileSystem(_hadoop(spark)).open(path)
    try:
        nowhere = jvm.java.io.OutputStream.nullOutputStream()
        limit = max(_BOMB_FLOOR, _BOMB_RATIO * file.size) + 1
        stream = jvm.java.util.zip.GZIPInputStream(packed, 1 << 16)
        size = int(jvm.org.apache.commons.io.IOUtils.copyLarge(stream, nowhere, 0, limit))
    finally:
        packed.close()
    if _bomb(file, size):
        raise _Unfit(
            f"decompresses to over {_BOMB_RATIO} times its {file.size:,} bytes; if it is meant so, decompress it first"
        )
    return size


def _footer(spark: SparkSession, file: File) -> T.StructType:
    """Schema of a Parquet file, from its footer alone; the sizes that it promises are checked."""
    jvm: Any = spark._jvm
    parquet = jvm.org.apache.parquet.hadoop
    source = parquet.util.HadoopInputFile.fromPath(_hadoop_path(spark, file.path), _hadoop(spark))
    reader = parquet.ParquetFileReader.open(source)
    try:
        meta = reader.getFooter()
        rows = int(reader.getRecordCount())
        unpacked = sum(int(block.getTotalByteSize()) for block in meta.getBlocks())
        conf = spark._jsparkSession.sessionState().conf()
        converter = jvm.org.apache.spark.sql.execution.datasources.parquet.ParquetToSparkSchemaConverter(conf)
        columns = [_column(jvm, converter, one) for one in meta.getFileMetaData().getSchema().getFields()]
    finally:
        reader.close()
    if _bomb(file, unpacked):
        raise _Unfit(f"unpacks to {unpacked:,} bytes, over {_BOMB_RATIO} times its {file.size:,} bytes")
    # A thousand million rows of one value take no room at all; rows that differ do (ESCI's examples: 20 bytes each).
    if rows > max(_BOMB_ROWS, file.size):
        raise _Unfit(f"holds {rows:,} rows in {file.size:,} bytes, so they are all the same")
    return T.StructType(columns)


def _column(jvm: Any, converter: Any, column: Any) -> T.StructField:
    """A column of a Parquet file as Spark reads it; for a type that Spark does not know (nanoseconds, as pandas writes
    them), a type that no field of ours may have, and the file's own word for it in `metadata`."""
    alone = jvm.org.apache.parquet.schema.MessageType("one", jvm.java.util.Collections.singletonList(column))
    try:
        (field,) = T.StructType.fromJson(json.loads(converter.convert(alone).json()))
    except (Py4JJavaError, PySparkException):
        return T.StructField(column.getName(), T.CalendarIntervalType(), metadata={"parquet": column.toString()})
    return field
