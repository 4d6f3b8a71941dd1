"""The JSON file of a COCO folder: read, and looked through for what is missing before anything is made of it."""

import json
from pathlib import Path
from typing import Any, cast

from .coco_layout import Kind
from .errors import DataError, DataNotFoundError, listing

__all__ = ["read_json"]


def read_json(source: Path, kind: Kind) -> dict[str, Any]:
    """Read the JSON file and check that every entry has what the readers ask for.

    Raises:
        DataNotFoundError: It is not there.
        DataError: It is not JSON, or lists or keys are missing; all of a kind in one message.
    """
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataNotFoundError("COCO annotations", [source], ["Check the path given as annotations=..."]) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(
            f"Expected JSON in {source}, got something else or half a file ({error}). Fetch it again."
        ) from None
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(key), list)
    ]
    if missing:
        raise DataError(f"Expected the lists images, annotations and categories in {source}; no {', '.join(missing)}.")
    needed = {
        "images": ("id", "file_name", "height", "width"),
        "categories": ("id", "name"),
        "annotations": ("image_id", "category_id", "bbox") if kind == "instances" else ("image_id", "segments_info"),
    }
    problems = [
        f"{part}[{i}] has no {key}"
        for part, keys in needed.items()
        for i, entry in enumerate(content[part])
        for key in keys
        if not isinstance(entry, dict) or key not in entry
    ]
    if not problems and kind == "panoptic":
        problems = [
            f"annotations[{i}], segments_info[{k}] has no {key}"
            for i, entry in enumerate(content["annotations"])
            for k, segment in enumerate(entry["segments_info"])
            for key in ("id", "category_id", "bbox")
            if key not in segment
        ]
    if problems:
        raise DataError(f"Expected complete entries in {source}:{listing(problems)}")
    return cast(dict[str, Any], content)
