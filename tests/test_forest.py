"""A forest computes what its rows compute apart: loss, gradients, and the answers' log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.models import tiny_model
from udfs.forest import IGNORED, Row, forests, grouped, logprobs, planted

ROWS = [
    Row((5, 6, 7, 8), (9, 10), (11, 12, 13)),
    Row((5, 6, 7, 8), (14,), (15,)),
    Row((20, 21), (22, 23, 24), (25, 26)),
    Row((5, 6, 7, 8), (9, 10), (16, 17, 18, 19)),
    Row((5, 6, 30), (9, 10), (27,)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path_factory.mktemp("forest") / "model")
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def apart(model: Any, row: Row) -> Any:
    """Log-probabilities of a row's answer tokens, the plain way: one row, no mask, no sharing."""
    import torch

    ids = [*row.root, *row.rest, *row.answer]
    logits = model(torch.tensor([ids])).logits[0]
    start = len(ids) - len(row.answer)
    found = torch.log_softmax(logits[start - 1 : -1], dim=-1)
    return found[torch.arange(len(row.answer)), torch.tensor(row.answer)]


def test_loss_and_gradients_of_a_forest_are_those_of_its_rows_apart(model: Any) -> None:
    import torch

    model.zero_grad()
    wanted = -torch.cat([apart(model, row) for row in ROWS]).mean()
    wanted.backward()
    gradients = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    forest, _ = planted(ROWS)
    inputs = forest.inputs()
    labels = inputs.pop("labels")[0, 1:]
    logits = model(**inputs).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
    loss.backward()

    assert torch.allclose(loss, wanted, atol=1e-5)
    for own, other in zip(model.parameters(), gradients, strict=True):
        assert torch.allclose(own.grad, other, atol=1e-4)


def test_answers_to_one_prompt_have_the_logprobs_and_entropies_that_they_have_apart(model: Any) -> None:
    import torch

    groups: list[tuple[tuple[int, ...], list[tuple[int, ...]]]] = [
        ((5, 6, 7), [(8, 9), (10,), (8, 11, 12)]),
        ((20, 21, 22, 23), [(24,)]),
    ]
    found = logprobs(model, groups, temperature=1.0)
    rows = [Row(tuple(prompt[:-1]), tuple(prompt[-1:]), answer) for prompt, answers in groups for answer in answers]
    for row, (own, entropy) in zip(rows, found, strict=True):
        assert torch.allclose(own, apart(model, row), atol=1e-5)
        assert own.requires_grad
        assert entropy.shape == own.shape
    logits = model(torch.tensor([[20, 21, 22, 23]])).logits[0, -1]
    p = torch.softmax(logits, -1)
    assert torch.allclose(found[-1][1][0], -(p * p.log()).sum(), atol=1e-4)


def test_temperature_divides_the_logits(model: Any) -> None:
    import torch

    ((own, _),) = logprobs(model, [((5, 6, 7), [(8,)])], temperature=2.0)
    logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1] / 2
    assert torch.allclose(own[0], torch.log_softmax(logits, -1)[8], atol=1e-5)


def test_rows_of_one_root_stand_together_and_a_tree_is_split_where_it_grows_too_large() -> None:
    trees = list(grouped(ROWS, 13))  # 4 of the root, 5 and 2 and 6 of its rows
    assert [[row.answer for row in tree] for tree in trees] == [
        [(11, 12, 13), (15,)],
        [(16, 17, 18, 19)],
        [(25, 26)],
        [(27,)],
    ]
    assert sorted(row for tree in trees for row in tree) == sorted(ROWS)
    assert forests(trees, 21) == [[0, 1], [2, 3]]  # 11 + 10, then 7 + 6


def test_what_all_roots_begin_with_takes_its_place_in_a_forest_once() -> None:
    trees = [[Row((1, 2, 3, number), (4,), (5,))] for number in (7, 8, 9)]  # 3, and 3 for each
    assert forests(trees, 9) == [[0, 1], [2]]
    assert len(planted([row for tree in trees[:2] for row in tree])[0].ids) == 9


def test_a_row_without_a_token_before_its_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="before its answer"):
        planted([Row((), (), (3,))])


def test_every_answer_is_found_where_it_was_planted() -> None:
    forest, spans = planted(ROWS)
    assert [tuple(forest.ids[i] for i in span) for span in spans] == [row.answer for row in ROWS]
    assert [forest.labels[i] for i in spans[0]] == [11, 12, 13]
    assert all(forest.labels[i] == IGNORED for i in range(len(forest.ids)) if not any(i in s for s in spans))


tokens = st.lists(st.integers(1, 3), max_size=6).map(tuple)


@given(st.lists(st.builds(Row, tokens, tokens.filter(len), tokens.filter(len)), min_size=1, max_size=8))
def test_an_answer_sees_its_row_alone_and_no_token_that_prompts_share_is_there_twice(rows: list[Row]) -> None:
    forest, spans = planted(rows)
    mask = forest.mask()[0, 0]
    for row, span in zip(rows, spans, strict=True):
        seen = mask[span.stop - 1].nonzero()[:, 0].tolist()
        assert tuple(forest.ids[i] for i in seen) == row.prompt + row.answer
        assert [forest.positions[i] for i in seen] == list(range(len(seen)))
        assert span.start - 1 in seen  # which foretells its first token
    nodes = {row.prompt[:n] for row in rows for n in range(1, len(row.prompt) + 1)}
    again = len(rows) - len({row.prompt for row in rows})  # a prompt's last token, for each answer
    assert len(forest.ids) == len(nodes) + again + sum(len(row.answer) for row in rows)
