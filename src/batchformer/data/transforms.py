"""Augmentation by name, and the mixing of samples.

A recipe holds a list of steps such as ``["crop=4", "flip", "autoaugment", "cutout=16"]``: a name, then numbers after
``=``. :class:`BatchAugment` makes one function of a batch of uint8 images of it, for images in memory and for image
files alike.

| step | numbers (defaults) | effect |
|---|---|---|
| crop | padding (4) | pads with black and cuts a random window |
| resized_crop | smallest share of the area (0.08) | cuts a window of random area and aspect ratio, and resizes it |
| flip | probability (0.5) | mirrors left and right |
| rotate | degrees (15) | turns by a random angle up to this |
| color_jitter | brightness, contrast, saturation, hue, probability (0.4, 0.4, 0.4, 0, 1) | changes colours randomly |
| grayscale | probability (0.2) | takes the colour away |
| blur | probability (0.5) | Gaussian blur, sigma 0.1 to 2 pixels |
| autoaugment | - | learned policy: CIFAR-10's up to 64 pixels, ImageNet's above |
| randaugment | operations, magnitude 0..10 (2, 9) | random operations; 10 is the strongest |
| cutout | size (16) | blacks out a square |
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from . import batch_policies
from . import batch_transforms as batched
from .errors import DataError
from .samplers import derive_seed

PRESETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "crop_flip": ("crop=4", "flip"),
    "cifar": ("crop=4", "flip", "autoaugment", "cutout=16"),
    "cifar_rotate": ("crop=4", "flip", "rotate=15"),
    "imagenet": ("resized_crop=0.08", "flip", "color_jitter=0.4,0.4,0.4,0"),
    "inat": ("resized_crop=0.08", "flip"),
    "paco_query": ("resized_crop=0.08", "flip", "color_jitter=0.4,0.4,0.4,0", "randaugment=2,10"),
    "paco_key": ("resized_crop=0.08", "flip", "color_jitter=0.4,0.4,0.4,0.1,0.8", "grayscale=0.2", "blur=0.5"),
    "paco_query_small": ("crop=4", "flip", "autoaugment", "cutout=16"),
    "paco_key_small": ("resized_crop=0.2", "flip", "color_jitter=0.4,0.4,0.4,0.1,0.8", "grayscale=0.2"),
}
"""Step lists by name: Balanced Softmax on CIFAR and ImageNet-LT, RIDE on CIFAR, iNaturalist, and PaCo's two views."""

SMALL = 64
"""Up to this working size images count as small: AutoAugment's CIFAR-10 policy, crops by padding."""

_MOST_NUMBERS = {
    "crop": 1,
    "resized_crop": 1,
    "flip": 1,
    "rotate": 1,
    "color_jitter": 5,
    "grayscale": 1,
    "blur": 1,
    "autoaugment": 0,
    "randaugment": 2,
    "cutout": 1,
}
_GREY = 128  # fills what comes into the frame in AutoAugment and RandAugment, as in the published policies
_RANDAUGMENT_LEVELS = 11  # 0..10, so that 10 is the strongest: the scale of the published "rand-m10-n2"


def resolve_steps(augment: str | Sequence[str], size: int) -> tuple[str, ...]:
    """Turn the name of a preset, ``"auto"`` or a list of steps into a checked list of steps.

    Args:
        augment: A key of :data:`PRESETS`; ``"auto"`` (crop and flip for small images, resized crop and flip for
            others); or steps.
        size: Working size in pixels.

    Raises:
        DataError: There is an unknown preset or step, or a wrong number; all of them are in one message.

    Example:
        >>> resolve_steps("auto", 32), resolve_steps(["flip", "cutout=8"], 32)
        (('crop=4', 'flip'), ('flip', 'cutout=8'))
    """
    if isinstance(augment, str):
        name = augment if augment != "auto" else ("crop_flip" if size <= SMALL else "inat")
        if name in PRESETS:
            return PRESETS[name]
        augment = [part for part in re.split(r"\s+", name) if part]
    wrong = [problem for step in augment if (problem := _problem(step))]
    if wrong:
        raise DataError(
            f"Expected augmentation steps out of {', '.join(_MOST_NUMBERS)} (numbers after '=') or one preset out of "
            f"auto, {', '.join(PRESETS)}; got " + "; ".join(wrong) + "."
        )
    return tuple(augment)


def _problem(step: str) -> str:
    name, _, numbers = step.partition("=")
    if name not in _MOST_NUMBERS:
        return f"unknown {step!r}"
    values = numbers.split(",") if numbers else []
    if len(values) > _MOST_NUMBERS[name]:
        return f"{step!r} with {len(values)} numbers, at most {_MOST_NUMBERS[name]} allowed"
    if not all(re.fullmatch(r"\s*\d+(\.\d*)?\s*|\s*\.\d+\s*", value) for value in values):
        return f"{step!r} with something that is not a positive number"
    return ""


