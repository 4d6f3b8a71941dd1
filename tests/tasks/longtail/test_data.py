import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from batchformer.data.errors import DataError, DataNotFoundError
from batchformer.data.loader import ImageLoader, TensorLoader
from batchformer.tasks.longtail.data import LongTailData
from batchformer.tasks.longtail.imbalance import (
    class_order,
    long_tail_indices,
    long_tail_profile,
    shot_groups,
    stratified_split,
    unmet,
)

Writer = Callable[..., Path]


@pytest.fixture(autouse=True)
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data root"))
    return tmp_path / "data root"


@pytest.fixture
def fashion(data_root: Path, write_fashion: Writer) -> Path:
    return write_fashion(data_root / "fashion-mnist")


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


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 55, 100])
@pytest.mark.parametrize("fractions", [(0.1, 0.2), (0.0, 0.2), (0.3, 0.0), (0.45, 0.5)])
def test_split_policy(n: int, fractions: tuple[float, float]) -> None:
    labels = torch.cat([torch.zeros(n), torch.ones(40)]).long()[torch.randperm(n + 40)]
    parts = stratified_split(labels, *fractions, seed=3)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(n + 40))
    sizes = {name: int((labels[indices] == 0).sum()) for name, indices in parts.items()}
    assert sizes["train"] >= 1
    assert (sizes["test"] >= 1) == (n >= 2 and fractions[1] > 0)
    assert (sizes["val"] >= 1) == (n >= (3 if fractions[1] else 2) and fractions[0] > 0)
    if n >= 10:
        assert abs(sizes["test"] - n * fractions[1]) <= 0.5
        assert abs(sizes["val"] - n * fractions[0]) <= 0.5
    again = stratified_split(labels, *fractions, seed=3)
    assert all(parts[name].equal(again[name]) for name in parts)


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.5, 0.5)])
def test_split_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="non-negative val_fraction and test_fraction with a sum below 1"):
        stratified_split(torch.zeros(5).long(), *fractions, seed=0)


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


# ---------------------------------------------------------------- known data sets


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


def test_fashion_mnist_absent() -> None:
    with pytest.raises(DataNotFoundError, match="batchformer data get fashion-mnist"):
        ready()


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


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet-lt", "places-lt", "inat18"])
def test_absent_data_is_never_downloaded(name: str, tmp_path: Path) -> None:
    data = LongTailData(name, str(tmp_path))  # type: ignore[arg-type]
    data.prepare_data()
    with pytest.raises(DataNotFoundError, match=r"Could not find .*Looked in:") as caught:
        data.setup()
    assert str(tmp_path) in str(caught.value)
    assert "--data.root" in str(caught.value)


def write_lists(root: Path, write_images: Writer, names: dict[str, str], counts: list[int]) -> None:
    write_images(root / "pictures", counts)
    for split, name in names.items():
        lines = [
            f"pictures/{image.parent.name}/{image.name} {k}"
            for k in range(len(counts))
            for image in sorted((root / "pictures" / f"class {k}").iterdir())[: None if split == "train" else 1]
        ]
        (root / name).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        ("imagenet-lt", {s: f"ImageNet_LT_{s}.txt" for s in ("train", "val", "test")}),
        ("places-lt", {s: f"Places_LT_{s}.txt" for s in ("train", "val", "test")}),
        ("inat18", {s: f"iNaturalist18_{s}.txt" for s in ("train", "val")}),
    ],
)
def test_published_lists(dataset: str, names: dict[str, str], tmp_path: Path, write_images: Writer) -> None:
    write_lists(tmp_path, write_images, names, [9, 5, 2])
    data = ready(
        dataset, str(tmp_path), few_under=3, many_over=6, batch_size=4, image_size=24, memory_gib=0, num_workers=0
    )
    assert data.counts.tolist() == [9, 5, 2]
    assert data.groups == {"many": [0], "medium": [1], "few": [2]}
    loader = data.train_dataloader()
    assert isinstance(loader, ImageLoader)
    images, _ = next(iter(loader))
    assert isinstance(images, Tensor)
    assert images.shape == (4, 3, 24, 24)
    assert sum(len(y) for _, y in data.val_dataloader()) == sum(len(y) for _, y in data.test_dataloader()) == 3


def test_own_lists(tmp_path: Path, write_images: Writer) -> None:
    write_lists(tmp_path, write_images, {"train": "a.txt", "test": "b.txt"}, [9, 5, 2])
    given = ready("folder", str(tmp_path), train_list=str(tmp_path / "a.txt"), test_list=str(tmp_path / "b.txt"))
    assert given.counts.tolist() == [9, 5, 2]
    assert sum(len(y) for _, y in given.val_dataloader()) == 3
    split = ready("folder", train_list=str(tmp_path / "a.txt"))
    assert split.counts.tolist() == [6, 3, 1]


