"""The four relevance labels, spelled here and nowhere else.

A label is a digit 4..1 in order of worth (TaoSR1, section 3). It is also the answer token of the model unless a
`prompt.json` names other strings, and `p_<name>` is its column in `label_probs`.
"""

from __future__ import annotations

LABELS = (4, 3, 2, 1)
NAMES = {4: "Excellent", 3: "Related", 2: "Mismatch", 1: "Irrelevant"}
P_COLUMNS = tuple(f"p_{NAMES[label].lower()}" for label in LABELS)

# Amazon ESCI: Exact, Substitute, Complement, Irrelevant. The order of worth is the paper's; the gains in ESCI's own
# published script have Substitute and Complement swapped, so take the order from here.
ESCI = {"E": 4, "S": 3, "C": 2, "I": 1}
# Wayfair WANDS has no grade between "fits in part" and "does not fit".
WANDS = {"Exact": 4, "Partial": 3, "Irrelevant": 1}

# What became of a pair that was given to a model. Only `scored` has probabilities; there is no default label.
OUTCOMES = {
    "scored": "the model answered; the four probabilities are set",
    "too_long": "the prompt has more tokens than --max-model-len or the model's context, even after the cuts",
    "not_finite": "the model's answer was not a number, or none of the four labels had any mass",
    "engine_failed": "the engine died on this pair",
}

# Why a chain is not taught. A kept chain has none of these.
DROPPED = {
    "other_label": "it was written for another label than the human one",
    "other_conclusion": "it concludes another label than the human one",
    "no_conclusion": "it does not end in a conclusion of its own, or has nothing that leads to it",
    "unfinished": "the teacher reached its token limit before it ended",
    "too_long": "the teacher's prompt does not fit into its context",
}
