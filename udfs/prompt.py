"""What the model is asked: a template file and a pair's text become token ids.

A pair is judged from one prefill, so the prompt is the cost. It has two parts that are joined as ids: one depends on
the product alone, one on the query alone. All pairs of a product then begin with the same ids, the engine computes
them once (prefix cache), and each distinct product and query is tokenised once, not once a pair. That a field's text
cannot close a turn or open one is the matter of `udfs.tokens`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from schemas.labels import LABELS
from udfs.tokens import data_tokenizer, template_ids, template_tokenizer

PRODUCT_FIELDS = ("title", "brand", "category", "attributes", "description")
FIELDS = (*PRODUCT_FIELDS, "query")
_FIELD_KEYS = {"field", "before", "after", "budget"}


@dataclass(frozen=True)
class Segment:
    """A stretch of the prompt: `before`, the field's ids (at most `budget`), `after`; fixed text has `field` empty.

    `lead` is what the field's text is tokenised behind: the space that its `before` ends in. "Product: " and "kettle"
    apart are a lone space and the pieces of a word that no text begins with; "Product:" and " kettle" are two words.
    """

    field: str
    before: tuple[int, ...]
    after: tuple[int, ...] = ()
    budget: int = 0
    lead: str = ""


@dataclass(frozen=True)
class Prompt:
    """A checked template for one tokenizer. Plain data: it is sent to Spark's workers (`udfs.render.shipped`).

    `label_ids` are the answer tokens in the order of LABELS; `first` says which part the prompt begins with; `block`
    is the number of tokens in a KV cache block; `fill` is the token that brings the first part to a block's end, None
    where the description's end goes for that; `reserved` are the ids that no text from data may become.
    """

    prompt_id: str
    label_ids: tuple[int, int, int, int]
    block: int
    fill: int | None
    first: str
    product: tuple[Segment, ...]
    query: tuple[Segment, ...]
    reserved: frozenset[int] = field(repr=False)
    tokenizer_json: str = field(repr=False)
    spec: Mapping[str, Any] = field(repr=False, compare=False)  # what the file says

    @property
    def head(self) -> int:
        """Tokens that every prompt begins with: the template's, before the first field."""
        first = self.product if self.first == "product" else self.query
        fields = [place for place, segment in enumerate(first) if segment.field]
        return sum(len(segment.before) for segment in first[: fields[0] + 1])


class Text(NamedTuple):
    """A segment as the file has it, before it is tokenised."""

    field: str
    before: str
    after: str
    budget: int
    lead: str


class Part(NamedTuple):
    """One part of a prompt: its ids, and how many tokens of data were left out of it (by budget, block cut, drops)."""

    ids: list[int]
    cut: int


def load(source: str | os.PathLike[str] | Mapping[str, Any], tokenizer_json: str, vocab_size: int) -> Prompt:
    """Reads a prompt.json (a path, or its content) and tokenises the template.

    `tokenizer_json` is the text of the model's tokenizer.json; `vocab_size` the rows of its embedding. Raises
    ValueError with a sentence for whatever could not be scored with: unknown keys and fields, a missing title or query,
    labels that are not one token each after the prompt's end, ids that the model does not have.
    """
    spec = _read(source)
    _keys("the prompt file", spec, {"version", "labels", "block", "segments"}, optional={"fill"})
    if spec["version"] != 1:
        raise ValueError(f"the prompt file has version {spec['version']!r}; version 1 is read. Write it in that form.")
    _positive("block", spec["block"])
    if not isinstance(spec["segments"], list):
        raise ValueError("segments must be a list of texts and fields; demo/prompt.json is one that works.")
    texts = [checked(segment) for segment in spec["segments"]]
    second = _where_the_second_part_begins([text.field for text in texts])
    tokenizer = template_tokenizer(tokenizer_json)
    segments = [tokenised(tokenizer, text) for text in texts]
    label_ids = _label_ids(tokenizer, spec["labels"], texts[-1].after if texts[-1].field else texts[-1].before)
    fill = _fill(tokenizer, spec["fill"]) if "fill" in spec else None
    highest = max({i for s in segments for i in (*s.before, *s.after)} | {*label_ids, fill or 0})
    if highest >= vocab_size:
        raise ValueError(
            f"the template or its labels need token id {highest}, but the model has only the ids 0..{vocab_size - 1}. "
            "Use tokens that the model knows, or the tokenizer.json that belongs to the model."
        )
    parts = tuple(segments[:second]), tuple(segments[second:])
    product_first = any(s.field in PRODUCT_FIELDS for s in parts[0])
    product, query = parts if product_first else parts[::-1]
    template = [[s.before, s.after] for s in segments]
    identity = [spec, template, label_ids, hashlib.sha256(tokenizer_json.encode()).hexdigest()]
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return Prompt(
        prompt_id=hashlib.sha256(canonical.encode()).hexdigest()[:16],
        label_ids=label_ids,
        block=spec["block"],
        fill=fill,
        first="product" if product_first else "query",
        product=product,
        query=query,
        reserved=frozenset(tokenizer.get_added_tokens_decoder()),
        tokenizer_json=tokenizer_json,
        spec=spec,
    )


