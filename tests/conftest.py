"""Writers of tiny data sets in their real on-disk formats, tiny detectors of transformers, processes of the command."""

import gzip
import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, serving
from PIL import Image

# Each worker of pytest-xdist computes on one core, and so do the processes that tests start: several threads on few
# cores wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
pytest.register_assert_rewrite("recipe_runs")


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Processes of the command line. Tests that use it belong to the group `processes` of tests/shared/ranks.py."""
    with serving(tmp_path_factory.mktemp("command")) as command:
        yield command


def idx_bytes(array: np.ndarray) -> bytes:
    """Lay an array of unsigned bytes out as an idx file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def write_fashion() -> Callable[..., Path]:
    """Write Fashion-MNIST's four files with ``per_class`` training and ``tested`` test images of every class."""

    def write(folder: Path, per_class: int = 20, tested: int = 3, size: int = 28) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for part, n in (("train", per_class), ("t10k", tested)):
            labels = random.permutation(np.repeat(np.arange(10), n))
            images = random.integers(0, 256, (len(labels), size, size))
            for name, array in ((f"{part}-images-idx3-ubyte.gz", images), (f"{part}-labels-idx1-ubyte.gz", labels)):
                (folder / name).write_bytes(gzip.compress(idx_bytes(array)))
        return folder

    return write


@pytest.fixture
def write_cifar() -> Callable[..., Path]:
    """Write the "python version" of CIFAR-10 or CIFAR-100 with ``per_class`` training images of every class."""

    def write(folder: Path, classes: int = 10, per_class: int = 5) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)

        def dump(name: str, content: dict[str, object]) -> None:
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))

        def batch(labels: Sequence[int]) -> dict[str, object]:
            key = "labels" if classes == 10 else "fine_labels"
            return {"data": random.integers(0, 256, (len(labels), 3072), dtype=np.uint8), key: list(labels)}

        labels = random.permutation(np.repeat(np.arange(classes), per_class)).tolist()
        if classes == 10:
            for i in range(5):
                dump(f"data_batch_{i + 1}", batch(labels[i::5]))
            dump("test_batch", batch(list(range(10))))
            dump("batches.meta", {"label_names": [f"kind {k}" for k in range(10)]})
        else:
            dump("train", batch(labels))
            dump("test", batch(list(range(classes))))
            dump("meta", {"fine_label_names": [f"kind {k}" for k in range(classes)]})
        return folder

    return write


@pytest.fixture
def write_images() -> Callable[..., Path]:
    """Write a folder with one sub-folder per class, ``counts[k]`` images in class k, of many kinds and sizes."""

    def write(root: Path, counts: Sequence[int], *, grey: bool = False, side: int = 24) -> Path:
        random = np.random.default_rng(0)
        modes = ["L"] if grey else ["RGB", "L", "RGBA", "P"]
        for k, count in enumerate(counts):
            folder = root / f"class {k}"
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(side, side + 8, 2)
                pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
                mode = modes[i % len(modes)]
                ending = "jpg" if mode == "RGB" else "png"
                Image.fromarray(pixels).convert(mode).save(folder / f"{i:03d}.{ending}")
        return root

    return write


@pytest.fixture
def write_coco() -> Callable[..., Path]:
    """Write a COCO folder: ``annotations/instances_<split><year>.json`` and ``<split><year>/*.jpg``.

    Coloured rectangles on noise, each class of a colour of its own, ids as odd as COCO's; with ``count`` images in a
    split, the last has no box, and beyond the training split one box is a crowd.
    """

    def write(root: Path, splits: dict[str, int], *, year: str = "", side: int = 48) -> Path:
        colours = {3: (220, 40, 40), 7: (40, 200, 40), 90: (40, 40, 220)}
        categories = [{"id": number, "name": f"kind {number}"} for number in (7, 3, 90)]
        for place, (split, count) in enumerate(splits.items()):
            random = np.random.default_rng(place)
            images, annotations = [], []
            folder = root / f"{split}{year}"
            folder.mkdir(parents=True)
            for index in range(count):
                number = 1000 * place + index + 1
                height, width = (int(n) for n in random.integers(side, side + 16, 2))
                pixels = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
                for _ in range(int(random.integers(1, 4)) if index < count - 1 else 0):
                    w, h = (int(n) for n in random.integers(12, 28, 2))
                    x, y = int(random.integers(width - w)), int(random.integers(height - h))
                    category = int(random.choice(list(colours)))
                    pixels[y : y + h, x : x + w] = colours[category]
                    box = {"bbox": [x, y, w, h], "area": w * h, "category_id": category, "image_id": number}
                    crowd = split != "train" and index == 1 and not any(one["iscrowd"] for one in annotations)
                    annotations.append({"id": len(annotations) + 1, "iscrowd": int(crowd), **box})
                Image.fromarray(pixels).save(folder / f"{number:012d}.jpg", quality=95)
                images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": height, "width": width})
            content = {"images": images, "annotations": annotations, "categories": categories}
            (root / "annotations").mkdir(exist_ok=True)
            (root / "annotations" / f"instances_{split}{year}.json").write_text(json.dumps(content), encoding="utf-8")
        return root

    return write


