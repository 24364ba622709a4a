"""Text to token ids, once for the template's own text and once for text that comes from data.

Text from data must never become a control token, or a product title could close the turn and answer for the model.
Switching special tokens off is not enough: `<think>` and its like are added tokens that are not marked special. So text
from data meets a tokenizer that knows no added tokens at all, and its ids are checked against theirs afterwards: a base
vocabulary may hold the same string, and a normaliser may rebuild it (NFKC makes `<think>` of its full-width form).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from tokenizers import Encoding, Tokenizer


@lru_cache(maxsize=4)
def template_tokenizer(tokenizer_json: str) -> Tokenizer:
    """The model's tokenizer, from the text of tokenizer.json: it knows all added tokens and adds none by itself.

    Raises ValueError where the text cannot be used, for the template or for data.
    """
    try:
        # A character that hardly any vocabulary has: what cannot take it would fail in the middle of a night.
        for tokenizer in _data_tokenizers(tokenizer_json):
            tokenizer.encode("\U0010fffd", add_special_tokens=False)
        return _compiled(json.loads(tokenizer_json))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"tokenizer.json cannot be used ({error}); allowed is one that the tokenizers library loads and that takes "
            "unknown characters. Save it again with the transformers version that made the model."
        ) from error


def template_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of the template's own text: control tokens in it are meant.

    Raises ValueError for a turn marker such as <|im_start|> that this model does not know: it would read its letters.
    """
    foreign = [marker for marker in re.findall(r"<\|[^<>|\s]+\|>", text) if tokenizer.token_to_id(marker) is None]
    if foreign:
        raise ValueError(
            f"the template says {foreign[0]}, which is no token of this model; write the turns of the chat that the "
            "model was trained on, as its chat_template shows them"
        )
    return tuple(_encoding(tokenizer, text).ids)


class DataTokenizer:
    """Tokenises text from data; none of its ids is in `reserved`. A big tokenizer takes a second to compile."""

    def __init__(self, tokenizer_json: str, reserved: frozenset[int]) -> None:
        """`reserved`: the ids of all added tokens."""
        self._field, self._stretch = _data_tokenizers(tokenizer_json)
        self._reserved = reserved

    def ids(self, text: str) -> Iterator[int | None]:
        """The ids of a field's text; None stands for a character that had to be dropped.

        Raises ValueError for a lone surrogate. Time is linear in the text's length.
        """
        return self._ids(self._field, text)

    def _ids(self, tokenizer: Tokenizer, text: str) -> Iterator[int | None]:
        """A token with a reserved id is taken apart: the halves of its text are tokenised alone, again and again.

        Halves, because a word of 100,000 characters may be one unknown token: depth and time then stay small. White
        space that the model does not know, or keeps as an added token (some do so with line breaks), becomes a space,
        so that words stay apart.
        """
        encoding = _encoding(tokenizer, text)
        if self._reserved.isdisjoint(encoding.ids):
            yield from encoding.ids
            return
        for i, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if i not in self._reserved:
                yield i
            elif end - start > 1:
                middle = (start + end) // 2
                yield from self._ids(self._stretch, text[start:middle])
                yield from self._ids(self._stretch, text[middle:end])
            elif text[start:end].isspace() and text[start:end] != " ":
                yield from self._ids(self._stretch, " ")
            else:
                yield None


@lru_cache(maxsize=4)
def data_tokenizer(tokenizer_json: str, reserved: frozenset[int]) -> DataTokenizer:
    """Compiled once in a process: a Spark worker renders many tasks."""
    return DataTokenizer(tokenizer_json, reserved)


def _encoding(tokenizer: Tokenizer, text: str) -> Encoding:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except TypeError as error:
        raise ValueError(
            "a text holds half a character (a lone surrogate), which no tokenizer takes. Remove it from the prompt "
            "file, or bring the rows in with ingest, which refuses them."
        ) from error


def _data_tokenizers(tokenizer_json: str) -> tuple[Tokenizer, Tokenizer]:
    """Without added tokens: one for a whole field, one for a stretch inside a field. The ids stay the model's.

    The second puts no space before its text, as some tokenizers do: it would spell `</s>` as `< / s >`.
    """
    spec = json.loads(tokenizer_json) | {"added_tokens": []}
    bare = {key: _without_prefix(spec.get(key)) for key in ("normalizer", "pre_tokenizer")}
    return _compiled(spec), _compiled(spec | bare)


def _compiled(spec: dict[str, Any]) -> Tokenizer:
    """A tokenizer that adds, cuts and pads nothing by itself."""
    return Tokenizer.from_str(json.dumps(spec | {"post_processor": None, "truncation": None, "padding": None}))


def _without_prefix(node: Any) -> Any:
    """A normaliser or pre-tokeniser that puts nothing before its text."""
    if isinstance(node, list):
        return [kept for kept in map(_without_prefix, node) if kept is not None]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {key: off.get(key, _without_prefix(value)) for key, value in node.items()}
