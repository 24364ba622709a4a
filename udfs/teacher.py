"""What a teacher is asked so that it writes a chain: the rules, judged neighbours, and the pair, but never its label.

The file is like a prompt.json (see `udfs.prompt`): texts and fields in order. One of its segments, `neighbour`, is a
list of fields that is written once for each judged neighbour; there the field `label` is the name of the human label.
Text from data can open or close no turn here either: it is tokenised field by field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from schemas.labels import NAMES
from udfs.prompt import FIELDS, Segment, checked, tokenised, told
from udfs.tokens import data_tokenizer, template_tokenizer

_NEIGHBOUR_FIELDS = (*FIELDS, "label")
_WORKS = "demo/teacher.json is one that works."


@dataclass(frozen=True)
class TeacherPrompt:
    """A checked template for one tokenizer. Plain data: it travels to Spark's workers inside a closure.

    before, after: the segments around the neighbours; neighbour: those of one neighbour; neighbours: how many there
    are to be. rules: ids of the beginning that all prompts share.
    """

    before: tuple[Segment, ...]
    neighbour: tuple[Segment, ...]
    after: tuple[Segment, ...]
    neighbours: int
    reserved: frozenset[int] = field(repr=False)
    tokenizer_json: str = field(repr=False)

    @property
    def rules(self) -> int:
        """Tokens that every prompt begins with."""
        first = self.before[0] if self.before else None
        return len(first.before) if first is not None and not first.field else 0

    def ids(self, pair: Mapping[str, Any], judged: Sequence[Mapping[str, Any]]) -> tuple[list[int], int]:
        """Prompt of a pair (by the names of `pairs`) and its judged neighbours; tokens of data that were left out."""
        groups = [(self.before, pair), *((self.neighbour, one) for one in judged), (self.after, pair)]
        found: list[int] = []
        cut = 0
        for segments, row in groups:
            for segment in segments:
                ids, lost = self._field(segment, row)
                cut += lost
                if ids or not segment.field:
                    found += chain(segment.before, ids, segment.after)
        return found, cut

    def _field(self, segment: Segment, row: Mapping[str, Any]) -> tuple[list[int], int]:
        value = row.get(segment.field) if segment.field else None
        if segment.field == "attributes":
            value = told(value)
        elif segment.field == "label":
            value = NAMES[int(str(value))]
        if not value or str(value).isspace():
            return [], 0
        found = list(data_tokenizer(self.tokenizer_json, self.reserved).ids(segment.lead + str(value)))
        ids = [i for i in found if i is not None][: segment.budget]
        return ids, len(found) - len(ids)


def load(source: str | Path | Mapping[str, Any], tokenizer_json: str, vocab_size: int) -> TeacherPrompt:
    """Reads a teacher's prompt file (a path, or its content). Raises ValueError with a sentence for what is wrong."""
    try:
        spec = source if isinstance(source, Mapping) else json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher prompt {source} is no readable JSON ({error}); {_WORKS}") from error
    if not isinstance(spec, Mapping) or set(spec) != {"version", "neighbours", "segments"} or spec["version"] != 1:
        raise ValueError(f"a teacher prompt has the keys version (1), neighbours, segments; {_WORKS}")
    count, given = spec["neighbours"], spec["segments"]
    if type(count) is not int or not 0 <= count <= 20 or not isinstance(given, list):
        raise ValueError(f"neighbours must be a whole number from 0 to 20, and segments a list; {_WORKS}")
    tokenizer = template_tokenizer(tokenizer_json)

    def segment(one: Any, allowed: Sequence[str]) -> Segment:
        return tokenised(tokenizer, checked(one, allowed))

    places = [i for i, one in enumerate(given) if isinstance(one, dict) and set(one) == {"neighbour"}]
    if len(places) != 1 or not isinstance(given[places[0]]["neighbour"], list):
        raise ValueError(f"a teacher prompt has exactly one segment neighbour, a list of fields; {_WORKS}")
    place = places[0]
    prompt = TeacherPrompt(
        before=tuple(segment(one, FIELDS) for one in given[:place]),
        neighbour=tuple(segment(one, _NEIGHBOUR_FIELDS) for one in given[place]["neighbour"]),
        after=tuple(segment(one, FIELDS) for one in given[place + 1 :]),
        neighbours=count,
        reserved=frozenset(tokenizer.get_added_tokens_decoder()),
        tokenizer_json=tokenizer_json,
    )
    for name in ("title", "query"):
        if name not in {s.field for s in (*prompt.before, *prompt.after)}:
            raise ValueError(f"field {name} is missing; a pair cannot be judged without it; {_WORKS}")
    highest = max(
        (i for s in (*prompt.before, *prompt.neighbour, *prompt.after) for i in (*s.before, *s.after)), default=0
    )
    if highest >= vocab_size:
        raise ValueError(f"the template needs token id {highest}, but the model has only 0..{vocab_size - 1}")
    return prompt


def asked(prompt: TeacherPrompt, schema: pa.Schema) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """The function for `mapInArrow`: rows of `pairs` with `neighbours` (a list of such rows) to prompts.

    Returns the columns of `schema`: ids, group_tokens and tokens_cut are made here, the others pass through.
    """

    def ask(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            made = []
            for row in batch.to_pylist():
                ids, cut = prompt.ids(row, row["neighbours"] or ())
                made.append({**row, "ids": ids, "group_tokens": prompt.rules, "tokens_cut": cut})
            yield pa.RecordBatch.from_pylist(made, schema=schema)

    return ask


def neighbours(
    texts: Sequence[str], queries: Sequence[str], asked: Sequence[int], count: int, among: int
) -> list[list[int]]:
    """For each row number in `asked`: the `count` rows most like it, nearest first, none of them of its own query.

    texts: what is compared, by TF-IDF over words and pairs of words, cosine (scikit-learn). queries: the query of each
    row in its normalised form; rows of an equal one are never neighbours, so the pair itself is not either. Only the
    first `among` rows may be neighbours. Exact: all of them are compared, with 256 of the asked ones at a time.
    """
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not asked or not count:
        return [[] for _ in asked]
    words = r"(?u)\w+"
    vectors = TfidfVectorizer(ngram_range=(1, 2), token_pattern=words, sublinear_tf=True).fit_transform(texts)
    columns = vectors[:among].T.tocsr()
    _, group = np.unique(np.array(queries, dtype=object), return_inverse=True)
    found: list[list[int]] = []
    for begin in range(0, len(asked), 256):
        some = np.array(asked[begin : begin + 256])
        likeness = (vectors[some] @ columns).toarray()
        likeness[group[some][:, None] == group[None, :among]] = -1.0
        least = np.partition(likeness, max(0, among - count), axis=1)[:, max(0, among - count)].clip(min=0.0)
        for row, low in zip(likeness, least, strict=True):
            near = np.flatnonzero(row >= low)
            # Of equals the first: a stable sort, so that the same tables give the same neighbours.
            found.append(near[np.argsort(-row[near], kind="stable")][:count].tolist())
    return found
