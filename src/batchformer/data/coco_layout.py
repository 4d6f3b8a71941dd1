"""Places of the files in a COCO folder.

For a split such as ``train``::

    annotations/instances_train2017.json   train2017/*.jpg      as COCO is published
    annotations/instances_train.json       train/*.jpg          as published, without the year
    train/_annotations.coco.json           train/*.jpg          as labelling tools export it
    annotations/panoptic_train2017.json    annotations/panoptic_train2017/*.png (or panoptic_train2017/)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .errors import DataNotFoundError

__all__ = ["Kind", "file_ids", "find_images", "find_json", "find_segments", "splits"]

Kind = Literal["instances", "panoptic"]
_YEARS = ("", "2017", "2014")


def splits(root: str | Path, kind: Kind = "instances") -> list[str]:
    """List the splits of a COCO folder by their JSON files, without years.

    Example:
        >>> splits("no/such/folder")
        []
    """
    root = Path(root).expanduser()
    found = [path.stem.removeprefix(f"{kind}_") for path in sorted((root / "annotations").glob(f"{kind}_*.json"))]
    if kind == "instances":
        found += [path.parent.name for path in sorted(root.glob("*/_annotations.coco.json"))]
    return list(dict.fromkeys(name.removesuffix("2017").removesuffix("2014") for name in found))


def _names(split: str) -> list[str]:
    return [f"{split}{year}" for year in _YEARS]


def _check_root(root: Path) -> None:
    if root.is_dir():
        return
    problem = "is a file and no folder" if root.exists() else "does not exist"
    raise DataNotFoundError(
        f"the folder of the data: {root} {problem}",
        [root.absolute()],
        ["Check the path: --data.root=PATH (in code: root), the folder that has annotations/ and the images."],
    )


def find_json(root: Path, split: str, kind: Kind) -> Path:
    """Return the JSON file with the annotations of a split.

    Raises:
        DataNotFoundError: There is none; the message lists the places tried and the splits that are there.
    """
    _check_root(root)
    places = [root / "annotations" / f"{kind}_{name}.json" for name in _names(split)]
    if kind == "instances":
        places.append(root / split / "_annotations.coco.json")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        here = splits(root, kind)
        ways = [f"Splits that are there: {', '.join(here)}."] if here else []
        ways.append("Give the folder that has such a file: --data.root=PATH (in code: root).")
        ways.append(
            "Rename, move or link the file to one of these places (in code: open_split(..., annotations=FILE))."
        )
        raise DataNotFoundError(f"COCO annotations ({kind}) of the split {split!r}", places, ways)
    return found


def find_images(root: Path, split: str, source: Path) -> Path:
    """Return the folder of the images that the JSON file ``source`` lists.

    Raises:
        DataNotFoundError: There is none; the message lists the places tried.
    """
    if source.name == "_annotations.coco.json":
        return source.parent
    _check_root(root)
    names = dict.fromkeys([source.stem.partition("_")[2], *_names(split)])
    places = [place for name in names for place in (root / name, root / "images" / name)] + [root / "images"]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        ways = ["Rename, move or link their folder to one of these places (in code: open_split(..., images=FOLDER))."]
        raise DataNotFoundError(f"the images of the split {split!r}", places, ways)
    return found


def find_segments(source: Path, split: str) -> Path:
    """Return the folder of the panoptic PNG files that the JSON file ``source`` lists.

    Raises:
        DataNotFoundError: There is none; the message lists the places tried.
    """
    names = dict.fromkeys([source.stem, *(f"panoptic_{name}" for name in _names(split))])
    places = [place for name in names for place in (source.parent / name, source.parent.parent / name)]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise DataNotFoundError(
            f"the panoptic PNG files of {source.name}", places, ["Unpack them beside the JSON file."]
        )
    return found


def file_ids(files: Sequence[Path]) -> list[int]:
    """Return image ids for files that no JSON lists: the numbers in their names, as in COCO, else 1, 2, ...

    Names are used for all files or for none, so that no two images share an id.

    Example:
        >>> file_ids([Path("000000000139.jpg"), Path("7.jpg")]), file_ids([Path("1.png"), Path("00001.jpg")])
        ([139, 7], [1, 2])
    """
    numbers = [int(file.stem) for file in files if file.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(files) else list(range(1, len(files) + 1))
