"""Identity of a split in COCO's format: its classes, its images with their bytes, and its boxes and segments."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .coco import CocoSplit
from .fingerprints import file_hashes, fingerprint

__all__ = ["split_fingerprint", "split_hashes"]


def split_hashes(root: Path, splits: Sequence[CocoSplit], *, cache: Path | None = None) -> dict[Path, str]:
    """Return the hash of the bytes of every image and every PNG of segments of some splits.

    Args:
        root: Folder of the data.
        splits: Splits below it.
        cache: Folder in which hashes are remembered; ``None`` remembers nothing.

    Raises:
        DataError: Files cannot be read; the message lists all of them.
    """
    names = {file: _name(root, file) for split in splits for file in _files(split)}
    hashes = file_hashes(root, list(names.values()), "reading the data's files", cache=cache)
    return {file: hashes[name] for file, name in names.items()}


def split_fingerprint(root: Path, split: CocoSplit, hashes: Mapping[Path, str]) -> str:
    """Return the fingerprint of a split.

    Args:
        root: Folder of the data, which file names are relative to.
        split: The split, as it is trained on or tested.
        hashes: Hash of the bytes of each file, from :func:`split_hashes`.
    """
    files = [(_name(root, file), hashes[file]) for file in _files(split)]
    sizes = [(record.height, record.width, record.segments is not None) for record in split.images]
    found = split.annotations
    counts: list[tuple[int, ...]] = [(len(entry.boxes), len(entry.dropped)) for entry in found]
    parts = [torch.cat([getattr(entry, name) for entry in found]) for name in ("boxes", "labels", "areas", "iscrowd")]
    if any(record.segments for record in split.images):  # the ids stand in the PNG files; those of boxes say nothing
        parts.append(torch.cat([entry.ids for entry in found]))
        counts += [entry.dropped for entry in found]
    classes = [(category.name, category.id, category.isthing) for category in split.categories]
    return fingerprint(classes, files, sizes, counts, *parts)


def _files(split: CocoSplit) -> list[Path]:
    return [file for record in split.images for file in (record.file, record.segments) if file is not None]


def _name(root: Path, file: Path) -> str:
    start, name = f"{root}{os.sep}", str(file)  # quicker than a path's own way, which counts for many files
    return (name.removeprefix(start) if name.startswith(start) else os.path.relpath(name, root)).replace(os.sep, "/")
