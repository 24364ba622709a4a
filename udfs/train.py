"""What a training process does: a policy, one stage's trainer, checkpoints it resumes from, and the folder it leaves.

The job on Spark picks the rows and writes them as token ids (`DATA`); from there on a stage knows folders only, so it
runs in the job's own process on one CPU or GPU, or in many processes that TorchDistributor starts. TRL's
trainers own the loop, the optimizer, logging and checkpoints; what is ours is how rows are laid out (`udfs.forest`).
A stage leaves a LoRA adapter (or, with `full`, whole weights) with prompt.json and `training.json` beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from schemas.labels import LABELS
from schemas.runs import Unmet
from udfs import adapter
from udfs.answer import Form, conclusion
from udfs.difficulty import STATE, Difficulty, pass_rates
from udfs.forest import IGNORED, Row, forests, grouped, logprobs, planted
from udfs.rollout import rolled_out

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import TrainerCallback
    from transformers.trainer_callback import TrainerState

DATA = "data.parquet"  # in the out folder: the rows of the stage
LOG = "log.jsonl"  # one line a logged step
TOLD_SECONDS = 20.0  # between two lines that people read
LAST_STEPS = 10  # over which a training's figures are means
COUNTED = ("step", "epoch", "generated_tokens", "num_tokens", "learning_rate")  # these say where it came to
_GPUS_OF_DRIVER = "spark.driver.resource.gpu.amount"
CHOSEN_NLL = 0.2  # weight of the chosen answers' own likelihood in DPO's loss


@dataclass(frozen=True)
class TrainSettings:
    """All that decides what a stage makes, beside its rows.

    stage: sft, dpo or grpo. base: folder of whole weights. adapter: folder of the LoRA adapter that is trained on, or
    None for a new one. out: folder that is made. full: train all weights. rank: of a new adapter; its alpha is twice
    that. batch_tokens: tokens of one sequence (a forest). accumulate: sequences in one optimizer step and process.
    label_weight: how many times a label token counts in the loss of SFT, and in what DPO prefers, beside a token of its
    chain, of which there are thirty. balance: the power of (mean count / own count) by which tokens of rarer labels
    count more: 0 is off, with 1 all labels weigh alike. beta: weight of the KL term (GRPO) or DPO's beta. seed: of
    weights, order and samples.
    """

    stage: str
    base: str
    out: str
    adapter: str | None = None
    full: bool = False
    rank: int = 16
    learning_rate: float = 5e-4
    epochs: float = 3.0
    batch_tokens: int = 1024
    accumulate: int = 2
    label_weight: float = 4.0
    balance: float = 0.0
    beta: float = 0.1
    seed: int = 0
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 25
    # GRPO alone. steps: of the optimizer, each on `groups` pairs with `group` answers of at most `max_tokens`; it ends
    # sooner where `generated_tokens` is set and reached. refresh: steps between two readings of all pass rates.
    # rewards: weights of a right label, of an answer's form, and of a chain that concludes its label. uniform: all
    # pairs are drawn alike and groups without spread are kept, to compare with.
    steps: int = -1
    groups: int = 4
    group: int = 8
    max_tokens: int = 64
    generated_tokens: int = 0
    refresh: int = 50
    rewards: tuple[float, float, float] = (1.0, 0.1, 0.2)
    uniform: bool = False

    def recipe(self) -> dict[str, Any]:
        """The settings that this stage knows, without the folders, which are this machine's."""
        known = {
            name: value for name, value in dataclasses.asdict(self).items() if name in (*_OF_ALL, *_OF[self.stage])
        }
        if self.stage == "dpo":
            known["chosen_nll"] = CHOSEN_NLL
        if self.adapter:
            config = json.loads((Path(self.adapter) / adapter.CONFIG).read_text(encoding="utf-8"))
            known["rank"] = config["r"]
        elif self.full:
            del known["rank"]
        return known


_OF_ALL = ("stage", "full", "rank", "learning_rate", "seed", "dtype", "gradient_checkpointing", "checkpoint_every")
_OF = {
    "sft": ("epochs", "accumulate", "batch_tokens", "label_weight", "balance"),
    "dpo": ("epochs", "accumulate", "beta", "label_weight"),
    "grpo": (
        "batch_tokens", "beta", "steps", "groups", "group", "max_tokens", "generated_tokens", "refresh", "rewards",
        "uniform",
    ),
}  # fmt: skip


