"""From the log-probabilities of the four label tokens to label probabilities.

TaoSR1 asks for the label first and the reasoning after it (post-CoT, section 3.4), so the distribution over labels is
the distribution of the first answer token, read at the four label ids. What the model gave to all other tokens is kept
as `p_outside` before the four are renormalised: a model that does not want to answer with a label shows itself there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class LabelProbs(NamedTuple):
    """p: probabilities of labels 4, 3, 2, 1, summing to 1, or None; p_outside in [0, 1] or None; outcome."""

    p: tuple[float, float, float, float] | None
    p_outside: float | None
    outcome: str


def label_probs(logprobs: Sequence[float]) -> LabelProbs:
    """Probabilities of labels 4, 3, 2, 1 from their four full-vocabulary log-probabilities, in that order.

    `not_finite` where a value is NaN or +inf, or where no label has any mass: there is no default label.
    """
    largest = max(logprobs)
    if len(logprobs) != 4 or any(math.isnan(x) for x in logprobs) or not math.isfinite(largest):
        return LabelProbs(None, None, "not_finite")
    # Relative to the largest, so that labels far below e^-700 still get their share of 1.
    shares = [math.exp(x - largest) for x in logprobs]
    total = math.fsum(shares)
    p4, p3, p2, p1 = (share / total for share in shares)
    inside = math.exp(largest) * total
    return LabelProbs((p4, p3, p2, p1), min(1.0, max(0.0, 1.0 - inside)), "scored")
