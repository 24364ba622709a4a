"""What a model folder is: the id of its bytes, and a sentence for every folder that is refused."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import udfs.model
from udfs.model import QUANTIZATIONS, Model, fetched, inspect, manifest, refuse_changed, weights_hash

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 12,
    "max_position_embeddings": 512,
    "transformers_version": "5.19.0",
}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 9}, "merges": []}, "added_tokens": []}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that is let through; each test spoils one thing in it."""
    return made(tmp_path / "model")


def made(path: Path) -> Path:
    path.mkdir()
    write(path / "config.json", CONFIG)
    write(path / "tokenizer.json", TOKENIZER)
    save_file({EMBEDDING: np.ones((10, 4), np.float16)}, path / "model.safetensors")
    return path


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))


def changed(file: Path, **changes: object) -> None:
    write(file, json.loads(file.read_text()) | changes)


def test_a_good_folder_is_described(folder: Path) -> None:
    write(folder / "prompt.json", {})
    model = inspect(str(folder))
    assert model == Model(
        path=str(folder.resolve()),
        model_id=model.model_id,
        weights_hash=weights_hash(str(folder)),
        architecture="LlamaForCausalLM",
        vocab_size=10,  # the rows of the embedding, not config.json's 12
        max_positions=512,
        tokenizer_json=json.dumps(TOKENIZER),
        prompt_file=str(folder.resolve() / "prompt.json"),
        canaries_file=None,
        source=str(folder.resolve()),
    )
    assert len(model.model_id) == 16
    assert "vocab" not in repr(model).replace("vocab_size", "")


def test_a_model_that_takes_images_too_keeps_its_numbers_in_text_config(folder: Path) -> None:
    inner = {"vocab_size": 11, "max_position_embeddings": 99}
    write(folder / "config.json", {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner})
    save_file({"vision.weight": np.ones((2, 2))}, folder / "model.safetensors")
    model = inspect(str(folder))
    assert (model.vocab_size, model.max_positions) == (11, 99)


def test_the_same_bytes_in_two_folders_are_one_model(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    changed(other / "config.json", transformers_version="4.0.0", _name_or_path="/elsewhere")
    write(other / "prompt.json", {"not": "a part of the model"})
    assert inspect(str(other)).model_id == inspect(str(folder)).model_id


def one_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def a_file_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        one_weight,
        a_file_name,
        lambda folder: changed(folder / "config.json", rope_theta=1e6),
        lambda folder: changed(folder / "tokenizer.json", version="1.1"),
        lambda folder: save_file({"lm_head.weight": np.ones(2)}, folder / "more.safetensors"),
        lambda folder: write(folder / "model.safetensors.index.json", {"weight_map": {EMBEDDING: "model.safetensors"}}),
    ],
)
def test_any_other_byte_is_another_model(folder: Path, change: Callable[[Path], None]) -> None:
    before = inspect(str(folder)).model_id
    change(folder)
    assert inspect(str(folder)).model_id != before


def test_the_weights_hash_covers_names_sizes_and_contents_in_the_order_of_names(folder: Path) -> None:
    for letter in "ecabd":
        save_file({letter: np.ones(3)}, folder / f"{letter}.safetensors")
    wanted = hashlib.sha256()
    for name in [*(f"{letter}.safetensors" for letter in "abcde"), "model.safetensors"]:
        content = (folder / name).read_bytes()
        wanted.update(f"{len(name)}:{name}{len(content)}:".encode() + content)
    assert weights_hash(str(folder)) == wanted.hexdigest()


def test_sharded_weights_with_their_index_are_let_through(folder: Path) -> None:
    save_file({"lm_head.weight": np.ones((10, 4))}, folder / "second.safetensors")
    shards = {EMBEDDING: "model.safetensors", "lm_head.weight": "second.safetensors"}
    write(folder / "model.safetensors.index.json", {"weight_map": shards})
    assert inspect(str(folder)).vocab_size == 10


def test_pickle_files_beside_safetensors_are_ignored(folder: Path) -> None:
    before = inspect(str(folder)).model_id
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert inspect(str(folder)).model_id == before


def test_added_tokens_beyond_the_embedding_are_harmless(folder: Path) -> None:
    changed(folder / "tokenizer.json", added_tokens=[{"id": 262_144, "content": "<image>"}])
    assert inspect(str(folder)).vocab_size == 10


def pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def hub_cache(folder: Path) -> None:
    blob = folder.parent / "blobs" / "0123abcd"
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to("../blobs/0123abcd")


def loop(folder: Path) -> None:
    (folder / "x").symlink_to("y")
    (folder / "y").symlink_to("x")


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def index(**weight_map: object) -> Callable[[Path], None]:
    return lambda folder: write(folder / "model.safetensors.index.json", weight_map)


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: changed(folder / "config.json", **changes)


