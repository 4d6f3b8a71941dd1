"""Augmentation of a whole batch at once, with a random draw for each sample and no Python loop over samples.

Every function takes uint8 images and a ``torch.Generator`` and returns uint8 images of the same shape; the global
random stream is never touched. Axes: N samples, C channels (1 or 3), H height, W width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor, torch.Generator], Tensor]

_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as in torchvision's grayscale


def crop(images: Tensor, stream: torch.Generator, padding: int = 4) -> Tensor:
    """Pad each sample with ``padding`` black pixels on all sides and cut out a random window of the old size.

    Example:
        >>> images = torch.arange(9, dtype=torch.uint8).reshape(1, 1, 3, 3)
        >>> crop(images, torch.Generator().manual_seed(0), padding=0).equal(images)
        True
    """
    n, _, height, width = images.shape
    top_N, left_N = torch.randint(0, 2 * padding + 1, (2, n), generator=stream)
    padded = F.pad(images, (padding,) * 4)
    return padded.unfold(2, height, 1).unfold(3, width, 1)[torch.arange(n), :, top_N, left_N]


def flip(images: Tensor, stream: torch.Generator, probability: float = 0.5) -> Tensor:
    """Mirror each sample left and right with this probability."""
    chosen = (torch.rand(len(images), generator=stream) < probability).nonzero().squeeze(1)
    return images.index_copy(0, chosen, images[chosen].flip(-1))


def cutout(images: Tensor, stream: torch.Generator, size: int = 16) -> Tensor:
    """Black out a square of ``size`` pixels around a random centre of each sample; the border cuts it.

    Source:
        DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.
    """
    n, _, height, width = images.shape
    centre_N = torch.rand(2, n, generator=stream)
    hidden = [
        ((axis[None] - (centre * length).long()[:, None] + size // 2) // size) == 0
        for axis, centre, length in zip(
            (torch.arange(height), torch.arange(width)), centre_N, (height, width), strict=True
        )
    ]
    return images.masked_fill((hidden[0][:, :, None] & hidden[1][:, None, :])[:, None], 0)


def rotate(images: Tensor, stream: torch.Generator, degrees: float = 15.0) -> Tensor:
    """Rotate each sample by an angle drawn uniformly from [-degrees, degrees]; nearest pixel, black corners."""
    angle_N = (torch.rand(len(images), generator=stream) * 2 - 1) * (degrees * torch.pi / 180)
    cos_N, sin_N, zero_N = angle_N.cos(), angle_N.sin(), torch.zeros(len(images))
    aspect = images.shape[3] / images.shape[2]
    theta = torch.stack([cos_N, -sin_N / aspect, zero_N, sin_N * aspect, cos_N, zero_N], 1).view(-1, 2, 3)
    return warp(images, theta, nearest=True, fill=0)


def resized_crop(images: Tensor, stream: torch.Generator, smallest: float = 0.08) -> Tensor:
    """Cut a random window out of each sample, see :func:`windows`, and stretch it to the old size."""
    return cut(images, windows(len(images), stream, smallest))


def windows(count: int, stream: torch.Generator, smallest: float = 0.08) -> Tensor:
    """Draw windows of square images, with a share of the area from ``smallest`` to 1 and aspect ratio 3/4 to 4/3.

    Returns:
        Windows, shape (N, 4): width and height over the side of the image, which may exceed 1, and the position from
        left to right and from top to bottom, in -1..1.
    """
    draw = torch.rand(4, count, generator=stream)
    area_N = smallest + (1 - smallest) * draw[0]
    ratio_N = torch.exp((draw[1] * 2 - 1) * torch.log(torch.tensor(4 / 3)))
    return torch.stack([(area_N * ratio_N).sqrt(), (area_N / ratio_N).sqrt(), draw[2] * 2 - 1, draw[3] * 2 - 1], 1)


def cut(images: Tensor, windows_N4: Tensor) -> Tensor:
    """Cut windows (N, 4) of :func:`windows` out of images (N, C, H, W) and stretch them to the old size."""
    width_N, height_N = windows_N4[:, :2].clamp(max=1.0).unbind(1)
    x_N, y_N = windows_N4[:, 2:].unbind(1)
    zero_N = torch.zeros(len(images))
    rows = [width_N, zero_N, x_N * (1 - width_N), zero_N, height_N, y_N * (1 - height_N)]
    return warp(images, torch.stack(rows, 1).view(-1, 2, 3), nearest=False)


def warp(images: Tensor, theta_N23: Tensor, *, nearest: bool, fill: int | None = None) -> Tensor:
    """Move the pixels of each sample by an affine map.

    Args:
        images: Pixels, uint8, shape (N, C, H, W).
        theta_N23: Maps from output to input positions, both in [-1, 1], as for ``torch.nn.functional.affine_grid``.
        nearest: Take the nearest pixel instead of interpolating between four.
        fill: Value of pixels from outside the image; ``None`` repeats the border.
    """
    grid = F.affine_grid(theta_N23, list(images.shape), align_corners=False)
    mode = "nearest" if nearest else "bilinear"
    warped = F.grid_sample(images.float(), grid, mode=mode, padding_mode="border", align_corners=False)
    moved = warped.round_().clamp_(0, 255).to(torch.uint8)
    return moved if fill is None else moved.masked_fill_((grid.abs() > 1).any(-1)[:, None], fill)


def blend(images: Tensor, base: Tensor | float, factor_N: Tensor) -> Tensor:
    """Return ``base + factor (x - base)``, clamped to 0..255, in float: a change of light or colour."""
    factor = factor_N.view(-1, 1, 1, 1)
    return (base + (images - base) * factor).clamp_(0, 255)


def grey(images: Tensor) -> Tensor:
    """Return the luma of colour images, and grey images unchanged, in float, shape (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images.float()
    return torch.einsum("c,nchw->nhw", torch.tensor(_LUMA), images.float())[:, None]


def color_jitter(
    images: Tensor,
    stream: torch.Generator,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.0,
    probability: float = 1.0,
) -> Tensor:
    """Change brightness, contrast, saturation and hue of each sample by random factors.

    The ranges are torchvision's: a factor from ``[max(0, 1 - b), 1 + b]``, the hue in turns. The order is fixed instead
    of random, and the hue turns in the YIQ plane instead of HSV, so that one matrix for each sample does it. Grey
    images keep saturation and hue.
    """
    draw = torch.rand(5, len(images), generator=stream)
    x = blend(images, 0.0, _factor(draw[0], brightness))
    x = blend(x, grey(x).mean((1, 2, 3), keepdim=True), _factor(draw[1], contrast))
    if images.shape[1] == 3:
        x = blend(x, grey(x), _factor(draw[2], saturation))
        if hue:
            x = torch.einsum("nij,njhw->nihw", _hue_matrices((draw[3] * 2 - 1) * hue), x).clamp_(0, 255)
    return torch.where((draw[4] < probability).view(-1, 1, 1, 1), x.round_().to(torch.uint8), images)


def _factor(draw_N: Tensor, strength: float) -> Tensor:
    low, high = max(0.0, 1 - strength), 1 + strength
    return low + (high - low) * draw_N


def _hue_matrices(turns_N: Tensor) -> Tensor:
    to_yiq = torch.tensor([_LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    cos_N, sin_N = (turns_N * 2 * torch.pi).cos(), (turns_N * 2 * torch.pi).sin()
    turn = torch.zeros(len(turns_N), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cos_N, -sin_N, sin_N, cos_N
    matrices: Tensor = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return matrices


def grayscale(images: Tensor, stream: torch.Generator, probability: float = 0.2) -> Tensor:
    """Take the colour of each sample away with this probability."""
    chosen = (torch.rand(len(images), generator=stream) < probability).nonzero().squeeze(1)
    without = grey(images[chosen]).round_().to(torch.uint8).expand(-1, images.shape[1], -1, -1)
    return images.index_copy(0, chosen, without)


def blur(images: Tensor, stream: torch.Generator, probability: float = 0.5) -> Tensor:
    """Blur each sample with this probability, by a Gaussian of sigma 0.1 to 2 pixels over a tenth of the width."""
    n, channels, _, width = images.shape
    draw = torch.rand(2, n, generator=stream)
    chosen = (draw[0] < probability).nonzero().squeeze(1)
    if len(chosen) == 0:
        return images
    reach = max(1, width // 20)
    offsets = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-0.5 * (offsets[None] / (0.1 + 1.9 * draw[1, chosen])[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, None]
    x = F.pad(images[chosen].float().flatten(0, 1)[None], (reach,) * 4, mode="reflect")
    x = F.conv2d(x, kernel, groups=kernel.shape[0])
    x = F.conv2d(x, kernel.transpose(2, 3), groups=kernel.shape[0])
    return images.index_copy(0, chosen, x.view(-1, channels, *images.shape[2:]).round_().to(torch.uint8))
