"""From log-probabilities to label probabilities."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from udfs.decode import label_probs


def test_probabilities_are_renormalised_over_the_labels_and_the_rest_is_kept() -> None:
    p, outside, outcome = label_probs([math.log(x) for x in (0.4, 0.2, 0.1, 0.1)])
    assert p == pytest.approx((0.5, 0.25, 0.125, 0.125))
    assert outside == pytest.approx(0.2)
    assert outcome == "scored"


def test_labels_far_below_what_a_double_can_hold_still_share_one() -> None:
    p, outside, outcome = label_probs([-800.0, -800.0, -900.0, -math.inf])
    assert p == pytest.approx((0.5, 0.5, 0.0, 0.0))
    assert (outside, outcome) == (1.0, "scored")


@pytest.mark.parametrize("broken", [[math.nan, -1.0, -1.0, -1.0], [-math.inf] * 4, [math.inf, -1.0, -1.0, -1.0]])
def test_what_is_not_a_number_has_no_probabilities_and_no_default_label(broken: list[float]) -> None:
    assert label_probs(broken) == (None, None, "not_finite")


@given(st.lists(st.floats(-1e4, 0), min_size=4, max_size=4))
def test_any_log_probabilities_give_a_simplex_within_the_tables_constraint(logprobs: list[float]) -> None:
    p, outside, outcome = label_probs(logprobs)
    assert outcome == "scored"
    assert p is not None
    assert outside is not None
    assert abs(p[0] + p[1] + p[2] + p[3] - 1) <= 1e-9
    assert all(0 <= x <= 1 for x in (*p, outside))
