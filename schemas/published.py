"""The published data sets that are read as they come: Amazon ESCI and Wayfair WANDS.

ESCI: the Shopping Queries Data Set (arXiv 2206.06588), two Parquet files joined on product and locale. WANDS: the
Wayfair Annotation Dataset (ECIR 2022), three files that are named .csv and separated by tabs. Both become canonical
records here and then meet the same rules as every other row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from schemas import canonical
from schemas.files import File
from schemas.formats import (
    PAIRS,
    Line,
    Read,
    alike,
    batched,
    columns,
    csv_rows,
    in_order,
    judged,
    lines,
    parquet_rows,
    too_large,
)
from schemas.labels import ESCI, WANDS

# Each published file with the columns that are read from it.
ESCI_FILES = {
    "shopping_queries_dataset_examples.parquet": ("query", "product_id", "product_locale", "esci_label", "split"),
    "shopping_queries_dataset_products.parquet": (
        "product_id",
        "product_locale",
        "product_title",
        "product_description",
        "product_bullet_point",
        "product_brand",
        "product_color",
    ),
}
WANDS_FILES = {
    "query.csv": ("query_id", "query"),
    "product.csv": (
        "product_id",
        "product_name",
        "product_class",
        "category hierarchy",
        "product_description",
        "product_features",
    ),
    "label.csv": ("query_id", "product_id", "label"),
}
FILES: dict[str, dict[str, tuple[str, ...]]] = {"esci": ESCI_FILES, "wands": WANDS_FILES}


def published_rows(spark: SparkSession, format: str, files: Mapping[str, Sequence[File]]) -> DataFrame:
    """All judged pairs of a published data set: columns of `formats.ROW`. `files`: those of each published name."""
    parts = [files[name] for name in FILES[format]]
    return _esci_rows(spark, *parts) if format == "esci" else _wands_rows(spark, *parts)


# --- ESCI


def _esci_rows(spark: SparkSession, examples: Sequence[File], products: Sequence[File]) -> DataFrame:
    of_example, of_product = ESCI_FILES.values()
    texts = reduce(DataFrame.unionByName, [columns(spark, group, of_product) for group in alike(products)])
    product = texts.select(
        "product_id", "product_locale", F.struct(*of_product[2:]).alias("product"), F.col("size").alias("product_size")
    )
    asked = reduce(DataFrame.unionByName, [columns(spark, group, of_example) for group in alike(examples)])
    joined = asked.withColumn("ignored", F.lit(None).cast("array<string>")).join(
        product, ["product_id", "product_locale"], how="left"
    )
    # A row is both: of a product that is too large only the beginning came along.
    joined = joined.withColumn("size", F.col("size") + F.coalesce("product_size", F.lit(0))).drop("product_size")
    return judged(joined, _esci_records, PAIRS)


def _esci_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Read]:
    for line, row in parquet_rows(batches):
        reason = too_large(line)
        yield (line, None, reason) if reason else (line, *from_esci(row))


def from_esci(row: Mapping[str, Any]) -> tuple[dict[str, object], str | None]:
    """An example with its product (struct, or None) as a canonical record, and a reason where it cannot be one.

    E, S, C, I are 4, 3, 2, 1. The published test part stays test; train is cut into train and dev, 8 : 1, by the hash
    of the query.
    """
    record: dict[str, object] = {
        "query": row["query"],
        "product_id": row["product_id"],
        "locale": row["product_locale"],
    }
    grade, part, product = _plain(row["esci_label"]), _plain(row["split"]), row["product"]
    if grade not in (None, *ESCI):
        return record, f"label: {ascii(grade)[:60]} is none of {', '.join(ESCI)}"
    if product is None:
        return record, "missing: the products file has no product of this product_id and locale"
    record["label"] = ESCI[grade] if grade else None
    record["split"] = canonical.split(_plain(row["query"]) or "", among=9) if part == "train" else part
    texts = [t for t in (product["product_description"], product["product_bullet_point"]) if t]
    color = product["product_color"]
    record |= {
        "title": product["product_title"],
        "brand": product["product_brand"],
        "description": b"\n".join(texts) or None,
        "attributes": {"color": color} if color else None,
    }
    return record, None


def _plain(value: bytes | None) -> str | None:
    return None if value is None else value.decode("utf-8", "replace")


# --- WANDS

_CELLS = pa.schema(
    {
        "file": pa.string(),
        "block": pa.int64(),
        "n": pa.int64(),
        "size": pa.int64(),
        "raw": pa.binary(),
        "reason": pa.string(),
        "cells": pa.map_(pa.string(), pa.string()),
    }
)


def _wands_rows(
    spark: SparkSession, queries: Sequence[File], products: Sequence[File], labels: Sequence[File]
) -> DataFrame:
    query, product, label = (
        _cells(spark, files, names)
        for files, names in zip((queries, products, labels), WANDS_FILES.values(), strict=True)
    )
    asked = (
        query.select(F.col("cells.query_id").alias("query_id"), F.col("cells.query").alias("query"))
        .groupBy("query_id")
        .agg(F.collect_set("query").alias("asked"))
    )
    texts = product.where("cells IS NOT NULL")
    texts = texts.select(F.col("cells.product_id").alias("product_id"), F.col("cells").alias("product"))
    joined = (
        label.withColumn("query_id", F.col("cells.query_id"))
        .withColumn("product_id", F.col("cells.product_id"))
        .join(asked, "query_id", how="left")
        .join(texts, "product_id", how="left")
        .select(*_CELLS.names, "asked", "product")
    )
    # The other two files' rows take part as blank ones, so that their refused rows are told with their lines.
    empty = {"cells": joined.schema["cells"].dataType, "asked": joined.schema["asked"].dataType}
    others = query.unionByName(product).withColumn("cells", F.lit(None).cast(empty["cells"]))
    others = others.withColumn("asked", F.lit(None).cast(empty["asked"]))
    others = others.withColumn("product", F.lit(None).cast(empty["cells"]))
    return judged(joined.unionByName(others), _wands_records, PAIRS)


def _cells(spark: SparkSession, files: Sequence[File], required: Sequence[str]) -> DataFrame:
    """Rows of a tab-separated file: file, block, n, size, raw, reason, cells; a blank one has neither of the last."""

    def work(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        found = (
            (
                line.size,
                {**vars(line), "reason": reason, "cells": [(k, v) for k, v in cells.items() if v] if cells else None},
            )
            for line, cells, reason in csv_rows(batches, "\t", required)
        )
        yield from batched(found, _CELLS)

    return in_order(lines(spark, files)).mapInArrow(work, from_arrow_schema(_CELLS))


def _wands_records(batches: Iterator[pa.RecordBatch]) -> Iterator[Read]:
    for batch in batches:
        for row in batch.to_pylist():
            line = Line(*[row[name] for name in ("file", "block", "n", "size", "raw")])
            if row["cells"] is None:
                yield line, None, row["reason"]
            else:
                product = None if row["product"] is None else dict(row["product"])
                yield line, *from_wands(dict(row["cells"]), row["asked"] or [], product)


def from_wands(
    cells: Mapping[str, str], asked: Sequence[str], product: Mapping[str, str] | None
) -> tuple[dict[str, object], str | None]:
    """A row of label.csv with its queries and its product as a canonical record, and a reason where it cannot be one.

    Exact, Partial, Irrelevant are 4, 3, 1. The category is the hierarchy with the product's class behind it.
    """
    record: dict[str, object] = {"product_id": cells.get("product_id")}
    if len(asked) != 1:
        found = "has two texts" if asked else "is not"
        return record, f"missing: query_id {ascii(cells.get('query_id'))[:60]} {found} in query.csv"
    record["query"] = asked[0]
    grade = cells.get("label")
    if grade not in (None, *WANDS):
        return record, f"label: {ascii(grade)[:60]} is none of {', '.join(WANDS)}"
    if product is None:
        return record, f"missing: product_id {ascii(cells.get('product_id'))[:60]} is not in product.csv"
    classes = [product[name] for name in ("category hierarchy", "product_class") if product.get(name)]
    record |= {
        "label": WANDS[grade] if grade else None,
        "title": product.get("product_name"),
        "description": product.get("product_description"),
        "category": " / ".join(classes) or None,
        "attributes": _features(product.get("product_features") or ""),
    }
    return record, None


def _features(text: str) -> dict[str, object]:
    """`name : value|name : value` as attributes; the values of a name that comes again are joined by a comma."""
    found: dict[str, list[str]] = {}
    for feature in text.split("|"):
        name, _, value = feature.partition(":")
        if name.strip() and value.strip() not in (values := found.setdefault(name.strip(), [])):
            values.append(value.strip())
    return {name: ", ".join(values) for name, values in found.items()}
