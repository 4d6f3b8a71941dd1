"""Positions in the image and the Gaussian prior on them, as pure functions.

Axes, used as suffixes of names:

    B  images      H  heads (1 where they share)      Q  object queries      L  feature levels
    Y  rows of a feature map      X  its columns      S  its cells, S = Y * X, row by row      C  channels

Positions are pairs (x, y). Cell (i, j) of a map has its center at (i + 1/2, j + 1/2), in cells of that map. (The
authors' code takes (i, j), half a cell away from the coordinates of boxes with the same center.)
"""

import math

import torch
from torch import Tensor


def valid_size(mask_BYX: Tensor) -> Tensor:
    """Count the cells of a padded map that an image fills, along both axes.

    Args:
        mask_BYX: Boolean mask, True where the image is; padding is at the bottom and right.

    Returns:
        Columns and rows, (B, 2).

    Example:
        >>> valid_size(torch.tensor([[[True, True, False, False]]]))
        tensor([[2, 1]])
    """
    return torch.stack([mask_BYX[:, 0, :].sum(1), mask_BYX[:, :, 0].sum(1)], -1)


def sine_positions(mask_BYX: Tensor, channels: int, temperature: float = 10000.0) -> Tensor:
    """Embed the cells of a map by sines and cosines: first half of the channels for y, second half for x.

    Positions are counted from 1 and divided by the size of the image (without padding) times 2 pi.

    Args:
        mask_BYX: Boolean mask, True where the image is.
        channels: C, a multiple of 4.
        temperature: Ratio of the longest wave length to the shortest.

    Returns:
        Embeddings (B, S, C), float32.

    Source:
        DETR (Carion et al. 2020), appendix A.4, on Vaswani et al. 2017, section 3.5.

    Example:
        >>> sine_positions(torch.ones(2, 3, 5, dtype=torch.bool), channels=8).shape
        torch.Size([2, 15, 8])
    """
    waves = temperature ** (torch.arange(channels // 4, device=mask_BYX.device) / (channels // 4))
    halves = []
    for axis in (1, 2):
        count = mask_BYX.cumsum(axis, dtype=torch.float32)
        angle = 2 * math.pi * count / count.amax(axis, keepdim=True).clamp(min=1)
        angle = angle[..., None] / waves
        halves.append(torch.stack([angle.sin(), angle.cos()], -1).flatten(-2))
    return torch.cat(halves, -1).flatten(1, 2)


def log_gaussian(center_BHQ2: Tensor, inverse_BHQ2: Tensor, shape: tuple[int, int], beta: float) -> Tensor:
    r"""Compute the logarithm of the spatial prior of each query and head on the cells of a map.

    .. math:: \log G(x, y) = -\frac{(x - c_x)^2}{\beta s_x^2} - \frac{(y - c_y)^2}{\beta s_y^2}

    The extent enters by its inverse :math:`1/s`, which may be any number, so that nothing is divided by zero. :math:`G`
    itself is not computed, since its logarithm would be minus infinity where it underflows.

    Args:
        center_BHQ2: Centers (x, y) in cells.
        inverse_BHQ2: 1/s for x and y, per cell, broadcast to the shape of the centers.
        shape: Rows Y and columns X of the map.
        beta: Bandwidth, larger than 0.

    Returns:
        Logarithms (B, H, Q, S), at most 0.

    Source:
        SMCA (arXiv 2101.07448), section 3.2, dynamic spatial weight maps and multi-head modulation.

    Example:
        >>> center = torch.tensor([1.5, 0.5]).view(1, 1, 1, 2)
        >>> log_gaussian(center, torch.ones(1, 1, 1, 2), (1, 3), beta=2.0)[0, 0, 0] + 0.0
        tensor([-0.5000,  0.0000, -0.5000])
    """
    rows, columns = shape
    x = torch.arange(columns, device=center_BHQ2.device, dtype=center_BHQ2.dtype) + 0.5
    y = torch.arange(rows, device=center_BHQ2.device, dtype=center_BHQ2.dtype) + 0.5
    x_BHQX = ((x - center_BHQ2[..., :1]) * inverse_BHQ2[..., :1]).square()
    y_BHQY = ((y - center_BHQ2[..., 1:]) * inverse_BHQ2[..., 1:]).square()
    return (y_BHQY[..., :, None] + x_BHQX[..., None, :]).flatten(-2) / -beta