def tokenizer(**model: object) -> Callable[[Path], None]:
    return lambda folder: write(folder / "tokenizer.json", {"model": model})


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None  # type: ignore[return-value]


def gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def in_subfolder(folder: Path) -> None:
    (folder / "code").mkdir()
    (folder / "code" / "modeling.py").write_text("print('hello')")


def fifo(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (gone("config.json"), r"has no config\.json"),
        (text("config.json", "{"), r"has a config\.json that is not JSON"),
        (text("config.json", "[" * 100_000), r"has a config\.json that is not JSON"),
        (text("config.json", "[]"), r"has a config\.json that is not a JSON object"),
        (gone("tokenizer.json"), r"has no tokenizer\.json"),
        (fifo, r"has no tokenizer\.json"),
        (text("tokenizer.json", "{}"), r"tokenizer\.json without a vocabulary"),
        (tokenizer(vocab={}), r"tokenizer\.json without a vocabulary"),
        (tokenizer(vocab={"a": 10}), r"ids up to 10, but the model knows only 0\.\.9"),
        (tokenizer(vocab=[["a", 0.0]] * 11), r"ids up to 10, but the model knows only 0\.\.9"),
        (gone("model.safetensors"), r"has no \*\.safetensors; .* save_pretrained"),
        (pickles_only, r"has no \*\.safetensors but pytorch_model\.bin, which is not loaded \(pickle"),
        (truncated, r"broken or truncated model\.safetensors"),
        (text("model.safetensors", ""), r"broken or truncated model\.safetensors"),
        (text("model.safetensors", "version https://git-lfs"), r"broken or truncated model\.safetensors"),
        (hub_cache, r"has model\.safetensors as a link out of the folder.*cp -rL"),
        (index(weight_map={"a": "model-00002.safetensors"}), r"has no 'model-00002\.safetensors'.*names"),
        (index(weight_map={"a": "../model/model.safetensors"}), r"has no '\.\./model/model\.safetensors'"),
        (index(weight_map={"lm_head": "model.safetensors"}), r"has no tensor 'lm_head' in model\.safetensors"),
        (index(weight_map=[1]), "without a weight_map"),
        (index(), "without a weight_map"),
        (config(auto_map={"AutoModel": "modeling.Model"}), r"asks in config\.json \(auto_map\).*delete"),
        (config(text_config={"auto_map": {}}), r"asks in config\.json \(auto_map\)"),
        (text("tokenizer_config.json", '{"auto_map": {}}'), r"asks in tokenizer_config\.json \(auto_map\)"),
        (text("modeling.py", "print('hello')"), r"holds Python code \(modeling\.py\)"),
        (in_subfolder, r"holds Python code \(code/modeling\.py\)"),
        (text("adapter_config.json", "{}"), r"holds a LoRA adapter.*merge_and_unload"),
        (
            config(architectures=["BertForSequenceClassification"]),
            "has the architecture 'BertForSequenceClass.*ForCausalLM",
        ),
        (config(architectures=[]), "has the architecture None"),
        (config(is_encoder_decoder=True), "no encoder-decoder"),
        (config(quantization_config={"quant_method": "bitsandbytes"}), "quantised by 'bitsandbytes'.*awq, compressed"),
        (config(quantization_config={}), "quantised by None"),
        (lambda f: (f / "hf_quant_config.json").write_text("{}"), r"has a hf_quant_config\.json, by which ModelOpt"),
        (config(text_config={"quantization_config": {"quant_method": "x"}}), "quantised by 'x'"),
        (config(vocab_size=None), r"has no number vocab_size in config\.json"),
        (config(max_position_embeddings="long"), "has no number max_position_embeddings or n_positions"),
    ],
)
def test_a_folder_that_cannot_be_trusted_or_loaded_is_refused(
    folder: Path, spoil: Callable[[Path], None], sentence: str
) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=sentence) as refused:
        inspect(str(folder))
    assert str(folder.resolve()) in str(refused.value)


