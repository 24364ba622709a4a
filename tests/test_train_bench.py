"""What the benches of training compare: the same pairs, under names that tell models apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import write_deltalake

from bench import icecat, orders, stages


def rows(pairs: str, answered: str) -> stages.Columns:
    """Columns of pairs named by one letter each."""
    hit = np.array([1.0 if pair in answered else np.nan for pair in pairs])
    return {"pair_id": np.array(list(pairs)), "gold": np.arange(len(pairs))} | {
        name: hit for name in ("agrees", *stages.PASSES)
    }


def test_models_are_compared_on_pairs_that_all_have_scored_and_answers_to_pairs_that_all_have_answered() -> None:
    one, other = stages.common([rows("abcd", "abc"), rows("acde", "ad")])
    assert one["pair_id"].tolist() == other["pair_id"].tolist() == ["a", "c", "d"]
    assert one["gold"].tolist() == [0, 2, 3]
    for found in (one, other):
        assert np.isnan(found["label 1"]).tolist() == [False, True, True]
    with pytest.raises(ValueError, match="no pair that all of the models have scored"):
        stages.common([rows("ab", "a"), rows("cd", "c")])


def test_two_folders_that_are_called_alike_keep_their_paths() -> None:
    assert stages.named(["demo-base", "M/sft", "N/sft"]) == ["demo-base", "M/sft", "N/sft"]
    assert stages.named(["M/sft", "M/dpo"]) == ["sft", "dpo"]


def test_an_answer_without_a_label_is_a_wrong_one_and_a_pre_cot_label_costs_the_whole_answer() -> None:
    assert [orders.said(None, gold) for gold in (4, 3, 2, 1)] == [1, 1, 4, 4]
    assert orders.said(3, 4) == 3

    def answered(pairs: str, said: list[int], written: float) -> stages.Columns:
        count = len(pairs)
        return {
            "pair_id": np.array(list(pairs)), "query": np.array(list(pairs)), "gold": np.array([4, 1, 2][:count]),
            "said": np.array(said), "labelled": np.ones(count), "written": np.full(count, written),
            "computed": np.full(count, 20.0),
        }  # fmt: skip

    told = orders.table(answered("abc", [4, 1, 2], 30), answered("ab", [4, 4], 40)).splitlines()
    assert told[0] == "| 2 pairs | post-CoT | pre-CoT |"
    assert told[3].startswith("| accuracy | 1.000 [1.000, 1.000] | 0.500 [")
    assert told[-1] == "| tokens a pair until its label is known | 21.0 | 60.0 |"


def product(query: str, title: str, label: int) -> dict[str, object]:
    fields = dict.fromkeys(("category", "description", "attributes"))
    return {"query": query, "title": title, "label": label, "brand": "Acme", **fields}


def test_the_baseline_tells_pairs_that_share_words_from_pairs_that_do_not() -> None:
    train = [
        product(f"kettle {n}", f"Steel kettle {n}" if n % 2 else "Blue towel", 4 if n % 2 else 1) for n in range(40)
    ]
    (p,) = icecat.logistic_regression(train, [[product("kettle", "Kettle", 4), product("kettle", "Towel", 1)]], None)
    assert p.argmax(axis=1).tolist() == [0, 3]
    assert p[:, 1:3].max() == 0  # labels that nobody gave
    rows = {"gold": np.array([4, 1]), "p": p}
    assert icecat.log_loss(rows) == pytest.approx(-np.log(p[[0, 1], [0, 3]]).mean())
    doubted = {**rows, "p": np.array([[0.5, 0.4, 0.05, 0.05], [0.55, 0.0, 0.1, 0.35]])}
    for power, wanted in ((0.0, [4, 4]), (1.0, [3, 1])):  # of four pairs two are Excellent, one Related, one Irrelevant
        assert icecat.rare_first(doubted, [4, 4, 3, 1], power)["said"].tolist() == wanted
    cut = icecat.cut(rows, rows)
    assert cut["said"].tolist() == [4, 1]
    assert icecat.log_loss(cut) <= icecat.log_loss(rows)


def test_data_that_is_not_there_is_skipped_with_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert icecat.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "skipped, there is no" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_pairs_held_out_are_those_of_dev_and_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gold = pa.table({"pair_id": ["a1", "b2", "c3"], "split": ["test", "train", "dev"], "label": [4, 1, 2]})
    write_deltalake(str(tmp_path / "gold"), gold)
    assert stages.of_splits(str(tmp_path), "dev", "test") == ["pair_id IN ('a1', 'c3')"]
    monkeypatch.setattr(stages, "NAMED", 2)
    assert stages.of_splits(str(tmp_path), "dev", "test", "train") == ["pair_id IN ('a1', 'b2')", "pair_id IN ('c3')"]


def test_a_model_is_better_by_the_difference_on_the_same_pairs() -> None:
    gold = np.array([4, 3, 2, 1] * 10)
    wrong = np.where(np.arange(40) % 8 == 0, 1, gold)
    columns = {"gold": gold, "query": np.repeat(np.arange(10), 4)}
    found = stages.differences({"a": columns | {"said": wrong}, "b": columns | {"said": gold}})
    gained = 1.0 - (2 * 5 / 15 + 1 + 1 + 2 * 10 / 25) / 4
    assert found.splitlines()[0] == "| macro-F1, column less row | b |"
    low, high = (float(x) for x in found.splitlines()[2].split("[")[1].split("]")[0].split(","))
    assert f"| a | {gained:+.3f} [" in found
    assert 0 < low < gained < high
