"""Scenes of real pixels with exact boxes and masks, written to disk as a COCO folder, to learn detection on.

Cut-out photographs of animals, fruit, flowers and vehicles (Tux Paint's stamps, whose alpha channel is the exact mask)
stand on photographs of other things, whose ground is grass, gravel or brick. The pixels are real, and a seed draws the
layout. There are eight classes of things, and four of stuff: the three grounds and the backdrop.

The splits ``val`` and ``test`` are new scenes of the photographs in ``train``. The split ``unseen`` has scenes of
photographs that training never saw, about a fifth of each class. A network knows the photographs of training by heart
long before it recognises new ones, so results on the two are to be reported apart.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .errors import DataError

__all__ = ["BACKDROPS", "GROUNDS", "SPLITS", "STUFF", "THINGS", "SceneSettings", "stamps", "write_scenes"]

THINGS: Mapping[str, tuple[str, ...]] = {
    "mammal": ("animals/mammals",),
    "bird": ("animals/birds",),
    "fish": ("animals/fish",),
    "insect": ("animals/insects",),
    "fruit": ("food/fruit",),
    "vegetable": ("food/vegetables",),
    "flower": ("plants/flowers",),
    "vehicle": ("vehicles", "military/vehicles"),
}
"""Folders of Tux Paint's stamps for each class."""
GROUNDS: Mapping[str, tuple[int, int, int]] = {
    "grass": (120, 185, 80),
    "gravel": (185, 180, 172),
    "brick": (205, 120, 95),
}
"""Colour (red, green, blue) of each grey texture of scikit-image (CC0); it varies from scene to scene."""
BACKDROPS = (
    "astronaut.png",
    "camera.png",
    "china.jpg",
    "coffee.png",
    "coins.png",
    "hubble_deep_field.jpg",
    "rocket.jpg",
)
"""Photographs of scikit-image and scikit-learn that show none of the things."""
STUFF = (*GROUNDS, "backdrop")
SPLITS = ("train", "val", "test", "unseen")
# Photographs by the rule below, but no pictures of their class: parts, lights, snails, a lobster, mirror images.
_NOT_THEM = ("sedan_police", "wheel_tractor", "Brown_slug", "Woodlouse", "lobster", "shrimp", "_mirror", "edward_bear")
_LEAST_COLOURS = 150  # at 32 levels for each channel; drawings have fewer

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class SceneSettings:
    """Settings of scenes.

    Attributes:
        size: Side of a scene in pixels, at least 32.
        train: Scenes of the split train.
        val: Scenes of the split val.
        test: Scenes of the split test.
        unseen: Scenes of the split unseen.
        least_objects: Fewest photographs in a scene, at least 1.
        most_objects: Most photographs in a scene.
        least_side: Smallest longer side of a photograph over the side of the scene, above 0.
        most_side: Largest longer side of a photograph over the side of the scene, at most 1.
        visible: Share of each photograph, above 0, that the others must leave visible.
        seed: Seed of the layout and of the split into seen and unseen photographs, at least 0.

    Raises:
        DataError: A value is out of range.
    """

    size: int = 160
    train: int = 3000
    val: int = 200
    test: int = 500
    unseen: int = 300
    least_objects: int = 1
    most_objects: int = 4
    least_side: float = 0.3
    most_side: float = 0.65
    visible: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 32 or min(self.train, self.val, self.test, self.unseen) < 1:
            raise DataError(f"Expected size >= 32 and at least one scene in each split, got {self}.")
        if not (1 <= self.least_objects <= self.most_objects and 0 < self.least_side <= self.most_side <= 1):
            raise DataError(
                f"Expected 1 <= least_objects <= most_objects and 0 < least_side <= most_side <= 1, got {self}."
            )
        if not 0 < self.visible <= 1:
            raise DataError(f"Expected visible in (0, 1], got {self.visible}.")
        if self.seed < 0:
            raise DataError(f"Expected seed >= 0, got {self.seed}.")


