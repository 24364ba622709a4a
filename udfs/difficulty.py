"""Which pairs GRPO trains on: those that the policy sometimes gets right and sometimes wrong, the harder the oftener.

A group of answers that are all right or all wrong has no spread, so every advantage in it is zero and its tokens were
generated for nothing (TaoSR1, section 3.3: difficulty-based dynamic sampling). With the label first, a pair's pass rate
at temperature 1 is p(gold), read from one prefill. So a group's labels are drawn before its chains are written: a group
without spread costs its prefill, and another pair is drawn in its place before the trainer sees the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from udfs.forest import Row, forests, grouped, planted

STATE = "difficulty.npy"  # in a checkpoint


class Difficulty:
    """Pass rates of all train pairs, and draws from them. Drawing is a function of seed, step and rates alone."""

    def __init__(self, rates: np.ndarray, group: int, seed: int, uniform: bool = False) -> None:
        """`rates`: p(gold) of each pair, in [0, 1]. `group`: answers a pair gets. `uniform`: draw all pairs alike."""
        self.rates = rates.astype(np.float64)
        self.group, self.seed, self.uniform = group, seed, uniform

    @property
    def weights(self) -> np.ndarray:
        """How often each pair is drawn, summing to 1: its difficulty 1 - rate, and 0 where a group of answers would
        be expected to hold less than half a right one, or half a wrong one.
        """
        expected = self.rates * self.group
        weights = np.where((expected >= 0.5) & (expected <= self.group - 0.5), 1 - self.rates, 0.0)
        if self.uniform or not weights.sum():
            weights = np.ones_like(self.rates)
        return np.asarray(weights / weights.sum())

    def draw(self, count: int, *key: int) -> np.ndarray:
        """Numbers of `count` different pairs (fewer where fewer have a weight); the same for the same key and rates."""
        generator = np.random.default_rng([self.seed, *key])
        weights = self.weights
        return generator.choice(len(weights), size=min(count, int((weights > 0).sum())), replace=False, p=weights)

    def save(self, folder: str) -> None:
        """Into a checkpoint."""
        np.save(Path(folder) / STATE, self.rates, allow_pickle=False)

    def load(self, folder: str) -> None:
        """From a checkpoint."""
        self.rates = np.load(Path(folder) / STATE, allow_pickle=False)


def pass_rates(model: Any, rows: Sequence[Row], tokens: int, share: slice = slice(None)) -> np.ndarray:
    """p(gold) of each pair under the model: the probability of the row's answer, one label token, after its prompt.

    One prefill of all prompts, each product once. `tokens`: of one forward pass. `share`: of the products, those that
    this process reads; pairs of the others get 0.
    """
    import torch

    device = next(model.parameters()).device
    place = {id(row): number for number, row in enumerate(rows)}
    trees = list(grouped(rows, tokens))[share]
    rates = np.zeros(len(rows))
    training = model.training
    model.eval()
    with torch.no_grad():
        for together in forests(trees, tokens):
            members = [row for tree in together for row in trees[tree]]
            forest, spans = planted(members)
            inputs = {name: value.to(device) for name, value in forest.inputs().items() if name != "labels"}
            at = torch.tensor([span.start - 1 for span in spans], device=device)
            logits = model(**inputs, use_cache=False, logits_to_keep=at).logits[0].float()
            own = torch.tensor([row.answer[0] for row in members], device=device)
            found = torch.softmax(logits, dim=-1).gather(1, own[:, None])[:, 0]
            rates[[place[id(row)] for row in members]] = found.double().cpu().numpy()
    model.train(training)
    return rates
