"""The known data sets: what they are, under which terms, how they are got, and which files are expected where."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dataset:
    """One row of the table of known data sets.

    Attributes:
        title: The name people know.
        content: What it is, in one line.
        size: The download, in words.
        licence: The terms, in words.
        home: The data set's own home page.
        how: What to do to get it.
        files: The files (or folders) that must be there, relative to one of ``layouts``.
        layouts: Sub-folders of the data root in which the files may lie.
        system: Absolute folders in which a system installation puts the files.
        sha256: Checksum of the unpacked content, for every file that is fetched.
    """

    title: str
    content: str
    size: str
    licence: str
    home: str
    how: str
    files: tuple[str, ...]
    layouts: tuple[str, ...]
    system: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def fetchable(self) -> bool:
        """Whether :func:`get` can fetch it; the others are only read from a local copy."""
        return bool(self.sha256)


_FASHION = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

DATASETS: dict[str, Dataset] = {
    "fashion-mnist": Dataset(
        title="Fashion-MNIST",
        content="70,000 grey images of 28x28 pixels in 10 classes of clothing",
        size="31 MB",
        licence="MIT",
        home="https://github.com/zalandoresearch/fashion-mnist",
        how="Run `batchformer data get fashion-mnist`, or copy the four .gz files there by hand.",
        files=tuple(_FASHION),
        layouts=("", "fashion-mnist", "FashionMNIST/raw"),
        system=("/usr/share/datasets/fashion-mnist",),
        sha256=_FASHION,
    ),
    "cifar10": Dataset(
        title="CIFAR-10",
        content="60,000 colour images of 32x32 pixels in 10 classes",
        size="163 MB",
        licence="none stated; cite the technical report",
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        how="Download the 'python version' from the home page and unpack it below the data root.",
        files=(*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"),
        layouts=("", "cifar-10-batches-py", "cifar10", "cifar10/cifar-10-batches-py"),
    ),
    "cifar100": Dataset(
        title="CIFAR-100",
        content="60,000 colour images of 32x32 pixels in 100 classes",
        size="161 MB",
        licence="none stated; cite the technical report",
        home="https://www.cs.toronto.edu/~kriz/cifar.html",
        how="Download the 'python version' from the home page and unpack it below the data root.",
        files=("train", "test", "meta"),
        layouts=("", "cifar-100-python", "cifar100", "cifar100/cifar-100-python"),
    ),
    "imagenet-lt": Dataset(
        title="ImageNet-LT",
        content="115,846 training photographs in 1,000 classes, 5 to 1,280 each",
        size="146 GB (ImageNet-1k)",
        licence="ImageNet terms of access: non-commercial research",
        home="https://www.image-net.org (images), https://liuziwei7.github.io/projects/LongTail.html (lists)",
        how="Put the three list files beside ImageNet-1k's train/ and val/ folders.",
        files=("ImageNet_LT_train.txt", "ImageNet_LT_val.txt", "ImageNet_LT_test.txt"),
        layouts=("", "imagenet-lt", "ImageNet_LT"),
    ),
    "places-lt": Dataset(
        title="Places-LT",
        content="62,500 training photographs in 365 classes, 5 to 4,980 each",
        size="24 GB (Places365, small images)",
        licence="Places365 terms: non-commercial research",
        home="http://places2.csail.mit.edu (images), https://liuziwei7.github.io/projects/LongTail.html (lists)",
        how="Put the three list files beside the image folders that their lines name.",
        files=("Places_LT_train.txt", "Places_LT_val.txt", "Places_LT_test.txt"),
        layouts=("", "places-lt", "Places_LT"),
    ),
    "inat18": Dataset(
        title="iNaturalist 2018",
        content="437,513 training photographs in 8,142 species, 2 to 1,000 each",
        size="120 GB",
        licence="iNaturalist competition terms: non-commercial research",
        home="https://github.com/visipedia/inat_comp/tree/master/2018",
        how="Put the two list files beside the train_val2018/ folder.",
        files=("iNaturalist18_train.txt", "iNaturalist18_val.txt"),
        layouts=("", "inat18", "iNaturalist18"),
    ),
}
"""Known data sets by the name used in recipes and on the command line."""