@dataclass(frozen=True)
class _Layer:
    """Something on a scene: its place in the list of categories, and the pixels that it covers when alone."""

    category: int
    where: NDArray[np.bool_]

    @property
    def pixels(self) -> int:
        return int(self.where.sum())


def stamps(folder: Path) -> dict[str, list[Path]]:
    """List the cut-out photographs of each class below Tux Paint's folder of stamps, in a fixed order.

    A photograph has many colours and an alpha channel; drawings, letters and black-and-white pictures are left out.

    Raises:
        DataError: A class has fewer than two photographs.
    """
    found = {}
    for name, places in THINGS.items():
        files = [file for place in places for file in sorted((folder / place).rglob("*.png"))]
        found[name] = [file for file in files if _is_photograph(file)]
    few = [name for name, files in found.items() if len(files) < 2]
    if few:
        raise DataError(f"Expected cut-out photographs below {folder}, found fewer than two of {', '.join(few)}.")
    return found


def _is_photograph(file: Path) -> bool:
    if "cartoon" in file.parts or any(word in file.stem for word in _NOT_THEM):
        return False
    with Image.open(file) as image:
        if image.mode == "LA":
            return False
        rgba = np.asarray(image.convert("RGBA"))
    seen = rgba[rgba[..., 3] > 127][:, :3] // 8
    return bool(rgba[..., 3].min() < 128) and len(np.unique(seen, axis=0)) >= _LEAST_COLOURS


def write_scenes(target: Path, cutouts: Path, photographs: Path, settings: SceneSettings = SceneSettings()) -> Path:
    """Write scenes as a COCO folder with images, instances and panoptic annotations of each split.

    Args:
        target: New folder; it is complete when this returns.
        cutouts: Tux Paint's folder of stamps.
        photographs: Folder with the files of ``GROUNDS`` (``.png``) and ``BACKDROPS``.
        settings: Numbers of scenes and objects, sizes, seed.

    Returns:
        The folder ``target``.

    Raises:
        DataError: A source is missing or unreadable.

    Example:
        >>> write_scenes(Path("scenes"), Path("nowhere"), Path("nowhere"), SceneSettings(train=10))
        Traceback (most recent call last):
        batchformer.data.errors.DataError: Expected cut-out photographs below nowhere, found fewer than two of ...
    """
    found = stamps(cutouts)
    random = np.random.default_rng([settings.seed, 0])
    seen: list[list[Pixels]] = []
    unseen: list[list[Pixels]] = []
    for files in found.values():
        order = random.permutation(len(files))
        held = max(1, round(len(files) / 5))
        pictures = [_read(file, "RGBA") for file in files]
        unseen.append([pictures[i] for i in order[:held]])
        seen.append([pictures[i] for i in order[held:]])
    surroundings = _Surroundings(photographs)
    for number, split in enumerate(SPLITS, 1):
        writer = _SplitWriter(target, split)
        pool = unseen if split == "unseen" else seen
        for index in tqdm(range(getattr(settings, split)), f"writing {split}", disable=None, leave=False):
            stream = np.random.default_rng([settings.seed, number, index])
            writer.add(index + 1, *_scene(stream, pool, surroundings, settings))
        writer.close()
    facts = {"settings": asdict(settings), "photographs": {name: len(files) for name, files in found.items()}}
    (target / "scenes.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (target / "ATTRIBUTION.txt").write_text(_attribution(found, cutouts), encoding="utf-8")
    return target


def _read(file: Path, mode: str) -> Pixels:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert(mode))
    except OSError as error:
        raise DataError(f"Expected a picture in {file}, but it cannot be read: {error}") from None