class Renderer:
    """Makes the ids of a product and of a query. Pure: the same text gives the same ids, whatever its neighbours."""

    def __init__(self, prompt: Prompt) -> None:
        """Compiles the tokenizer, so make it by `renderer`."""
        self.prompt = prompt
        self._tokenizer = data_tokenizer(prompt.tokenizer_json, prompt.reserved)

    def product(
        self,
        title: str,
        brand: str | None = None,
        category: str | None = None,
        attributes: Mapping[str, str | None] | Iterable[tuple[str, str | None]] | None = None,
        description: str | None = None,
    ) -> Part:
        """The product's part. `attributes` as a mapping, or as the pairs that Arrow gives for a map.

        Where the prompt begins with it, it ends on a block's boundary, so that all pairs of the product share all of
        it; with 30 pairs a product that left 14.3 tokens to compute a pair, not 22.7. A prompt with `fill` repeats that
        token up to the boundary: no text is lost, and a product costs up to a block more, once. Without, the
        description's end goes where the part is two blocks or longer. If it has fewer tokens than must go, the part
        stays as it is. If it goes whole, its `before` and `after` stay: they are the template's, and without them the
        boundary would be missed. Raises ValueError for a lone surrogate.
        """
        texts = {
            "title": title,
            "brand": brand,
            "category": category,
            "attributes": told(attributes),
            "description": description,
        }
        return self._part(self.prompt.product, texts, self.prompt.first == "product")

    def query(self, query: str) -> Part:
        """The query's part; filled up where the prompt begins with it. Raises ValueError for a lone surrogate."""
        return self._part(self.prompt.query, {"query": query}, self.prompt.first == "query")

    def join(self, product: Part, query: Part) -> list[int]:
        """The whole prompt of a pair, in the template's order."""
        return product.ids + query.ids if self.prompt.first == "product" else query.ids + product.ids

    def _part(self, segments: Iterable[Segment], texts: Mapping[str, str | None], first: bool) -> Part:
        pieces: list[Iterable[int]] = []
        description: list[int] = []
        cut = 0
        for segment in segments:
            text = texts.get(segment.field)
            ids, lost = self._field(segment.lead + text, segment.budget) if text and not text.isspace() else ([], 0)
            cut += lost
            if ids or segment.field in ("", "query"):
                pieces += [segment.before, ids, segment.after]
            if segment.field == "description":
                description = ids
        length, block = sum(1 for _ in chain.from_iterable(pieces)), self.prompt.block
        over = length % block
        if first and self.prompt.fill is not None:
            pieces.append([self.prompt.fill] * (-length % block))
        elif first and length >= 2 * block and 0 < over <= len(description):
            del description[-over:]
            cut += over
        return Part(list(chain.from_iterable(pieces)), cut)

    def _field(self, text: str, budget: int) -> tuple[list[int], int]:
        """At most `budget` ids of a text, and how many tokens and characters were left out."""
        found = list(self._tokenizer.ids(text))
        ids = [i for i in found if i is not None]
        return ids[:budget], len(found) - len(ids[:budget])


_RENDERERS: dict[str, Renderer] = {}


def renderer(prompt: Prompt) -> Renderer:
    """The renderer of a prompt, made once per process: a Spark worker renders many tasks."""
    if prompt.prompt_id not in _RENDERERS:
        _RENDERERS[prompt.prompt_id] = Renderer(prompt)
    return _RENDERERS[prompt.prompt_id]


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> Any:
    if isinstance(source, Mapping):
        return dict(source)
    try:
        return json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"prompt file {source} is no readable JSON ({error}); name one by --prompt.") from error


