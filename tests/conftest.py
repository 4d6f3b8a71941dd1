"""Writers of tiny data sets in their real on-disk formats; for tests only."""

import gzip
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
