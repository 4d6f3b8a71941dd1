"""Images with class labels: read from every source, checked, sized, normalised, and served as batches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from batchformer.data.errors import DataError, DataNotFoundError
from batchformer.data.loader import ImageLoader, TensorLoader
from batchformer.tasks.image_classification.data import ImageData

Writer = Callable[..., Path]


pytestmark = pytest.mark.usefixtures("data_root")


def ready(*args: object, **arguments: object) -> ImageData:
    data = ImageData(*args, **arguments)  # type: ignore[arg-type]
    data.setup()
    return data


def train_images(data: ImageData) -> Tensor:
    assert data._parts is not None
    images = data._parts["train"].images
    assert images is not None
    return images


# ---------------------------------------------------------------- sources


def test_fashion_mnist_absent() -> None:
    with pytest.raises(DataNotFoundError, match="batchformer data get fashion-mnist"):
        ready()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet-lt", "places-lt", "inat18"])
def test_absent_data_is_never_downloaded(name: str, tmp_path: Path) -> None:
    data = ImageData(name, str(tmp_path))  # type: ignore[arg-type]
    data.prepare_data()
    with pytest.raises(DataNotFoundError, match=r"Could not find .*Looked in:") as caught:
        data.setup()
    assert str(tmp_path) in str(caught.value)
    assert "--data.root" in str(caught.value)


def write_lists(root: Path, write_images: Writer, names: dict[str, str], counts: list[int]) -> None:
    write_images(root / "pictures", [count + 1 for count in counts])  # the last of each class is not trained on
    for split, name in names.items():
        lines = [
            f"pictures/{image.parent.name}/{image.name} {k}"
            for k in range(len(counts))
            for image in sorted((root / "pictures" / f"class {k}").iterdir())[
                slice(-1) if split == "train" else slice(-1, None)
            ]
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
    data = ready(dataset, str(tmp_path), batch_size=4, image_size=24, memory_gib=0, num_workers=0)
    assert data.counts.tolist() == [9, 5, 2]
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


def test_any_folder(tmp_path: Path, write_images: Writer) -> None:
    data = ready("folder", str(write_images(tmp_path / "pictures", [40, 20, 5])), batch_size=8)
    assert data.counts.tolist() == [28, 14, 3]
    assert data.classes == ["class 0", "class 1", "class 2"]
    assert (data.in_channels, data.image_size) == (3, 28)
    assert isinstance(data.train_dataloader(), TensorLoader)
    assert sum(len(y) for _, y in data.test_dataloader()) == 8 + 4 + 1
    assert sum(len(y) for _, y in data.val_dataloader()) == 4 + 2 + 1


# ---------------------------------------------------------------- size, statistics, memory and files


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
    with pytest.raises(DataNotFoundError, match="Could not find 2 of 14 listed images"):
        ready("imagenet-lt", str(tmp_path))
    train.write_text("\n".join(good))
    (tmp_path / names["val"]).write_text(good[0][:-1] + "3\n" + good[1][:-1] + "-7\n")
    with pytest.raises(DataError, match=r"labels from 0 to 2 \(3 classes\), got 2 out of range"):
        ready("imagenet-lt", str(tmp_path))


def test_image_size_can_be_chosen(fashion: Path) -> None:
    images, _ = next(iter(ready(image_size=32).test_dataloader()))
    assert isinstance(images, Tensor)
    assert images.shape[1:] == (1, 32, 32)


# ---------------------------------------------------------------- batches and trainers


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

    def data() -> ImageData:
        return ImageData(epochs=3, **arguments)  # type: ignore[arg-type]

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
    data = ImageData(sampler="progressive")
    data.setup()
    with pytest.raises(DataError, match="number of epochs for the progressive sampler"):
        data.train_dataloader()
    data.trainer = trainer(tmp_path, max_epochs=7, enable_checkpointing=False)
    sampler = data.train_dataloader().sampler
    assert getattr(sampler, "epochs", None) == 7
