"""Batches that hold the cached maps of a frozen backbone instead of pixels.

Axis letters: B images, C channels, h, w cells, S the side of the square that every image is padded to.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm  # type: ignore[import-untyped]

from batchformer.data.detection_transforms import CocoDetection, eval_transform
from batchformer.data.samplers import generator
from batchformer.data.transforms import seeded
from batchformer.tasks.pretrained.feature_cache import FeatureCache, fill

from .backbone import Backbone

__all__ = ["CachedDetection", "CachedItem", "cached", "collate_cached", "resized_label"]


class CachedItem(NamedTuple):
    """One image of a split: its place there, whether it is mirrored, and its label in transformers' terms."""

    place: int
    mirrored: bool
    label: dict[str, Any]


class CachedDetection(Dataset[CachedItem]):
    """Items ``dataset[epoch, index]`` of a split whose maps are cached.

    Args:
        labels: Label of each image, not mirrored.
        cache: Maps of all images.
        size: Side S of the padded square, in pixels.
        mirrored: Mirror every other item, chosen by (seed, epoch, index).
        seed: Seed of that choice.
    """

    def __init__(
        self, labels: Sequence[dict[str, Any]], cache: FeatureCache, size: int, *, mirrored: bool, seed: int = 0
    ) -> None:
        self.labels, self.cache, self.size, self.mirrored, self.seed = labels, cache, size, mirrored, seed

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> CachedItem:
        """Return the item of ``(epoch, index)``."""
        epoch, index = key
        mirrored = self.mirrored and bool(torch.rand((), generator=generator(self.seed, epoch, index)) < 0.5)
        label = self.labels[index]
        if mirrored:
            label = {**label, "boxes": torch.cat((1 - label["boxes"][:, :1], label["boxes"][:, 1:]), 1)}
            if "masks" in label:
                label["masks"] = label["masks"].flip(-1)
        return CachedItem(index, mirrored, label)


def collate_cached(dataset: CachedDetection) -> Callable[[Sequence[CachedItem]], dict[str, Any]]:
    """Return the function that makes a batch of items and reads their maps at once.

    A batch has ``pixel_values`` (B, 3, S, S), zeros without memory of their own, ``pixel_mask`` (B, S, S), ``labels``
    and ``features``, a list of maps (B, C, h, w).
    """

    def collate(items: Sequence[CachedItem]) -> dict[str, Any]:
        side = dataset.size
        mask, labels = torch.zeros(len(items), side, side, dtype=torch.int64), []
        for row, item in enumerate(items):
            height, width = item.label["size"].tolist()
            mask[row, :height, :width] = 1
            labels.append(_padded(item.label, side))
        return {
            "pixel_values": torch.zeros(1).expand(len(items), 3, side, side),
            "pixel_mask": mask,
            "labels": labels,
            "features": dataset.cache.read([item.place for item in items], [item.mirrored for item in items]),
        }

    return collate


def _padded(label: dict[str, Any], side: int) -> dict[str, Any]:
    """Pad masks to the size of the batch, as `collate` of images does."""
    if "masks" not in label:
        return label
    masks = label["masks"]
    return {**label, "masks": F.pad(masks, (0, side - masks.shape[2], 0, side - masks.shape[1]))}


def cached(
    dataset: CocoDetection,
    backbone: Backbone,
    size: int,
    *,
    mirrored: bool,
    folder: Path,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | None = None,
    labels: Sequence[dict[str, Any]] | None = None,
) -> CachedDetection:
    """Compute the maps of a split that are not cached yet, the share of this process, and return the split's items.

    Args:
        dataset: The split, with ``eval_transform(size, size)``.
        backbone: Frozen backbone; it is moved for this, and moved back.
        size: Side S of the padded square, in pixels.
        mirrored: Cache mirror images too, and give them to every other item.
        folder: Folder of the caches of all data; inside, each is named by a hash of what its maps depend on.
        seed: Seed of the choice of mirror images.
        rank: Number of this process.
        world_size: Number of processes.
        device: Device to compute on; by default the backbone's own.
        labels: Label of each image, not mirrored; by default its boxes.
    """
    facts = {"strides": backbone.strides, "size": size, "files": [record.file for record in dataset.split.images]}
    facts |= {name: getattr(backbone, name).flatten().tolist() for name in ("scale", "shift")}
    key = FeatureCache.key(backbone, facts) + ("-mirrored" if mirrored else "")
    where = next(backbone.parameters()).device
    backbone.to(device or where)
    with torch.inference_mode():
        maps = backbone.maps(torch.zeros(1, 3, size, size, device=device or where))
    shapes = [(int(x.shape[1]), int(x.shape[2]), int(x.shape[3])) for x in maps]
    cache = FeatureCache(folder / key, len(dataset), shapes, mirrored=mirrored)
    plain, mirror = (dataset.transform, eval_transform(size, size, flip=True))

    def load(index: int, turned: bool) -> Tensor:
        transform = mirror if turned else plain
        with seeded(0):  # its only size is drawn from the global stream
            pixels, _ = transform(dataset.image(index), {})
        return F.pad(pixels, (0, size - pixels.shape[2], 0, size - pixels.shape[1]))

    missing = len(cache.missing(rank, world_size))
    with tqdm(total=missing, desc=f"features of {dataset.split.name}", disable=None if missing else True) as bar:
        fill(
            cache,
            backbone.maps,
            load,
            rank=rank,
            world_size=world_size,
            device=device or where,
            say=lambda done, of: bar.update(done - bar.n),
        )
    backbone.to(where)
    if labels is None:
        labels = [resized_label(dataset, index, size) for index in range(len(dataset))]
    return CachedDetection(labels, cache, size, mirrored=mirrored, seed=seed)


def resized_label(dataset: CocoDetection, index: int, size: int) -> dict[str, Tensor]:
    """Return the label of an image whose long side is brought to ``size`` pixels, without decoding it."""
    record, found = dataset.split.images[index], dataset.annotations(index)
    ratio = size / max(record.height, record.width)
    # As torchvision's RandomShortestSize rounds.
    after = (int(record.height * ratio), int(record.width * ratio))
    boxes, whole = found["boxes"], torch.tensor([record.width, record.height, record.width, record.height])
    scale = after[0] * after[1] / (record.height * record.width)
    return {
        "class_labels": found["labels"],
        "boxes": torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1) / whole,
        "area": found["area"] * scale,
        "iscrowd": found["iscrowd"].long(),
        "image_id": torch.tensor(found["image_id"]),
        "orig_size": torch.tensor((record.height, record.width)),
        "size": torch.tensor(after),
    }