def _parse(step: str) -> tuple[str, list[float]]:
    name, _, numbers = step.partition("=")
    return name, [float(value) for value in numbers.split(",")] if numbers else []


class BatchAugment:
    """Function of a batch that applies a list of steps, with a random draw for each image. It can be pickled.

    A ``resized_crop`` that comes first cuts from all pixels at hand: of images in memory from the centred square that
    is kept of them, of image files from the whole picture. Everything else is the same for both, to the bit.

    Args:
        steps: Steps as in the table at the top of this module, or the name of a preset.
        size: Working size in pixels; chooses AutoAugment's policy.

    Raises:
        DataError: An unknown or malformed step.

    Example:
        >>> augment = BatchAugment(["crop=2", "flip"], 8)
        >>> images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
        >>> augment(images, torch.Generator().manual_seed(0)).shape
        torch.Size([4, 3, 8, 8])
    """

    def __init__(self, steps: str | Sequence[str], size: int) -> None:
        self.steps = resolve_steps(steps, size)
        parsed = [_parse(step) for step in self.steps]
        self._smallest: float | None = None
        if parsed and parsed[0][0] == "resized_crop":
            self._smallest = (parsed.pop(0)[1] or [0.08])[0]
        self._functions = [_batch_step(name, numbers, size) for name, numbers in parsed]

    def __call__(self, images: Tensor, stream: torch.Generator) -> Tensor:
        """Augment (N, C, H, W) uint8 images with the randomness of ``stream`` alone."""
        windows = self.windows(len(images), stream)
        return self.finish(images if windows is None else batched.cut(images, windows), stream)

    def windows(self, count: int, stream: torch.Generator) -> Tensor | None:
        """Draw the windows (N, 4) that a first ``resized_crop`` cuts, for :func:`cut_file`; ``None`` without one."""
        return None if self._smallest is None else batched.windows(count, stream, self._smallest)

    def finish(self, images: Tensor, stream: torch.Generator) -> Tensor:
        """Apply the steps after the windows to (N, C, H, W) uint8 images; ``stream`` has drawn the windows."""
        for function in self._functions:
            images = function(images, stream)
        return images

    def __repr__(self) -> str:
        return f"BatchAugment({list(self.steps)})"


def _batch_step(name: str, numbers: list[float], size: int) -> batched.Step:
    if name == "autoaugment":
        return batch_policies.AutoAugment(_policy(size), fill=_GREY)
    if name == "randaugment":
        return batch_policies.RandAugment(*_randaugment_arguments(numbers), fill=_GREY)
    if name == "crop":
        return partial(batched.crop, padding=int(numbers[0]) if numbers else 4)
    if name == "cutout":
        return partial(batched.cutout, size=int(numbers[0]) if numbers else 16)
    function = getattr(batched, name)
    keywords = {
        "flip": ("probability",),
        "rotate": ("degrees",),
        "resized_crop": ("smallest",),
        "grayscale": ("probability",),
        "blur": ("probability",),
        "color_jitter": ("brightness", "contrast", "saturation", "hue", "probability"),
    }[name]
    return partial(function, **dict(zip(keywords, numbers, strict=False)))


def cut_file(image: Image.Image, window_4: Tensor, size: int) -> Tensor:
    """Cut a window out of a decoded file and resize it to a uint8 tensor (C, ``size``, ``size``).

    A picture that has the working size is cut exactly as in memory. A larger one is resized by Pillow, which smooths
    where it reduces; the window has the same share of the area and the same aspect ratio in pixels.

    Args:
        image: The picture, in 8-bit grey or RGB.
        window_4: One row of :meth:`BatchAugment.windows`.
        size: Working size in pixels.

    Example:
        >>> from PIL import Image
        >>> window = BatchAugment(["resized_crop"], 8).windows(1, torch.Generator().manual_seed(0))[0]
        >>> cut_file(Image.new("RGB", (30, 20)), window, 8).shape
        torch.Size([3, 8, 8])
    """
    width, height = image.size
    if width == height == size:
        return batched.cut(v2.functional.pil_to_tensor(image)[None], window_4[None])[0]
    wide, high, x, y = window_4.tolist()
    wide = min(1.0, wide * (height / width) ** 0.5) * width
    high = min(1.0, high * (width / height) ** 0.5) * height
    left, top = (width - wide) * (1 + x) / 2, (height - high) * (1 + y) / 2
    box = (left, top, min(width, left + wide), min(height, top + high))
    resized = image.resize((size, size), Image.Resampling.BILINEAR, box)
    pixels: Tensor = v2.functional.pil_to_tensor(resized)
    return pixels


