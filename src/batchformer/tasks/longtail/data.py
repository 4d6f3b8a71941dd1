"""Long-tailed data: images with class labels, cut to a long tail if asked for, and classes in groups by their counts.

Axes: M images, K classes.
"""

import warnings
from pathlib import Path
from typing import Any, Literal

import torch

from batchformer.tasks.image_classification.data import ImageData
from batchformer.tasks.image_classification.sources import DatasetName, Part

from .imbalance import class_order, long_tail_indices, long_tail_profile, shot_groups, unmet


class LongTailData(ImageData):
    """Long-tailed training data with its validation and test data.

    After ``setup()`` there is ``groups`` ("many" / "medium" / "few": class indices) beside the facts of
    :class:`~batchformer.tasks.image_classification.data.ImageData`.

    Args:
        dataset: Name of a data set; ``"folder"`` is any folder with one sub-folder for each class, or your own lists.
        root: Folder of the data; ``None`` means the data root (``BATCHFORMER_DATA``, else ``~/.cache/batchformer``).
        n_max: Training images of the most frequent class; ``None`` means as many as there are.
        imbalance_factor: Ratio of the most to the least frequent class after the cut, at least 1; ``None`` leaves the
            data as it is. A warning names the counts when the classes have too few images for it.
        class_order: Order in which classes become rare: by class index, or permuted. ``"auto"``: by index for CIFAR (as
            published), else permuted.
        class_order_seed: Seed of that permutation.
        many_over: Training images above which a class counts as "many".
        few_under: Training images below which a class counts as "few".
        **images: Settings of :class:`~batchformer.tasks.image_classification.data.ImageData`; its ``subset_seed`` also
            chooses the images that the cut keeps.

    Raises:
        DataError: From ``setup()``, when the data cannot be used; all problems of one kind in one message.
        DataNotFoundError: From ``setup()``, when the data is not there; names where it looked and the way out.
    """

    groups: dict[str, list[int]]

    def __init__(
        self,
        dataset: DatasetName = "fashion-mnist",
        root: str | Path | None = None,
        *,
        n_max: int | None = None,
        imbalance_factor: float | None = None,
        class_order: Literal["auto", "index", "permuted"] = "auto",
        class_order_seed: int = 0,
        many_over: int = 100,
        few_under: int = 20,
        **images: Any,
    ) -> None:
        super().__init__(dataset, root, **images)
        self.n_max, self.imbalance_factor = n_max, imbalance_factor
        self.class_order, self.class_order_seed = class_order, class_order_seed
        self.many_over, self.few_under = many_over, few_under

    def setup(self, stage: str | None = None) -> None:
        """Read, cut, check, count and group. A second call does nothing."""
        super().setup(stage)
        self.groups = shot_groups(self.counts, self.many_over, self.few_under)

    def notes(self) -> list[str]:
        """Return the sentence that says which classes count as many, medium and few, and those on the images."""
        return [
            *super().notes(),
            f"Many: classes with more than {self.many_over} training images; few: with fewer than {self.few_under}; "
            "medium: the others. Each group's value is the mean over its classes.",
        ]

    def choose(self, train: Part, num_classes: int) -> Part:
        """Return the training images cut to the long tail that was asked for."""
        if self.n_max is None and self.imbalance_factor is None:
            return train
        available = torch.bincount(train.labels, minlength=num_classes)
        by_index = self.class_order == "index" or (
            self.class_order == "auto" and self.dataset in ("cifar10", "cifar100")
        )
        order = class_order(available, None if by_index else self.class_order_seed)
        n_max = int(available.max()) if self.n_max is None else self.n_max
        factor = 1.0 if self.imbalance_factor is None else self.imbalance_factor
        profile = long_tail_profile(num_classes, n_max, factor)
        if words := unmet(profile, available[order].tolist(), factor):
            warnings.warn(words, stacklevel=2)
        counts = [0] * num_classes
        for k, count in zip(order, profile, strict=True):
            counts[k] = count
        return train.subset(long_tail_indices(train.labels, counts, self.subset_seed))