@pytest.fixture
def odd_images() -> Callable[[Path], list[str]]:
    """Write PNG files of 40 x 30 pixels that a plain conversion to RGB gets wrong; return their names.

    ``alpha`` and ``palette`` are transparent on the left half, ``deep`` is grey of 16 bits.
    """

    def write(folder: Path) -> list[str]:
        folder.mkdir(parents=True, exist_ok=True)
        slope = np.linspace(300, 60000, 40 * 30).reshape(30, 40).astype(np.uint16)
        pixels = np.zeros((30, 40, 4), dtype=np.uint8)
        pixels[..., 0], pixels[:, 20:, 3] = slope >> 8, 255
        palette = Image.fromarray((np.arange(40 * 30).reshape(30, 40) % 40 // 20).astype(np.uint8))
        palette.putpalette([0, 0, 0, 10, 200, 30])
        palette.save(folder / "palette.png", transparency=0)
        Image.fromarray(pixels).save(folder / "alpha.png")
        Image.fromarray(slope).save(folder / "deep.png")
        return ["alpha.png", "deep.png", "palette.png"]

    return write


PANOPTIC_CATEGORIES = [
    {"id": 3, "name": "box", "supercategory": "thing", "isthing": 1, "color": [220, 20, 60]},
    {"id": 17, "name": "plate", "supercategory": "thing", "isthing": 1, "color": [0, 220, 0]},
    {"id": 90, "name": "sky", "supercategory": "stuff", "isthing": 0, "color": [0, 0, 220]},
    {"id": 184, "name": "floor", "supercategory": "stuff", "isthing": 0, "color": [90, 90, 0]},
]
PANOPTIC_COLOURS = {3: (230, 60, 50), 17: (60, 200, 70), 90: (120, 160, 240), 184: (130, 110, 60)}


def panoptic_scene(random: np.random.Generator, *, crowd: bool) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Pixels, segment ids and their list: floor under sky, boxes and plates before them, a void corner, or a crowd."""
    height, width = (int(n) for n in random.integers(44, 72, 2))
    ids = np.zeros((height, width), dtype=np.int64)
    kind: dict[int, int] = {}

    def paint(region: Any, category: int) -> None:
        number = int(random.integers(1, 2**24))
        ids[region] = number
        kind[number] = category

    horizon = int(random.integers(height // 3, 2 * height // 3))
    paint(np.s_[:horizon], 90)
    paint(np.s_[horizon:], 184)
    for _ in range(int(random.integers(1, 4))):
        y, x, h, w = (int(random.integers(*span)) for span in ((0, height - 16), (0, width - 16), (12, 26), (12, 26)))
        paint(np.s_[y : y + h, x : x + w], int(random.choice([3, 17])))
    ids[:4, :4] = 0
    pixels = np.zeros((height, width, 3), dtype=np.int64)
    segments = []
    for number, category in kind.items():
        mask = ids == number
        if not mask.any():
            continue
        pixels[mask] = np.array(PANOPTIC_COLOURS[category]) + random.integers(-20, 20, (int(mask.sum()), 3))
        rows, columns = np.nonzero(mask)
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        is_crowd = int(crowd and category == 17)
        segments.append(
            {"id": number, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": is_crowd}
        )
    return pixels.clip(0, 255).astype(np.uint8), ids, segments


def write_panoptic_split(root: Path, split: str, count: int, seed: int, first_id: int) -> None:
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for folder in (root / split, root / "annotations" / f"panoptic_{split}"):
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels, ids, segments = panoptic_scene(random, crowd=index % 4 == 3)
        number = first_id + index
        name = f"{number:012d}"
        Image.fromarray(pixels).save(root / split / f"{name}.jpg", quality=95)
        rgb = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(root / "annotations" / f"panoptic_{split}" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.jpg", "height": ids.shape[0], "width": ids.shape[1]})
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": PANOPTIC_CATEGORIES}
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def write_panoptic() -> Callable[..., Path]:
    """Write ``<split>/*.jpg``, ``annotations/panoptic_<split>.json`` and its PNG files for every split."""

    def write(root: Path, splits: Sequence[str] = ("train", "val", "test"), count: int = 8) -> Path:
        for place, split in enumerate(splits):
            write_panoptic_split(root, split, count, seed=place, first_id=1000 * place + 1)
        return root

    return write


# ------------------------------------------------------------------ detectors of transformers 4.57 and 5


DETECTOR_CLASSES = 3
_SMALL = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "num_labels": DETECTOR_CLASSES,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "auxiliary_loss": True,
}
_OWN_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_FOUR_LEVELS = {"stages": (2, 3, 4), "num_feature_levels": 4, "disable_custom_kernels": True}
_RT_DETR = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [32, 32, 32],
    "num_attention_heads": 4,
    "encoder_layers": 1,
    "num_denoising": 0,
    "stages": (2, 3, 4),
}
_MASK2FORMER = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "dim_feedforward": 32,
    "num_attention_heads": 4,
    "decoder_layers": 3,
    "train_num_points": 64,
    "stages": (1, 2, 3, 4),
}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "detr": ("DetrForObjectDetection", {}),
    "segmentation": ("DetrForSegmentation", {"stages": (1, 2, 3, 4), "encoder_attention_heads": 8}),
    "conditional": ("ConditionalDetrForObjectDetection", {}),
    "deformable": ("DeformableDetrForObjectDetection", _FOUR_LEVELS),
    "one level": ("DeformableDetrForObjectDetection", {**_FOUR_LEVELS, "stages": (4,), "num_feature_levels": 1}),
    "box refinement": ("DeformableDetrForObjectDetection", {**_FOUR_LEVELS, "with_box_refine": True}),
    "two stages": (
        "DeformableDetrForObjectDetection",
        {**_FOUR_LEVELS, "with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 5},
    ),
    "dab": ("DabDetrForObjectDetection", {"hidden_size": 32}),
    "rt-detr": ("RTDetrForObjectDetection", _RT_DETR),
    "rt-detr v2": ("RTDetrV2ForObjectDetection", _RT_DETR),
    "mask2former": ("Mask2FormerForUniversalSegmentation", _MASK2FORMER),
    "smca": ("SmcaForObjectDetection", {"stages": (3, 4), "num_feature_levels": 3}),
}


@pytest.fixture(scope="session")
def detector() -> Callable[..., Any]:
    """A function: kind and settings of the configuration -> tiny model in training."""
    transformers = pytest.importorskip("transformers")

    def build(kind: str, **settings: Any) -> Any:
        torch.manual_seed(0)
        name, extra = _KINDS[kind]
        settings = {**_SMALL, **_OWN_BACKBONE, **extra, **settings}
        resnet = transformers.RTDetrResNetConfig if kind.startswith("rt-detr") else transformers.ResNetConfig
        stages = settings.pop("stages", (4,))
        own = resnet(**_RESNET, out_features=[f"stage{stage}" for stage in stages])
        settings = {"backbone_config": own, **settings}
        library = transformers
        if kind == "smca":
            from batchformer.tasks.set_prediction import smca as library

            settings = {key: value for key, value in settings.items() if key not in _OWN_BACKBONE}
        config = getattr(library, re.sub("For[A-Z].*", "Config", name))(**settings)
        return getattr(library, name)(config).train()

    return build


@pytest.fixture(scope="session")
def scenes() -> Callable[..., dict[str, Any]]:
    """A function: images, side in pixels, kind of detector -> batch of images of several sizes, padded to one."""

    def make(n: int, side: int = 64, kind: str = "detr", seed: int = 0) -> dict[str, Any]:
        torch.manual_seed(seed)
        images, masks = torch.randn(n, 3, side, side), torch.ones(n, side, side, dtype=torch.long)
        for i in range(n):
            masks[i, side - 10 * (i % 4) :] = 0
            masks[i, :, side - 16 * ((i + 1) % 3) :] = 0
        counts = [i % 3 + (i < 2) for i in range(n)]  # one of them may have none
        classes = [torch.randint(DETECTOR_CLASSES, (count,)) for count in counts]
        shapes = [torch.rand(count, side, side) > 0.5 for count in counts]
        boxes = [torch.cat((torch.rand(count, 2) * 0.4 + 0.3, torch.rand(count, 2) * 0.4 + 0.1), 1) for count in counts]
        batch = {"pixel_values": images * masks[:, None], "pixel_mask": masks}
        if kind == "mask2former":
            return {**batch, "mask_labels": [shape.to(images.dtype) for shape in shapes], "class_labels": classes}
        labels = [
            {"class_labels": c, "boxes": b} | ({"masks": s} if kind == "segmentation" else {})
            for c, b, s in zip(classes, boxes, shapes, strict=True)
        ]
        return {**batch, "labels": labels}

    return make


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of all data, which is not the user's."""
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data root"))
    return tmp_path / "data root"


@pytest.fixture
def fashion(data_root: Path, write_fashion: Callable[..., Path]) -> Path:
    """A small Fashion-MNIST in the folder of all data."""
    return write_fashion(data_root / "fashion-mnist")
