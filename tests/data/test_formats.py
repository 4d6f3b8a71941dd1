import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from batchformer.data.errors import DataError
from batchformer.data.formats import read_cifar, read_fashion_mnist, read_idx

Writer = Callable[..., Path]


def test_fashion_mnist_agrees_with_torchvision(tmp_path: Path, write_fashion: Writer) -> None:
    folder = write_fashion(tmp_path / "FashionMNIST" / "raw")
    for packed in folder.iterdir():
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    from torchvision.datasets import FashionMNIST

    for train in (True, False):
        ours, theirs = read_fashion_mnist(folder, train=train), FashionMNIST(str(tmp_path), train=train)
        assert ours.images[:, 0].equal(theirs.data)
        assert ours.labels.equal(theirs.targets)
        assert ours.classes == theirs.classes


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_agrees_with_a_plain_reading(classes: int, tmp_path: Path, write_cifar: Writer) -> None:
    folder = write_cifar(tmp_path, classes, per_class=5)
    arrays = read_cifar(folder, train=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    n = 0
    for name in names:
        batch = pickle.loads((folder / name).read_bytes())
        for row, label in zip(batch["data"], batch["labels" if classes == 10 else "fine_labels"], strict=True):
            for channel in range(3):  # 1,024 red, 1,024 green, 1,024 blue values, row by row
                plane = row[channel * 1024 : (channel + 1) * 1024]
                assert arrays.images[n, channel].numpy().tobytes() == np.ascontiguousarray(plane).tobytes()
            assert int(arrays.labels[n]) == label
            n += 1
    assert n == len(arrays.labels) == 5 * classes
    assert arrays.classes[1] == "kind 1"
    assert len(read_cifar(folder, train=False).labels) == classes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "could not read .*labels.gz.*Fetch it again"),
        (gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x01x"), "Expected an idx file of unsigned bytes"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abc"), "Expected 5 bytes of data in .*, got 3"),
        (gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x05abcde")[:-9], "could not read"),
        (gzip.compress(b""), "Expected an idx file"),
    ],
    ids=["no gzip", "another type", "too short", "cut off", "empty"],  # the bytes have the time in them
)
def test_damaged_idx(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.gz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "labels.gz")


def test_images_and_labels_that_do_not_fit(tmp_path: Path, write_fashion: Writer) -> None:
    folder = write_fashion(tmp_path)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes((folder / "train-labels-idx1-ubyte.gz").read_bytes())
    with pytest.raises(DataError, match="Expected as many images as labels"):
        read_fashion_mnist(folder, train=False)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('/tmp/evil', 'w')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "Expected a CIFAR file, could not read .*test.*Unpack it again"),
        (pickle.dumps({"data": Evil()}), "asks for builtins.eval"),
        (pickle.dumps([1]), "holds a list"),
        (pickle.dumps({"labels": [1]}), "Expected CIFAR's 'data' and 'fine_labels'"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]}), "as many images as labels"),
    ],
)
def test_damaged_cifar(content: bytes, message: str, tmp_path: Path, write_cifar: Writer) -> None:
    folder = write_cifar(tmp_path, 100, 1)
    (folder / "test").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_cifar(folder, train=False)


def test_idx_of_any_rank(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(
        gzip.compress(b"\x00\x00\x08\x02\x00\x00\x00\x02\x00\x00\x00\x03" + bytes(range(6)))
    )
    assert read_idx(tmp_path / "x.gz").equal(torch.arange(6, dtype=torch.uint8).reshape(2, 3))
