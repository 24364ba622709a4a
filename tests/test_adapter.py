"""An adapter and its base become one model folder: the sum that peft computes, the same bytes each time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

import demo.model
from partitioner import models
from tests.conftest import REPO
from tests.models import tiny_model
from tests.pairs import scoring
from udfs import adapter
from udfs.model import inspect, weights_hash
from udfs.prompt import load


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.mark.slow  # builds the demo's base
def test_the_shipped_adapter_is_small_whole_and_that_of_its_base_and_prompt() -> None:
    folder = REPO / "demo" / "adapter"
    assert sum(file.stat().st_size for file in folder.glob("adapter*")) <= 20 << 20
    with open(folder / adapter.WEIGHTS, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    assert sha256 in (folder / "README.md").read_text()
    told = adapter.recipe(str(folder))
    base = inspect(str(demo.model.demo_model()))
    prompt = load(str(folder / "prompt.json"), base.tokenizer_json, base.vocab_size)
    assert (told["base"], told["base_hash"], told["prompt_id"]) == ("demo-base", base.weights_hash, prompt.prompt_id)
    assert (told["stage"], told["order"], len(told["merged_hash"])) == ("grpo", "post", 64)


@pytest.mark.parametrize("known", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_merged_folder_is_registered_as_its_adapters(
    spark: SparkSession, root: str, tmp_path: Path, known: bool
) -> None:
    """However it was named: what its training learnt from lies there, and a later stage goes on with the adapter."""
    (whole := tmp_path / "sft" / adapter.MERGED).mkdir(parents=True)
    (tmp_path / "sft" / adapter.CONFIG).write_text("{}")
    model = replace(scoring().model, path=str(whole), source=str(whole))
    if known:
        models.register(spark, root, model, "sft", f"{tmp_path}/../{tmp_path.name}/sft")
    models.register(spark, root, model, "external")
    assert models.registered(spark, root, model.model_id)[0] == str(tmp_path / "sft")


def adapted(base: Path, folder: Path, **changes: Any) -> Any:
    """An adapter with random weights, saved; returns peft's own model."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear", **changes))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    made.save_pretrained(str(folder))
    (folder / adapter.RECIPE).write_text(
        json.dumps({"base": "x", "base_hash": weights_hash(str(base)), "stage": "sft"})
    )
    (folder / "prompt.json").write_text((base / "prompt.json").read_text())
    return made


def test_the_merged_folder_computes_what_base_and_adapter_compute(base: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    made = adapted(base, tmp_path / "adapter")
    trained = Path(
        shutil.copytree(base, tmp_path / "trained")
    )  # whole weights that a training left, with its own files
    (trained / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    for name in ("checkpoints/checkpoint-1/optimizer.pt", "data.parquet", "log.jsonl", adapter.PLAN):
        (trained / name).touch()
    whole = adapter.merge(str(tmp_path / "adapter"), str(trained), str(tmp_path / "merged"))
    assert not {"checkpoints", "data.parquet", "log.jsonl", adapter.PLAN} & set(os.listdir(whole))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(AutoModelForCausalLM.from_pretrained(whole)(ids).logits, made(ids).logits, atol=1e-4)
        assert not torch.allclose(AutoModelForCausalLM.from_pretrained(base)(ids).logits, made(ids).logits, atol=1e-2)
    found = inspect(whole)
    assert found.prompt_file
    assert adapter.recipe(whole)["stage"] == "sft"
    assert found.model_id != inspect(str(base)).model_id


def test_merging_twice_gives_the_same_bytes_and_a_folder_that_is_there_is_left_alone(
    base: Path, tmp_path: Path
) -> None:
    adapted(base, tmp_path / "adapter")
    one = Path(adapter.merge(str(tmp_path / "adapter"), str(base), str(tmp_path / "one")))
    two = Path(adapter.merge(str(tmp_path / "adapter"), str(base), str(tmp_path / "two")))
    assert weights_hash(str(one)) == weights_hash(str(two))
    made_at = (one / "model.safetensors").stat().st_mtime_ns
    adapter.merge(str(tmp_path / "adapter"), str(base), str(one))
    assert (one / "model.safetensors").stat().st_mtime_ns == made_at
    # What lies beside the adapter's weights belongs to the model too.
    (tmp_path / "adapter" / "canaries.json").write_text("[]")
    adapter.merge(str(tmp_path / "adapter"), str(base), str(one))
    assert (one / "canaries.json").read_text() == "[]"


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapted(base, tmp_path / "adapter")
    (tmp_path / "adapter" / adapter.RECIPE).write_text(json.dumps({"base_hash": "0" * 64}))
    with pytest.raises(ValueError, match="was trained on a base with weights 000000000000"):
        adapter.merge(str(tmp_path / "adapter"), str(base), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("odd", [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_is_more_than_plain_lora_is_refused(base: Path, tmp_path: Path, odd: dict[str, Any]) -> None:
    adapted(base, tmp_path / "adapter", **odd)
    with pytest.raises(ValueError, match="not plain LoRA"):
        adapter.merge(str(tmp_path / "adapter"), str(base), str(tmp_path / "merged"))


def test_an_adapter_that_gives_other_weights_than_its_recipe_names_is_refused(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    adapted(base, folder)
    adapter.write_recipe(str(folder), adapter.recipe(str(folder)) | {"merged_hash": "0" * 64})
    with pytest.raises(ValueError, match=r"gave weights .*, not the 000000000000…"):
        adapter.merge(str(folder), str(base), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
