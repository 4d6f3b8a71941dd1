"""AutoAugment and RandAugment of a whole batch at once, with operations and strengths drawn for each sample.

The policies, the operations and the strengths are torchvision's: the tables are read from its classes. Only the
execution differs, since samples with the same operation are transformed together, whatever their strengths.
Axes: N samples, C channels (1 or 3), H height, W width.
"""

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from .batch_transforms import blend, grey, warp

_MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class AutoAugment:
    """AutoAugment, which applies one of 25 learned pairs of operations to each sample (Cubuk et al., CVPR 2019).

    Args:
        policy: Learned policy.
        fill: Value of the pixels that come into the frame.

    Example:
        >>> augment = AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
        >>> augment(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, policy: v2.AutoAugmentPolicy, fill: int = 0) -> None:
        self.table, self.fill = v2.AutoAugment(policy), fill

    def __call__(self, images: Tensor, stream: torch.Generator) -> Tensor:
        """Augment (N, C, H, W) uint8 images."""
        policies, n = self.table._policies, len(images)
        policy_N = torch.randint(len(policies), (n,), generator=stream).tolist()
        draw = torch.rand(2, 2, n, generator=stream).tolist()
        strengths = {
            (name, level): _strength(self.table, name, level, 10, images)
            for name, _, level in {choice for policy in policies for choice in policy}
        }
        for turn in range(2):
            groups: dict[str, list[tuple[int, float]]] = defaultdict(list)
            for sample, policy in enumerate(policy_N):
                name, probability, level = policies[policy][turn]
                if draw[turn][0][sample] <= probability:
                    strength = strengths[name, level]
                    groups[name].append((sample, -strength if draw[turn][1][sample] <= 0.5 else strength))
            images = _apply_groups(images, groups, self.fill)
        return images


class RandAugment:
    """RandAugment, which draws operations uniformly and applies all at one magnitude (Cubuk et al., NeurIPS 2020).

    Args:
        num_ops: Operations for each sample.
        magnitude: Strength, from 0 to ``bins - 1``.
        bins: Number of strengths.
        fill: Value of the pixels that come into the frame.
    """

    def __init__(self, num_ops: int, magnitude: int, bins: int, fill: int = 0) -> None:
        self.table, self.fill = v2.RandAugment(), fill
        self.num_ops, self.magnitude, self.bins = num_ops, magnitude, bins

    def __call__(self, images: Tensor, stream: torch.Generator) -> Tensor:
        """Augment (N, C, H, W) uint8 images."""
        names, n = list(self.table._AUGMENTATION_SPACE), len(images)
        strengths = [_strength(self.table, name, self.magnitude, self.bins, images) for name in names]
        for _ in range(self.num_ops):
            operation_N = torch.randint(len(names), (n,), generator=stream).tolist()
            negative_N = (torch.rand(n, generator=stream) <= 0.5).tolist()
            groups: dict[str, list[tuple[int, float]]] = defaultdict(list)
            for sample, (operation, negative) in enumerate(zip(operation_N, negative_N, strict=True)):
                strength = -strengths[operation] if negative else strengths[operation]
                groups[names[operation]].append((sample, strength))
            images = _apply_groups(images, groups, self.fill)
        return images


def _strength(table: Any, name: str, level: int | None, bins: int, images: Tensor) -> float:
    """Look up the strength of an operation in torchvision's table."""
    levels, _ = table._AUGMENTATION_SPACE[name]
    values = levels(bins, images.shape[-2], images.shape[-1])
    return 0.0 if values is None or level is None else float(values[level])


def _apply_groups(images: Tensor, groups: dict[str, list[tuple[int, float]]], fill: int) -> Tensor:
    images = images.clone()
    for name, members in groups.items():
        index = torch.tensor([sample for sample, _ in members])
        images[index] = operation(name, images[index], torch.tensor([strength for _, strength in members]), fill)
    return images


def operation(name: str, images: Tensor, strength_N: Tensor, fill: int = 0) -> Tensor:
    """Apply one operation of AutoAugment, with a strength for each sample.

    Args:
        name: Name of the operation in torchvision's tables.
        images: Pixels, uint8, shape (N, C, H, W).
        strength_N: Strength in torchvision's units, with a sign, which is ignored where it means nothing.
        fill: Value of the pixels that come into the frame.
    """
    if name in _MOVES:
        return warp(images, _move(name, strength_N, images.shape[-2], images.shape[-1]), nearest=True, fill=fill)
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return blend(images, _base(name, images), 1 + strength_N).to(torch.uint8)
    if name == "Posterize":
        mask_N = 256 - 2 ** (8 - strength_N.abs().int())
        return images & mask_N.to(torch.uint8).view(-1, 1, 1, 1)
    if name == "Solarize":
        return torch.where(images >= 255 * strength_N.abs().view(-1, 1, 1, 1), 255 - images, images)
    whole = {"AutoContrast": TF.autocontrast, "Equalize": TF.equalize, "Invert": TF.invert, "Identity": _identity}
    changed: Tensor = whole[name](images)
    return changed


def _identity(images: Tensor) -> Tensor:
    return images


def _base(name: str, images: Tensor) -> Tensor | float:
    """Return the images that an operation blends towards: black, grey, of one grey, or smoothed."""
    if name == "Brightness":
        return 0.0
    if name == "Color":
        return grey(images)
    if name == "Contrast":
        return grey(images).floor().mean((1, 2, 3), keepdim=True)
    smooth = images.float()
    if min(images.shape[-2:]) > 2:  # the outermost pixels stay sharp
        inner = smooth[:, :, 1:-1, 1:-1]  # a 3x3 kernel of ones with 5 in the middle
        smooth[:, :, 1:-1, 1:-1] = ((9 * F.avg_pool2d(smooth, 3, 1) + 4 * inner) / 13).round_()
    return smooth


def _move(name: str, strength_N: Tensor, height: int, width: int) -> Tensor:
    """Return the matrices (N, 2, 3) from output to input positions in [-1, 1].

    Shears leave the top left corner in place, rotations the centre; translations are cut to whole pixels.
    """
    theta = torch.eye(2, 3).repeat(len(strength_N), 1, 1)
    if name == "ShearX":
        theta[:, 0, 1] = theta[:, 0, 2] = strength_N * height / width
    elif name == "ShearY":
        theta[:, 1, 0] = theta[:, 1, 2] = strength_N * width / height
    elif name == "TranslateX":
        theta[:, 0, 2] = -strength_N.trunc() * 2 / width
    elif name == "TranslateY":
        theta[:, 1, 2] = -strength_N.trunc() * 2 / height
    else:
        angle_N = strength_N * torch.pi / 180
        theta[:, 0, 0] = theta[:, 1, 1] = angle_N.cos()
        theta[:, 0, 1] = -angle_N.sin() * height / width
        theta[:, 1, 0] = angle_N.sin() * width / height
    return theta
