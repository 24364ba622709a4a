"""The models that may score: which folder `--model NAME` means, and their rows in the table `models`.

A name is `demo` or `demo-base`, a folder or its URI, the folder of an adapter (which is merged with its base, once),
the model_id of a row, or `active`: the model of the thresholds in force.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyspark.sql import Column, Row, SparkSession
from pyspark.sql import functions as F

import demo.model
from partitioner import tiers
from schemas import delta
from schemas.files import is_uri
from schemas.tables import MODELS
from udfs import adapter
from udfs.model import Model, cache_folder, fetched, inspect
from udfs.prompt import Prompt
from udfs.score import Scoring

ACTIVE = "active"


def of(model_id: str | None, prompt_id: str | None) -> Column:
    """Rows of one model, asked with one prompt."""
    return (F.col("model_id") == F.lit(model_id)) & (F.col("prompt_id") == F.lit(prompt_id))


def row(spark: SparkSession, root: str, model_id: str) -> Row | None:
    """A model's row in `models`."""
    return delta.read_few(spark, root, "models").where(F.col("model_id") == model_id).head()


def register(
    spark: SparkSession,
    root: str,
    model: Model,
    stage: str,
    path: str | None = None,
    metrics: Mapping[str, float] | None = None,
    config: Mapping[str, str] | None = None,
) -> None:
    """Writes a model's row. What is known of it stays; a folder that was trained tells its story in training.json.

    `path`: where it is named (default: its folder, or the adapter's that its folder lies in, which a later stage goes
    on with). `metrics`, `config`: what is added to what is known.
    """
    told, known = adapter.recipe(model.path), row(spark, root, model.model_id)
    new: dict[str, Any] = known.asDict() if known else {
        "model_id": model.model_id,
        "base": told.get("base", model.architecture),
        "stage": told.get("stage", stage),
        "weights_hash": model.weights_hash,
        "created_at": datetime.now(UTC),
        **{name: told.get(name) for name in ("prompt_id", "parent_id", "data_hash", "trained_on")},
        "config": {name: str(value) for name, value in told.get("settings", {}).items()},
    }  # fmt: skip
    measured = {**told.get("metrics", {}), **(new.get("metrics") or {}), **(metrics or {})}
    new["metrics"] = {name: value for name, value in measured.items() if not math.isnan(value)}
    new["config"] = {**(new.get("config") or {}), **(config or {})}
    whole = Path(model.path)
    of_adapter = whole.name == adapter.MERGED and adapter.is_adapter(str(whole.parent))
    new["path"] = path or (str(whole.parent) if of_adapter else model.source)
    values = [new.get(name) for name in MODELS.names]
    delta.upsert(spark, root, "models", delta.rows(spark, "models", [values]))


def folder_of(name: str) -> tuple[str, str] | None:
    """Folder of whole weights and stage of `--model NAME` where no table is needed to tell; None for a model_id."""
    if (folder := named(name)) is None:
        return None
    return whole_folder(folder), "base" if name == "demo-base" else "external"


def named(name: str) -> str | None:
    """The folder that `--model NAME` is, an adapter's where it is one; None for a model_id, which a table knows."""
    if name == "demo-base":
        return str(demo.model.demo_model())
    if name == "demo":
        return str(demo.model.demo_adapter())
    if len(name) == 16 and set(name) <= set("0123456789abcdef") and not Path(name).exists():
        return None
    return name


def whole_folder(folder: str) -> str:
    """The folder itself, or what an adapter and its base make together. Raises ValueError with a sentence."""
    if is_uri(folder) and adapter.is_adapter(fetched(folder)):
        raise ValueError(
            f"{folder} is an adapter, and workers fetch whole models only. Copy it to a folder of this machine, run "
            "any job with it, which merges it, and put its folder `merged` where the workers reach it"
        )
    try:
        if not adapter.is_adapter(folder):
            return folder
    except OSError as error:  # a folder that this user may not look into, a name that is too long
        raise ValueError(f"--model {folder}: {error}") from error
    if Path(folder) == demo.model.demo_adapter():  # a checkout may be read-only
        return adapter.merge(folder, base_folder(folder), str(cache_folder() / "demo-tuned"))
    return adapter.merge(folder, base_folder(folder), str(Path(folder) / adapter.MERGED))


