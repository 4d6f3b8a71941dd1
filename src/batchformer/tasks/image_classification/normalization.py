"""Mean and standard deviation of each channel, by which images are normalised before a network sees them."""

from typing import Literal

from torch import Tensor

Normalize = Literal["auto", "imagenet", "training"]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of each channel, of pixels in 0..1."""

IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_PUBLISHED: dict[str, Statistics] = {
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "inat18": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}


def known_statistics(dataset: str, normalize: Normalize, in_channels: int) -> Statistics | None:
    """Look up the statistics of a data set.

    Args:
        dataset: Name of the data set.
        normalize: ``"auto"``: the published figures of the data set, else ImageNet's for colour. ``"imagenet"``:
            ImageNet's, for grey their mean. ``"training"``: none, they are to be measured.
        in_channels: 3 for colour, 1 for grey.

    Returns:
        Mean and standard deviation, ``None`` where they are to be measured on the training images.

    Example:
        >>> known_statistics("fashion-mnist", "auto", 1)
        ((0.286,), (0.353,))
        >>> known_statistics("folder", "auto", 1)
    """
    if normalize == "auto" and dataset in _PUBLISHED:
        return _PUBLISHED[dataset]
    if normalize == "imagenet" or (normalize == "auto" and in_channels == 3):
        mean, std = IMAGENET
        return (mean, std) if in_channels == 3 else ((sum(mean) / 3,), (sum(std) / 3,))
    return None


def measured_statistics(pixels: Tensor) -> Statistics:
    """Measure the statistics on at most 20,000 evenly chosen images.

    Args:
        pixels: Images, uint8, (M, C, H, W).

    Returns:
        Mean and standard deviation of each channel, of pixels in 0..1; the deviation is at least 0.001.

    Example:
        >>> import torch
        >>> measured_statistics(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8))[1]
        (0.0010000000474974513,)
    """
    sample = pixels[:: -(-len(pixels) // 20000)].float() / 255
    std_C = sample.std((0, 2, 3)).clamp(min=1e-3)
    return tuple(sample.mean((0, 2, 3)).tolist()), tuple(std_C.tolist())
