"""DETR's augmentation, and batches of images of different sizes, through torchvision's transforms v2.

A *sample* is ``(pixel_values, label)``: ImageNet-normalised pixels (3, H, W), and a dict in transformers' convention:

    class_labels  (T,) int64        class of each box
    boxes         (T, 4) float32    centre x, centre y, width, height, over the width and height of the image
    area          (T,) float32      area of each segment in pixels of the resized image
    iscrowd       (T,) int64        1 where a box stands for a group of objects
    image_id      () int64          id of the image
    orig_size     (2,) int64        height and width of the file
    size          (2,) int64        height and width after resizing
    masks         (T, H, W) bool    pixels of each segment, if the dataset gives them

Axis letters: B images, T boxes, H, W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from .coco import CocoSplit
from .errors import DataError
from .images import decode
from .samplers import derive_seed
from .transforms import seeded

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "CocoDetection",
    "Sample",
    "SizeJitter",
    "Transform",
    "collate",
    "eval_transform",
    "read_image",
    "train_transform",
]

Sample = tuple[Tensor, dict[str, Tensor]]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Transform:
    """Transform of an image with its boxes and masks into a sample.

    Args:
        steps: Transforms of torchvision's v2, applied in turn; their random numbers come from torch's global stream.
    """

    steps: tuple[nn.Module, ...]

    def __call__(self, image: Image.Image, annotations: Mapping[str, Any]) -> Sample:
        """Transform one image.

        Args:
            image: RGB picture.
            annotations: Mapping with ``boxes`` (T, 4) as x1, y1, x2, y2 in pixels, ``labels`` (T,), and if known
                ``area``, ``iscrowd``, ``masks`` (T, H, W) and ``image_id``; empty for an image alone.
        """
        whole = _annotated(image, annotations)
        picture: Any = tv_tensors.Image(TF.pil_to_tensor(image))
        for step in self.steps:
            picture, whole = step(picture, whole)
        pixels = TF.to_dtype(picture.as_subclass(Tensor), torch.float32, scale=True)
        pixels = TF.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))
        return pixels, _label(whole, (image.height, image.width), (pixels.shape[1], pixels.shape[2]))


def _annotated(image: Image.Image, annotations: Mapping[str, Any]) -> dict[str, Any]:
    size = (image.height, image.width)
    boxes = torch.as_tensor(annotations.get("boxes", torch.zeros(0, 4)), dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    whole: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": torch.as_tensor(annotations.get("labels", torch.zeros(count)), dtype=torch.int64),
        "area": torch.as_tensor(annotations.get("area", _area(boxes)), dtype=torch.float32),
        "iscrowd": torch.as_tensor(annotations.get("iscrowd", torch.zeros(count)), dtype=torch.int64),
        "image_id": torch.as_tensor(annotations.get("image_id", 0), dtype=torch.int64),
    }
    if "masks" in annotations:
        whole["masks"] = tv_tensors.Mask(annotations["masks"])
    return whole


def _label(whole: dict[str, Any], before: tuple[int, int], after: tuple[int, int]) -> dict[str, Tensor]:
    boxes = whole["boxes"].as_subclass(Tensor)
    height, width = after
    scale = torch.tensor([width, height, width, height], dtype=torch.float32)
    label = {
        "class_labels": whole["labels"],
        "boxes": torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1) / scale,
        "area": whole["area"],
        "iscrowd": whole["iscrowd"],
        "image_id": whole["image_id"],
        "orig_size": torch.tensor(before),
        "size": torch.tensor(after),
    }
    if "masks" in whole:
        label["masks"] = whole["masks"].as_subclass(Tensor).bool()
    return label


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


# -------------------------------------------------------------------- steps


def train_transform(
    scales: Sequence[int] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
    max_size: int | None = 1333,
    *,
    flip: float = 0.5,
    crop: tuple[int, int] | None = (384, 600),
    crop_scales: Sequence[int] = (400, 500, 600),
) -> Transform:
    """Build DETR's augmentation: a flip, then a random scale; every other image is resized and cut at random before.

    Args:
        scales: Short sides in pixels to choose from.
        max_size: Largest long side in pixels; ``None`` for no bound.
        flip: Probability of the mirror image.
        crop: Smallest and largest side of the cut in pixels; ``None`` for no cut.
        crop_scales: Short sides in pixels before the cut.

    Source:
        End-to-End Object Detection with Transformers (DETR), arXiv 2005.12872, section 4 (technical details).

    Example:
        >>> transform = train_transform([32], crop=None)
        >>> with seeded(0):
        ...     pixels, label = transform(Image.new("RGB", (60, 40)), {"boxes": [[0, 0, 30, 20]]})
        >>> tuple(pixels.shape), label["size"].tolist(), label["orig_size"].tolist()
        ((3, 32, 48), [32, 48], [40, 60])
    """
    resize: nn.Module = v2.RandomShortestSize(list(scales), max_size=max_size)
    if crop is not None:
        cut = v2.Compose([v2.RandomShortestSize(list(crop_scales)), RandomCut(*crop), resize])
        resize = v2.RandomChoice([resize, cut])
    return Transform((v2.RandomHorizontalFlip(flip), SizeJitter(resize), DropVanished()))


def eval_transform(size: int = 800, max_size: int | None = 1333, *, flip: bool = False) -> Transform:
    """Build the transform for evaluation, which resizes the short side.

    Args:
        size: Short side in pixels.
        max_size: Largest long side in pixels; ``None`` for no bound.
        flip: Give the mirror image, for the cached maps of a frozen backbone.

    Example:
        >>> pixels, label = eval_transform(32)(Image.new("RGB", (60, 40)), {})
        >>> tuple(pixels.shape), len(label["boxes"])
        ((3, 32, 48), 0)
    """
    mirror = (v2.RandomHorizontalFlip(1.0),) if flip else ()
    return Transform((*mirror, SizeJitter(v2.RandomShortestSize([size], max_size=max_size)), DropVanished()))


class SizeJitter(nn.Module):
    """Resize an image by another transform, and the annotations' ``area`` with it."""

    def __init__(self, resize: nn.Module) -> None:
        super().__init__()
        self.resize = resize

    def forward(self, image: Tensor, whole: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Resize both; the area of a box that is cut shrinks with the box."""
        before = _area(whole["boxes"].as_subclass(Tensor))
        image, whole = self.resize(image, whole)
        after = _area(whole["boxes"].as_subclass(Tensor))
        whole["area"] = whole["area"] * after / before.clamp(min=1e-6)
        return image, whole


class RandomCut(nn.Module):
    """Cut a rectangle out; each side has ``least`` to ``most`` pixels, or all of a side that is shorter."""

    def __init__(self, least: int, most: int) -> None:
        super().__init__()
        self.least, self.most = least, most

    def forward(self, image: Tensor, whole: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Cut both; boxes are clipped to the rectangle."""
        sizes = [self._side(side) for side in image.shape[-2:]]
        corner = [int(torch.randint(side - cut + 1, ())) for side, cut in zip(image.shape[-2:], sizes, strict=True)]
        place = (*corner, *sizes)  # top, left, height, width
        cut = {name: TF.crop(x, *place) if isinstance(x, tv_tensors.TVTensor) else x for name, x in whole.items()}
        cut["boxes"] = TF.clamp_bounding_boxes(cut["boxes"])
        return TF.crop(image, *place), cut

    def _side(self, side: int) -> int:
        least, most = min(self.least, side), min(self.most, side)
        return least + int(torch.randint(most - least + 1, ()))


class DropVanished(nn.Module):
    """Drop boxes without area or, with masks, without a pixel, and all that belongs to them."""

    def forward(self, image: Tensor, whole: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the image unchanged and the annotations that are left."""
        boxes = whole["boxes"]
        keep = (boxes[:, 2:] > boxes[:, :2]).as_subclass(Tensor).all(1)
        if "masks" in whole:
            keep &= whole["masks"].as_subclass(Tensor).flatten(1).any(1)
        rows = ("labels", "area", "iscrowd")
        left = {name: whole[name][keep] for name in rows}
        left["boxes"] = tv_tensors.wrap(boxes.as_subclass(Tensor)[keep], like=boxes)
        if "masks" in whole:
            left["masks"] = tv_tensors.wrap(whole["masks"].as_subclass(Tensor)[keep], like=whole["masks"])
        return image, {**whole, **left}


# -------------------------------------------------------------------- samples and batches


def read_image(file: str | Path) -> Image.Image:
    """Read an image for training, testing and prediction: RGB, opaque, as the file stores it.

    The camera's orientation is not applied, since annotations are drawn on the pixels as they are stored.

    Raises:
        DataError: The file cannot be decoded.
    """
    try:
        return decode(Path(file), 3, upright=False)
    except OSError as error:
        raise DataError(f"Expected an image in {file}, but it cannot be decoded: {error}") from None


class CocoDetection(Dataset[Sample]):
    """Samples of a split; ``dataset[epoch, index]`` is a pure function of (seed, epoch, index).

    Args:
        split: Split of a COCO folder.
        transform: Transform of each image and its annotations.
        crowds: Give crowd boxes too: evaluation ignores detections inside them, training leaves them out.
        masks: Give the pixels of each box's segment (panoptic splits).
        seed: Seed of the augmentation.

    Raises:
        DataError: From an item, when its image cannot be decoded or has another size than the annotations say.
    """

    def __init__(
        self,
        split: CocoSplit,
        transform: Callable[[Image.Image, Mapping[str, Any]], Sample],
        *,
        crowds: bool = False,
        masks: bool = False,
        seed: int = 0,
    ) -> None:
        self.split, self.transform = split, transform
        self.crowds, self.masks, self.seed = crowds, masks, seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample of ``(epoch, index)``."""
        epoch, index = key
        with seeded(derive_seed(self.seed, epoch, index)):
            return self.transform(self.image(index), self.annotations(index))

    def image(self, index: int) -> Image.Image:
        """Read the picture of an index with :func:`read_image`."""
        record = self.split.images[index]
        image = read_image(record.file)
        if (image.height, image.width) != (record.height, record.width):
            raise DataError(
                f"Expected {record.file} of {record.width} x {record.height} pixels, as the annotations say, got "
                f"{image.width} x {image.height}. Correct the width and height in the JSON file, or the image."
            )
        return image

    def annotations(self, index: int) -> dict[str, Any]:
        """Return the annotations of an index in the form that the transform takes."""
        found = self.split.annotations[index]
        keep = torch.ones_like(found.iscrowd) if self.crowds else ~found.iscrowd
        whole = {
            "boxes": found.boxes[keep],
            "labels": found.labels[keep],
            "area": found.areas[keep],
            "iscrowd": found.iscrowd[keep],
            "image_id": self.split.images[index].id,
        }
        if self.masks:
            whole["masks"] = self.split.masks(index)[keep]
        return whole


def collate(samples: Sequence[Sample], *, multiple: int = 1) -> dict[str, Any]:
    """Make one batch of samples of different sizes, padded with zeros at the bottom and on the right.

    Args:
        samples: Samples, B of them.
        multiple: Number that divides the height and the width of the batch.

    Returns:
        Dict with ``pixel_values`` (B, 3, H, W), ``pixel_mask`` (B, H, W) int64, which is 1 on images and 0 on padding,
        and ``labels``, a list of B dicts; masks are padded like the pixels.

    Example:
        >>> batch = collate([(torch.ones(3, 2, 4), {}), (torch.ones(3, 3, 2), {})])
        >>> tuple(batch["pixel_values"].shape), batch["pixel_mask"].sum((1, 2)).tolist()
        ((2, 3, 3, 4), [8, 6])
    """
    height, width = (-(-max(pixels.shape[axis] for pixels, _ in samples) // multiple) * multiple for axis in (1, 2))
    pixel_values = torch.zeros(len(samples), 3, height, width)
    pixel_mask = torch.zeros(len(samples), height, width, dtype=torch.int64)
    labels = []
    for row, (pixels, label) in enumerate(samples):
        h, w = pixels.shape[1:]
        pixel_values[row, :, :h, :w] = pixels
        pixel_mask[row, :h, :w] = 1
        if "masks" in label:
            label = {**label, "masks": nn.functional.pad(label["masks"], (0, width - w, 0, height - h))}
        labels.append(label)
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": labels}
