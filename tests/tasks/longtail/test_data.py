"""The cut to a long tail, the groups, and the data module that does both."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from batchformer.data.errors import DataError
from batchformer.data.loader import TensorLoader
from batchformer.tasks.longtail.data import LongTailData
from batchformer.tasks.longtail.imbalance import (
    class_order,
    long_tail_indices,
    long_tail_profile,
    shot_groups,
    unmet,
)

Writer = Callable[..., Path]


pytestmark = pytest.mark.usefixtures("data_root")


def ready(*args: object, **arguments: object) -> LongTailData:
    data = LongTailData(*args, **arguments)  # type: ignore[arg-type]
    data.setup()
    return data


def train_images(data: LongTailData) -> Tensor:
    assert data._parts is not None
    images = data._parts["train"].images
    assert images is not None
    return images


# ---------------------------------------------------------------- pure functions


@pytest.mark.parametrize(
    ("classes", "n_max", "factor", "total"),
    [(10, 5000, 200, 11203), (100, 500, 200, 9502), (100, 500, 100, 10847), (10, 6000, 100, 14886)],
)
def test_published_totals(classes: int, n_max: int, factor: int, total: int) -> None:
    profile = long_tail_profile(classes, n_max, factor)
    assert sum(profile) == total
    for i, count in enumerate(profile):
        exact = n_max * math.exp(-math.log(factor) * i / (classes - 1))
        assert exact - 1 - 1e-6 <= count <= exact + 1e-6


def test_profile_ends() -> None:
    assert long_tail_profile(5, 100, 1) == [100] * 5
    assert long_tail_profile(10, 2000, 100) == [2000, 1198, 718, 430, 258, 154, 92, 55, 33, 20]
    assert min(long_tail_profile(10, 10, 1000)) == 1
    for wrong in ((1, 10, 10), (10, 0, 10), (10, 10, 0.5)):
        with pytest.raises(DataError, match="at least 2 classes, n_max of at least 1 and an imbalance_factor"):
            long_tail_profile(*wrong)


def test_subsets_are_nested_and_depend_on_the_seed_alone() -> None:
    labels = torch.arange(300) % 3
    small = set(long_tail_indices(labels, [50, 20, 5], 0).tolist())
    large = set(long_tail_indices(labels, [90, 60, 30], 0).tolist())
    assert small < large
    assert torch.bincount(labels[list(small)]).tolist() == [50, 20, 5]
    assert set(long_tail_indices(labels, [50, 20, 5], 0).tolist()) == small
    assert set(long_tail_indices(labels, [50, 20, 5], 1).tolist()) != small
    assert long_tail_indices(labels, [500, 500, 500], 0).tolist() == list(range(300))


def test_class_order() -> None:
    equal = torch.full((10,), 7)
    assert class_order(equal, None) == list(range(10))
    assert sorted(class_order(equal, 0)) == list(range(10))
    assert class_order(equal, 0) == class_order(equal, 0) != class_order(equal, 1)
    assert class_order(torch.tensor([3, 9, 5]), 0) == [1, 2, 0]


def test_groups() -> None:
    counts = torch.tensor([101, 100, 20, 19, 0])
    assert shot_groups(counts) == {"many": [0], "medium": [1, 2], "few": [3, 4]}
    assert shot_groups(counts, many_over=50, few_under=50) == {"many": [0, 1], "medium": [], "few": [2, 3, 4]}
    with pytest.raises(DataError, match=r"few_under of at most many_over \+ 1 = 11, got 50"):
        shot_groups(counts, 10, 50)


def test_a_long_tail_that_the_data_has_not_is_told() -> None:
    asked = long_tail_profile(4, 1000, 100)
    told = unmet(asked, [42, 21, 10, 5], 100)
    assert told is not None
    assert "1000, 215, 46, 10 training images per class (imbalance factor 100)" in told
    assert "got 42, 21, 10, 5 (factor 8.4): 4 of 4 classes have fewer. Lower n_max or imbalance_factor" in told
    assert unmet(asked, [1000, 215, 46, 10], 100) is None
    assert unmet([100, 10], [100, 9], 10) is not None
    many = unmet(long_tail_profile(1000, 500, 100), [400] * 1000, 100)
    assert many is not None
    assert "500, 497, 495, 493, 490, 488, 486, ..., 5, 5 training" in many
    # A profile that would end below one image.
    assert "no class can go below 1" in str(unmet(long_tail_profile(4, 10, 1000), [10] * 4, 1000))


@pytest.mark.parametrize("cut", [{"n_max": 30, "imbalance_factor": 10}, {"n_max": 21}, {"imbalance_factor": 1000}])
def test_a_cut_that_is_not_what_was_asked_warns(fashion: Path, cut: dict[str, float]) -> None:
    with pytest.warns(UserWarning, match=r"Expected .* training images per class .* Lower n_max or imbalance_factor"):
        ready(**cut)


# ---------------------------------------------------------------- the data module


def test_fashion_mnist_cut_to_a_long_tail(fashion: Path) -> None:
    data = ready(n_max=20, imbalance_factor=10, many_over=10, few_under=5, batch_size=16)
    profile = long_tail_profile(10, 20, 10)
    assert sorted(data.counts.tolist(), reverse=True) == profile
    assert data.counts.tolist() != profile  # the class order is permuted
    assert (data.num_classes, data.in_channels, data.image_size) == (10, 1, 28)
    assert data.classes[6] == "Shirt"
    assert sorted(k for group in data.groups.values() for k in group) == list(range(10))
    assert all(data.counts[k] > 10 for k in data.groups["many"])
    loader = data.train_dataloader()
    assert isinstance(loader, TensorLoader)
    images, _ = next(iter(loader))
    assert isinstance(images, Tensor)
    assert images.shape == (16, 1, 28, 28)
    assert len(loader) == sum(profile) // 16
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 30


def test_subset_does_not_depend_on_the_run(fashion: Path) -> None:
    one, same = ready(n_max=9, imbalance_factor=3), ready(n_max=9, imbalance_factor=3, seed=5, batch_size=7)
    assert train_images(one).equal(train_images(same))
    assert not train_images(one).equal(train_images(ready(n_max=9, imbalance_factor=3, subset_seed=1)))
    other = ready(n_max=9, imbalance_factor=3, class_order_seed=1)
    assert other.counts.tolist() != one.counts.tolist()
    first, again = (torch.cat([y for _, y in data.train_dataloader()]) for data in (one, one))
    assert first.equal(again)
    assert not first.equal(torch.cat([y for _, y in ready(n_max=9, imbalance_factor=3, seed=5).train_dataloader()]))


def test_data_as_it_is(fashion: Path) -> None:
    assert ready().counts.tolist() == [20] * 10
    assert ready(n_max=4).counts.tolist() == [4] * 10
    assert ready(imbalance_factor=20).counts.max() == 20


@pytest.mark.parametrize(
    ("name", "classes", "folder"), [("cifar10", 10, "cifar-10-batches-py"), ("cifar100", 100, "cifar-100-python")]
)
def test_cifar_keeps_the_index_order(name: str, classes: int, folder: str, tmp_path: Path, write_cifar: Writer) -> None:
    write_cifar(tmp_path / folder, classes, per_class=20)
    data = ready(name, str(tmp_path), n_max=20, imbalance_factor=10)
    assert data.counts.tolist() == long_tail_profile(classes, 20, 10)
    assert (data.num_classes, data.in_channels, data.image_size) == (classes, 3, 32)
    assert data.mean == (0.4914, 0.4822, 0.4465)
    assert ready(name, tmp_path / folder).counts.tolist() == [20] * classes


def test_folder_cut_to_a_long_tail(tmp_path: Path, write_images: Writer) -> None:
    root = write_images(tmp_path / "pictures", [20, 20, 20])
    data = ready("folder", str(root), imbalance_factor=7, val_fraction=0, test_fraction=0.3)
    assert sorted(data.counts.tolist()) == [2, 5, 14]
    assert sum(len(y) for _, y in data.test_dataloader()) == 18


def test_fewer_images_than_a_batch(fashion: Path) -> None:
    loader = ready(n_max=3, imbalance_factor=3, batch_size=64).train_dataloader()
    assert [len(y) for _, y in loader] == [sum(long_tail_profile(10, 3, 3))]
    with pytest.raises(DataError, match="at least one batch of 64"):
        ready(n_max=3, imbalance_factor=3, batch_size=64, drop_last=True).train_dataloader()


def test_arguments_from_the_command_line(fashion: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LongTailData, "data")
    words = [
        "--data.n_max=8",
        "--data.imbalance_factor=4",
        '--data.augment=["crop=2","flip"]',
        "--data.sampler=square_root",
    ]
    config = parser.parse_args(words)
    data = parser.instantiate(config).data
    data.setup()
    assert data.counts.max() == 8
    assert data.augment == ["crop=2", "flip"]
    assert parser.parse_args(["--data.augment=cifar"]).data.augment == "cifar"
