"""Reading of the JSON file of a COCO folder, with a check of all its entries."""

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

from .coco_layout import Kind
from .errors import DataError, DataNotFoundError, listing

__all__ = ["read_json"]


class _Rule(NamedTuple):
    """Rule for the values that the entries of a list have under one key.

    Attributes:
        key: Name of the key.
        expected: Expected value, in words.
        fine: Function that returns whether a value is as expected.
        sure: Types of which every value is fine, so that a million entries are checked by their types alone.
        default: Value for a key that is absent; ``...`` if the key must be there.
    """

    key: str
    expected: str
    fine: Callable[[Any], bool]
    sure: frozenset[type] = frozenset()
    default: Any = ...


def _whole(value: Any) -> bool:
    # pandas turns 7 into 7.0 beside a missing number; isinstance would take true for an int; ids become 64-bit tensors.
    return type(value) in (int, float) and value == value // 1 and abs(value) < 2**63


def _side(value: Any) -> bool:
    return _whole(value) and value >= 1


def _area(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < math.inf)


def _flag(value: Any) -> bool:
    return type(value) in (int, float) and value in (0, 1)


def _anything(value: Any) -> bool:
    return True


def _nothing(value: Any) -> bool:
    return False


def _id(key: str, default: Any = ...) -> _Rule:
    return _Rule(key, "a whole number", _whole, default=default)


_FILE_NAME = _Rule("file_name", "a string", _nothing, frozenset({str}))
_OF_BOXES = (
    _id("category_id"),
    _Rule("bbox", "a list", _anything),  # its four numbers are looked at when the boxes are made
    _Rule("area", "a finite number of at least 0", _area, default=None),
    _Rule("iscrowd", "0 or 1", _flag, frozenset({bool, type(None)}), 0),
)
_RULES: dict[str, tuple[_Rule, ...]] = {
    "images": (
        _id("id"),
        _FILE_NAME,
        _Rule("height", "a whole number of at least 1", _side),
        _Rule("width", "a whole number of at least 1", _side),
    ),
    "categories": (
        _id("id"),
        _Rule("name", "a string", _nothing, frozenset({str, int, float})),
        _Rule("isthing", "0 or 1", _flag, frozenset({bool}), 1),
    ),
    "instances": (_id("id", 0), _id("image_id"), *_OF_BOXES),
    "panoptic": (_id("image_id"), _FILE_NAME, _Rule("segments_info", "a list", _nothing, frozenset({list}))),
    "segments": (_id("id"), *_OF_BOXES),
}


def read_json(source: Path, kind: Kind) -> dict[str, Any]:
    """Read the JSON file and check that every entry has the keys that the readers need, with values of their types.

    Args:
        source: JSON file.
        kind: Kind of its annotations.

    Raises:
        DataNotFoundError: The file is not there.
        DataError: It is not JSON, lists or keys are missing, or values are wrong; the message lists all of them.
    """
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        ways = ["Check the path given to open_split as annotations=...; it is relative to root."]
        raise DataNotFoundError("COCO annotations", [source], ways) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"Expected JSON in {source}, got something else or a part of a file ({error}). Fetch it again."
        ) from None
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        raise DataError(f"Expected the lists images, annotations and categories in {source}; no {', '.join(missing)}.")
    problems = [
        line for part in ("images", "categories") for line in _offenders(content[part], _RULES[part], _named(part))
    ]
    inside = _offenders(content["annotations"], _RULES[kind], _named("annotations"))
    if kind == "panoptic" and not inside:
        lists = [entry["segments_info"] for entry in content["annotations"]]
        inside = _offenders([segment for each in lists for segment in each], _RULES["segments"], _named_inside(lists))
    problems += inside
    if problems:
        ids = any(line.endswith("not a whole number") for line in problems)
        advice = (
            "\nIds are whole numbers: number the images, categories and annotations, and put these numbers where "
            "image_id and category_id refer to them."
        )
        raise DataError(
            f"Expected complete entries in {source}, of the types that COCO has:{listing(problems)}{advice * ids}"
            "\nCorrect the file, or export it again."
        )
    return cast(dict[str, Any], content)


def _offenders(entries: Sequence[Any], rules: Sequence[_Rule], name: Callable[[int], str]) -> list[str]:
    """Describe all problems of the entries of a list in their order; ``name`` names an entry by its number."""
    if not {dict}.issuperset(map(type, entries)):
        strangers = [(i, entry) for i, entry in enumerate(entries) if type(entry) is not dict]
        return [f"{name(i)} is {_shown(entry)}, not an object with keys" for i, entry in strangers]
    found: list[tuple[int, str]] = []
    for rule in rules:
        values = [entry.get(rule.key, rule.default) for entry in entries]
        if rule.sure.issuperset(map(type, values)):
            continue
        for i, value in enumerate(values):
            if value is ...:
                found.append((i, f"{name(i)} has no {rule.key}"))
            elif type(value) not in rule.sure and not rule.fine(value):
                found.append((i, f"{name(i)}: {rule.key} is {_shown(value)}, not {rule.expected}"))
    return [line for _, line in sorted(found, key=lambda pair: pair[0])]


def _named(part: str) -> Callable[[int], str]:
    return lambda i: f"{part}[{i}]"


def _named_inside(lists: Iterable[Sequence[Any]]) -> Callable[[int], str]:
    """Return a function that names a segment by its annotation and its place there, given its number among all."""
    starts = list(accumulate(map(len, lists), initial=0))

    def name(i: int) -> str:
        entry = bisect_right(starts, i) - 1
        return f"annotations[{entry}], segments_info[{i - starts[entry]}]"

    return name


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