def base_folder(folder: str) -> str:
    """Folder of an adapter's base, which its training.json names."""
    name = adapter.recipe(folder).get("base")
    if not isinstance(name, str):
        raise ValueError(
            f"adapter {folder} has no {adapter.RECIPE} that names its base; merge it (peft: merge_and_unload, then "
            "save_pretrained) and name the merged folder"
        )
    if name == "demo-base":
        return str(demo.model.demo_model())
    if is_uri(name):
        return fetched(name)
    if not Path(name).is_dir():
        raise ValueError(
            f"adapter {folder} is of the base {name}, which is no folder of this machine; copy the base there, or name "
            f"its folder as `base` in {Path(folder) / adapter.RECIPE}"
        )
    return name


def registered_folder(spark: SparkSession, root: str, model_id: str) -> tuple[str, str]:
    """Folder of whole weights and stage of a model_id in `models`.

    Raises ValueError, naming the ones there are; and where another model lies in that folder now.
    """
    folder, stage = registered(spark, root, model_id)
    folder = whole_folder(folder)
    refuse_another(model_id, folder, inspect(folder))
    return folder, stage


def refuse_another(model_id: str, folder: str, found: Model) -> None:
    """Raises ValueError where the folder of a registered model holds another one now."""
    if found.model_id != model_id:
        raise ValueError(
            f"--model {model_id}: its folder {folder} holds another model now ({found.model_id}); put the former back, "
            "or name the folder itself to take what lies there"
        )


def registered(spark: SparkSession, root: str, model_id: str) -> tuple[str, str]:
    """Path and stage of a model_id in `models`."""
    rows = delta.read_few(spark, root, "models").select("model_id", "path", "stage").collect()
    models = {m["model_id"]: m for m in rows}
    if model_id not in models:
        known = ", ".join(sorted(models)) or "none yet"
        raise ValueError(f"--model {model_id}: no folder of that name, and no registered model either (known: {known})")
    return str(models[model_id]["path"]), str(models[model_id]["stage"])


def in_force(spark: SparkSession, root: str) -> tuple[str, str]:
    """model_id and prompt_id of the thresholds in force. Raises ValueError where there are none yet."""
    version = tiers.active(spark, root)
    if version is None:
        raise ValueError(
            "no version of thresholds is in force yet, so no model is; name one: --model demo, a model folder, or a "
            "registered model_id"
        )
    return version.model_id, version.prompt_id


def kept_prompt(spark: SparkSession, root: str, model_id: str, prompt_id: str) -> dict[str, Any] | None:
    """The content of the prompt.json with this id that the model was asked with; None where the tables do not know."""
    known = row(spark, root, model_id)
    text = (known["config"] or {}).get(_prompt_key(prompt_id)) if known else None
    return json.loads(text) if text else None


def keep_prompt(prompt: Prompt) -> dict[str, str]:
    """What `register` adds to a model's config, so that `kept_prompt` finds the prompt."""
    return {_prompt_key(prompt.prompt_id): json.dumps(prompt.spec)}


def _prompt_key(prompt_id: str) -> str:
    return f"prompt {prompt_id}"


def refuse_other_prompt(spark: SparkSession, root: str, what: Scoring) -> None:
    """Raises ValueError where the thresholds in force are of this model, but of another prompt: no tier would come."""
    model_id, prompt_id = in_force(spark, root)
    if model_id == what.model.model_id and prompt_id != what.prompt.prompt_id:
        raise ValueError(
            f"the thresholds in force are of prompt {prompt_id}, but model {model_id} would be asked with "
            f"{what.prompt.prompt_id}; give the file of the former with --prompt FILE"
        )


def refuse_as_scorer(spark: SparkSession, root: str, what: Scoring) -> None:
    """Raises ValueError where no scores are to be read off the model: taught chain first, or with another prompt."""
    adapter.refuse_chain_first(what.model.path)
    refuse_foreign_prompt(spark, root, what)


def refuse_foreign_prompt(spark: SparkSession, root: str, what: Scoring) -> None:
    """Raises ValueError where the model was trained with another prompt; warns where it was trained with none."""
    known = row(spark, root, what.model.model_id)
    trained = known["prompt_id"] if known else adapter.recipe(what.model.path).get("prompt_id")
    if trained not in (None, what.prompt.prompt_id):
        raise ValueError(
            f"model {what.model.model_id} was trained with prompt {trained}, not with {what.prompt.prompt_id}; leave "
            "--prompt away to use the one beside its weights"
        )
    if trained is None:
        print(f"model {what.model.model_id} was not trained with a prompt of this project; look at p_outside")