def _keys(what: str, has: Any, wanted: set[str], optional: Collection[str] = ()) -> None:
    if not isinstance(has, dict) or set(has) - set(optional) != wanted:
        raise ValueError(
            f"{what} must be an object with exactly the keys {sorted(wanted)}, not {str(has)[:200]!r}; "
            "demo/prompt.json is one that works."
        )


def _positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number of tokens, 1 or more.")


def checked(segment: Any, fields: Sequence[str] = FIELDS) -> Text:
    """A segment of a prompt file, a text or one of `fields`. Raises ValueError where its keys or types are wrong."""
    is_text = isinstance(segment, dict) and "text" in segment
    _keys("a text segment" if is_text else "a field segment", segment, {"text"} if is_text else _FIELD_KEYS)
    for key in segment.keys() - {"budget"}:
        if not isinstance(segment[key], str):
            raise ValueError(f"{key} is {segment[key]!r} in a segment; it must be a string. Put it in quotes.")
    if is_text:
        return Text("", segment["text"], "", 0, "")
    if segment["field"] not in fields:
        raise ValueError(f"field {segment['field']!r} is unknown; name one of {', '.join(fields)}.")
    _positive(f"budget of field {segment['field']}", segment["budget"])
    before, lead = (segment["before"][:-1], " ") if segment["before"].endswith(" ") else (segment["before"], "")
    return Text(segment["field"], before, segment["after"], segment["budget"], lead)


def tokenised(tokenizer: Tokenizer, text: Text) -> Segment:
    """The segment with the ids of its own texts."""
    before, after = (template_ids(tokenizer, one) for one in (text.before, text.after))
    return Segment(text.field, before, after, text.budget, text.lead)


def told(attributes: Mapping[str, str | None] | Iterable[tuple[str, str | None]] | None) -> str:
    """A product's attributes as one text, whatever their order; those without a value are left out."""
    named = sorted(dict(attributes or {}).items())
    return "; ".join(f"{key}: {value}" for key, value in named if value and not value.isspace())


def _fill(tokenizer: Tokenizer, text: Any) -> int:
    """The token that fills the first part up to a block's end."""
    ids = template_ids(tokenizer, text) if isinstance(text, str) else ()
    if len(ids) != 1:
        raise ValueError(
            f"fill is {text!r}, of the ids {ids}; it must be a string that is one token, such as a line break."
        )
    return ids[0]


def _where_the_second_part_begins(fields: list[str]) -> int:
    """Index of the segment that opens the second part: the first product field after the query, or the other way."""
    named = [name for name in fields if name]
    for name in sorted(set(named)):
        if named.count(name) > 1:
            raise ValueError(f"field {name} stands {named.count(name)} times; once is allowed. Remove the others.")
    for name in ("title", "query"):
        if name not in named:
            raise ValueError(f"field {name} is missing; a pair cannot be judged without it. Add a segment for it.")
    if named.index("query") not in (0, len(named) - 1):
        raise ValueError(
            "the query stands between product fields; all product fields must stand together, so that the pairs of a "
            "product share them. Put the query before or after them."
        )
    return fields.index("query") if named[-1] == "query" else fields.index(named[1])


def _label_ids(tokenizer: Tokenizer, labels: Any, tail: str) -> tuple[int, int, int, int]:
    """The id of each label in its place: right after `tail`, the prompt's last text. In the order of LABELS."""
    _keys("labels", labels, {str(label) for label in LABELS})
    end = template_ids(tokenizer, tail)
    ids = []
    for label in LABELS:
        text = labels[str(label)]
        both = template_ids(tokenizer, tail + text) if isinstance(text, str) else ()
        if not both or both[:-1] != end:
            raise ValueError(
                f"label {label} ({text!r}) is not one token after the prompt's end {tail[-20:]!r}: the end has the ids "
                f"{end[-4:]}, with the label {both[-8:]}. The model's first token must be the label: let the last text "
                "not end in a space, or name labels that are single tokens of this tokenizer."
            )
        ids.append(both[-1])
    four, three, two, one = ids
    if len(set(ids)) < len(LABELS):
        raise ValueError(f"two labels are one token: {dict(zip(LABELS, ids, strict=True))}; give each its own string.")
    return four, three, two, one