# ---------------------------------------------------------------- any folder


def test_any_folder(tmp_path: Path, write_images: Writer) -> None:
    data = ready("folder", str(write_images(tmp_path / "pictures", [40, 20, 5])), batch_size=8)
    assert data.counts.tolist() == [28, 14, 3]
    assert data.classes == ["class 0", "class 1", "class 2"]
    assert (data.in_channels, data.image_size) == (3, 28)
    assert isinstance(data.train_dataloader(), TensorLoader)
    assert sum(len(y) for _, y in data.test_dataloader()) == 8 + 4 + 1
    assert sum(len(y) for _, y in data.val_dataloader()) == 4 + 2 + 1


def test_folder_cut_to_a_long_tail(tmp_path: Path, write_images: Writer) -> None:
    root = write_images(tmp_path / "pictures", [20, 20, 20])
    data = ready("folder", str(root), imbalance_factor=7, val_fraction=0, test_fraction=0.3)
    assert sorted(data.counts.tolist()) == [2, 5, 14]
    assert sum(len(y) for _, y in data.test_dataloader()) == 18


@pytest.mark.parametrize(("side", "size"), [(20, 28), (33, 32), (60, 64), (100, 224)])
def test_working_size(side: int, size: int, tmp_path: Path, write_images: Writer) -> None:
    data = ready("folder", str(write_images(tmp_path / "pictures", [4, 4], side=side, grey=True)))
    assert (data.image_size, data.in_channels) == (size, 1)
    images = train_images(data).float() / 255
    torch.testing.assert_close(torch.tensor(data.mean), images.mean()[None])
    torch.testing.assert_close(torch.tensor(data.std), images.std()[None])


def test_normalization_choices(tmp_path: Path, write_images: Writer) -> None:
    root = str(write_images(tmp_path / "pictures", [6, 6]))
    assert ready("folder", root).mean == (0.485, 0.456, 0.406)
    own = ready("folder", root, normalize="training").mean
    assert own != (0.485, 0.456, 0.406)
    assert ready("folder", root, normalize="training", memory_gib=0).mean == own


def test_files_and_memory_split_alike(tmp_path: Path, write_images: Writer) -> None:
    root = str(write_images(tmp_path / "pictures", [9, 6]))
    memory, files = (
        ready("folder", root, batch_size=4),
        ready("folder", root, batch_size=4, memory_gib=0, num_workers=0),
    )
    assert isinstance(files.train_dataloader(), ImageLoader)
    for loaders in (
        (memory.train_dataloader(), files.train_dataloader()),
        (memory.test_dataloader(), files.test_dataloader()),
    ):
        a, b = (torch.cat([y for _, y in loader]) for loader in loaders)
        assert a.equal(b)


@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("augment", ["none", "auto"])
def test_files_and_memory_are_evaluated_alike(size: int, augment: str, tmp_path: Path, write_images: Writer) -> None:
    root = str(write_images(tmp_path / "pictures", [6, 4], side=120))
    place = {"image_size": size, "augment": augment, "val_fraction": 0.2}
    memory = ready("folder", root, **place)
    files = ready("folder", root, memory_gib=0, num_workers=0, **place)
    loaders = ["val_dataloader", "test_dataloader", *(["train_dataloader"] if augment == "none" else [])]
    for name in loaders:
        (a, _), (b, _) = next(iter(getattr(memory, name)())), next(iter(getattr(files, name)()))
        assert a.equal(b), name


def test_a_class_without_test_image_warns(tmp_path: Path, write_images: Writer) -> None:
    with pytest.warns(UserWarning, match="1 of 2 classes have no test image"):
        ready("folder", str(write_images(tmp_path / "pictures", [9, 1])))


def test_errors_come_before_the_first_step(tmp_path: Path, write_images: Writer) -> None:
    with pytest.raises(DataNotFoundError, match=r"--data.root PATH"):
        ready("folder")
    root = write_images(tmp_path / "pictures", [5, 5])
    names = sorted(path for path in root.rglob("*.jpg"))
    for path in names[:2]:
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="Expected images that can be decoded") as caught:
        ready("folder", str(root), val_fraction=0, test_fraction=0.01)
    assert all(path.name in str(caught.value) for path in names[:2])
    with pytest.raises(DataError, match="Raise val_fraction or test_fraction"):
        ready("folder", str(root), val_fraction=0, test_fraction=0)