def land(
    settings: TrainSettings,
    rows: Sequence[dict[str, Any]],
    processes: int = 1,
    chosen: Mapping[str, Any] | None = None,
    **weights: str,
) -> tuple[str, bool]:
    """Writes the rows of a stage into its out folder; returns the hash of those it trains on, and whether it is these.

    `processes`: each has its own share of a step's sequences and its own random state. `chosen`: what decides the rows,
    beside the tables. `weights`: hashes of what is trained on. A training that was killed goes on with the rows it
    began with, whatever the tables hold by now: then nothing is written. Raises ValueError where the folder holds
    another training: its checkpoints would go on from another parent, or it has ended with other rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    plan: dict[str, Any] = json.loads(
        json.dumps(
            {
                "data_hash": (own := data_hash(rows)),
                "weights": weights,
                "settings": {**dataclasses.asdict(settings), "processes": processes, **(chosen or {})},
            }
        )
    )
    file = Path(settings.out) / adapter.PLAN
    if file.is_file() and (was := json.loads(file.read_text(encoding="utf-8"))) != plan:
        keys = {**was["settings"], **plan["settings"]}
        other = [key for key in keys if was["settings"].get(key) != plan["settings"].get(key)]
        other += ["the weights it starts from"] * (was.get("weights") != plan["weights"])
        if other or "merged_hash" in adapter.recipe(settings.out):  # that one has ended
            other += ["the rows"] * (was["data_hash"] != own)
            raise Unmet(
                f"--out {settings.out} holds a training that differs in {', '.join(other)}; name another folder"
            )
        if _last_checkpoint(settings, processes):
            return str(was["data_hash"]), was["data_hash"] == own
    pq.write_table(pa.Table.from_pylist(list(rows)), f"{settings.out}/{DATA}")
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(plan, indent=2), encoding="utf-8")
    partial.rename(file)
    return own, True


def data_hash(rows: Sequence[dict[str, Any]]) -> str:
    """SHA-256 of the rows of a stage, in hex."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def launch(settings: TrainSettings, processes: int, on_cluster: bool = False, **more: Any) -> dict[str, float]:
    """Runs a stage in this process, or in `processes` of them, one a GPU; returns its last figures.

    They run on this machine, or as tasks of the Spark cluster; then `out` must lie on a disk that all of them see. One
    process is a task too where the cluster's tasks have a GPU each and this machine has none. Raises ValueError for
    processes that do not go with the GPUs there are.
    """
    of_a_task = gpus_of_a_task() if on_cluster else 0.0
    if processes == 1 and (not of_a_task or has_gpu()):
        # The trainer would want as many processes as there are GPUs.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        return stage(settings, **more)
    # The processes on this machine find this code where this one found it.
    code = str(Path(__file__).parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
    from pyspark.ml.torch.distributor import TorchDistributor
    from pyspark.sql import SparkSession

    spark = SparkSession.active()
    if not on_cluster:
        gpus = int(spark.sparkContext.getConf().get(_GPUS_OF_DRIVER) or 0)
        if (use_gpu := has_gpu()) and processes > gpus:  # the distributor would start fewer
            raise Unmet(
                f"--processes {processes}: the driver was given {gpus} GPUs; say --processes {max(1, gpus)}, or give "
                f"it more (--conf {_GPUS_OF_DRIVER}=N, and a spark.driver.resource.gpu.discoveryScript that names them)"
            )
        return TorchDistributor(processes, local_mode=True, use_gpu=use_gpu).run(stage, settings, **more) or {}
    if of_a_task and (of_a_task % 1 or processes % of_a_task):
        raise Unmet(
            f"--processes {processes}: each task has {of_a_task:g} GPUs (spark.task.resource.gpu.amount), and each "
            "process wants one; say 1 there"
        )
    # A task of a training says nothing until it is over; Spark would end it after half an hour.
    ends_idle = "spark.sql.execution.pyspark.udf.killOnIdleTimeout"
    spark.conf.set(ends_idle, "false")
    try:
        return TorchDistributor(processes, local_mode=False, use_gpu=of_a_task > 0).run(stage, settings, **more) or {}
    finally:
        spark.conf.unset(ends_idle)


def gpus_of_a_task() -> float:
    """GPUs that each task of the running Spark application is given; a part of one where several share it."""
    from pyspark.sql import SparkSession

    return float(SparkSession.active().sparkContext.getConf().get("spark.task.resource.gpu.amount") or 0)


def has_gpu() -> bool:
    """Whether this process could train on a GPU."""
    import torch

    return bool(torch.cuda.is_available())


def stage(settings: TrainSettings, **more: Any) -> dict[str, float]:
    """One stage, on the rows that `land` wrote."""
    import pyarrow.parquet as pq

    rows = pq.read_table(f"{settings.out}/{DATA}").to_pylist()
    stages: dict[str, Callable[..., dict[str, float]]] = {"sft": sft, "dpo": dpo, "grpo": grpo}
    return stages[settings.stage](settings, rows, **more)


def leave(settings: TrainSettings, base_name: str) -> None:
    """What a whole folder needs beside its weights; nothing in it names this machine's folders."""
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    out = Path(settings.out)
    config = out / adapter.CONFIG
    if config.is_file():
        # In the base's dtype, to which the sum of the two is rounded anyway: for bfloat16 half the bytes.
        weights = load_file(out / adapter.WEIGHTS)
        as_base = AutoConfig.from_pretrained(settings.base, local_files_only=True, trust_remote_code=False).dtype
        halved = {name: weight.to(as_base or weight.dtype) for name, weight in weights.items()}
        save_file(halved, out / adapter.WEIGHTS, metadata={"format": "pt"})
        adapter.let_read(out)
        told = json.loads(config.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_name}
        config.write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    else:
        adapter.copy_beside(settings.base, out)


def draw(out: str) -> str:
    """Draws the stage's log as charts, one a figure, into a page that needs no network; returns its path."""
    import altair
    import pandas

    log = pandas.read_json(f"{out}/{LOG}", lines=True)
    drawn = [name for name in log.columns if name in _DRAWN and log[name].notna().any()]
    charts = [
        altair.Chart(log[["step", name]].dropna().rename(columns={name: "value"}), title=name, width=320, height=150)
        .mark_line()
        .encode(altair.X("step:Q"), altair.Y("value:Q", title=None, scale=altair.Scale(zero=False)))
        for name in drawn
    ]
    page = f"{out}/log.html"
    altair.concat(*charts, columns=3).save(page, inline=True)
    return page


def policy(settings: TrainSettings) -> Any:
    """The model that is trained: base weights in `dtype` (frozen, or float32 where all are trained) and an adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(settings.seed)  # a new adapter's weights are drawn
    model = AutoModelForCausalLM.from_pretrained(
        settings.base,
        dtype=torch.float32 if settings.full else getattr(torch, settings.dtype),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        attn_implementation="sdpa",  # takes the mask of a forest
    )
    if settings.full:
        return model
    from peft import LoraConfig, PeftModel, get_peft_model

    if settings.adapter:
        return PeftModel.from_pretrained(model, settings.adapter, is_trainable=True, local_files_only=True)
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules="all-linear",  # without the head
            task_type="CAUSAL_LM",
        ),
    )
    weights = (name.partition(".lora_A.") for name, _ in adapted.named_parameters())
    modules = [name.removeprefix("base_model.model.") for name, half, _ in weights if half]
    adapter.refuse_unmergeable(settings.base, modules, bool(adapted.peft_config["default"].fan_in_fan_out))
    return adapted


def sft(settings: TrainSettings, data: Sequence[dict[str, Any]], label_at: int) -> dict[str, float]:
    """Supervised fine-tuning on chains (TaoSR1, section 3.1): the answers' tokens are learnt, the prompts' are read.

    `data`: root, rest (the prompt's two parts) and answer, as token ids; weight, where a pair has several answers: the
    share of its raters who gave this one. `label_at`: where in an answer its label token stands (0 post-CoT, -2
    pre-CoT: the end follows it). Returns the last logged figures. Resumes from the newest checkpoint under `out`.
    """
    import numpy as np
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [Row(tuple(row["root"]), tuple(row["rest"]), tuple(row["answer"]), row.get("weight", 1.0)) for row in data]
    weight_of = label_weights([(row.answer[label_at], row.weight) for row in rows], settings)
    trees = list(grouped(rows, settings.batch_tokens))
    trees = [trees[i] for i in np.random.default_rng(settings.seed).permutation(len(trees))]
    packed = [[row for i in together for row in trees[i]] for together in forests(trees, settings.batch_tokens)]
    # Of a mean sequence. Divided by its own, a sequence of one row would teach as much as one of a dozen, and what a
    # row weighs would cancel in it.
    whole = sum(row.weight * (settings.label_weight + len(row.answer) - 1) for row in rows) / len(packed)

    class Trainer(SFTTrainer):
        """SFT on forests; only the positions that foretell an answer's token meet the vocabulary."""

        loss_is_scaled_for_ga: Any = False  # the trainer divides by the step's batches

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels, shares, is_label = (inputs.pop(name)[0, 1:] for name in ("labels", "shares", "is_label"))
            at = (labels != IGNORED).nonzero()[:, 0]
            labels, shares, is_label = labels[at], shares[at], is_label[at]
            logits = model(**inputs, use_cache=False, logits_to_keep=at).logits[0].float()
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            right, means = (logits.argmax(-1) == labels).float(), {}
            for name, values, some in (
                ("label_loss", losses, is_label),
                ("chain_loss", losses, ~is_label),
                ("label_accuracy", right, is_label),
            ):
                means[name] = (values * shares)[some].sum() / shares[some].sum()
            _note(self, means)
            balanced = torch.ones_like(losses)
            balanced[is_label] = torch.tensor([weight_of[i] for i in labels[is_label].tolist()], device=losses.device)
            return (losses * balanced * shares).sum() / whole

    def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        (example,) = examples
        forest, answers = planted([Row(tuple(row[0]), tuple(row[1]), tuple(row[2])) for row in example["rows"]])
        inputs = forest.inputs()
        shares, is_label = torch.ones(inputs["labels"].shape), torch.zeros(inputs["labels"].shape, dtype=torch.bool)
        for span, share in zip(answers, example["shares"], strict=True):
            shares[0, span.start : span.stop] = share
        is_label[0, [span[label_at] for span in answers]] = True
        return inputs | {"shares": shares, "is_label": is_label}

    trainer = Trainer(
        model=policy(settings),
        args=SFTConfig(**_arguments(settings), dataset_kwargs={"skip_prepare_dataset": True}, max_length=None),
        train_dataset=Dataset.from_list(
            [
                {"rows": [[row.root, row.rest, row.answer] for row in group], "shares": [row.weight for row in group]}
                for group in packed
            ]
        ),
        data_collator=collate,
        processing_class=_tokenizer(settings.base),
        callbacks=[_log(settings)],
    )
    return _run(trainer, settings)


def label_weights(labels: Iterable[tuple[int, float]], settings: TrainSettings) -> dict[int, float]:
    """Weight in the loss of each label's token, from label token and weight of all rows: a rarer one weighs more."""
    counts: dict[int, float] = defaultdict(float)
    for token, weight in labels:
        counts[token] += weight
    mean = sum(counts.values()) / len(counts)
    return {token: settings.label_weight * (mean / count) ** settings.balance for token, count in counts.items()}


def dpo(settings: TrainSettings, data: Sequence[dict[str, Any]], label_at: int) -> dict[str, float]:
    """Direct preference optimisation on right against wrong answers of one prompt (TaoSR1, section 3.2).

    `data`: prompt, chosen and rejected, as token ids. `label_at`: where in an answer its label token stands. The
    reference is the parent as it was. The chosen answers' own likelihood stays in the loss with a small weight: DPO
    alone may lower both, the rejected one faster. With the label first a wrong answer's chain argues for its label as
    was taught, and making it less likely may unteach that: `label_weight` lets the label carry the preference.
    """
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.utils import use_adapter

    class Trainer(DPOTrainer):
        """DPO on token ids, where the two answers share their prompt and they alone meet the vocabulary."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False) -> Any:
            """Rafailov et al. 2023 (arXiv 2305.18290), equation 7."""
            groups = [(row["prompt"], [row["chosen"], row["rejected"]]) for row in inputs["rows"]]
            policy_logps = [own for own, _ in logprobs(model, groups, 1.0)]
            with torch.no_grad():
                if settings.full:
                    reference = logprobs(self.ref_model, groups, 1.0)
                else:
                    adapted = self.accelerator.unwrap_model(model)
                    with use_adapter(adapted, "ref" if "ref" in adapted.peft_config else None):
                        reference = logprobs(model, groups, 1.0)
            more = settings.label_weight - 1  # the label's gain counts so much beyond its part of the answer's
            gains = torch.stack(
                [
                    gain.sum() + more * gain[label_at]
                    for gain in (own - other for own, (other, _) in zip(policy_logps, reference, strict=True))
                ]
            )
            chosen, rejected = settings.beta * gains[0::2], settings.beta * gains[1::2]
            nll = -torch.cat(policy_logps[0::2]).mean()
            told = {
                "rewards/chosen": chosen.mean(),
                "rewards/rejected": rejected.mean(),
                "rewards/margins": (chosen - rejected).mean(),
                "rewards/accuracies": (chosen > rejected).float().mean(),
                "nll": nll,
            }
            _note(self, told)
            return -torch.nn.functional.logsigmoid(chosen - rejected).mean() + CHOSEN_NLL * nll

    trainer = Trainer(
        model=policy(settings),
        args=DPOConfig(
            **_arguments(settings) | {"per_device_train_batch_size": 4},
            beta=settings.beta,
            max_length=None,
        ),
        train_dataset=Dataset.from_list(
            [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in data]
        ),
        data_collator=lambda rows: {"rows": rows},
        processing_class=_tokenizer(settings.base),
        callbacks=[_log(settings)],
    )
    return _run(trainer, settings)


def grpo(settings: TrainSettings, data: Sequence[dict[str, Any]], form: Form) -> dict[str, float]:
    """Group-relative policy optimisation with difficulty-based dynamic sampling (TaoSR1, section 3.3).

    `data`: root, rest (the prompt's two parts), label, and rate, the pass rate under the parent (None: not known). The
    policy answers `group` times a pair; rewards are a right label, the form of an answer, and a chain that concludes
    its own label. Every `refresh` steps the pass rates of all pairs are read off the policy anew (post-CoT).
    """
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    gold = [form.label_ids[LABELS.index(row["label"])] for row in data]
    rows = [Row(tuple(row["root"]), tuple(row["rest"]), (own,)) for row, own in zip(data, gold, strict=True)]
    known = np.array([np.nan if row["rate"] is None else row["rate"] for row in data])
    answers = np.array([row.get("answers") or 0 for row in data])
    difficulty = Difficulty(np.nan_to_num(known, nan=0.5), settings.group, settings.seed, settings.uniform)
    is_read_off = form.order == "post"  # else a first token is no label, and the rates of samples stay
    is_refreshed = is_read_off and not settings.uniform
    generated = 0  # tokens of answers, of all processes

    def refresh(model: Any) -> None:
        """Each process reads its share of the pairs."""
        processes = trainer.accelerator
        share = slice(processes.process_index, None, processes.num_processes)
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=settings.dtype == "bfloat16"):
            found = pass_rates(model, rows, settings.batch_tokens, share)
        told = processes.reduce(torch.tensor(found, dtype=torch.float32, device=model.device), "sum")
        difficulty.rates = told.double().cpu().numpy()

    class Refresh(TrainerCallback):
        """Keeps the pass rates those of the policy, in checkpoints too; ends at the bound of generated tokens."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal generated  # a checkpoint's log says how many there were
            generated = int(max((entry.get("generated_tokens", 0) for entry in state.log_history), default=0))

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step % settings.refresh == 0 and is_refreshed:
                refresh(model)
                if state.global_step == 0 and trainer.is_world_process_zero():
                    print(against_samples(difficulty.rates, known, answers), flush=True)

        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if is_refreshed:  # those that are drawn are as hard at the end as at the start
                refresh(model)
                state.log_history.append({"step": state.global_step, "p_gold_end": float(difficulty.rates.mean())})

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            difficulty.save(f"{args.output_dir}/checkpoint-{state.global_step}")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if settings.generated_tokens and generated >= settings.generated_tokens:
                control.should_training_stop = True

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        """Answers to pairs drawn by difficulty, in the place of those that the trainer's own sampler names."""
        nonlocal generated
        key = (trainer.state.global_step, trainer.accelerator.process_index)
        policy_model = trainer.accelerator.unwrap_model(trainer.model)
        with trainer.accelerator.autocast():
            count = len(prompts) // settings.group
            groups = rolled_out(policy_model, rows, difficulty, form, count, settings.max_tokens, key)
        output: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "label": []}
        for number, answers in groups.answers:
            for ids in answers:
                output["prompt_ids"].append(list(rows[number].prompt))
                output["completion_ids"].append(ids)
                output["label"].append(data[number]["label"])
        output["logprobs"] = None  # type: ignore[assignment]  # the policy that samples is the one that learns
        # Of all processes: were each to stop by a count of its own, the others would wait for it for ever.
        written = torch.tensor(sum(map(len, output["completion_ids"])), device=trainer.accelerator.device)
        generated += int(trainer.accelerator.reduce(written, "sum"))
        trainer._log_metric("groups_drawn", float(groups.drawn))
        trainer._log_metric("generated_tokens", float(generated))
        if is_read_off:
            trainer._log_metric("groups_without_spread", groups.without_spread / groups.drawn)
        if is_refreshed:
            trainer._log_metric("p_gold", float(difficulty.rates.mean()))  # of all pairs, as last read
            trainer._log_metric("p_gold_drawn", float(difficulty.rates[[n for n, _ in groups.answers]].mean()))
        return output

    class Trainer(GRPOTrainer):
        """GRPO where all answers to a pair share its prompt in the forward pass too."""

        def _get_per_token_logps_and_entropies(
            self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, *_: Any, **__: Any
        ) -> Any:
            of_prompt: dict[tuple[int, ...], list[int]] = {}
            answers = []
            for i, (ids, seen) in enumerate(zip(input_ids, attention_mask.bool(), strict=True)):
                prompt = ids[:-logits_to_keep][seen[:-logits_to_keep]].tolist()
                answers.append(ids[-logits_to_keep:][seen[-logits_to_keep:]].tolist())
                of_prompt.setdefault(tuple(prompt), []).append(i)
            groups = [(prompt, [answers[i] for i in members]) for prompt, members in of_prompt.items()]
            with self.accelerator.autocast():
                found = logprobs(model, groups, self.temperature)
            places = [i for members in of_prompt.values() for i in members]
            in_order = [pair for _, pair in sorted(zip(places, found, strict=True), key=lambda entry: entry[0])]
            logps, entropies = (
                torch.stack([torch.nn.functional.pad(one, (0, logits_to_keep - len(one))) for one in side])
                for side in zip(*in_order, strict=True)
            )
            return logps, entropies, None

    batch = settings.group * settings.groups
    trainer = Trainer(
        model=policy(settings),
        reward_funcs=rewards(form),
        args=GRPOConfig(
            **_arguments(settings)
            | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "max_steps": settings.steps},
            num_generations=settings.group,
            steps_per_generation=1,
            max_completion_length=settings.max_tokens,
            reward_weights=list(settings.rewards),
            beta=settings.beta,
            temperature=1.0,
        ),
        train_dataset=Dataset.from_list([{"prompt": str(i)} for i in range(max(len(rows), batch))]),
        processing_class=_tokenizer(settings.base),
        callbacks=[_log(settings), Refresh()],
        rollout_func=rollout,
    )
    if last := _last_checkpoint(settings, trainer.accelerator.num_processes):
        difficulty.load(last)
    return _run(trainer, settings)


def against_samples(rates: np.ndarray, known: np.ndarray, answers: np.ndarray) -> str:
    """A sentence: how many of the sampled answers (`answers` to each pair, of which `known` is the share that is right)
    p(gold) would expect to be right, and how many are. Of one model the two differ by a few standard errors at most."""
    asked = answers > 0
    if not asked.any():
        return "train_grpo: no sampled answers of this model, so p(gold) was held against none"
    right, expected = (float((side[asked] * answers[asked]).sum()) for side in (known, rates))
    error = math.sqrt(float((answers * rates * (1 - rates))[asked].sum()))
    return (
        f"train_grpo: of {int(answers.sum()):,} sampled answers {right:,.0f} are right, p(gold) expects "
        f"{expected:,.1f} ({(right - expected) / max(error, 1e-9):+.1f} standard errors)"
    )


def rewards(form: Form) -> list[Any]:
    """GRPO's rewards of answers, each 0 or 1 and logged apart: `right` label, `formed` as was taught, and a chain that
    `agrees` with its label."""

    def right(completion_ids: list[list[int]], label: list[int], **_: Any) -> list[float | None]:
        return [float(form.read(ids).label == own) for ids, own in zip(completion_ids, label, strict=True)]

    def formed(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        read = map(form.read, completion_ids)
        return [float(r.finished and r.label is not None and conclusion(r.chain) is not None) for r in read]

    def agrees(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        read = map(form.read, completion_ids)
        return [float(r.label is not None and conclusion(r.chain) == r.label) for r in read]

    return [right, formed, agrees]


def _note(trainer: Any, figures: dict[str, torch.Tensor]) -> None:
    """Has a batch's figures logged, as their mean over all processes: the trainer would log the first one's own."""
    import torch

    means = trainer.accelerator.reduce(torch.stack(list(figures.values())).detach().float(), "mean")
    for name, mean in zip(figures, means.tolist(), strict=True):
        trainer._metrics["train"][name].append(mean)


def _arguments(settings: TrainSettings) -> dict[str, Any]:
    """What the three trainers are told alike."""
    import torch

    return {
        "output_dir": f"{settings.out}/checkpoints",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": settings.accumulate,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,  # a share of all steps
        "bf16": settings.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": settings.gradient_checkpointing,
        "logging_steps": 1,
        "save_steps": settings.checkpoint_every,
        "save_total_limit": 2,
        "seed": settings.seed,
        "data_seed": settings.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        # Processes may call the model a different number of times in a step; buffers are alike and need no broadcast.
        "ddp_broadcast_buffers": False,
    }


def _tokenizer(folder: str) -> Any:
    """The trainers want one for its ids of padding and end; no text of ours goes through it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _log(settings: TrainSettings) -> TrainerCallback:
    """Appends each logged step to the stage's log, and tells people."""
    import torch
    from transformers import TrainerCallback

    class Log(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = self.told = time.monotonic()
            self.first = state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not state.is_world_process_zero or not logs:
                return
            figures = {k: v for k, v in logs.items() if isinstance(v, int | float)}
            if torch.cuda.is_available():
                figures["gpu_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
            with open(f"{settings.out}/{LOG}", "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": state.global_step} | figures) + "\n")
            now = time.monotonic()
            if now - self.told < TOLD_SECONDS and state.global_step < state.max_steps:
                return
            self.told = now
            left = (now - self.began) / max(1, state.global_step - self.first) * (state.max_steps - state.global_step)
            shown = " · ".join(f"{name} {value:.4g}" for name, value in figures.items() if name in _SHOWN)
            print(
                f"train_{settings.stage}: step {state.global_step} of {state.max_steps} · {shown} · "
                f"{left / 60:.0f} min left",
                flush=True,
            )

    return Log()


_DRAWN = (
    "loss", "label_loss", "chain_loss", "label_accuracy", "learning_rate", "grad_norm", "rewards/margins",
    "rewards/accuracies", "nll", "reward", "rewards/right/mean", "rewards/formed/mean",
    "rewards/agrees/mean", "kl", "entropy", "completions/mean_length", "groups_without_spread", "frac_reward_zero_std",
    "p_gold", "p_gold_drawn", "generated_tokens",
)  # fmt: skip
_SHOWN = (
    "loss", "label_loss", "chain_loss", "label_accuracy", "rewards/margins", "rewards/accuracies", "rewards/right/mean",
    "rewards/agrees/mean", "p_gold", "groups_without_spread", "kl", "gpu_peak_gb",
)  # fmt: skip


def _last_checkpoint(settings: TrainSettings, processes: int) -> str | None:
    """The newest checkpoint that was written to its end: a kill may have come in the middle of one."""
    found = Path(settings.out, "checkpoints").glob("checkpoint-*")
    newest_first = sorted(found, key=lambda folder: _step(str(folder)), reverse=True)
    return next((str(folder) for folder in newest_first if _is_whole(folder, settings.stage, processes)), None)


def _step(checkpoint: str) -> int:
    return int(checkpoint.rsplit("-", 1)[1])


def _is_whole(checkpoint: Path, stage: str, processes: int) -> bool:
    """Whether what is written last is there and can be read: the random state of each process, the trainer's state,
    and after it GRPO's pass rates. Processes do not wait for each other: the one's may be whole, the other's cut."""
    import zipfile

    import numpy as np

    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if stage == "grpo":
            np.load(checkpoint / STATE, allow_pickle=False)
        states = [zipfile.is_zipfile(file) for file in checkpoint.glob("rng_state*.pth")]  # its list stands at the end
        return all(states) and len(states) == processes
    except (OSError, EOFError, ValueError):
        return False


def _run(trainer: Any, settings: TrainSettings) -> dict[str, float]:
    """Trains from the newest checkpoint, or from the start; leaves the weights in `out`. Returns the figures of its
    end: the mean of the last steps', which are of one batch each, and of what counts where it came to."""
    from transformers import PrinterCallback
    from transformers.trainer_callback import TrainerState

    trainer.remove_callback(PrinterCallback)
    if not settings.full:
        _load_policy_too(trainer)
    last = _last_checkpoint(settings, trainer.accelerator.num_processes)
    if trainer.is_world_process_zero():
        if last:
            print(f"train_{settings.stage}: goes on from {os.path.basename(last)}", flush=True)
        _cut_log(settings, _step(last) if last else 0)
    if last and _at_its_end(settings, reached := TrainerState.load_from_json(f"{last}/trainer_state.json")):
        trainer._load_from_checkpoint(last)  # the trainer looks at its end after a step, and there is none to take
        trainer.state = reached
        trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    else:
        trainer.train(resume_from_checkpoint=last)
    if trainer.is_world_process_zero():
        kept = {} if settings.full else {"selected_adapters": ["default"]}  # without the reference
        trainer.model.save_pretrained(settings.out, safe_serialization=True, **kept)
        adapter.let_read(settings.out)
    told: dict[str, list[float]] = {}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if isinstance(value, int | float):
                told.setdefault(name, []).append(float(value))
    return {
        name: values[-1] if name in COUNTED else sum(values[-LAST_STEPS:]) / len(values[-LAST_STEPS:])
        for name, values in told.items()
    }


def _load_policy_too(trainer: Any) -> None:
    """Makes the trainer load the policy's adapter from a checkpoint, always.

    PEFT writes it at the checkpoint's root and TRL's reference beside it in a folder `ref`; transformers 5.19, finding
    such a folder, loads that one alone, and would go on with the parent's weights and the policy's optimizer.
    """
    load = trainer._load_from_checkpoint

    def load_both(checkpoint: str, model: Any = None) -> None:
        load(checkpoint, model)
        (model or trainer.model).load_adapter(checkpoint, "default", is_trainable=True)

    trainer._load_from_checkpoint = load_both


def _at_its_end(settings: TrainSettings, state: TrainerState) -> bool:
    """Whether a kill came between the last step and the end: all steps were taken (the trainer would take another one
    in an epoch that the last one left unfinished), or as many tokens were generated as the training may generate."""
    generated = max((entry.get("generated_tokens", 0) for entry in state.log_history), default=0)
    bound_reached = settings.generated_tokens and generated >= settings.generated_tokens
    return bool(bound_reached or state.global_step >= state.max_steps)


def _cut_log(settings: TrainSettings, step: int) -> None:
    """Takes out what was logged after the checkpoint (0: there is none): those steps are taken once more."""
    log = Path(settings.out) / LOG
    if log.exists():
        lines = []
        for line in log.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # of a line that a kill or a full disk cut off
                lines += [line] if json.loads(line)["step"] <= step else []
        log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
