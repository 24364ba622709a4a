"""The jobs as people start them, by ./spark-submit.sh, what they are given and what they leave in the tables."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from tests.conftest import QUICK, REPO


def submit(*words: str | Path, timeout: int = 540) -> str:
    """Runs ./spark-submit.sh and returns what it printed."""
    quick = [word for key, value in QUICK.items() for word in ("--conf", f"{key}={value}")]
    command = [str(REPO / "spark-submit.sh"), *quick, *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr[-6000:]
    return ended.stdout


def a_file_of_pairs(folder: Path, products: int, queries: int) -> Path:
    """Products with long enough descriptions that each is some work."""
    file = folder / "pairs.jsonl"
    rows = [
        {
            "query": f"kettle {query}",
            "product_id": f"k{product}",
            "title": f"Steel kettle no. {product}",
            "description": f"Kettle {product} boils water for {product + 1} cups of tea in three minutes. " * 6,
        }
        for product in range(products)
        for query in range(queries)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def table(root: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = DeltaTable(f"{root}/{name}").to_pyarrow_table().to_pylist()
    return rows
