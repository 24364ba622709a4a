"""Pairs to prompts, as a DataFrame step: each distinct product and each distinct query is tokenised once.

A prompt is a product part and a query part (see `udfs.prompt`), each a pure function of its own text. So the two are
tokenised apart, on as many cores as Spark has, and joined as token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from pyspark import Broadcast
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from schemas import tables
from schemas.canonical import TEXTS
from udfs.prompt import Part, Prompt, Renderer, renderer

_shipped: dict[tuple[str, str], Broadcast[Prompt]] = {}
_PARTS = pa.struct([("ids", pa.list_(pa.int32())), ("cut", pa.int32())])


def rendered(pairs: DataFrame, prompt: Prompt) -> DataFrame:
    """Rows of `pairs` as prompts.

    Returns pair_id, query, product_id, locale, content_hash, and: ids ARRAY<INT>, the prompt's token ids;
    group_tokens INT, the length of its first part; tokens_cut INT, tokens of text that budgets and block cut left out;
    and `portion`, where the pairs have it.
    """
    held = shipped(pairs.sparkSession, prompt)
    keyed = pairs.withColumn("product_key", tables.product_hash(*map(F.col, TEXTS)))
    products = (
        keyed.select("product_key", *TEXTS)
        .dropDuplicates(["product_key"])
        .mapInArrow(_tokenise(held, _product), "product_key STRING, product STRUCT<ids: ARRAY<INT>, cut: INT>")
    )
    queries = (
        keyed.select("query")
        .distinct()
        .mapInArrow(_tokenise(held, _query), "query STRING, asked STRUCT<ids: ARRAY<INT>, cut: INT>")
    )
    first, second = ("product", "asked") if prompt.first == "product" else ("asked", "product")
    return (
        keyed.join(queries, "query", how="inner")  # first, as it is short: the second join moves what the first brought
        .join(products, "product_key", how="inner")
        .select(
            "pair_id",
            "query",
            "product_id",
            "locale",
            "content_hash",
            F.concat(f"{first}.ids", f"{second}.ids").alias("ids"),
            F.size(f"{first}.ids").alias("group_tokens"),
            (F.col("product.cut") + F.col("asked.cut")).alias("tokens_cut"),
            *[name for name in ("portion",) if name in pairs.columns],
        )
    )


def product_text(row: Mapping[str, Any]) -> dict[str, Any]:
    """The product's text in a row, by the names that `Renderer.product` takes; what the row lacks is None."""
    return {name: row.get(name) for name in TEXTS}


def _product(renderer: Renderer, row: dict[str, Any]) -> Part:
    return renderer.product(**product_text(row))


def _query(renderer: Renderer, row: dict[str, Any]) -> Part:
    return renderer.query(row["query"])


def shipped(spark: SparkSession, prompt: Prompt) -> Broadcast[Prompt]:
    """The prompt and its tokenizer, sent once. Spark would broadcast a function that holds more than 1 MB each time one
    is made, and leaves the file of each on the driver's disk for as long as the application runs."""
    key = (str(spark.sparkContext.applicationId), prompt.prompt_id)
    if key not in _shipped:
        _shipped[key] = spark.sparkContext.broadcast(prompt)
    return _shipped[key]


def _tokenise(
    prompt: Broadcast[Prompt], part: Callable[[Renderer, dict[str, object]], Part]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Keeps the first column (the key) and puts the part's ids and cut beside it."""

    def tokenise(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        compiled = renderer(prompt.value)
        for batch in batches:
            parts = [part(compiled, row) for row in batch.to_pylist()]
            tokenised = pa.array([{"ids": p.ids, "cut": p.cut} for p in parts], type=_PARTS)
            yield pa.RecordBatch.from_arrays([batch.column(0), tokenised], names=[batch.schema.names[0], "part"])

    return tokenise
