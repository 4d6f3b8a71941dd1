"""Table of the known data sets: content, terms, ways to get them, expected files."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dataset:
    """One row of the table of known data sets.

    Attributes:
        title: Usual name.
        content: Content in one line.
        size: Size of the download, in words.
        licence: Terms, in words.
        home: Home page of the data set.
        how: Sentence for the user on how to get it.
        files: Files or folders that must be there, relative to one of ``layouts``.
        layouts: Sub-folders of the data root in which the files may lie.
        system: Absolute folders in which a system installation puts the files.
        sha256: Checksum of the unpacked content of every file that is fetched.
        tree_sha256: Checksum of the names and contents of a fetched folder with many files.
        made_from: Data set that this one is made from on this machine instead of being fetched.
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
    tree_sha256: str = ""
    made_from: str = ""

    @property
    def fetchable(self) -> bool:
        """True if :func:`batchformer.data.fetch.get` can fetch or make it; others are read from a local copy."""
        return bool(self.sha256 or self.tree_sha256 or self.made_from)


_FASHION = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

_LITE0 = "efficientnet-lite0-57934424.pth"

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
    "scenes": Dataset(
        title="batchformer scenes",
        content="4,000 scenes of 160x160 pixels with boxes and masks: photographs of 8 classes of things on 4 of stuff",
        size="184 MB of photographs (fetched once), 72 MB of scenes",
        licence="pictures in the public domain, CC-BY, CC-BY-SA or GPL; ATTRIBUTION.txt beside them lists them",
        home="https://tuxpaint.org/stamps/",
        how="Run `batchformer data get scenes`, which writes them, or `batchformer scenes OUT` for others.",
        files=("scenes.json", "annotations/instances_train.json", "annotations/panoptic_train.json", "train", "unseen"),
        layouts=("", "scenes"),
        made_from="scene-photographs",
    ),
    "scene-photographs": Dataset(
        title="Photographs to make scenes of",
        content="Tux Paint's stamps (cut-out photographs) and sample pictures of scikit-image and scikit-learn",
        size="184 MB",
        licence="pictures in the public domain, CC-BY, CC-BY-SA or GPL (stamps), BSD-3 and CC0 (sample pictures)",
        home="https://tuxpaint.org/stamps/",
        how="Run `batchformer data get scene-photographs`.",
        files=("stamps", "photographs"),
        layouts=("scene-photographs",),
        tree_sha256="cae74a7c4da8b57ab065f1c5e5a0dfa019f659586dcbf354c60a64d983ad2991",
    ),
    "efficientnet-lite0": Dataset(
        title="EfficientNet-Lite0, ImageNet weights",
        content="weights of a backbone of 4.7 million parameters, trained on ImageNet-1k",
        size="17 MB",
        licence="Apache-2.0",
        home="https://github.com/RangiLyu/EfficientNet-Lite",
        how="Run `batchformer data get efficientnet-lite0`, or copy the .pth file there by hand.",
        files=(_LITE0,),
        layouts=("", "efficientnet-lite0"),
        sha256={_LITE0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"},
    ),
    "coco": Dataset(
        title="COCO 2017",
        content="123,287 photographs with boxes of 80 classes of things, and panoptic maps with 53 classes of stuff",
        size="19 GB of photographs, 0.3 GB of boxes, 0.8 GB of panoptic maps",
        licence="annotations CC-BY-4.0; photographs under their Flickr licences",
        home="https://cocodataset.org/#download",
        how="Unpack train2017/, val2017/ and annotations/ (panoptic: also the PNG archives inside it) into one folder.",
        files=("annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017", "val2017"),
        layouts=("", "coco", "COCO"),
    ),
}
"""Known data sets by the name used in recipes and on the command line."""