def _attribution(found: Mapping[str, Sequence[Path]], cutouts: Path) -> str:
    head = (
        "The cut-outs are Tux Paint's stamps (tuxpaint.org): the package is GPL-2, single pictures are in the public\n"
        "domain, CC-BY, CC-BY-SA or GPL. Backdrops and textures are scikit-image's and scikit-learn's sample pictures\n"
        "(BSD-3, CC0, public domain). Stamps used:\n"
    )
    return head + "".join(f"{file.relative_to(cutouts)}\n" for files in found.values() for file in files)


# -------------------------------------------------------------------- one scene


class _Surroundings:
    """Backdrops and grounds, cut at random to the size of a scene."""

    def __init__(self, folder: Path) -> None:
        self.backdrops = [_read(folder / name, "RGB") for name in BACKDROPS]
        self.grounds = [(_read(folder / f"{name}.png", "L"), np.array(tint)) for name, tint in GROUNDS.items()]

    def backdrop(self, random: np.random.Generator, size: int) -> Pixels:
        picture = self.backdrops[random.integers(len(self.backdrops))]
        side = int(min(picture.shape[:2]) * random.uniform(0.5, 1.0))
        return _cut(random, picture, side, size)

    def ground(self, random: np.random.Generator, size: int) -> tuple[int, Pixels]:
        which = int(random.integers(len(self.grounds)))
        texture, tint = self.grounds[which]
        grey = _cut(random, texture, int(random.integers(size, 2 * size + 1)), size)
        colour = tint * random.uniform(0.85, 1.15, 3)
        return which, (grey[..., None] / 150 * colour).clip(0, 255).astype(np.uint8)


def _cut(random: np.random.Generator, picture: Pixels, side: int, size: int) -> Pixels:
    side = min(side, *picture.shape[:2])
    top, left = (int(random.integers(length - side + 1)) for length in picture.shape[:2])
    part = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def _scene(
    random: np.random.Generator, pool: Sequence[Sequence[Pixels]], around: _Surroundings, settings: SceneSettings
) -> tuple[Pixels, list[_Layer]]:
    """Draw the picture and its layers from back to front; every pixel belongs to the last layer that covers it."""
    size = settings.size
    canvas = around.backdrop(random, size).astype(np.float32)
    everywhere = np.ones((size, size), dtype=bool)
    layers = [_Layer(len(THINGS) + STUFF.index("backdrop"), everywhere)]
    which, ground = around.ground(random, size)
    # The ground's edge is a straight line; in some scenes the ground is all there is.
    left, right = random.uniform(0.25, 0.85, 2) * size if random.random() < 0.8 else (-1.0, -1.0)
    edge = left + (right - left) * np.arange(size) / size
    below = np.arange(size)[:, None] >= edge[None, :]
    canvas[below] = ground[below]
    layers.append(_Layer(len(THINGS) + which, below))
    for _ in range(int(random.integers(settings.least_objects, settings.most_objects + 1))):
        category = int(random.integers(len(pool)))
        photograph = pool[category][int(random.integers(len(pool[category])))]
        layer = _place(random, canvas, photograph, category, layers, settings)
        if layer is not None:
            layers.append(layer)
    return canvas.round().clip(0, 255).astype(np.uint8), layers


def _place(
    random: np.random.Generator,
    canvas: NDArray[np.float32],
    photograph: Pixels,
    category: int,
    layers: Sequence[_Layer],
    settings: SceneSettings,
) -> _Layer | None:
    """Put a photograph on the canvas, unless it hides too much of another one."""
    size = settings.size
    scale = random.uniform(settings.least_side, settings.most_side) * size / max(photograph.shape[:2])
    width, height = (max(2, round(scale * length)) for length in (photograph.shape[1], photograph.shape[0]))
    picture = Image.fromarray(photograph).resize((width, height), Image.Resampling.LANCZOS)
    if random.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rgba = np.asarray(picture).astype(np.float32)
    for _ in range(10):
        top, left = (int(random.integers(0, size - length + 1)) for length in (height, width))
        where = np.zeros((size, size), dtype=bool)
        where[top : top + height, left : left + width] = rgba[..., 3] > 127
        if where.sum() >= 32 and _leaves_visible(where, layers, settings.visible):
            alpha = rgba[..., 3:] / 255
            part = canvas[top : top + height, left : left + width]
            light = random.uniform(0.8, 1.2)
            part[:] = alpha * (rgba[..., :3] * light).clip(0, 255) + (1 - alpha) * part
            return _Layer(category, where)
    return None