def image_eval(size: int) -> v2.Compose:
    """Build the evaluation pipeline for one Pillow image, or for uint8 images (..., H, W).

    Above :data:`SMALL` the short side becomes 8/7 of ``size`` (256 for 224), else ``size``; the centre is cut out.
    """
    return v2.Compose([*_fit(size), v2.PILToTensor()])


def image_keep(steps: Sequence[str | Sequence[str]], size: int) -> v2.Compose:
    """Build the pipeline that brings training images to the working size, before :class:`BatchAugment`.

    That is the evaluation pipeline, except that it keeps the largest centred square if every view has a
    ``resized_crop``, which then cuts from as much of the picture as possible.

    Args:
        steps: Steps, or the name of a preset, of each view; without views images are evaluated.
        size: Working size in pixels.
    """
    names = [{_parse(step)[0] for step in resolve_steps(view, size)} for view in steps]
    if names and all("resized_crop" in view for view in names):
        return v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])
    return image_eval(size)


def evaluation_rule(size: int) -> dict[str, int]:
    """Return what :func:`image_eval` does as numbers for other programs.

    Example:
        >>> evaluation_rule(224), evaluation_rule(32)
        ({'resize_short_side': 256, 'centre_crop': 224}, {'resize_short_side': 32, 'centre_crop': 32})
    """
    return {"resize_short_side": size if size <= SMALL else round(size * 8 / 7), "centre_crop": size}


def _fit(size: int) -> list[Any]:
    rule = evaluation_rule(size)
    return [v2.Resize(rule["resize_short_side"], antialias=True), v2.CenterCrop(rule["centre_crop"])]


def _policy(size: int) -> v2.AutoAugmentPolicy:
    return v2.AutoAugmentPolicy.CIFAR10 if size <= SMALL else v2.AutoAugmentPolicy.IMAGENET


def _randaugment_arguments(numbers: list[float]) -> tuple[int, int, int]:
    operations, magnitude = [*numbers, *(2.0, 9.0)[len(numbers) :]]
    if magnitude >= _RANDAUGMENT_LEVELS:
        raise DataError(f"Expected a randaugment magnitude from 0 to {_RANDAUGMENT_LEVELS - 1}, got {magnitude:g}.")
    return int(operations), int(magnitude), _RANDAUGMENT_LEVELS


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Give torch's global stream a seed of its own inside the block and leave it untouched afterwards.

    Example:
        >>> before = torch.get_rng_state()
        >>> with seeded(1, 2, 3):
        ...     number = torch.rand(())
        >>> torch.get_rng_state().equal(before)
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*parts))  # torch.manual_seed would seed the accelerators too
        yield


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn uint8 (N, C, H, W) into float32 with ``(x / 255 - mean) / std`` per channel.

    Example:
        >>> normalize(torch.full((1, 1, 1, 1), 255, dtype=torch.uint8), [0.5], [0.5]).item()
        1.0
    """
    scale = torch.tensor([1 / (255 * s) for s in std]).view(1, -1, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1)
    return images.float().mul_(scale).sub_(shift)


class Mix:
    """Mixup and CutMix of a batch, giving soft targets; one of the two is drawn for each batch when both are on.

    Both are torchvision's: mixup of Zhang et al., ICLR 2018, and CutMix of Yun et al., ICCV 2019. Mix *before*
    BatchFormer doubles the targets.

    Args:
        num_classes: Number of classes K.
        mixup_alpha: Parameter of mixup's Beta distribution; 0 switches mixup off.
        cutmix_alpha: Parameter of CutMix's Beta distribution; 0 switches CutMix off.

    Raises:
        DataError: An alpha is negative, or both are 0.

    Example:
        >>> images, targets = Mix(3, mixup_alpha=1.0)(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]), seed=0)
        >>> targets.shape, targets.sum(1).allclose(torch.ones(4))
        (torch.Size([4, 3]), True)
    """

    def __init__(self, num_classes: int, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> None:
        if min(mixup_alpha, cutmix_alpha) < 0 or max(mixup_alpha, cutmix_alpha) == 0:
            raise DataError(
                f"Expected non-negative alphas, at least one above 0; got mixup {mixup_alpha}, cutmix {cutmix_alpha}."
            )
        ways: list[Any] = [v2.MixUp(alpha=mixup_alpha, num_classes=num_classes)] if mixup_alpha else []
        ways += [v2.CutMix(alpha=cutmix_alpha, num_classes=num_classes)] if cutmix_alpha else []
        self._mix = v2.RandomChoice(ways)

    def __call__(self, images: Tensor, labels: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Mix float images (N, C, H, W) and class indices (N,) into images and probabilities (N, K)."""
        with seeded(seed):
            mixed: tuple[Tensor, Tensor] = self._mix(images, labels)
        return mixed
