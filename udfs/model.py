"""What a model folder is, and when it is refused. Runs before Spark or the engine is started, so it is quick and cheap.

A model is a local folder in the Hugging Face form: config.json, tokenizer.json, *.safetensors. Weights in pickle files
and Python files beside them are programs that would run on every worker, so no folder that needs them is let through.
The id of a model is a hash of what decides its answers, so the same bytes in two folders are one model and any other
byte is another one. Weights of many gigabytes are read whole once: what they hashed to is kept, and later looks (each
worker's too, before its engine loads them) compare a `manifest`: names, sizes, headers, and samples of the contents.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schemas.files import is_uri

QUANT_CONFIG = "hf_quant_config.json"
INDEX = "model.safetensors.index.json"
# vLLM 0.32's names for quantised checkpoints on disk (its list is longer: it holds ways to quantise while loading).
QUANTIZATIONS = ("awq", "compressed-tensors", "fp8", "gptq", "modelopt", "modelopt_fp4", "mxfp4", "quark")
# Decoders in vLLM's registry end so; ForConditionalGeneration is a decoder that also takes images.
_ARCHITECTURES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack", ".onnx")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
_QUANTISED_HEAD = re.compile(r"(^|\.)lm_head\.(?!(weight|bias)$)")  # scales, or weights under another name
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# What the saving program writes about itself: it changes no answer.
_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version")
_CHUNK = 8 << 20
_SAMPLES, _SAMPLE = 64, 4096  # blocks of a weight file that a manifest looks at, and their bytes
KEPT_FROM_BYTES = 64 << 20  # smaller weights are hashed whole each time: it takes a moment
COPY_KEPT_DAYS = 7  # a node's copy of a model that nothing asked for so long goes when another version comes

Manifest = tuple[tuple[str, int, str], ...]  # name, size and mark of each file that decides a model's answers


@dataclass(frozen=True)
class Model:
    """A folder that may be loaded.

    path: on this machine. source: what others are told to load, the URI where `path` is this node's copy. model_id: 16
    hex digits over weights, config and tokenizer. vocab_size: token ids that have an embedding. max_positions: longest
    prompt and answer in tokens. tokenizer_json: the text of tokenizer.json. prompt_file, canaries_file: paths of
    prompt.json and canaries.json, None where the folder has none. quantised_head: whether its logits are.
    """

    path: str
    model_id: str
    weights_hash: str
    architecture: str
    vocab_size: int
    max_positions: int
    tokenizer_json: str = field(repr=False)
    prompt_file: str | None
    canaries_file: str | None
    source: str
    quantised_head: bool = False


def inspect(where: str, whole: bool = False) -> Model:
    """Checks a model folder, or the node's copy of what a URI names, and hashes it.

    whole: read all weights, also where they were hashed before and look the same. Raises ValueError with a sentence for
    every folder that could not be scored with or would run code of its own.
    """
    try:
        return _inspected(where, whole)
    except OSError as error:
        raise ValueError(f"model folder {where!r} cannot be read by user {os.getuid()}: {error}") from error


def _inspected(where: str, whole: bool) -> Model:
    path = Path(fetched(where))
    if not path.is_dir():
        raise ValueError(
            f"there is no model folder {where!r}; name a folder or a URI (s3://, gs://, hdfs://, file://) with "
            "config.json, tokenizer.json and *.safetensors (a model of a hub: download it first), or: --model demo"
        )
    path = path.resolve()
    _refuse_links_and_code(path)
    if (path / "adapter_config.json").exists():
        raise _refusal(
            path,
            "holds a LoRA adapter; a whole model is wanted. Merge the adapter into its base (peft: merge_and_unload, "
            "then save_pretrained) and name the merged folder",
        )
    config = _json(path / "config.json")
    architecture = _architecture(path, config)
    _refuse_unknown_quantization(path, config)
    shapes = _shapes(path)
    vocab_size = min([_number(path, config, ("vocab_size",)), *_embedding_rows(shapes)])
    tokenizer = _json(path / "tokenizer.json")
    highest = _highest_id(path, tokenizer)
    if highest >= vocab_size:
        raise _refusal(
            path,
            f"has a tokenizer.json with ids up to {highest}, but the model knows only 0..{vocab_size - 1}: the "
            "tokenizer is another model's. Put the tokenizer.json of this model there",
        )
    tokenizer_json = (path / "tokenizer.json").read_text(encoding="utf-8")
    weights = weights_hash(str(path), whole)
    lasting = {key: value for key, value in config.items() if key not in _VOLATILE}
    identity = [weights, lasting, hashlib.sha256(tokenizer_json.encode()).hexdigest()]
    if (path / INDEX).is_file():  # of two files with a tensor it says whose is loaded
        identity.append(_json(path / INDEX).get("weight_map") or {})
    return Model(
        path=str(path),
        model_id=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16],
        weights_hash=weights,
        architecture=architecture,
        vocab_size=vocab_size,
        max_positions=_number(path, config, _POSITIONS),
        tokenizer_json=tokenizer_json,
        prompt_file=_optional(path / "prompt.json"),
        canaries_file=_optional(path / "canaries.json"),
        source=where if is_uri(where) else str(path),
        quantised_head=any(_QUANTISED_HEAD.search(name) for name in shapes),
    )


def weights_hash(folder: str, whole: bool = False) -> str:
    """SHA-256, in hex, over names, sizes and contents of the folder's *.safetensors files, sorted by name.

    Contents are read where this node has not hashed them before, or their times or manifest have changed, or `whole`.
    """
    path = Path(folder).resolve()
    stats = [(file.name, file.stat()) for file in _weight_files(path)]
    if sum(stat.st_size for _, stat in stats) < KEPT_FROM_BYTES:
        return _weights_hash(path)
    seen = json.loads(json.dumps([[(name, stat.st_mtime_ns) for name, stat in stats], manifest(folder)]))
    kept = cache_folder() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        was = json.loads(kept.read_text())
        if not whole and was["seen"] == seen:
            return str(was["hash"])
    found = _weights_hash(path)
    with contextlib.suppress(OSError):  # nowhere to keep it: it is read again next time
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f"{kept.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps({"folder": str(path), "seen": seen, "hash": found}))
        partial.rename(kept)
    return found


def _weights_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in _weight_files(path):
        digest.update(f"{len(file.name.encode())}:{file.name}{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def manifest(folder: str) -> Manifest:
    """The files that decide what a model answers: name, size, and a hash of their content.

    Of weights it covers the header (names, types and shapes of the tensors) and `_SAMPLES` blocks spread over the rest,
    so that another training of the same architecture shows without gigabytes being read.
    """
    files = [
        *_weight_files(Path(folder)),
        *(Path(folder) / name for name in ("config.json", "tokenizer.json", QUANT_CONFIG, INDEX)),
    ]
    return tuple((file.name, file.stat().st_size, _mark(file)) for file in files if file.is_file())


def _mark(file: Path) -> str:
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as stream:
        if file.suffix != ".safetensors" or size <= _SAMPLES * _SAMPLE:
            return hashlib.sha256(stream.read()).hexdigest()[:16]
        header = int.from_bytes(stream.read(8), "little")
        digest.update(stream.read(min(header, size)))
        for n in range(_SAMPLES):
            stream.seek((size - _SAMPLE) * n // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]


def refuse_changed(folder: str, wanted: Sequence[Sequence[str | int]], whole: str | None = None) -> None:
    """Raises ValueError where a folder is not what was looked at when the job was planned.

    whole: the hash that all bytes of the weights must give; None trusts the manifest.
    """
    now, then = ({str(name): (size, mark) for name, size, mark in files} for files in (manifest(folder), wanted))
    changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if not changed and whole and _weights_hash(Path(folder)) != whole:
        changed = ["the weights"]
    if changed:
        raise ValueError(
            f"model folder {folder}: {', '.join(changed)} changed since this job looked at it, or this machine has "
            "another copy; nothing was scored with it. Put the same folder on every machine and start the job again"
        )


def fetched(where: str) -> str:
    """The folder of a model on this machine: itself, or the node's own copy of what a URI names.

    A copy is made once for each version of the files (names, sizes, times), under `cache_folder()`/models, by whoever
    is first; the others wait for its lock. Credentials are those of the machine (pyarrow's file systems: for S3 the
    environment, the profile or the instance's role). Raises ValueError where there is nothing to copy.
    """
    if not is_uri(where):
        return where
    if re.match(r"[^/]*//[^/@]*:(?!\d+/)[^@]*@", where):  # it would stand in table models, and in messages
        raise ValueError("--model: a URI must not hold a password or key; let the machine's own credentials serve")
    from pyarrow import fs

    try:
        system, path = fs.FileSystem.from_uri(re.sub(r"^s3[an]://", "s3://", where.rstrip("/")))
        files = [info for info in system.get_file_info(fs.FileSelector(path)) if info.is_file]
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {where} cannot be listed: {str(error).splitlines()[0]}") from error
    if not files:
        raise ValueError(f"--model {where}: there is no file")
    version = sorted((info.base_name, info.size, info.mtime_ns) for info in files)
    place, state = (hashlib.sha256(repr(value).encode()).hexdigest()[:12] for value in (where.rstrip("/"), version))
    folder = cache_folder() / "models" / f"{place}-{state}"

    def copy(partial: Path) -> None:
        for old in folder.parent.glob(f"{place}-{'?' * 12}"):
            if time.time() - old.stat().st_mtime > 86_400 * COPY_KEPT_DAYS:
                shutil.rmtree(old, ignore_errors=True)
        for info in files:
            fs.copy_files(info.path, str(partial / info.base_name), source_filesystem=system)
            if (partial / info.base_name).stat().st_size != info.size:
                raise ValueError(f"--model {where}: {info.base_name} changed while it was copied; start again")

    with made_once(folder, copy):
        os.utime(folder)
    return str(folder)


@contextlib.contextmanager
def made_once(folder: Path, make: Callable[[Path], None], fits: Callable[[], bool] | None = None) -> Iterator[None]:
    """Inside, `folder` is whole and nobody else makes or mends it: who comes first has `make` fill it, the others wait.

    make: fills an empty folder, which gets the name by one rename. fits: whether what is there will do (default: that
    it is there). The lock beside the folder ends with its process.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (fits() if fits else folder.is_dir()):
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        yield


def cache_folder() -> Path:
    """`$TAOSR1_CACHE`, else `.cache` of the checkout, else (run from an archive) `taosr1` in the user's cache."""
    if named := os.environ.get("TAOSR1_CACHE"):
        return Path(named).expanduser().resolve()
    repository = Path(__file__).resolve().parent.parent
    if (repository / "pyproject.toml").is_file():
        return repository / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taosr1"


def _refusal(path: Path, sentence: str) -> ValueError:
    return ValueError(f"model folder {path} {sentence}.")


def _refuse_links_and_code(path: Path) -> None:
    for file in path.iterdir():
        if not Path(os.path.realpath(file)).is_relative_to(path):
            raise _refusal(
                path,
                f"has {file.name} as a link out of the folder, where another program may change it (a hub's cache "
                f"looks so); plain files are wanted. Copy it with `cp -rL {path} COPY` and name the copy",
            )
    code = next(path.rglob("*.py"), None)
    if code is not None:
        raise _refusal(
            path,
            f"holds Python code ({code.relative_to(path)}), and no code from a model folder is ever run. If vLLM knows "
            "the architecture by itself, copy the folder without its *.py files and without auto_map",
        )
    for file in sorted(path.glob("*config.json")):
        if any(key == "auto_map" for key in _keys(_json(file))):
            raise _refusal(
                path,
                f"asks in {file.name} (auto_map) for code of its own, and no code from a model folder is ever run. If "
                "vLLM knows the architecture by itself, delete the auto_map entry",
            )


def _keys(node: Any) -> Iterator[str]:
    """All keys of a JSON value, at every depth."""
    if isinstance(node, dict):
        yield from node
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from _keys(inner)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise _refusal(file.parent, f"has no {file.name}; save the model again with save_pretrained")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(file.parent, f"has a {file.name} that is not JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise _refusal(file.parent, f"has a {file.name} that is not a JSON object; copy the file again")
    return content


def _architecture(path: Path, config: dict[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or not name.endswith(_ARCHITECTURES) or config.get("is_encoder_decoder"):
        raise _refusal(
            path,
            f"has the architecture {name!r} in config.json; wanted is a decoder that writes text, whose name ends in "
            f"{', '.join(_ARCHITECTURES)}, and no encoder-decoder. Use such a model",
        )
    return name


def _refuse_unknown_quantization(path: Path, config: dict[str, Any]) -> None:
    if (path / QUANT_CONFIG).exists():  # the engine would read it in the place of what config.json does not say
        raise _refusal(
            path,
            f"has a {QUANT_CONFIG}, by which ModelOpt up to 0.29 told how a model is quantised; quantise it by a newer "
            "one, which writes that into config.json, or save the model in bf16 without that file",
        )
    for part in (config, config.get("text_config")):
        quantization = part.get("quantization_config") if isinstance(part, dict) else None
        if quantization is None:
            continue
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method not in QUANTIZATIONS:
            raise _refusal(
                path,
                f"is quantised by {method!r}; the engine takes none or one of {', '.join(QUANTIZATIONS)}. Save the "
                "model in bf16, or quantise it by one of these",
            )


def _number(path: Path, config: dict[str, Any], names: tuple[str, ...]) -> int:
    """The first of `names` that config.json, or its text_config where it takes images too, gives a number for."""
    for part in (config, config.get("text_config")):
        for name in names:
            value = part.get(name) if isinstance(part, dict) else None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    raise _refusal(
        path, f"has no number {' or '.join(names)} in config.json; save the model again with save_pretrained"
    )


def _weight_files(path: Path) -> list[Path]:
    return sorted(file for file in path.glob("*.safetensors") if file.is_file())


def _shapes(path: Path) -> dict[str, list[int]]:
    """Name and shape of every tensor, from the headers of the weight files; nothing else of them is read."""
    from safetensors import SafetensorError, safe_open

    files = _weight_files(path)
    if not files:
        others = sorted(file.name for file in path.iterdir() if file.suffix in _OTHER_WEIGHTS)
        seen = f" but {', '.join(others[:3])}, which is not loaded (pickle files can run code)" if others else ""
        raise _refusal(
            path,
            f"has no *.safetensors{seen}; load the model where you trust it and save it with save_pretrained, which "
            "writes safetensors",
        )
    index = path / INDEX
    wanted = _json(index).get("weight_map") if index.exists() else {}
    if not isinstance(wanted, dict) or not all(isinstance(name, str) for name in wanted.values()):
        raise _refusal(path, f"has a {index.name} without a weight_map of file names; copy the file again")
    strangers = sorted(set(wanted.values()) - {file.name for file in files})
    if strangers:
        raise _refusal(
            path,
            f"has no {strangers[0]!r}, which its {index.name} names; copy the missing files into the folder itself",
        )
    shapes: dict[str, list[int]] = {}
    inside: set[tuple[str, str]] = set()
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    shapes[name] = tensors.get_slice(name).get_shape()
                    inside.add((name, file.name))
        except (SafetensorError, OSError) as error:
            raise _refusal(path, f"has a broken or truncated {file.name} ({error}); copy the file again") from error
    missing = sorted(set(wanted.items()) - inside)
    if missing:
        raise _refusal(
            path, f"has no tensor {missing[0][0]!r} in {missing[0][1]}, where its {index.name} puts it; copy both again"
        )
    return shapes


def _embedding_rows(shapes: dict[str, list[int]]) -> list[int]:
    return [shape[0] for name, shape in shapes.items() if name.endswith(_EMBEDDINGS) and shape]


def _highest_id(path: Path, tokenizer: dict[str, Any]) -> int:
    """The highest id that text from data can become. Added tokens beyond the embedding are harmless: data never
    becomes one, and the prompt's own are checked against vocab_size (gemma-3-1b has such a token).
    """
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        return len(vocabulary) - 1
    if isinstance(vocabulary, dict) and vocabulary and all(isinstance(i, int) for i in vocabulary.values()):
        return max(int(i) for i in vocabulary.values())
    raise _refusal(path, "has a tokenizer.json without a vocabulary; save the tokenizer again with save_pretrained")


def _optional(file: Path) -> str | None:
    return str(file) if file.is_file() else None