def _leaves_visible(where: NDArray[np.bool_], layers: Sequence[_Layer], visible: float) -> bool:
    covered = where.copy()
    for layer in reversed(layers):
        if layer.category >= len(THINGS):
            break
        if (layer.where & ~covered).sum() < visible * layer.pixels:
            return False
        covered |= layer.where
    return True


# -------------------------------------------------------------------- COCO


class _SplitWriter:
    """Writer of a split: images, ``instances_<split>.json``, ``panoptic_<split>.json`` and its PNG files."""

    def __init__(self, target: Path, split: str) -> None:
        self.split, self.folder = split, target / split
        self.annotations = target / "annotations"
        self.segments = self.annotations / f"panoptic_{split}"
        for folder in (self.folder, self.segments):
            folder.mkdir(parents=True)
        self.images: list[dict[str, Any]] = []
        self.instances: list[dict[str, Any]] = []
        self.panoptic: list[dict[str, Any]] = []

    def add(self, number: int, picture: Pixels, layers: Sequence[_Layer]) -> None:
        name = f"{number:06d}"
        height, width = picture.shape[:2]
        Image.fromarray(picture).save(self.folder / f"{name}.jpg", quality=92)
        self.images.append({"id": number, "file_name": f"{name}.jpg", "height": height, "width": width})
        owner = np.zeros((height, width), dtype=np.int64)  # the layer that each pixel belongs to
        for place, layer in enumerate(layers):
            owner[layer.where] = place
        # As in COCO, each segment has a colour of its own, and its id is red + 256 green + 65536 blue.
        ids = 1 + (np.arange(len(layers)) * 2654435 + number * 7919) % (2**24 - 1)
        info = list(_segments(owner, layers, ids))
        rgb = np.stack([ids[owner] >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)
        Image.fromarray(rgb).save(self.segments / f"{name}.png")
        self.panoptic.append({"image_id": number, "file_name": f"{name}.png", "segments_info": info})
        for segment in info:
            if segment["category_id"] <= len(THINGS):
                numbers = {"id": len(self.instances) + 1, "image_id": number}
                mask = _run_lengths(ids[owner] == segment["id"])
                self.instances.append({**segment, **numbers, "segmentation": mask})

    def close(self) -> None:
        categories = [
            {"id": k, "name": name, "isthing": int(k <= len(THINGS))} for k, name in enumerate((*THINGS, *STUFF), 1)
        ]
        about = {"description": "batchformer scenes: real photographs, generated layout"}
        for kind, entries, known in (
            ("instances", self.instances, categories[: len(THINGS)]),
            ("panoptic", self.panoptic, categories),
        ):
            content = {"info": about, "images": self.images, "annotations": entries, "categories": known}
            path = self.annotations / f"{kind}_{self.split}.json"
            path.write_text(json.dumps(content), encoding="utf-8")


def _run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Write a mask as COCO does without compression: lengths of runs down the columns, the first of background."""
    flat = np.concatenate(([False], mask.ravel(order="F"), [not mask[-1, -1]]))
    return {"size": list(mask.shape), "counts": np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()}


def _segments(owner: NDArray[np.int64], layers: Sequence[_Layer], ids: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    for place, layer in enumerate(layers):
        rows, columns = np.nonzero(owner == place)
        if len(rows):
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            numbers = {"id": int(ids[place]), "category_id": layer.category + 1, "iscrowd": 0}
            yield {**numbers, "bbox": box, "area": len(rows)}
