"""Reading of COCO folders as published: instances (boxes) and panoptic (boxes of segments, and their pixels).

:mod:`batchformer.data.coco_layout` lists the places where files may lie. Invalid annotations are handled like this:

    =========================================  ==================================================================
    crowd boxes                                kept for evaluation, which ignores them; left out of training
    images without a box                       kept, since a detector learns from them where nothing is
    boxes partly outside their image           clipped to it
    boxes without area, or wholly outside      dropped
    not JSON, a key or a file missing,         an error before the first step, which lists all problems of the
    a value of another type, an id twice,      kind
    an unknown category or image, numbers
    that are not finite, a negative area,
    an image without height or width
    a PNG of another size than its image, or   an error when the PNG is read
    with ids that are not in the JSON
    =========================================  ==================================================================

The split's :class:`Findings` count the first four; ``policy="strict"`` turns clipped and dropped boxes into errors.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .coco_json import read_json
from .coco_layout import Kind, find_images, find_json, find_segments, splits
from .errors import DataError, listing

__all__ = ["Annotations", "Category", "CocoSplit", "Findings", "ImageRecord", "Kind", "open_split", "splits"]

Policy = Literal["tolerant", "strict"]


@dataclass(frozen=True)
class Category:
    """A class: its id in the file (any whole number), its name, and its kind, countable (a thing) or stuff."""

    id: int
    name: str
    isthing: bool = True


@dataclass(frozen=True)
class ImageRecord:
    """An image: its id in the JSON, its file, its size in pixels, and its panoptic PNG, if any (``segments``)."""

    id: int
    file: Path
    height: int
    width: int
    segments: Path | None = None


@dataclass(frozen=True)
class Annotations:
    """Annotations of one image with T boxes.

    Attributes:
        boxes: Corners x1, y1, x2, y2 in pixels, inside the image and with area, shape (T, 4).
        labels: Index of each class in the split's categories, shape (T,).
        areas: Area of each segment in square pixels, as the file says, shape (T,); COCO sorts objects into sizes by it.
        iscrowd: Boolean, shape (T,); true where one box stands for a group of objects.
        ids: Id of each annotation, or of the segment in the panoptic PNG, shape (T,).
        dropped: Ids of the boxes that the policy left out.
    """

    boxes: Tensor
    labels: Tensor
    areas: Tensor
    iscrowd: Tensor
    ids: Tensor
    dropped: tuple[int, ...] = ()


@dataclass
class Findings:
    """Counts of images and boxes, and of the invalid ones among them; ``str()`` writes them as a sentence.

    Example:
        >>> print(Findings(images=2, boxes=3, clipped=1))
        2 images, 3 boxes; 1 box clipped to its image
    """

    images: int = 0
    boxes: int = 0
    crowd: int = 0
    empty: int = 0
    clipped: int = 0
    dropped: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        words = [
            (self.crowd, "crowd {box} (evaluation ignores detections there)"),
            (self.empty, "{image} without a box"),
            (self.clipped, "{box} clipped to {its} image"),
            (self.dropped, "{box} without area or outside {its} image dropped"),
        ]
        parts = [
            f"{n} "
            + text.format(
                box="box" if n == 1 else "boxes",
                image="image" if n == 1 else "images",
                its="its" if n == 1 else "their",
            )
            for n, text in words
            if n
        ]
        return f"{self.images} images, {self.boxes} boxes" + "".join(f"; {part}" for part in parts)


@dataclass(frozen=True)
class CocoSplit:
    """One split of a COCO folder.

    Attributes:
        name: Name of the split.
        categories: Classes in the order of their ids; the index is the class label.
        images: Images in the order of the file.
        annotations: Annotations of each image.
        findings: Counts of boxes that were clipped, dropped and so on.
    """

    name: str
    categories: tuple[Category, ...]
    images: tuple[ImageRecord, ...]
    annotations: tuple[Annotations, ...]
    findings: Findings

    def __len__(self) -> int:
        return len(self.images)

    def counts(self) -> Tensor:
        """Count the boxes of each class, crowds left out, shape (K,)."""
        kept = [entry.labels[~entry.iscrowd] for entry in self.annotations]
        return torch.bincount(
            torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64), minlength=self.num_classes
        )

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.categories)

    def segment_map(self, index: int) -> Tensor:
        """Read the segment id of every pixel of an image, int64, shape (H, W); 0 belongs to no segment.

        Args:
            index: Number of the image in the split.

        Raises:
            DataError: The split is not panoptic, or the PNG cannot be read, has another size, or has ids that the JSON
                lacks.
        """
        import numpy as np
        from PIL import Image

        record = self.images[index]
        if record.segments is None:
            raise DataError(f"Expected a panoptic split, got {self.name!r} of instances. Open it with kind='panoptic'.")
        try:
            with Image.open(record.segments) as opened:
                rgb = np.asarray(opened.convert("RGB"), dtype=np.int64)
        except OSError as error:
            raise DataError(
                f"Expected a PNG of segments in {record.segments}, but it cannot be read: {error}"
            ) from None
        ids = torch.from_numpy(rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2])
        if tuple(ids.shape) != (record.height, record.width):
            raise DataError(
                f"Expected {record.segments} of {record.width} x {record.height} pixels, as its image, got "
                f"{ids.shape[1]} x {ids.shape[0]}."
            )
        entry = self.annotations[index]
        starts = ids.flatten()[
            ids.flatten().diff(prepend=torch.tensor([-1])) != 0
        ]  # starts of runs, far fewer than pixels
        strangers = sorted(set(starts.tolist()) - {0, *entry.ids.tolist(), *entry.dropped})
        if strangers:
            raise DataError(
                f"Expected in {record.segments} only segments that are in the JSON, got others:{listing(strangers)}"
            )
        return ids

    def masks(self, index: int) -> Tensor:
        """Read the pixels of each box's segment in a panoptic split, boolean, shape (T, H, W).

        Args:
            index: Number of the image in the split.

        Raises:
            DataError: One of the reasons of :meth:`segment_map`, or a segment of the JSON has no pixel.
        """
        ids, wanted = self.segment_map(index), self.annotations[index].ids
        masks = ids[None] == wanted[:, None, None]
        if len(wanted) and not bool((present := masks.flatten(1).any(1)).all()):
            gone = wanted[~present].tolist()
            raise DataError(
                f"Expected pixels of the segments {gone[:10]} in {self.images[index].segments}, found none."
            )
        return masks


def open_split(
    root: str | Path,
    split: str,
    *,
    kind: Kind = "instances",
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    policy: Policy = "tolerant",
) -> CocoSplit:
    """Read one split of a COCO folder.

    Args:
        root: Folder of the data set.
        split: Name of the split, such as ``train`` or ``val``, with or without a year.
        kind: ``"instances"``, or ``"panoptic"`` for the boxes of panoptic segments with their PNG.
        annotations: JSON file in another place, relative to ``root``.
        images: Folder of images in another place, relative to ``root``.
        policy: ``"strict"`` turns boxes that are clipped or dropped otherwise into errors.

    Raises:
        DataNotFoundError: The JSON file or the folder of images is missing; the message lists the places tried.
        DataError: There is an error by the table at the top of this module; the message lists all of its kind.

    Example:
        >>> import json, tempfile
        >>> image = {"id": 5, "file_name": "5.jpg", "height": 8, "width": 9}
        >>> box = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [1, 2, 4, 4], "area": 16, "iscrowd": 0}
        >>> cat = {"id": 3, "name": "cat"}
        >>> with tempfile.TemporaryDirectory() as root:
        ...     content = json.dumps({"images": [image], "annotations": [box], "categories": [cat]})
        ...     for file, text in {"annotations/instances_train.json": content, "train/5.jpg": ""}.items():
        ...         (Path(root) / file).parent.mkdir()
        ...         _ = (Path(root) / file).write_text(text)
        ...     open_split(root, "train").annotations[0].boxes
        tensor([[1., 2., 5., 6.]])
    """
    root = Path(root).expanduser()
    source = root / annotations if annotations is not None else find_json(root, split, kind)
    content = read_json(source, kind)
    folder = root / images if images is not None else find_images(root, split, source)
    categories = _categories(content, source)
    png_folder = find_segments(source, split) if kind == "panoptic" else None
    entries = _entries(content, kind)
    png_names = {int(e["image_id"]): str(e["file_name"]) for e in content["annotations"]} if png_folder else {}
    records = tuple(_records(content, source, folder, png_folder, png_names))
    _check_ids(entries, records, categories, source)
    found, findings = _boxes(entries, records, categories, source, policy)
    return CocoSplit(split, categories, records, found, findings)


# -------------------------------------------------------------------- entries of the JSON


def _categories(content: dict[str, Any], source: Path) -> tuple[Category, ...]:
    found = [Category(int(c["id"]), str(c["name"]), bool(c.get("isthing", 1))) for c in content["categories"]]
    if not found:
        raise DataError(f"Expected at least one category in {source}, got none.")
    _refuse_twice([category.id for category in found], "categories", source)
    return tuple(sorted(found, key=lambda category: category.id))


def _entries(content: dict[str, Any], kind: Kind) -> list[dict[str, Any]]:
    """Return an entry for each box, in one form for both kinds."""
    if kind == "instances":
        return [{"id": number, **entry} for number, entry in enumerate(content["annotations"], 1)]
    return [
        {"image_id": entry["image_id"], **segment}
        for entry in content["annotations"]
        for segment in entry["segments_info"]
    ]


def _records(
    content: dict[str, Any], source: Path, folder: Path, png_folder: Path | None, png_names: dict[int, str]
) -> Iterable[ImageRecord]:
    if not content["images"]:
        raise DataError(f"Expected at least one image in {source}, got none.")
    _refuse_twice([int(image["id"]) for image in content["images"]], "images", source)
    records = []
    for image in content["images"]:
        number = int(image["id"])
        png = None
        if png_folder is not None:
            png = png_folder / png_names.get(number, f"{Path(str(image['file_name'])).stem}.png")
        records.append(ImageRecord(number, folder / image["file_name"], int(image["height"]), int(image["width"]), png))
    gone = [record.file for record in records if not record.file.is_file()]
    if gone:
        raise DataError(
            f"Expected the {len(records)} image files that {source} lists, {len(gone)} are missing:{listing(gone)}"
        )
    gone = [png for record in records if (png := record.segments) is not None and not png.is_file()]
    if gone:
        raise DataError(
            f"Expected the {len(records)} PNG files that {source} lists, {len(gone)} are missing:{listing(gone)}"
        )
    return records


def _refuse_twice(ids: Sequence[int], what: str, source: Path) -> None:
    twice = [number for number, times in Counter(ids).items() if times > 1]
    if twice:
        raise DataError(f"Expected each id once among the {what} of {source}, these come more often:{listing(twice)}")


def _check_ids(
    entries: Sequence[dict[str, Any]], records: Sequence[ImageRecord], categories: Sequence[Category], source: Path
) -> None:
    for key, known, what in (
        ("image_id", {record.id for record in records}, "images"),
        ("category_id", {category.id for category in categories}, "categories"),
    ):
        strangers = Counter(entry.get(key) for entry in entries if entry.get(key) not in known)
        if strangers:
            lines = [f"{key} {number}: {times} times" for number, times in strangers.items()]
            raise DataError(f"Expected annotations of the {what} that {source} lists, got others:{listing(lines)}")
    # A segment's id is unique inside its image only, which is enough for evaluation.
    twice = [pair for pair, n in Counter((e["image_id"], e["id"]) for e in entries).items() if n > 1]
    if twice:
        lines = [f"image {image}, annotation {number}" for image, number in twice]
        raise DataError(f"Expected each annotation id once in {source}, these come more often:{listing(lines)}")


# -------------------------------------------------------------------- boxes


def _boxes(
    entries: Sequence[dict[str, Any]],
    records: Sequence[ImageRecord],
    categories: Sequence[Category],
    source: Path,
    policy: Policy,
) -> tuple[tuple[Annotations, ...], Findings]:
    place = {record.id: i for i, record in enumerate(records)}
    label = {category.id: k for k, category in enumerate(categories)}
    rows: list[list[tuple[list[float], int, float, bool, int]]] = [[] for _ in records]
    dropped: list[list[int]] = [[] for _ in records]
    findings, wrong, bent = Findings(images=len(records)), [], []
    for entry in entries:
        record = records[place[entry["image_id"]]]
        name = f"image {record.id}, annotation {entry['id']}: bbox {entry.get('bbox')}"
        box = _finite_box(entry.get("bbox"))
        if box is None:
            wrong.append(name)
            continue
        x, y, w, h = box
        inside = [min(max(v, 0.0), most) for v, most in ((x, record.width), (y, record.height))]
        inside += [min(max(v, 0.0), most) for v, most in ((x + w, record.width), (y + h, record.height))]
        if inside[2] <= inside[0] or inside[3] <= inside[1]:
            dropped[place[record.id]].append(int(entry["id"]))
            bent.append(f"{name} (dropped)")
            continue
        if max(abs(a - b) for a, b in zip(inside, (x, y, x + w, y + h), strict=True)) > 1e-3:
            findings.clipped += 1
            bent.append(f"{name} (clipped)")
        crowd = bool(entry.get("iscrowd", 0))
        findings.crowd += crowd
        area = float(entry.get("area") or (inside[2] - inside[0]) * (inside[3] - inside[1]))
        rows[place[record.id]].append((inside, label[entry["category_id"]], area, crowd, int(entry["id"])))
    if wrong:
        raise DataError(f"Expected bbox as four finite numbers [x, y, width, height] in {source}:{listing(wrong)}")
    if bent and policy == "strict":
        raise DataError(f"Expected boxes with area inside their images in {source} (policy strict):{listing(bent)}")
    findings.examples = bent[:5]
    findings.dropped = sum(map(len, dropped))
    findings.boxes = sum(map(len, rows))
    findings.empty = sum(not row for row in rows)
    return tuple(map(_annotations, rows, dropped)), findings


def _finite_box(box: Any) -> tuple[float, float, float, float] | None:
    if not isinstance(box, list) or len(box) != 4:
        return None
    if not {int, float}.issuperset(map(type, box)):
        return None
    try:
        x, y, w, h = map(float, box)
    except OverflowError:
        return None
    return (x, y, w, h) if all(map(math.isfinite, (x, y, w, h))) else None


def _annotations(rows: Sequence[tuple[list[float], int, float, bool, int]], dropped: Sequence[int]) -> Annotations:
    return Annotations(
        torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([row[1] for row in rows], dtype=torch.int64),
        torch.tensor([row[2] for row in rows], dtype=torch.float32),
        torch.tensor([row[3] for row in rows], dtype=torch.bool),
        torch.tensor([row[4] for row in rows], dtype=torch.int64),
        tuple(dropped),
    )
