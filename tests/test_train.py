"""The three stages on a tiny model: each learns a rule it can learn, and a killed one ends as one that was not killed.

The rule: a product is one of four colours, and the colour decides the label. The chain names the label's conclusion.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from schemas.labels import LABELS, NAMES
from tests.models import tiny_model
from udfs import adapter, rollout, train
from udfs.answer import Form, form
from udfs.difficulty import Difficulty, pass_rates
from udfs.forest import Row
from udfs.model import inspect, weights_hash
from udfs.prompt import load
from udfs.train import TrainSettings, against_samples

COLOUR = {4: 301, 3: 302, 2: 303, 1: 304}  # a token of the product's text
QUERY = (60, 61)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("train") / "model")


@pytest.fixture(scope="module")
def answers(base: Path) -> Form:
    model = inspect(str(base))
    return form(model, load(str(base / "prompt.json"), model.tokenizer_json, model.vocab_size))


def root_of(number: int, label: int) -> list[int]:
    return [50 + number % 7, COLOUR[label], 70 + number % 11]


def lessons(answers: Form, count: int = 48) -> list[dict[str, Any]]:
    made = []
    for number in range(count):
        label = LABELS[number % 4]
        answer = answers.target(label, f"Seen. So {NAMES[label]}.")
        made.append({"pair_id": str(number), "root": root_of(number, label), "rest": list(QUERY), "answer": answer})
    return made


def settings(base: Path, out: Path, stage: str = "sft", **changes: Any) -> TrainSettings:
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {
        "full": True,
        "dtype": "float32",
        "learning_rate": 3e-3,
        "batch_tokens": 256,
        "accumulate": 1,
        "label_weight": 1.0 if stage == "dpo" else 4.0,  # as the jobs' flags
    } | changes
    return TrainSettings(stage=stage, base=str(base), out=str(out), **told)


def p_gold(folder: Path, answers: Form, adapter: Path | None = None) -> float:
    """Mean p(gold) over the rule, which is pass@1 at temperature 1."""
    how = settings(folder, folder, full=adapter is None, adapter=str(adapter) if adapter else None)
    token = dict(zip(LABELS, answers.label_ids, strict=True))
    rows = [Row(tuple(root_of(n, label)), QUERY, (token[label],)) for n in range(8) for label in LABELS]
    return float(pass_rates(train.policy(how), rows, 512).mean())


def test_pass_rates_that_are_read_in_shares_are_those_of_one_process(base: Path, answers: Form) -> None:
    policy = train.policy(settings(base, base, full=True))
    rows = [Row(tuple(root_of(n, label)), QUERY, (answers.label_ids[0],)) for n in range(5) for label in LABELS]
    whole = pass_rates(policy, rows, 64)
    for processes in (2, 50):  # of 50 most have nothing to read
        parts = [pass_rates(policy, rows, 64, slice(n, None, processes)) for n in range(processes)]
        assert sum(parts) == pytest.approx(whole, abs=1e-6)
    assert whole.min() > 0


def test_a_line_of_the_log_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    how = settings(tmp_path, tmp_path)
    whole = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    (tmp_path / train.LOG).write_text(whole + '{"step": 3, "loss": 0.5}\n{"step": 3, "lo')
    train._cut_log(how, 2)
    assert (tmp_path / train.LOG).read_text() == whole


def log(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / train.LOG).read_text().splitlines()]


def run(how: TrainSettings, rows: list[dict[str, Any]], **more: Any) -> dict[str, float]:
    train.land(how, rows)
    figures = train.launch(how, 1, **more)
    train.leave(how, "tiny")
    return figures


@pytest.fixture(scope="module")
def taught(base: Path, answers: Form, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "sft"
    run(settings(base, out, epochs=3), lessons(answers), label_at=0)
    return out


def test_sft_learns_the_rule_and_leaves_an_ordinary_model_folder(base: Path, answers: Form, taught: Path) -> None:
    steps = log(taught)
    assert steps[-2]["loss"] < 0.5 * steps[0]["loss"]
    assert p_gold(base, answers) < 0.1
    assert p_gold(taught, answers) > 0.3
    assert inspect(str(taught)).weights_hash != inspect(str(base)).weights_hash


def test_what_raters_said_is_learnt_by_the_shares_of_them_who_said_it(
    base: Path, answers: Form, tmp_path: Path
) -> None:
    said = {4: 0.75, 1: 0.25}
    prompt = {"root": root_of(0, 4), "rest": list(QUERY)}
    rows = [{"pair_id": "0", **prompt, "answer": answers.target(y, None), "weight": share} for y, share in said.items()]
    run(settings(base, tmp_path / "sft", epochs=40), rows, label_at=0)
    token = dict(zip(LABELS, answers.label_ids, strict=True))
    asked = [Row(tuple(prompt["root"]), QUERY, (token[label],)) for label in LABELS]
    p = pass_rates(train.policy(settings(tmp_path / "sft", tmp_path, full=True)), asked, 512)
    assert p == pytest.approx([said.get(label, 0.0) for label in LABELS], abs=0.1)


def preferred(answers: Form) -> list[dict[str, Any]]:
    """Preferences: the right answer against another label's."""
    rows = []
    for number, lesson in enumerate(lessons(answers)):
        wrong = LABELS[(number + 1 + number // 4 % 3) % 4]
        rejected = answers.target(wrong, f"Seen. So {NAMES[wrong]}.")
        prompt = [*lesson["root"], *lesson["rest"]]
        rows.append({"pair_id": lesson["pair_id"], "prompt": prompt, "chosen": lesson["answer"], "rejected": rejected})
    return rows


def test_dpo_prefers_the_right_answers(answers: Form, taught: Path, tmp_path: Path) -> None:
    how = settings(taught, tmp_path / "dpo", "dpo", epochs=3, learning_rate=5e-4)
    run(how, preferred(answers), label_at=0)
    steps = [entry for entry in log(tmp_path / "dpo") if "rewards/margins" in entry]
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["rewards/margins"] > 0.1
    assert p_gold(tmp_path / "dpo", answers) > p_gold(taught, answers) + 0.05


def test_activations_that_are_computed_twice_give_the_same_weights(
    base: Path, answers: Form, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    enable, enabled = PreTrainedModel.gradient_checkpointing_enable, []

    def noted(self: Any, *told: Any, **more: Any) -> None:
        enabled.append(self)
        enable(self, *told, **more)

    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", noted)

    def trained(stage: str, parent: Path, rows: list[dict[str, Any]], saved: bool, **more: Any) -> str:
        enabled.clear()
        how = settings(parent, tmp_path / f"{stage}-{saved}", stage, epochs=1, gradient_checkpointing=saved)
        run(how, rows, **more)
        assert bool(enabled) == saved
        return weights_hash(how.out)

    for stage, parent, rows, more in (
        ("sft", base, lessons(answers), {"label_at": 0}),
        ("dpo", taught, preferred(answers), {"label_at": 0}),
    ):
        assert trained(stage, parent, rows, True, **more) == trained(stage, parent, rows, False, **more)


@pytest.mark.parametrize("order", ["post", "pre"])
def test_sfts_loss_is_that_of_all_rows_by_their_weights_whatever_sequences_they_are_put_into(
    base: Path, answers: Form, tmp_path: Path, order: str
) -> None:
    import torch

    first = dataclasses.replace(answers, order=order)
    label_at = 0 if order == "post" else -2
    rows = [{**row, "weight": (1.0, 0.5, 0.25)[n % 3]} for n, row in enumerate(lessons(first, 11))]
    told = {}
    for tokens in (40, 4096):  # a row or two in a sequence, and all; the sequences of an epoch are one step
        how = settings(base, tmp_path / str(tokens), batch_tokens=tokens, accumulate=64, epochs=1, balance=0.5)
        run(how, rows, label_at=label_at)
        told[tokens] = next(entry for entry in log(tmp_path / str(tokens)) if "loss" in entry)

    model, counts = train.policy(settings(base, tmp_path)), dict.fromkeys(answers.label_ids, 0.0)
    for row in rows:
        counts[row["answer"][label_at]] += row["weight"]
    loss = weight = 0.0
    with torch.no_grad():
        for row in rows:
            prompt, answer = [*row["root"], *row["rest"]], row["answer"]
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none")
            losses[label_at] *= 4.0 * (sum(counts.values()) / 4 / counts[answer[label_at]]) ** 0.5
            loss += row["weight"] * float(losses.sum())
            weight += row["weight"] * (4.0 + len(answer) - 1)
    assert told[40]["loss"] == pytest.approx(loss / weight, rel=1e-3)
    assert told[4096]["loss"] == pytest.approx(loss / weight, rel=1e-3)
    assert told[40]["grad_norm"] == pytest.approx(told[4096]["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_a_stage_trains_an_adapter_in_bfloat16(answers: Form, taught: Path, tmp_path: Path, stage: str) -> None:
    rows, changes, more = a_stage(stage, answers)
    short = {"full": False, "dtype": "bfloat16", "epochs": 1, "steps": 2, "gradient_checkpointing": True}
    run(settings(taught, tmp_path / stage, stage, **changes | short), rows, **more)
    told = [entry for entry in log(tmp_path / stage) if "loss" in entry]
    assert told
    assert all(np.isfinite(entry["loss"]) and np.isfinite(entry["grad_norm"]) for entry in told)


@pytest.mark.slow
def test_reasoning_first_is_learnt_in_its_order(base: Path, tmp_path: Path, answers: Form) -> None:
    first = dataclasses.replace(answers, order="pre")
    how = settings(base, tmp_path / "pre", epochs=2)
    run(how, lessons(first), label_at=-2)
    steps = log(tmp_path / "pre")
    assert steps[-2]["loss"] < steps[0]["loss"]
    accuracy = [entry["label_accuracy"] for entry in steps if "label_accuracy" in entry]
    assert accuracy[-1] > accuracy[0]

    rows = [
        {"pair_id": str(n), "root": root_of(n, label), "rest": list(QUERY), "label": label, "rate": 0.5}
        for n in range(4)
        for label in LABELS
    ]
    grpo = settings(tmp_path / "pre", tmp_path / "grpo", "grpo", steps=2, groups=2, group=4, max_tokens=12, refresh=1)
    run(grpo, rows, form=first)
    told = [entry for entry in log(tmp_path / "grpo") if "groups_drawn" in entry]
    # No label can be read off a first token: nothing is put back, and no rate is read anew.
    assert [entry["groups_drawn"] for entry in told] == [2, 2]
    assert all("p_gold_drawn" not in entry for entry in told)


def test_grpo_raises_the_reward_and_draws_groups_with_spread(
    answers: Form, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"pair_id": str(n), "root": root_of(n, label), "rest": list(QUERY), "label": label, "rate": None}
        for n in range(12)
        for label in LABELS
    ]
    read: list[int] = []  # pairs of each reading of the pass rates

    def counted(model: Any, rows: Sequence[Row], *rest: Any) -> np.ndarray:
        read.append(len(rows))
        return pass_rates(model, rows, *rest)

    monkeypatch.setattr(train, "pass_rates", counted)
    how = settings(
        taught, tmp_path / "grpo", "grpo", learning_rate=1e-3, steps=24, groups=4, group=6, max_tokens=24, refresh=8
    )
    run(how, rows, form=answers)
    assert read == [48, 48, 48, 48]  # the last at the end
    steps = [entry for entry in log(tmp_path / "grpo") if "reward" in entry]
    right = [entry["rewards/right/mean"] for entry in steps]
    assert {"rewards/formed/mean", "rewards/agrees/mean", "kl", "entropy", "frac_reward_zero_std"} <= steps[0].keys()
    assert max(entry["frac_reward_zero_std"] for entry in steps[:8]) == 0  # refilled before the trainer sees them
    assert np.mean([entry["groups_without_spread"] for entry in steps[:8]]) < 0.5
    assert 0 < right[0] < 1
    assert np.mean([entry["reward"] for entry in steps[-6:]]) > np.mean([entry["reward"] for entry in steps[:6]])
    assert p_gold(tmp_path / "grpo", answers) > p_gold(taught, answers) + 0.05


@pytest.mark.parametrize(
    ("settled", "uniform", "order", "drawn", "answered"),
    [
        ({0, 1, 2}, False, "post", 6, {3, 4, 5}),  # put back until three with spread are there
        ({0, 1, 2, 3}, False, "post", None, {4, 5}),  # too few with spread: one without fills the batch
        ({0, 1, 2}, True, "post", 3, None),  # uniform sampling keeps what it draws
        ({0, 1, 2}, False, "pre", 3, None),  # a first token is no label
    ],
)
def test_a_group_whose_labels_are_all_alike_is_put_back_and_another_pair_drawn_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
    answers: Form,
    settled: set[int],
    uniform: bool,
    order: str,
    drawn: int | None,
    answered: set[int] | None,
) -> None:
    right, wrong = 7, 8
    rows = [Row((number,), QUERY, (right,)) for number in range(6)]
    asked: list[int] = []

    def firsts(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        asked.extend(prompt[0] for prompt in prompts)
        return [[right] * count if prompt[0] in settled else [right, *[wrong] * (count - 1)] for prompt in prompts]

    import torch

    class InTurn(Difficulty):
        def draw(self, count: int, *key: int) -> np.ndarray:
            return np.array([(len(asked) + n) % 6 for n in range(count)])

    monkeypatch.setattr(rollout, "first_tokens", firsts)
    monkeypatch.setattr(rollout, "continued", lambda model, prompts, firsts, *_: [[[f, 1] for f in g] for g in firsts])
    difficulty = InTurn(np.full(6, 0.5), group=4, seed=0, uniform=uniform)
    how = dataclasses.replace(answers, order=order)
    found = rollout.rolled_out(torch.nn.Linear(1, 1), rows, difficulty, how, 3, 12, (0, 0))
    pairs = [number for number, _ in found.answers]
    assert len(pairs) == 3
    assert all(len(group) == 4 for _, group in found.answers)
    assert found.drawn == len(asked)
    assert found.without_spread == sum(number in settled for number in asked)
    if drawn:
        assert found.drawn == drawn
    if answered:
        assert answered <= set(pairs)
    else:
        assert set(pairs) == {0, 1, 2}


@pytest.mark.parametrize("label_weight", [1, 5])
def test_dpos_loss_is_the_formula_of_its_paper(answers: Form, taught: Path, tmp_path: Path, label_weight: int) -> None:
    """Rafailov et al. 2023 (arXiv 2305.18290), equation 7, with the label's own gain so many times, and 0.2 of the
    chosen answers' mean NLL a token."""
    import torch

    rows = []
    for number, lesson in enumerate(lessons(answers, 4)):
        rejected = answers.target(LABELS[(number + 1) % 4], "No. So Related.")
        prompt = [*lesson["root"], *lesson["rest"]]
        rows.append({"pair_id": str(number), "prompt": prompt, "chosen": lesson["answer"], "rejected": rejected})
    changes = {"epochs": 3, "learning_rate": 1e-3, "beta": 0.3, "checkpoint_every": 1, "label_weight": label_weight}
    how = settings(taught, tmp_path / "dpo", "dpo", **changes)
    run(how, rows, label_at=0)
    # The first step only warms up: it moves nothing.
    logged = next(entry["loss"] for entry in log(tmp_path / "dpo") if entry["step"] == 3)

    def logp(folder: Path, row: dict[str, Any], side: str) -> Any:
        model = train.policy(settings(folder, tmp_path / "read"))
        logits = model(torch.tensor([row["prompt"] + row[side]])).logits[0, len(row["prompt"]) - 1 : -1]
        every = torch.log_softmax(logits.double(), -1)
        return every[torch.arange(len(row[side])), torch.tensor(row[side])]

    policy = tmp_path / "dpo" / "checkpoints" / "checkpoint-2"
    margins, nll, tokens = [], 0.0, 0
    with torch.no_grad():
        for row in rows:
            gain = {}
            for side in ("chosen", "rejected"):
                each = logp(policy, row, side) - logp(taught, row, side)
                gain[side] = label_weight * each[0] + each[1:].sum()
            margins.append(0.3 * (gain["chosen"] - gain["rejected"]))
            nll -= float(logp(policy, row, "chosen").sum())
            tokens += len(row["chosen"])
    wanted = float(-torch.nn.functional.logsigmoid(torch.stack(margins)).mean()) + 0.2 * nll / tokens
    assert abs(float(torch.stack(margins).mean())) > 0.05
    assert logged == pytest.approx(wanted, rel=1e-3)


def test_how_many_sampled_answers_are_right_is_held_against_what_p_gold_expects() -> None:
    """Two pairs of eight answers each, one that was not sampled."""
    rates, known, answers = np.array([0.5, 0.25, 0.9]), np.array([0.75, 0.25, np.nan]), np.array([8, 8, 0])
    told = against_samples(rates, known, answers)
    assert "of 16 sampled answers 8 are right, p(gold) expects 6.0 (+1.1 standard errors)" in told
    assert "against none" in against_samples(rates, known, 0 * answers)


def test_grpos_advantages_and_loss_are_the_formulas_of_its_paper(
    answers: Form, taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shao et al. 2024 (arXiv 2402.03300), section 4.1.2: rewards standardised in their group; tokens averaged."""
    from trl import GRPOTrainer

    seen: dict[str, Any] = {}

    def keep(name: str) -> None:
        original = getattr(GRPOTrainer, name)

        def kept(self: Any, *given: Any) -> Any:
            found = original(self, *given)
            seen.setdefault(name, found.clone() if hasattr(found, "clone") else dict(found))
            return found

        monkeypatch.setattr(GRPOTrainer, name, kept)

    for name in ("_calculate_rewards", "_generate_and_score_completions", "_compute_loss"):
        keep(name)
    rows = [
        {"pair_id": str(n), "root": root_of(n, LABELS[n % 4]), "rest": list(QUERY), "label": LABELS[n % 4], "rate": 0.5}
        for n in range(8)
    ]
    how = settings(
        taught, tmp_path / "grpo", "grpo", steps=1, groups=3, group=4, max_tokens=16, rewards=(1.0, 0.5, 0.25)
    )
    run(how, rows, form=answers)

    rewards = (seen["_calculate_rewards"].numpy() * [1.0, 0.5, 0.25]).sum(axis=1).reshape(3, 4)
    assert len(np.unique(rewards)) > 1
    wanted = (rewards - rewards.mean(axis=1, keepdims=True)) / (rewards.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    scored = seen["_generate_and_score_completions"]
    assert scored["advantages"].numpy() == pytest.approx(wanted.reshape(-1), abs=1e-5)
    # The policy is still the one that sampled and the reference: every ratio is 1, every KL term 0.
    tokens = scored["completion_mask"].sum(dim=1).numpy()
    assert float(seen["_compute_loss"]) == pytest.approx(-(wanted.reshape(-1) * tokens).sum() / tokens.sum(), abs=1e-4)


def a_stage(stage: str, answers: Form) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The rows of a stage, changes of its settings, and what it is told beside them."""
    rows = lessons(answers)
    if stage == "dpo":
        return preferred(answers), {"learning_rate": 1e-3}, {"label_at": 0}
    if stage == "grpo":
        rows = [{**row, "label": LABELS[n % 4], "rate": 0.5} for n, row in enumerate(rows)]
        return rows, {"learning_rate": 1e-3, "groups": 2, "group": 4, "max_tokens": 12}, {"form": answers}
    return rows, {}, {"label_at": 0}


def _train(how: TrainSettings, more: dict[str, Any]) -> None:
    train.launch(how, 1, **more)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "full"),
    [("sft", True), ("sft", False), ("dpo", True), ("grpo", True)],
    ids=["sft", "lora", "dpo", "grpo"],
)
def test_a_killed_training_ends_with_the_weights_of_one_that_was_not_killed(
    base: Path, answers: Form, taught: Path, tmp_path: Path, stage: str, full: bool
) -> None:
    rows, changes, more = a_stage(stage, answers)
    changes |= {"epochs": 8, "checkpoint_every": 3, "batch_tokens": 128, "steps": 40, "full": full}
    parent = base if stage == "sft" else taught
    whole, cut = (settings(parent, tmp_path / name, stage, **changes) for name in ("whole", "cut"))
    run(whole, rows, **more)

    train.land(cut, rows)
    child = multiprocessing.get_context("spawn").Process(target=_train, args=(cut, more))
    child.start()
    deadline = time.monotonic() + 120
    while not list((tmp_path / "cut" / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline
        assert child.is_alive()
        time.sleep(0.02)
    os.kill(int(child.pid or 0), signal.SIGKILL)
    child.join()
    assert not list((tmp_path / "cut").glob("*.safetensors")), "it was done before it was killed"
    train.launch(cut, 1, **more)

    assert weights_hash(str(tmp_path / "cut")) == weights_hash(str(tmp_path / "whole"))
    steps = [[e["step"] for e in log(tmp_path / name) if "loss" in e] for name in ("whole", "cut")]
    assert steps[0] == steps[1]


@pytest.mark.slow
@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_two_processes_train_one_model_and_end_together(
    answers: Form, taught: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH")  # the tests' own, which an operator does not have
    rows, changes, more = a_stage(stage, answers)
    changes |= {"full": False, "epochs": 2, "learning_rate": 1e-3, "steps": 9, "gradient_checkpointing": True}
    how = settings(taught, tmp_path / stage, stage, **changes)
    if stage == "grpo":
        how = dataclasses.replace(how, generated_tokens=300)
    train.land(how, rows)
    train.launch(how, 2, **more)
    train.leave(how, "tiny")
    told = [entry for entry in log(tmp_path / stage) if "loss" in entry]
    assert [entry["step"] for entry in told] == list(range(1, len(told) + 1))  # one process writes the log
    if stage != "grpo":  # which draws in each process from all pairs
        alone = settings(taught, tmp_path / "alone", stage, **changes | {"accumulate": 2})
        run(alone, rows, **more)
        same = [entry for entry in log(tmp_path / "alone") if "loss" in entry]
        of_all = (
            ("label_loss", "label_accuracy") if stage == "sft" else ("rewards/margins", "rewards/accuracies", "nll")
        )
        for name in ("loss", "grad_norm", *of_all):  # not of the first process's batches alone
            wanted = [entry[name] for entry in same]
            assert [entry[name] for entry in told] == pytest.approx(wanted, rel=0.02, abs=1e-3), name
    if stage == "grpo":
        spent = [entry["generated_tokens"] for entry in told]
        assert spent[-2] < 300 <= spent[-1]


def test_a_whole_model_takes_from_its_base_what_does_not_tell_of_other_weights(base: Path, tmp_path: Path) -> None:
    (parent := tmp_path / "parent").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors.index.json", "canaries.json", "x.bin"):
        (parent / name).write_text("{}")
    train.leave(settings(parent, tmp_path / "out"), "parent")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["chat_template.jinja", "tokenizer.json"]


def test_rarer_labels_weigh_more_by_the_power_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    def weights(balance: float) -> dict[int, float]:
        labels = [(4, 1.0)] * 8 + [(3, 0.5)] * 4 + [(2, 1.0)] * 2
        return train.label_weights(labels, settings(base, tmp_path, balance=balance))

    assert weights(0.0) == {4: 4, 3: 4, 2: 4}
    assert weights(1.0) == pytest.approx({4: 2, 3: 8, 2: 8})
    assert weights(0.5) == pytest.approx({4: 8**0.5, 3: 32**0.5, 2: 32**0.5})


def cut_short(out: Path, checkpoints: int, left: Sequence[str] = ()) -> Path:
    """A copy of a training's folder, as if it was killed before its last so many checkpoints, or after all of them.

    `left`: files, truncated, that a kill left of the first checkpoint that it cut.
    """
    cut = Path(shutil.copytree(out, out.with_name(f"cut {checkpoints}")))
    for file in cut.glob("*.safetensors"):
        file.unlink()
    (cut / "plan.json").unlink()
    saved = sorted((cut / "checkpoints").glob("checkpoint-*"), key=lambda c: int(c.name.rsplit("-")[1]))
    for number, checkpoint in enumerate(saved[len(saved) - checkpoints :]):
        kept = {name: (checkpoint / name).read_bytes() for name in left if number == 0}
        shutil.rmtree(checkpoint)
        for name, content in kept.items():
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / name).write_bytes(content[: len(content) // 2])
    return cut


@pytest.mark.parametrize(
    ("stage", "full", "lost"),
    [("sft", False, (2, 1)), ("dpo", False, (1, 0)), pytest.param("dpo", True, (1, 0), marks=pytest.mark.slow)],
)
def test_a_training_that_goes_on_from_its_checkpoint_ends_with_the_same_weights(
    answers: Form, taught: Path, tmp_path: Path, stage: str, full: bool, lost: tuple[int, int]
) -> None:
    rows, _, more = a_stage(stage, answers)

    def ended(out: Path) -> list[float]:
        how = settings(taught, out, stage, full=full, epochs=2, learning_rate=5e-4, checkpoint_every=5)
        run(how, rows, **more)
        return [entry["step"] for entry in log(out) if "loss" in entry]

    whole = ended(tmp_path / "whole")
    for checkpoints in lost:
        cut = cut_short(tmp_path / "whole", checkpoints, ["optimizer.pt", "trainer_state.json"])
        assert ended(cut) == whole
        assert weights_hash(str(cut)) == weights_hash(str(tmp_path / "whole"))


def test_a_training_that_was_killed_behind_its_last_step_takes_no_other(
    base: Path, answers: Form, tmp_path: Path
) -> None:
    how = settings(base, tmp_path, full=False, epochs=1.4, checkpoint_every=100)  # an epoch is left unfinished
    run(how, lessons(answers), label_at=0)
    whole, steps = weights_hash(str(tmp_path)), [entry["step"] for entry in log(tmp_path)]
    for _ in range(2):
        (tmp_path / "adapter_model.safetensors").unlink()
        run(how, lessons(answers), label_at=0)
        assert weights_hash(str(tmp_path)) == whole
        assert [entry["step"] for entry in log(tmp_path)] == steps


@pytest.mark.parametrize(
    ("every", "full"),
    [pytest.param(2, True, marks=pytest.mark.slow), pytest.param(1, True, marks=pytest.mark.slow), (2, False)],
)
def test_grpo_ends_at_its_bound_of_generated_tokens_a_resumed_one_too(
    answers: Form, taught: Path, tmp_path: Path, every: int, full: bool
) -> None:
    rows = [
        {"pair_id": str(n), "root": root_of(n, LABELS[n % 4]), "rest": list(QUERY), "label": LABELS[n % 4], "rate": 0.5}
        for n in range(16)
    ]

    def ended(out: Path) -> list[tuple[float, float]]:
        how = settings(
            taught,
            out,
            "grpo",
            full=full,
            steps=30,
            groups=2,
            group=4,
            max_tokens=12,
            generated_tokens=400,
            checkpoint_every=every,
        )
        assert "p_gold_end" in run(how, rows, form=answers)
        return [(e["step"], e["generated_tokens"]) for e in log(out) if "generated_tokens" in e]

    whole = ended(tmp_path / "whole")
    assert whole[-2][1] < 400 <= whole[-1][1] < 400 + 2 * 4 * 12
    for checkpoints in (1, 0):
        cut = cut_short(tmp_path / "whole", checkpoints, ["difficulty.npy"])
        assert ended(cut) == whole
        assert weights_hash(str(cut)) == weights_hash(str(tmp_path / "whole"))


@pytest.mark.parametrize("name", ["trainer_state.json", "difficulty.npy", "rng_state_1.pth"])
def test_the_newest_checkpoint_that_was_written_to_its_end_is_gone_on_from(tmp_path: Path, name: str) -> None:
    import torch

    how = settings(tmp_path, tmp_path, "grpo")
    assert train._last_checkpoint(how, 2) is None
    for step in (9, 10):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text('{"global_step": 1}')
        np.save(folder / "difficulty.npy", np.ones(3))
        for process in range(2):
            torch.save({"cpu": torch.get_rng_state()}, folder / f"rng_state_{process}.pth")
    assert train._last_checkpoint(how, 2) == str(folder)
    whole = (folder / name).read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        (folder / name).write_bytes(content)
        assert train._last_checkpoint(how, 2) == str(folder.with_name("checkpoint-9"))
    (folder / name).unlink()
    assert train._last_checkpoint(how, 2) == str(folder.with_name("checkpoint-9"))


def test_a_folder_that_holds_another_training_is_refused(base: Path, answers: Form, tmp_path: Path) -> None:
    train.land(settings(base, tmp_path), lessons(answers, 4))
    # Nothing is trained yet, so nothing is lost with the rows that were landed first.
    assert train.land(settings(base, tmp_path), lessons(answers, 5)) == (train.data_hash(lessons(answers, 5)), True)
    adapter.write_recipe(str(tmp_path), {"merged_hash": "0"})
    train.land(settings(base, tmp_path), lessons(answers, 5))
    train.land(settings(base, tmp_path), lessons(answers, 5))
    with pytest.raises(ValueError, match="differs in the rows"):
        train.land(settings(base, tmp_path), lessons(answers, 8))
    with pytest.raises(ValueError, match="differs in order"):
        train.land(settings(base, tmp_path), lessons(answers, 5), chosen={"order": "pre"})
    with pytest.raises(ValueError, match="differs in the weights it starts from"):
        train.land(settings(base, tmp_path), lessons(answers, 5), parent="another's")
    with pytest.raises(ValueError, match="differs in learning_rate"):
        train.land(settings(base, tmp_path, learning_rate=1.0), lessons(answers, 5))
    with pytest.raises(ValueError, match="differs in processes"):
        train.land(settings(base, tmp_path), lessons(answers, 5), processes=2)


@pytest.mark.usefixtures("spark")
def test_more_processes_than_the_driver_has_gpus_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "has_gpu", lambda: True)
    with pytest.raises(ValueError, match="--processes 8: the driver was given 0 GPUs; say --processes 1"):
        train.launch(settings(base, tmp_path), 8, label_at=0)


@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize(("of_a_task", "processes"), [(0.25, 1), (0.25, 2), (2, 1), (2, 3)])
def test_processes_that_the_gpus_of_a_task_do_not_go_into_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_a_task: float, processes: int
) -> None:
    monkeypatch.setattr(train, "gpus_of_a_task", lambda: of_a_task)
    monkeypatch.setattr(train, "has_gpu", lambda: False)
    with pytest.raises(ValueError, match=rf"--processes {processes}: each task has {of_a_task} GPUs .*; say 1 there"):
        train.launch(settings(base, tmp_path), processes, on_cluster=True, label_at=0)


def test_what_could_not_be_merged_is_refused_before_it_is_trained(base: Path) -> None:
    policy = train.policy(settings(base, base, full=False))  # this one could
    (module,) = {name for name, _ in policy.named_modules() if name.endswith("layers.0.self_attn.q_proj")}
    adapter.refuse_unmergeable(str(base), [module.removeprefix("base_model.model.")], False)
    with pytest.raises(ValueError, match=r"keeps vision\.q_proj\.weight under another name.*--full"):
        adapter.refuse_unmergeable(str(base), ["vision.q_proj"], False)
    with pytest.raises(ValueError, match="keeps its weights transposed"):
        adapter.refuse_unmergeable(str(base), [], True)


@pytest.mark.parametrize(("step", "kept"), [(0, []), (3, [1, 2, 3])])
def test_steps_that_are_taken_again_are_logged_once(tmp_path: Path, step: int, kept: list[int]) -> None:
    (tmp_path / train.LOG).write_text("".join(json.dumps({"step": n}) + "\n" for n in range(1, 6)))
    train._cut_log(TrainSettings(stage="sft", base="", out=str(tmp_path)), step)
    assert [json.loads(line)["step"] for line in (tmp_path / train.LOG).read_text().splitlines()] == kept


def test_hard_pairs_are_drawn_oftener_and_settled_ones_never() -> None:
    rates = np.array([0.0, 0.2, 0.8, 1.0, 0.95])
    difficulty = Difficulty(rates, group=8, seed=0)
    assert difficulty.weights == pytest.approx([0, 0.8, 0.2, 0, 0])
    drawn = np.bincount([difficulty.draw(1, step)[0] for step in range(400)], minlength=5)
    assert drawn[[0, 3, 4]].sum() == 0
    assert 0.7 < drawn[1] / 400 < 0.9
    assert sorted(difficulty.draw(5, 0)) == [1, 2]
    assert Difficulty(rates, 8, 0, uniform=True).weights == pytest.approx([0.2] * 5)


def test_draws_depend_on_seed_step_and_rates_alone(tmp_path: Path) -> None:
    rates = np.linspace(0.1, 0.9, 50)
    one, two = Difficulty(rates, 8, 7), Difficulty(np.full(50, 0.5), 8, 7)
    one.save(str(tmp_path))
    two.load(str(tmp_path))
    assert one.draw(8, 3, 0).tolist() == two.draw(8, 3, 0).tolist()
    assert one.draw(8, 3, 0).tolist() != one.draw(8, 4, 0).tolist()