def test_list_errors(tmp_path: Path, write_images: Writer) -> None:
    names = {s: f"ImageNet_LT_{s}.txt" for s in ("train", "val", "test")}
    write_lists(tmp_path, write_images, names, [3, 3, 3])
    train = tmp_path / names["train"]
    good = train.read_text().splitlines()
    train.write_text("\n".join(line for line in good if not line.endswith(" 1")))
    with pytest.raises(DataError, match=r"1 of 3 classes have none:\n  1 \(1\)"):
        ready("imagenet-lt", str(tmp_path))
    train.write_text("\n".join([*good, "pictures/gone.jpg 0", "pictures/lost.jpg 1"]))
    with pytest.raises(DataNotFoundError, match="Could not find 2 of 11 listed images"):
        ready("imagenet-lt", str(tmp_path))
    train.write_text("\n".join(good))
    (tmp_path / names["val"]).write_text(good[0][:-1] + "3\n" + good[1][:-1] + "-7\n")
    with pytest.raises(DataError, match=r"labels from 0 to 2 \(3 classes\), got 2 out of range"):
        ready("imagenet-lt", str(tmp_path))


# ---------------------------------------------------------------- options and trainers


@pytest.mark.parametrize("files", [False, True])
def test_two_views_and_mixing(files: bool, tmp_path: Path, write_images: Writer) -> None:
    place = {"dataset": "folder", "root": write_images(tmp_path / "pictures", [9, 6]), "batch_size": 4}
    place |= {"memory_gib": 0.0, "num_workers": 0} if files else {}
    views, labels = next(iter(ready(**place, two_views=True).train_dataloader()))
    assert isinstance(views, list)
    assert [tuple(view.shape) for view in views] == [(4, 3, 28, 28)] * 2
    assert not views[0].equal(views[1])
    assert labels.shape == (4,)
    _, soft = next(iter(ready(**place, mixup_alpha=0.2, cutmix_alpha=1.0).train_dataloader()))
    assert soft.shape == (4, 2)
    with pytest.raises(DataError, match="one view with mixup or cutmix, got two"):
        ready(**place, two_views=True, mixup_alpha=0.2).train_dataloader()


def test_fewer_images_than_a_batch(fashion: Path) -> None:
    loader = ready(n_max=3, imbalance_factor=3, batch_size=64).train_dataloader()
    assert [len(y) for _, y in loader] == [sum(long_tail_profile(10, 3, 3))]
    with pytest.raises(DataError, match="at least one batch of 64"):
        ready(n_max=3, imbalance_factor=3, batch_size=64, drop_last=True).train_dataloader()


def test_image_size_can_be_chosen(fashion: Path) -> None:
    images, _ = next(iter(ready(image_size=32).test_dataloader()))
    assert isinstance(images, Tensor)
    assert images.shape[1:] == (1, 32, 32)


class Killed(Exception):
    """Stands for the end of the process."""


class Recorder(LightningModule):
    """Trains one weight and remembers the labels of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int]]] = []
        self.last, self.path = -1, Path()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if self.global_step == self.last:
            raise Killed
        self.seen.append((self.current_epoch, batch[1].tolist()))
        return (self.weight * batch[0].mean()).sum()

    def on_train_batch_end(self, *_: object) -> None:
        if self.global_step == self.last:
            self.trainer.save_checkpoint(self.path)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **arguments: object) -> Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(default_root_dir=folder, log_every_n_steps=1, num_sanity_val_steps=0, **quiet, **arguments)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # inside Lightning
@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_lightning_resumes_with_the_same_batches(files: bool, steps: int, tmp_path: Path, write_images: Writer) -> None:
    root = write_images(tmp_path / "pictures", [12, 8])
    arguments = {"dataset": "folder", "root": root, "batch_size": 4, "sampler": "progressive"}
    arguments |= {"memory_gib": 0.0, "num_workers": 0} if files else {}

    def data() -> LongTailData:
        return LongTailData(epochs=3, **arguments)  # type: ignore[arg-type]

    whole = Recorder()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(whole, data())
    assert len(whole.seen) == 9
    assert len({str(labels) for _, labels in whole.seen}) > 3
    killed = Recorder()
    killed.last = steps
    killed.path = tmp_path / "stopped.ckpt"
    with pytest.raises(Killed):
        trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(killed, data())
    resumed = Recorder()
    trainer(tmp_path, max_epochs=3, enable_checkpointing=False).fit(
        resumed, data(), ckpt_path=tmp_path / "stopped.ckpt"
    )
    assert killed.seen + resumed.seen == whole.seen


def test_progressive_sampling_asks_the_trainer_for_the_epochs(fashion: Path, tmp_path: Path) -> None:
    data = LongTailData(sampler="progressive")
    data.setup()
    with pytest.raises(DataError, match="number of epochs for the progressive sampler"):
        data.train_dataloader()
    data.trainer = trainer(tmp_path, max_epochs=7, enable_checkpointing=False)
    sampler = data.train_dataloader().sampler
    assert getattr(sampler, "epochs", None) == 7


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