def test_an_adapter_without_anything_else_is_called_an_adapter(tmp_path: Path) -> None:
    write(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(ValueError, match="holds a LoRA adapter"):
        inspect(str(tmp_path))


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in (str(tmp_path / "absent"), str(tmp_path / "file"), "a\0b"):
        with pytest.raises(ValueError, match=r"there is no model folder .* --model demo"):
            inspect(name)


def test_a_folder_that_cannot_be_looked_into_is_a_sentence_too() -> None:
    with pytest.raises(ValueError, match=r"cannot be read by user \d+: .*File name too long"):
        inspect("x" * 300)


def test_links_within_the_folder_are_let_through_and_endless_ones_do_no_harm(folder: Path) -> None:
    (folder / "copy.json").symlink_to("config.json")
    loop(folder)
    assert inspect(str(folder)).vocab_size == 10


@pytest.mark.parametrize(
    ("name", "quantised"),
    [("lm_head.weight", False), ("lm_head.qweight", True), ("language_model.lm_head.weight_scale", True)],
)
def test_a_head_that_is_quantised_is_seen(folder: Path, name: str, quantised: bool) -> None:
    save_file({name: np.ones(2)}, folder / "more.safetensors")
    assert inspect(str(folder)).quantised_head is quantised


@pytest.mark.parametrize("key", ["AKIA:hunter2", "AKIA:a/hunter2+b", ":hunter2"])
def test_a_uri_with_a_key_in_it_is_refused_without_being_repeated(key: str) -> None:
    with pytest.raises(ValueError, match="must not hold a password or key") as refused:
        inspect(f"s3://{key}@bucket/model")
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match="cannot be listed"):
        inspect("nothing://host:8020/a@b")


@pytest.mark.parametrize("method", [None, *QUANTIZATIONS])
def test_quantised_models_are_let_through_where_the_engine_knows_the_method(folder: Path, method: str | None) -> None:
    changed(folder / "config.json", quantization_config=method and {"quant_method": method})
    assert inspect(str(folder)).architecture == "LlamaForCausalLM"


def test_every_quantisation_let_through_is_one_that_the_installed_engine_names() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vllm is not installed")
    listed = Path(found.origin).parent / "model_executor" / "layers" / "quantization" / "__init__.py"
    names = {node.value for node in ast.walk(ast.parse(listed.read_text())) if isinstance(node, ast.Constant)}
    assert set(QUANTIZATIONS) <= names


def test_large_weights_are_read_whole_once_and_again_when_they_may_have_changed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAOSR1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(udfs.model, "KEPT_FROM_BYTES", 1)
    read: list[Path] = []
    hashed = udfs.model._weights_hash

    def noted(path: Path) -> str:
        read.append(path)
        return hashed(path)

    monkeypatch.setattr(udfs.model, "_weights_hash", noted)
    first = weights_hash(str(folder))
    assert weights_hash(str(folder)) == first == hashed(folder)
    assert len(read) == 1
    assert weights_hash(str(folder), whole=True) == first
    assert len(read) == 2
    # The same size and time, as a careless copy leaves it: the samples see it.
    file = folder / "model.safetensors"
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_hash(str(folder)) == hashed(folder) != first
    # A time that moved is a reason to read, even where all samples are the same.
    os.utime(file, ns=(1, 1))
    weights_hash(str(folder))
    assert len(read) == 4


def test_a_folder_that_changed_after_it_was_looked_at_is_refused_by_the_worker(folder: Path) -> None:
    large = np.zeros((600, 1024), np.float16)  # 1.2 MB: more than the samples cover
    save_file({EMBEDDING: large}, folder / "model.safetensors")
    looked_at, whole = manifest(str(folder)), weights_hash(str(folder))
    refuse_changed(str(folder), looked_at, whole)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    # One byte between two samples: only reading all of it can see that.
    content[30_000] ^= 1
    file.write_bytes(content)
    refuse_changed(str(folder), looked_at)
    with pytest.raises(ValueError, match=r"the weights changed since this job looked at it"):
        refuse_changed(str(folder), looked_at, whole)
    # Another training of the same architecture has the same names, sizes and headers.
    save_file({EMBEDDING: large + 1}, file)
    write(folder / "tokenizer.json", TOKENIZER | {"version": "2"})
    with pytest.raises(ValueError, match=r"model.safetensors, tokenizer.json changed"):
        refuse_changed(str(folder), looked_at)


def test_a_model_behind_a_uri_is_copied_once_a_node_and_version(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAOSR1_CACHE", str(tmp_path / "cache"))
    uri = folder.as_uri()
    with ThreadPoolExecutor(4) as workers:
        (copy,) = set(workers.map(fetched, [uri] * 4))
    assert sorted(f.name for f in Path(copy).iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    model = inspect(uri)
    assert (model.path, model.source) == (copy, uri)
    assert model.model_id == inspect(str(folder)).model_id
    (Path(copy) / "mark").touch()
    assert fetched(uri + "/") == copy
    # A copy that was cut off is no copy.
    partial = tmp_path / "cache" / "models" / (Path(copy).name.split("-")[0] + ".partial")
    partial.mkdir()
    (partial / "config.json").write_text("{")
    changed(folder / "config.json", vocab_size=13)
    os.utime(copy, (1, 1))
    newer = fetched(uri)
    assert newer != copy
    assert json.loads((Path(newer) / "config.json").read_text())["vocab_size"] == 13
    assert not Path(copy).exists()  # of last century
    for wrong in ("nowhere://bucket/model", (tmp_path / "none").as_uri()):
        with pytest.raises(ValueError, match=f"--model {wrong}"):
            inspect(wrong)
