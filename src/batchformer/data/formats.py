"""Readers for data sets that come as a few binary files: Fashion-MNIST (idx, gzip) and CIFAR (Python pickles)."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import DataError

FASHION_MNIST_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


class Arrays(NamedTuple):
    """Images in memory.

    Attributes:
        images: uint8, shape (M, C, H, W).
        labels: Class indices, shape (M,), int64.
        classes: Class names, K of them.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]


def read_idx(path: Path) -> Tensor:
    """Read one gzip-packed idx file of unsigned bytes.

    The format is: two zero bytes, the type (8 is an unsigned byte), the number of axes, a big-endian 32-bit length for
    each axis, the data.

    Returns:
        The data, uint8, in the shape that the file states.

    Raises:
        DataError: The file is damaged or not of this format.
    """
    try:
        with gzip.open(path) as stream:
            content = stream.read()
    except (OSError, EOFError) as problem:
        raise DataError(
            f"Expected a gzip-packed idx file, could not read {path}: {problem}. Fetch it again."
        ) from problem
    axes = content[3] if len(content) > 3 else 0
    header = 4 + 4 * axes
    if content[:3] != b"\x00\x00\x08" or len(content) < header:
        raise DataError(f"Expected an idx file of unsigned bytes, {path} begins with {content[:4]!r}. Fetch it again.")
    shape = struct.unpack(f">{axes}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise DataError(
            f"Expected {int(np.prod(shape))} bytes of data in {path}, got {len(content) - header}. Fetch it again."
        )
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def read_fashion_mnist(folder: Path, *, train: bool) -> Arrays:
    """Read Fashion-MNIST's training or test images, (M, 1, 28, 28), from its four published files.

    Raises:
        DataError: A file is damaged, or images and labels do not fit together.
    """
    part = "train" if train else "t10k"
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz").long()
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(
            f"Expected as many images as labels in {folder}, got {tuple(images.shape)} and {tuple(labels.shape)}."
        )
    return Arrays(images[:, None], labels, list(FASHION_MNIST_CLASSES))


def read_cifar(folder: Path, *, train: bool) -> Arrays:
    """Read CIFAR-10's or CIFAR-100's training or test images, (M, 3, 32, 32), from the published "python version".

    The file names tell the two apart. CIFAR-100 is read with its 100 fine labels.

    Raises:
        DataError: A file is damaged or holds something other than arrays.
    """
    if (folder / "batches.meta").exists():
        names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        meta, key, titles = "batches.meta", "labels", "label_names"
    else:
        names, meta, key, titles = ["train" if train else "test"], "meta", "fine_labels", "fine_label_names"
    batches = [_unpickle(folder / name) for name in names]
    try:
        images = np.concatenate([np.asarray(batch["data"], dtype=np.uint8) for batch in batches]).reshape(-1, 3, 32, 32)
        labels = torch.tensor([label for batch in batches for label in batch[key]], dtype=torch.int64)
        classes = [str(name) for name in _unpickle(folder / meta)[titles]]
    except (KeyError, ValueError) as problem:
        raise DataError(
            f"Expected CIFAR's 'data' and {key!r} in {folder}, got {problem}. Unpack it again."
        ) from problem
    if len(images) != len(labels):
        raise DataError(f"Expected as many images as labels in {folder}, got {len(images)} and {len(labels)}.")
    return Arrays(torch.from_numpy(images), labels, classes)


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler that rebuilds NumPy arrays and refuses everything else, since a pickle may run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in (
            "ndarray",
            "dtype",
            "_reconstruct",
        ):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = _ArrayUnpickler(stream, encoding="latin1").load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, IndexError, AttributeError) as problem:
        raise DataError(f"Expected a CIFAR file, could not read {path}: {problem}. Unpack it again.") from problem
    if not isinstance(content, dict):
        raise DataError(f"Expected a CIFAR file with a dictionary, {path} holds a {type(content).__name__}.")
    return content
