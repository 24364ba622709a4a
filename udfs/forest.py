"""Training sequences that share prefixes: a product is computed once for its pairs, a prompt once for its answers.

The prompt is the cost in training too. A row alone is `prompt + answer`; rows of one product repeat its text, and the
answers sampled for one pair repeat the whole prompt. Here such rows are laid out as one sequence, a tree: the common
root first, then each row's rest as a branch, at the positions it would have alone, and with a mask that lets a branch
see its root and itself only. Every token then gets the hidden state that it would have in a row of its own, so loss and
gradients are those of the rows apart (a test holds both against them); the demo's train split is 2.4 times shorter so.
Several trees stand side by side in one sequence (a forest) until a token budget is full: no padding is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a token that is not trained on, in torch's own convention


class Row(NamedTuple):
    """One row to train on, as token ids: `root` may be shared with others, `rest` and `answer` are its own."""

    root: tuple[int, ...]
    rest: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def own(self) -> int:
        """Tokens that are computed for this row alone."""
        return len(self.rest) + len(self.answer)


@dataclass
class Forest:
    """One sequence: for each token its id, label, position in its row, tree, and branch (0: the root)."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    tree: list[int] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)

    def plant(self, root: Sequence[int], branches: Iterable[tuple[Sequence[int], Sequence[int]]]) -> list[range]:
        """Adds a tree; a branch is (rest, answer). Returns where each answer lies.

        Raises ValueError for an empty rest: the answer's first token would be foretold by the branch before it.
        """
        number = self.tree[-1] + 1 if self.tree else 0
        self._grow(root, [IGNORED] * len(root), 0, number, 0)
        answers = []
        for branch, (rest, answer) in enumerate(branches, start=1):
            if not rest:
                raise ValueError("a branch needs a token of its own before its answer")
            self._grow([*rest, *answer], [*[IGNORED] * len(rest), *answer], len(root), number, branch)
            answers.append(range(len(self.ids) - len(answer), len(self.ids)))
        return answers

    def _grow(self, ids: Sequence[int], labels: Sequence[int], position: int, tree: int, branch: int) -> None:
        self.ids += ids
        self.labels += labels
        self.positions += range(position, position + len(ids))
        self.tree += [tree] * len(ids)
        self.branch += [branch] * len(ids)

    def mask(self) -> torch.Tensor:
        """Who sees whom, [1, 1, tokens, tokens] bool: what stands before it in its own tree, root or own branch."""
        import torch

        tree, branch = torch.tensor(self.tree), torch.tensor(self.branch)
        same_tree = tree[:, None] == tree[None, :]
        visible = (branch[None, :] == 0) | (branch[:, None] == branch[None, :])
        return (same_tree & visible).tril()[None, None]

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a decoder's forward takes, a batch of one sequence: input_ids, position_ids, attention_mask, labels."""
        import torch

        return {
            "input_ids": torch.tensor([self.ids]),
            "position_ids": torch.tensor([self.positions]),
            "attention_mask": self.mask(),
            "labels": torch.tensor([self.labels]),
        }


def grouped(rows: Iterable[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows of one root together, in the order of their first; a root's rows are split where they pass `tokens`."""
    trees: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        trees.setdefault(row.root, []).append(row)
    for root, members in trees.items():
        part: list[Row] = []
        size = len(root)
        for row in members:
            if part and size + row.own > tokens:
                yield part
                part, size = [], len(root)
            part.append(row)
            size += row.own
        yield part


def forests(trees: Sequence[Sequence[Row]], tokens: int) -> list[list[int]]:
    """Which trees stand together: numbers of trees, in order, up to `tokens` a forest (a larger tree stands alone)."""
    packed: list[list[int]] = []
    size = tokens
    for number, tree in enumerate(trees):
        own = len(tree[0].root) + sum(row.own for row in tree)
        if size + own > tokens or not packed:
            packed.append([])
            size = 0
        packed[-1].append(number)
        size += own
    return packed


def planted(trees: Iterable[Sequence[Row]]) -> tuple[Forest, list[range]]:
    """The trees side by side, and where each row's answer lies."""
    forest, answers = Forest(), []
    for tree in trees:
        answers += forest.plant(tree[0].root, [(row.rest, row.answer) for row in tree])
    return forest, answers


def logprobs(model: Any, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], temperature: float) -> Any:
    """Log-probabilities of the tokens of many answers to each prompt, with gradient, and the entropies there without.

    `groups`: prompt ids and the answers' ids. Returns, for each answer in order, a pair of tensors [answer tokens].
    """
    import torch

    found = []
    for prompt, answers in groups:
        forest = Forest()
        # The last token of the prompt opens each branch: its hidden state foretells the answer's first token.
        spans = forest.plant(prompt[:-1], [(prompt[-1:], answer) for answer in answers])
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in forest.inputs().items() if name != "labels"}
        at = torch.tensor([i - 1 for span in spans for i in span], device=device)
        logits = model(**inputs, use_cache=False, logits_to_keep=at).logits[0].float() / temperature
        ids = torch.tensor([i for answer in answers for i in answer], device=device)
        every = torch.log_softmax(logits, dim=-1)
        own = every.gather(1, ids[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(every.exp() * every).sum(-1)
        lengths = [len(answer) for answer in answers]
        found += list(zip(torch.split(own, lengths), torch.split(entropy, lengths), strict=True))
    return found
