"""LoRA adapters: which base one belongs to, and how the two become one ordinary model folder.

The engine runs whole weights, so an adapter is merged before it scores. The sum is taken in float64 and rounded once,
so that every machine gets the same bytes and with them the same model_id; a library's merge in bf16 rounds twice and
depends on the machine's kernels. Only what that sum covers is let through: plain LoRA on linear layers, the head among
them where the base has one of its own (of one that is tied to the embedding it is refused).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from schemas.runs import Unmet
from udfs.model import made_once, weights_hash

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECIPE = "training.json"  # how a trained folder was made; beside an adapter, and in what is merged from it
MERGED = "merged"
STAMP = "merged.json"  # which adapter and base a merged folder was made of
PLAN = "plan.json"  # of a training: settings and rows that the checkpoints in its folder belong to
_BESIDE = (".json", ".jinja", ".model", ".txt")
_OWN = ("manifest.json", "prompt.json", "canaries.json", RECIPE, STAMP, PLAN)  # tell of the folder's own weights


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter and not whole weights."""
    return (Path(folder) / CONFIG).is_file()


def recipe(folder: str) -> dict[str, Any]:
    """What `training.json` says of a trained folder; empty for a folder that this project did not make."""
    file = Path(folder) / RECIPE
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy the folder again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object; copy the folder again")
    return found


def refuse_chain_first(folder: str) -> None:
    """Raises ValueError where a model was taught `chain, then label`: its first token is no label, so no scores."""
    if recipe(folder).get("order", "post") == "pre":
        raise ValueError(
            f"{folder} was taught --order pre, chain first, so no label can be read off its first token, and there are "
            "no scores to explain; ask it for whole answers (sample), or train without --order pre to score with it"
        )


def write_recipe(folder: str, made: dict[str, Any]) -> None:
    """Writes `training.json`."""
    (Path(folder) / RECIPE).write_text(json.dumps(made, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def merge(adapter: str, base: str, target: str) -> str:
    """Writes base + adapter as a model folder `target`, once; returns it.

    Raises ValueError with a sentence where the base is not the adapter's, or the adapter is more than plain LoRA.
    """
    told = {name: value for name, value in recipe(adapter).items() if name != "merged_hash"}
    beside = [file for name in ("prompt.json", "canaries.json") if (file := Path(adapter) / name).is_file()]
    made = {
        "adapter": weights_hash(adapter),
        "base": told.get("base_hash") or weights_hash(base),
        "told": _hash(json.dumps(told, sort_keys=True).encode()),
        **{file.name: _hash(file.read_bytes()) for file in (Path(adapter) / CONFIG, *beside)},
    }
    stamp = Path(target) / STAMP

    def make(partial: Path) -> None:
        if (found := weights_hash(base)) != made["base"]:
            raise ValueError(
                f"adapter {adapter} was trained on a base with weights {made['base'][:12]}…, but {base} has "
                f"{found[:12]}…; name the right base in {RECIPE}"
            )
        copy_beside(base, partial)
        _merge_weights(Path(adapter), Path(base), partial)
        wanted = recipe(adapter).get("merged_hash")
        if wanted and (got := weights_hash(str(partial))) != wanted:
            raise ValueError(
                f"adapter {adapter} and its base gave weights {got[:12]}…, not the {wanted[:12]}… that its {RECIPE} "
                "names: one of its files has changed. Copy the folder again"
            )
        for file in (*beside, Path(adapter) / RECIPE):
            if file.is_file():
                shutil.copyfile(file, partial / file.name)
        (partial / STAMP).write_text(json.dumps(made))

    with made_once(Path(target), make, lambda: stamp.is_file() and json.loads(stamp.read_text()) == made):
        return target


def copy_beside(base: str, target: Path) -> None:
    """Copies what stands beside a model's weights (configuration, tokenizer), but for names that `target` has."""
    for file in Path(base).iterdir():
        told = file.suffix in _BESIDE and file.name not in _OWN and not file.name.endswith(".safetensors.index.json")
        if told and file.is_file() and not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


def let_read(folder: str | Path) -> None:
    """Lets all read the weights in it: safetensors lets only their owner, and workers may run as somebody else."""
    for file in Path(folder).glob("*.safetensors"):
        file.chmod(0o644)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _merge_weights(adapter: Path, base: Path, target: Path) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    scale = _scale(adapter)
    deltas: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(adapter / WEIGHTS, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (not a dict)
            module, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
            if half not in ("A.weight", "B.weight"):
                raise ValueError(f"adapter {adapter} holds {name}, which is no plain LoRA; merge it with peft yourself")
            deltas.setdefault(f"{module}.weight", {})[half[0]] = tensors.get_tensor(name).double()
    for file in sorted(base.glob("*.safetensors")):
        merged = {}
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                weight = tensors.get_tensor(name)
                if pair := deltas.pop(name, None):
                    weight = (weight.double() + scale * (pair["B"] @ pair["A"])).to(weight.dtype)
                merged[name] = weight
            save_file(merged, target / file.name, metadata=tensors.metadata())
    let_read(target)
    if deltas:
        raise ValueError(f"adapter {adapter} changes {sorted(deltas)[0]}, which its base {base} does not have")
    for file in base.glob("*.safetensors.index.json"):
        shutil.copyfile(file, target / file.name)


def refuse_unmergeable(base: str, modules: Iterable[str], fan_in_fan_out: bool) -> None:
    """Raises ValueError, before a training, where an adapter on these modules of a base could not be merged with it."""
    from safetensors import safe_open

    there: set[str] = set()
    for file in Path(base).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            there |= set(tensors.keys())
    missing = sorted(f"{module}.weight" for module in modules if f"{module}.weight" not in there)
    if missing or fan_in_fan_out:
        what = f"keeps {missing[0]} under another name" if missing else "keeps its weights transposed (Conv1D)"
        raise Unmet(f"{base} {what}, so an adapter could not be merged with it; train all weights: --full")


def _scale(adapter: Path) -> float:
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    odd = [
        name
        for name in (
            "use_dora",
            "use_rslora",
            "fan_in_fan_out",
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
            "lora_bias",
        )
        if config.get(name)
    ]
    if config.get("peft_type") != "LORA" or odd or config.get("bias", "none") != "none":
        raise ValueError(
            f"adapter {adapter} is not plain LoRA ({', '.join(odd) or config.get('peft_type')}); merge it with peft "
            "(merge_and_unload, then save_pretrained) and name the merged folder"
        )
    return float(config["lora_alpha"]) / float(config["r"])
