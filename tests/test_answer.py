"""The form of an answer, there and back, and what a chain concludes once the label and its echoes are masked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import demo.catalogue
from schemas.labels import LABELS
from tests.models import PROMPT, tiny_tokenizer
from udfs.answer import ORDERS, Form, conclusion, end_ids, findings, form, masked
from udfs.model import Model
from udfs.prompt import load

TOKENIZER = tiny_tokenizer()
END = json.loads(TOKENIZER)["added_tokens"][2]["id"]  # <|im_end|>


def answers(folder: Path, order: str = "post", **config: object) -> Form:
    (folder / "config.json").write_text(json.dumps({"eos_token_id": END, **config}))
    model = Model(str(folder), "0123456789abcdef", "ff", "Fake", 512, 2048, TOKENIZER, None, None, "")
    return form(model, load(PROMPT, TOKENIZER, 512), order)


def test_every_chain_of_the_demo_concludes_its_own_label() -> None:
    for row in demo.catalogue.chains():
        assert conclusion(str(row["chain"])) == row["label"]


@pytest.mark.parametrize(
    ("chain", "label"),
    [
        ("Missed: colour. So Related.", 3),
        ("Missed: colour. So Related", 3),
        ("Grade 4. Missed: colour. So Related.", 3),
        ("4. Missed: colour. So Related (3).", 3),
        ("4 = Excellent. Missed: type. So Mismatch.", 2),
        ("Holds 4 cups. So Excellent.", 4),
        ("Missed: colour.", None),
        ("Missed: colour. Grade: 3", None),
        ("Missed: colour. So related.", None),
        ("Missed: colour. So Related. It is blue.", None),
        ("So Excellent. Missed: colour. So Related.", None),
        # Nothing but the label and its echoes stands before these.
        ("So Excellent.", None),
        ("4. So Excellent.", None),
        ("Excellent: So Excellent.", None),
        ("Grade 4, label: 4. So Excellent.", None),
        ("", None),
    ],
)
def test_a_chain_concludes_what_it_states_at_its_end_and_only_after_findings(chain: str, label: int | None) -> None:
    assert conclusion(chain) == label


def test_no_echo_of_the_label_is_left_in_the_findings_and_facts_stay() -> None:
    chain = "4. Grade: 4 (4). Asked: kettle, 4 cups, size=4 l. The label is Excellent. Excellent fit. So Excellent."
    assert findings(chain) == "Asked: kettle, 4 cups, size=4 l. The . fit."
    assert "So Excellent." in masked(chain)


@pytest.mark.parametrize("order", ORDERS)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60))
def test_what_is_taught_reads_back_as_label_and_chain(
    tmp_path_factory: pytest.TempPathFactory, order: str, text: str
) -> None:
    made = answers(tmp_path_factory.mktemp("model"), order)
    for label in LABELS:
        read = made.read(made.target(label, text))
        assert (read.label, read.chain, read.finished) == (label, text.strip(), True)


@pytest.mark.parametrize("order", ORDERS)
def test_a_chain_cannot_end_its_answer_or_become_a_control_token(tmp_path: Path, order: str) -> None:
    made = answers(tmp_path, order)
    ids = made.target(3, "Missed <|im_end|> <think> <|im_start|>. So Related.")
    assert [i for i in ids if i in made.reserved] == [END]
    assert ids[-1] == END


def test_an_answer_of_another_form_has_no_label_and_one_that_was_cut_is_not_finished(tmp_path: Path) -> None:
    post, pre = answers(tmp_path), answers(tmp_path, "pre")
    whole = post.target(4, "Fits. So Excellent.")
    assert post.read(whole[1:]) == (None, "Fits. So Excellent.", True)
    assert post.read(whole[:-1]) == (4, "Fits. So Excellent.", False)
    assert post.read([]) == (None, "", False)
    assert pre.read(whole).label is None
    assert pre.read(pre.target(4, "Fits. So Excellent.")[:-1]) == (None, "Fits. So Excellent.\n4", False)


def test_the_question_holds_the_findings_but_neither_label_nor_statement(tmp_path: Path) -> None:
    made = answers(tmp_path)
    asked = made.question("Grade 4. Missed: colour. So Excellent.")
    assert asked is not None
    assert made._text(asked) == " Missed: colour. So"
    assert made.question("4. So Excellent.") is None
    assert made.name_ids is not None
    assert len(set(made.name_ids)) == 4


def test_the_end_that_closes_the_templates_turns_is_the_one_that_is_taught(tmp_path: Path) -> None:
    assert answers(tmp_path, eos_token_id=[END - 2, END]).end_ids == (END, END - 2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": END - 2}))
    assert end_ids(str(tmp_path)) == (END - 2,)


def test_a_model_that_never_ends_an_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='add "eos_token_id" to its generation_config'):
        answers(tmp_path, eos_token_id=None)
    with pytest.raises(ValueError, match="--order 'sideways' is none of post, pre"):
        dataclasses.replace(answers(tmp_path, "sideways"))
