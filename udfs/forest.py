"""Training sequences that share prefixes: what prompts begin with is computed once, a prompt once for its answers.

The prompt is the cost in training too. A row alone is `prompt + answer`; all rows repeat the system's words, those of
one product its text, and the answers to one pair the whole prompt. Here rows are laid out as one sequence, the trie of
their prompts walked depth first: each token at the position it would have in its own row, and with a mask that lets it
see what leads to it and nothing else. Every token then gets the hidden state that it would have in a row of its own, so
loss and gradients are those of the rows apart (a test holds both against them); the demo's train split is 2.6 times
shorter so. Rows are put together (a forest) until a token budget is full: no padding is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label of a token that is not trained on, in torch's own convention


class Row(NamedTuple):
    """One row to train on, as token ids: its prompt is `root`, by which rows are grouped, and `rest`; `weight` is how
    much SFT counts its answer."""

    root: tuple[int, ...]
    rest: tuple[int, ...]
    answer: tuple[int, ...]
    weight: float = 1.0

    @property
    def prompt(self) -> tuple[int, ...]:
        """All that stands before the answer."""
        return self.root + self.rest

    @property
    def own(self) -> int:
        """Tokens behind its root."""
        return len(self.rest) + len(self.answer)


@dataclass
class Forest:
    """One sequence: for each token its id, label, position in its row, and where in the sequence ends what is built on
    it: the tokens from it up to there, and no others, see it."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def grow(self, ids: Sequence[int], position: int, learnt: bool = False) -> range:
        """Adds a stretch of tokens that stand on each other; returns where it lies."""
        at = range(len(self.ids), len(self.ids) + len(ids))
        self.ids += ids
        self.labels += ids if learnt else [IGNORED] * len(ids)
        self.positions += range(position, position + len(ids))
        self.ends += [at.stop] * len(ids)
        return at

    def mask(self) -> torch.Tensor:
        """Who sees whom, [1, 1, tokens, tokens] bool: what leads to it, and itself."""
        import torch

        ends, places = torch.tensor(self.ends), torch.arange(len(self.ids))
        return (ends[None, :] > places[:, None]).tril()[None, None]

    def inputs(self) -> dict[str, torch.Tensor]:
        """What a decoder's forward takes, a batch of one sequence: input_ids, position_ids, attention_mask, labels."""
        import torch

        return {
            "input_ids": torch.tensor([self.ids]),
            "position_ids": torch.tensor([self.positions]),
            "attention_mask": self.mask(),
            "labels": torch.tensor([self.labels]),
        }


def planted(rows: Sequence[Row]) -> tuple[Forest, list[range]]:
    """The rows as one forest, and where each row's answer lies.

    The last token of a prompt is its row's own, also where other rows have the same prompt: the token before an answer
    foretells its first. Raises ValueError for a row without a prompt.
    """
    forest, answers = Forest(), [range(0)] * len(rows)
    path: list[int] = []  # where the tokens of the last row's prompt lie
    for number in sorted(range(len(rows)), key=lambda n: rows[n].prompt):
        prompt = rows[number].prompt
        if not prompt:
            raise ValueError("a row needs a token before its answer")
        shared = 0
        for place, own in zip(path, prompt[:-1], strict=False):
            if forest.ids[place] != own:
                break
            shared += 1
        del path[shared:]
        path += forest.grow(prompt[shared:], shared)
        answers[number] = forest.grow(rows[number].answer, len(prompt), learnt=True)
        for place in path:
            forest.ends[place] = len(forest.ids)
    return forest, answers


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
    """Which trees stand together: numbers of trees, in order, up to `tokens` a forest (a larger tree stands alone).
    What all roots begin with is counted once for each forest."""
    head = len(commonprefix([tree[0].root for tree in trees]))  # noqa: RUF071 (of token ids)
    packed: list[list[int]] = []
    size = tokens
    for number, tree in enumerate(trees):
        own = len(tree[0].root) - head + sum(row.own for row in tree)
        if size + own > tokens or not packed:
            packed.append([])
            size = head
        packed[-1].append(number)
        size += own
    return packed


def logprobs(model: Any, groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], temperature: float) -> Any:
    """Log-probabilities of the tokens of many answers to each prompt, with gradient, and the entropies there without.

    `groups`: prompt ids and the answers' ids. Returns, for each answer in order, a pair of tensors [answer tokens].
    """
    import torch

    found = []
    for prompt, answers in groups:
        forest, spans = planted([Row(tuple(prompt), (), tuple(answer)) for answer in answers])
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
