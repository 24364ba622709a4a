"""The form of an answer, a label and its chain of reasoning: as token ids and back, and what a chain concludes.

Post-CoT (TaoSR1, section 3.4), the form that is served: the label's token right after the prompt, a space, the chain,
the token that ends a turn. Pre-CoT, kept to be compared: the chain, a line break, the label, the same end. Training
writes this form and sampling reads it, both from here.

A chain ends in its conclusion, "So Related.". Since the label came first, a model can copy it there without having
reasoned, so agreement is judged twice, both times with the label and what echoes it ("Grade 3", a leading "Related:",
"(3)") masked:

- `conclusion`: the label that the chain states. None without exactly one such statement at its end, and None where
  nothing but echoes stands before it: a bare "So Related." concludes nothing.
- `Form.question`: the findings alone, the statement masked too, with an open "So" behind them. The model that wrote the
  chain is asked which name comes next; it sees the pair and its own findings, but neither the label nor the statement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from schemas.labels import LABELS, NAMES
from udfs.model import Model
from udfs.prompt import Prompt
from udfs.tokens import data_tokenizer, template_tokenizer

ORDERS = ("post", "pre")

_LABEL_OF = {name: label for label, name in NAMES.items()}
_NAMES = "|".join(_LABEL_OF)
_STATED = re.compile(rf"\bSo ({_NAMES})\b\s*(?:[.!]|$)")
_ECHO = re.compile(
    rf"""
    \b(?:grade|graded|label|labelled|rating|rated|score|scored|answer|verdict)\b[\s:=]*(?:(?:is|as|of)\s+)?(?:[1-4]\b|(?:{_NAMES.lower()})\b)
    | [(\[]\s*[1-4]\s*[)\]]            # Excellent (4)
    | \b[1-4]\s*=\s*(?={_NAMES.lower()})  # 4 = Excellent
    | ^\s*(?:[1-4]|{_NAMES.lower()})\s*[.:,;)]+(?=\s|$)  # the answer's own beginning, once more
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NAME = re.compile(rf"\b(?:{_NAMES})\b")


def masked(chain: str) -> str:
    """The chain without what echoes the label; the closing statement stays."""
    return " ".join(_ECHO.sub(" ", chain).split())


def findings(chain: str) -> str:
    """What the chain found: without echoes of the label, closing statements, and names of labels."""
    return " ".join(_NAME.sub(" ", _STATED.sub(" ", masked(chain))).split()).lstrip(" .,:;")


def conclusion(chain: str) -> int | None:
    """The label that a chain concludes, 4..1, or None where it concludes none or more than one."""
    stated = list(_STATED.finditer(text := masked(chain)))
    if not stated or text[stated[-1].end() :].strip() or len({match[1] for match in stated}) > 1:
        return None
    return _LABEL_OF[stated[-1][1]] if any(c.isalnum() for c in findings(chain)) else None


class Read(NamedTuple):
    """An answer as it was read: label 4..1 or None, the chain's text, whether it came to its end by itself."""

    label: int | None
    chain: str
    finished: bool


@dataclass(frozen=True)
class Form:
    """How one model, asked with one prompt, answers. Plain data: it travels to Spark's workers inside a closure.

    label_ids: the label tokens in the order of LABELS. end_ids: tokens that end an answer, the one that is taught
    first. name_ids: first token of each label's name after an open "So", in the order of LABELS; None where two names
    begin alike.
    """

    order: str
    label_ids: tuple[int, int, int, int]
    end_ids: tuple[int, ...]
    name_ids: tuple[int, int, int, int] | None
    reserved: frozenset[int] = field(repr=False)
    tokenizer_json: str = field(repr=False)

    @property
    def label_at(self) -> int:
        """Where in the ids of an answer its label stands; behind it is its chain, or its end."""
        return -2 if self.order == "pre" else 0

    def target(self, label: int, chain: str | None) -> list[int]:
        """The ids that follow the prompt where `label` and `chain` (None: no reasoning) are the right answer."""
        token = self.label_ids[LABELS.index(label)]
        if chain is None:
            return [token, self.end_ids[0]]
        if self.order == "pre":
            return [*self._ids(f"{chain}\n"), token, self.end_ids[0]]
        return [token, *self._ids(f" {chain}"), self.end_ids[0]]

    def read(self, ids: Sequence[int]) -> Read:
        """What generated ids say. Nothing in them is repaired: an answer of another form has no label."""
        finished = bool(ids) and ids[-1] in self.end_ids
        body = list(ids[:-1] if finished else ids)
        if self.order == "pre":
            before = self._text(body[:-1])
            if finished and body and body[-1] in self.label_ids and before.endswith("\n"):
                return Read(LABELS[self.label_ids.index(body[-1])], before.strip(), True)
        elif body and body[0] in self.label_ids:
            return Read(LABELS[self.label_ids.index(body[0])], self._text(body[1:]).strip(), finished)
        return Read(None, self._text(body).strip(), finished)

    def question(self, chain: str) -> list[int] | None:
        """What to put after the prompt so that the next token, one of `name_ids`, says where the findings lead.

        None where the chain has no findings, or the names cannot be told apart by their first tokens.
        """
        found = findings(chain)
        if self.name_ids is None or not any(c.isalnum() for c in found):
            return None
        return self._ids(f"{found} So" if self.order == "pre" else f" {found} So")

    def _ids(self, text: str) -> list[int]:
        """Ids of text from data: none is a control token. What the tokenizer cannot say is left out."""
        return [i for i in data_tokenizer(self.tokenizer_json, self.reserved).ids(text) if i is not None]

    def _text(self, ids: Sequence[int]) -> str:
        # Control tokens inside an answer stay visible.
        return str(template_tokenizer(self.tokenizer_json).decode(list(ids), skip_special_tokens=False))


def form(model: Model, prompt: Prompt, order: str = "post") -> Form:
    """The form of a model's answers. Raises ValueError where its folder names no token that ends an answer."""
    if order not in ORDERS:
        raise ValueError(f"--order {order!r} is none of {', '.join(ORDERS)}")
    ends = required_end_ids(model)
    # Where there are several, the one that closes the template's own turns is what an answer ends with.
    template = {i for segment in (*prompt.product, *prompt.query) for i in (*segment.before, *segment.after)}
    ends = tuple(sorted(ends, key=lambda i: i not in template))
    made = Form(order, prompt.label_ids, ends, None, prompt.reserved, prompt.tokenizer_json)
    start = len(made._ids(" So"))
    four, three, two, one = (made._ids(f" So {NAMES[label]}")[start] for label in LABELS)
    names = (four, three, two, one) if len({four, three, two, one}) == len(LABELS) else None
    return replace(made, name_ids=names)


def required_end_ids(model: Model) -> tuple[int, ...]:
    """`end_ids` of a model. Raises ValueError where its folder names none, or one that it does not have."""
    ends = end_ids(model.path)
    if not ends or max(ends) >= model.vocab_size:
        raise ValueError(
            f"model folder {model.path} names no token of its own that ends an answer ({ends or 'no eos_token_id'}); "
            'add "eos_token_id" to its generation_config.json, the id of <|im_end|> for a ChatML model'
        )
    return ends


def end_ids(folder: str) -> tuple[int, ...]:
    """`eos_token_id` (a number or a list) of generation_config.json, else of config.json; empty where there is none."""
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        ids = found if isinstance(found, list) else [found]
        if ids and all(type(i) is int and i >= 0 for i in ids):
            return tuple(ids)
    return ()
