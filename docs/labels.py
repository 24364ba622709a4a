"""Tiers without Spark, JVM or this project: `python labels.py T` prints pair_id and tier; needs deltalake, pyarrow."""

import sys

from deltalake import DeltaTable


def tier(p, taus, temperature=1.0):
    """The tier of p (labels 4, 3, 2, 1) by τ4, τ3, τ2; add up in this order: at an exact tie the last bit decides."""
    q = p if temperature == 1 else [x ** (1 / temperature) for x in p]
    total = 1.0 if temperature == 1 else ((q[0] + q[1]) + q[2]) + q[3]
    c = q[0] / total, (q[0] + q[1]) / total, ((q[0] + q[1]) + q[2]) / total
    return next((k for k, c_k, tau in zip((4, 3, 2), c, taus, strict=True) if c_k >= tau), 1)


def tiers(root):
    """(pair_id, tier) of each pair that the version in force can judge."""
    names = ("thresholds", "pairs", "label_probs")
    cuts, pairs, probs = (DeltaTable(f"{root}/{name}").to_pyarrow_table().to_pylist() for name in names)
    cuts = [cut for cut in cuts if cut["status"] == "active"]
    tau = {(cut["segment"], cut["boundary"]): cut["tau"] for cut in cuts}
    segment = {pair["pair_id"]: pair.get(cut["segment_by"]) for cut in cuts[:1] for pair in pairs}
    for row in probs:
        if row["pair_id"] in segment and all(row[key] == cuts[0][key] for key in ("model_id", "prompt_id")):
            taus = [tau.get((segment[row["pair_id"]], k), tau["", k]) for k in (4, 3, 2)]
            p = [row[name] for name in ("p_excellent", "p_related", "p_mismatch", "p_irrelevant")]
            yield row["pair_id"], None if None in p else tier(p, taus, cuts[0]["temperature"])


if __name__ == "__main__":
    for pair in tiers(sys.argv[1]):
        print(*pair)
