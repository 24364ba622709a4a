"""What a row of input may be: pure functions from a record (of JSON, CSV or Parquet) to its fields or a reason.

All formats meet the same rules here, and nothing here knows Spark, so the rules are tested row by row. Text is kept as
typed: no trimming, no normalising. A reason starts with its kind and a colon ("label: …"): so reasons can be counted.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from schemas.labels import LABELS

MAX_ROW_BYTES = 8 << 20  # a longer line or row is refused unparsed; eight fields of the largest size fit
MAX_FIELD_BYTES = 1 << 20  # the longest text of Amazon ESCI has 60 KB; a prompt holds a few KB of it
MAX_ATTRIBUTES = 1_000  # Icecat's richest product has under 200
MAX_RATERS = 1_000
_NORMALISED_CHARACTERS = 4_096  # normalising takes time squared in a run of combining marks; no query is longer

TEXTS = ("title", "brand", "description", "attributes", "category")
PAIR_FIELDS = (
    "query",
    "product_id",
    "locale",
    *TEXTS,
    "label",
    "rater_labels",
    "weight",
    "gold_weight",
    "split",
)
PRODUCT_FIELDS = ("product_id", "locale", *TEXTS)
CHAIN_FIELDS = ("query", "product_id", "locale", "label", "chain")
DELETE_FIELDS = ("product_id", "locale", "query")
SPLITS = ("train", "dev", "test")
LEAST_GOLD_WEIGHT = 0.001  # weights are summed in steps of a millionth; only their ratios count

# C0 and DEL are refused in every text, but for tab, newline and carriage return, which ids may not hold either. C1
# (U+0080..U+009F) is refused too, except inside long text: there it is what is left of a wrongly decoded quotation
# mark (16 places among Icecat's 19,406 products, all in attributes), and a judged pair is not given up for one.
_CONTROL_IN_LONG = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_CONTROL_IN_ID = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CSV_INTEGER = re.compile(r"-?\d{1,9}")
_CSV_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Accepted:
    """A row that may go in. For a product row `given` names the texts to set; for a deletion `query` None means all."""

    product_id: str
    locale: str
    query: str | None = None
    title: str | None = None
    brand: str | None = None
    description: str | None = None
    attributes: dict[str, str] | None = None
    category: str | None = None
    label: int | None = None
    rater_labels: list[int] | None = None
    weight: float | None = None
    gold_weight: float | None = None
    split: str | None = None
    chain: str | None = None
    given: list[str] = field(default_factory=list)


class _Refused(Exception):
    """Carries the reason from where it is found to the border."""


Accept = Callable[[Mapping[str, object]], Accepted | str]


def accept(record: Mapping[str, object]) -> Accepted | str:
    """A pair with its product's text and, where judged, its judgement; or the reason why not."""
    try:
        query, product_id, locale = _query(record), _product_id(record), _locale(record)
        raters = _rater_labels(record.get("rater_labels"))
        label = _label("label", record.get("label"))
        if label is None and raters:
            label = sorted(raters)[(len(raters) - 1) // 2]  # the lower median
        return Accepted(
            query=query,
            product_id=product_id,
            locale=locale,
            title=_title(record),
            brand=_optional(record, "brand"),
            description=_optional(record, "description", _CONTROL_IN_LONG),
            attributes=_attributes(record.get("attributes")),
            category=_optional(record, "category"),
            label=label,
            rater_labels=raters,
            weight=_weight("weight", record.get("weight"), zero=True),
            gold_weight=_weight("gold_weight", record.get("gold_weight"), zero=False),
            split=_split(record),
        )
    except _Refused as refused:
        return str(refused)


def accept_product(record: Mapping[str, object]) -> Accepted | str:
    """New text for a product: a field that is absent stays as it is, null clears it; the title may not be cleared."""
    try:
        given = [name for name in TEXTS if name in record]
        if not given:
            raise _Refused(f"missing: the row has none of {', '.join(TEXTS)}, so there is nothing to update")
        return Accepted(
            product_id=_product_id(record),
            locale=_locale(record),
            title=_title(record) if "title" in given else None,
            brand=_optional(record, "brand"),
            description=_optional(record, "description", _CONTROL_IN_LONG),
            attributes=_attributes(record.get("attributes")),
            category=_optional(record, "category"),
            given=given,
        )
    except _Refused as refused:
        return str(refused)


def accept_deletion(record: Mapping[str, object]) -> Accepted | str:
    """What to delete: a pair, or, where the row has no field `query` at all, every pair of the product.

    A query that is there but empty is refused, so that a hole in a file never deletes a whole product.
    """
    try:
        query = None
        if "query" in record:
            query = _text(record, "query", _CONTROL)
            if not query:
                raise _Refused("missing: query is empty; leave the field out to delete all pairs of the product")
        return Accepted(product_id=_product_id(record), locale=_locale(record), query=query)
    except _Refused as refused:
        return str(refused)


def accept_chain(record: Mapping[str, object]) -> Accepted | str:
    """A chain of reasoning for a pair, and the label that it was written for; or the reason why not."""
    try:
        query, product_id, locale = _query(record), _product_id(record), _locale(record)
        label = _label("label", record.get("label"))
        if label is None:
            raise _Refused("missing: label")
        chain = _required(record, "chain", _CONTROL_IN_LONG)
        if not any(c.isalnum() for c in chain):
            raise _Refused(f"blank: chain {_shown(chain)} has no letter and no digit")
        return Accepted(query=query, product_id=product_id, locale=locale, label=label, chain=chain)
    except _Refused as refused:
        return str(refused)


def identity(record: Mapping[str, object]) -> tuple[str, str, str] | None:
    """(query, product_id, locale) of a row, refused or not; None where that cannot be read."""
    try:
        return _query(record), _product_id(record), _locale(record)
    except _Refused:
        return None


def normalised(query: str) -> str:
    """The form in which two spellings of a query are one: NFKC, case folded, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", query[:_NORMALISED_CHARACTERS]).casefold().split())


def split(query: str, among: int = 10) -> str:
    """The part of gold a query belongs to, by SHA-256 of its normalised form: 80 % train, 10 % dev, 10 % test.

    `among=9` leaves test out and keeps 8 : 1, for data whose test part is published.
    """
    digest = hashlib.sha256(normalised(query).encode()).digest()
    return (*("train",) * 8, "dev", "test")[int.from_bytes(digest[:8], "big") % among]


def from_json(line: bytes) -> dict[str, object] | str:
    """One line of JSON Lines as a record, or the reason why it is none. Nothing in it is repaired."""
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
        record = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)
    except _Refused as refused:
        return str(refused)
    except RecursionError:
        return "broken JSON: nested too deep"
    except ValueError as error:
        return f"broken JSON: {error}"
    return record if isinstance(record, dict) else f"broken JSON: a line must hold one object, this is {_shown(record)}"


def from_csv(cells: Mapping[str, str]) -> dict[str, object] | str:
    """A CSV row as a record: the one place where text becomes a number, a list or an object; an empty cell is null.

    label: whole digits. weight, gold_weight: a decimal number. rater_labels: `1|2|2` or a JSON list. attributes: a JSON
    object. Text that is none of these is left as it is, and refused as the wrong type by `accept`.
    """
    record: dict[str, object] = {name: text or None for name, text in cells.items()}
    for name, text in cells.items():
        if name == "label" and _CSV_INTEGER.fullmatch(text):
            record[name] = int(text)
        elif name in ("weight", "gold_weight") and _CSV_NUMBER.fullmatch(text):
            record[name] = float(text)
        elif name == "rater_labels" and text:
            inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
            parts = inner.split("|" if inner is text else ",") if inner.strip() else []
            record[name] = [int(p) if _CSV_INTEGER.fullmatch(p.strip()) else p for p in parts]
        elif name == "attributes" and text:
            parsed = from_json(text.encode("utf-8", "surrogateescape"))
            if isinstance(parsed, str):
                return f"attributes: {parsed}"
            record[name] = parsed
    return record


def not_utf8(line: bytes) -> str | None:
    """The reason where bytes are not strict UTF-8, else None."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        return _not_utf8(line, error)
    return None


def unknown(names: Iterable[str], fields: Iterable[str]) -> list[str]:
    """Those names that mean nothing here, short and safe to print."""
    return [ascii(name[:64])[1:-1] for name in names if name not in fields]


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: byte 0x{line[error.start]:02x} at position {error.start + 1}"


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise _Refused(f"duplicate key: {_shown(twice)} stands more than once in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise _Refused(f"broken JSON: {name} is not a JSON number")


def _shown(value: object) -> str:
    """A value in a reason: short, plain ASCII, and safe whatever it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    shown = json.dumps(value) if value is None or isinstance(value, bool) else ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


def _decoded(name: str, value: object) -> str:
    """Text of a field, from str, or from the bytes that Parquet holds. Raises _Refused."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Refused(f"{_not_utf8(value, error)} of {name}") from None
    if not isinstance(value, str):
        raise _Refused(f"wrong type: {name} must be text, this is {_shown(value)}")
    return value


def _checked(name: str, text: str, control: re.Pattern[str]) -> str:
    if len(text.encode("utf-8", "surrogatepass")) > MAX_FIELD_BYTES:
        raise _Refused(f"too large: {name} has over {MAX_FIELD_BYTES:,} bytes")
    if found := _SURROGATE.search(text):
        raise _Refused(f"lone surrogate: U+{ord(found[0]):04X} in {name}")
    if found := control.search(text):
        raise _Refused(f"control character: U+{ord(found[0]):04X} in {name}")
    return text


def _text(record: Mapping[str, object], name: str, control: re.Pattern[str]) -> str | None:
    value = record.get(name)
    return None if value is None else _checked(name, _decoded(name, value), control)


def _optional(record: Mapping[str, object], name: str, control: re.Pattern[str] = _CONTROL) -> str | None:
    return _text(record, name, control) or None  # an empty text says as little as none


def _required(record: Mapping[str, object], name: str, control: re.Pattern[str]) -> str:
    text = _text(record, name, control)
    if text is None:
        raise _Refused(f"missing: {name}")
    return text


def _worded(record: Mapping[str, object], name: str) -> str:
    """A required text with at least one letter or digit of any script in it."""
    text = _required(record, name, _CONTROL)
    if not any(c.isalnum() for c in text):
        raise _Refused(f"blank: {name} {_shown(text)} has no letter and no digit")
    return text


def _query(record: Mapping[str, object]) -> str:
    return _worded(record, "query")


def _title(record: Mapping[str, object]) -> str:
    return _worded(record, "title")


def _product_id(record: Mapping[str, object]) -> str:
    text = _required(record, "product_id", _CONTROL_IN_ID)
    if not any(c.isprintable() and not c.isspace() for c in text):
        raise _Refused("blank: product_id has no character that can be seen")
    return text


def _locale(record: Mapping[str, object]) -> str:
    return _text(record, "locale", _CONTROL_IN_ID) or ""


def _label(name: str, value: object) -> int | None:
    if value is None:
        return None
    if type(value) is not int or value not in LABELS:
        raise _Refused(f"{name}: {_shown(value)} is none of the whole numbers 4, 3, 2, 1")
    return value


def _rater_labels(value: object) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise _Refused(f"wrong type: rater_labels must be a list of labels, this is {_shown(value)}")
    if len(value) > MAX_RATERS:
        raise _Refused(f"too large: rater_labels has {len(value):,} entries, allowed are {MAX_RATERS:,}")
    labels = [_label("rater_labels", one) for one in value]
    if None in labels:
        raise _Refused("rater_labels: null is none of the whole numbers 4, 3, 2, 1")
    return [one for one in labels if one is not None] or None


def _weight(name: str, value: object, zero: bool) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused(f"wrong type: {name} must be a number, this is {_shown(value)}")
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    least = 0 if zero else LEAST_GOLD_WEIGHT
    if not math.isfinite(weight) or weight < least:
        raise _Refused(f"{name}: {_shown(value)} is not a finite number of at least {least}")
    return weight


def _split(record: Mapping[str, object]) -> str | None:
    text = _optional(record, "split")
    if text is not None and text not in SPLITS:
        raise _Refused(f"split: {_shown(text)} is none of {', '.join(SPLITS)}")
    return text


def _attributes(value: object) -> dict[str, str] | None:
    """Names and values as text; null values are dropped, numbers and booleans become text as JSON prints them.

    `value`: a dict, or pairs of name and value as a Parquet map gives them.
    """
    if value is None:
        return None
    if isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        pairs = value
    else:
        raise _Refused(f"wrong type: attributes must be an object, this is {_shown(value)}")
    if len(pairs) > MAX_ATTRIBUTES:
        raise _Refused(f"too large: {len(pairs):,} attributes, allowed are {MAX_ATTRIBUTES:,}")
    found: dict[str, str] = {}
    size = 0
    for raw_name, raw in pairs:
        name = _checked("an attribute's name", _decoded("an attribute's name", raw_name), _CONTROL)
        if not name.strip():
            raise _Refused("blank: an attribute's name")
        if name in found:
            raise _Refused(f"duplicate key: attribute {_shown(name)} stands more than once")
        if raw is None:
            continue
        where = f"attribute {_shown(name)}"
        if isinstance(raw, bool | int | float):
            if isinstance(raw, float) and not math.isfinite(raw):
                raise _Refused(f"attributes: {where} is not a finite number")
            text = json.dumps(raw)
        else:
            text = _checked(where, _decoded(where, raw), _CONTROL_IN_LONG)
        size += len(name.encode()) + len(text.encode())
        found[name] = text
    if size > MAX_FIELD_BYTES:
        raise _Refused(f"too large: attributes have over {MAX_FIELD_BYTES:,} bytes")
    return found or None
