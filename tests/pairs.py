"""Pairs that are not judged yet, and a model for the fake engine to score them with."""

from __future__ import annotations

from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from schemas import delta, tables
from tests.engines import load_fake
from tests.models import PROMPT, tiny_tokenizer
from udfs.engine import EngineSettings
from udfs.model import Model
from udfs.prompt import load
from udfs.score import Scoring

PRODUCTS = [
    ("k1", "Steel kettle 1.7 l", {"material": "steel"}, "Boils water for four cups of tea in three minutes. " * 4),
    ("k2", "Plastic kettle", {"material": "plastic"}, "The lid opens wide."),
    ("t1", "Blue towel", {"colour": "blue", "size": "70x140"}, None),
]
QUERIES = ["kettle not plastic", "blue towel", "cheap kettle", "gift for a newborn"]


def scoring(max_model_len: int = 512, **prompt: Any) -> Scoring:
    tokenizer = tiny_tokenizer()
    model = Model("/nowhere", "0123456789abcdef", "ff", "Fake", 512, 2048, tokenizer, None, None, "/nowhere")
    settings = EngineSettings(model="/nowhere", max_model_len=max_model_len)
    return Scoring(model, "external", load({**PROMPT, **prompt}, tokenizer, 512), settings, load_fake)


def put(spark: SparkSession, root: str, products: list[Any], queries: list[str] = QUERIES) -> None:
    """Every query with every product into `pairs`, as ingest does."""
    delta.prepare(spark, root, new=True)
    schema = "product_id STRING, title STRING, attributes MAP<STRING,STRING>, description STRING"
    rows = (
        spark.createDataFrame(products, schema)
        .crossJoin(spark.createDataFrame([(q,) for q in queries], "query STRING"))
        .withColumns({"locale": F.lit("en"), "brand": F.lit("Hearthline"), "category": F.lit("Kitchen")})
    )
    text = [F.col(c) for c in ("title", "brand", "description", "attributes", "category")]
    rows = rows.withColumns(
        {
            "pair_id": tables.pair_id(F.col("locale"), F.col("query"), F.col("product_id")),
            "weight": F.lit(None).cast("double"),
            "content_hash": tables.content_hash(tables.product_hash(*text), F.col("locale"), F.col("query")),
            "updated_at": F.current_timestamp(),
        }
    ).localCheckpoint()
    delta.upsert(spark, root, "pairs", rows, "old.content_hash <> new.content_hash")


def probs(spark: SparkSession, root: str) -> DataFrame:
    return delta.read(spark, root, "label_probs")
