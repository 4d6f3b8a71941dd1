"""Panoptic maps, in which every pixel belongs to one segment, or to none.

Axis letters: H, W pixels, S segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PanopticMap"]


class PanopticMap(NamedTuple):
    """Segments of one image, predicted or true.

    Attributes:
        ids_HW: Segment that each pixel belongs to: 1..S, 0 for none (void), int64.
        labels_S: Class index of each segment, int64; segment ``s`` of the map has ``labels_S[s - 1]``.
        scores_S: Confidence of each segment in 0..1; ones in a true map.
        iscrowd_S: True for a crowd, whose members are not told apart, bool; only true maps have crowds.

    Source:
        Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 3.

    Example:
        >>> whole = PanopticMap.of(torch.tensor([[7, 7], [0, 3]]), ids=[3, 7], labels=[0, 5])
        >>> whole.ids_HW
        tensor([[2, 2],
                [0, 1]])
    """

    ids_HW: Tensor
    labels_S: Tensor
    scores_S: Tensor
    iscrowd_S: Tensor

    @classmethod
    def of(
        cls, pixels_HW: Tensor, ids: list[int], labels: list[int], iscrowd: list[bool] | None = None
    ) -> "PanopticMap":
        """Make a true map from the ids of a PNG file (``R + 256 G + 65536 B``) and the segments of its JSON.

        Args:
            pixels_HW: Segment id of each pixel, 0 for void.
            ids: Id of each segment, all different and not 0.
            labels: Class index of each segment.
            iscrowd: True for each segment that is a crowd; by default there is none.

        Raises:
            ValueError: When a pixel's id is none of ``ids``.
        """
        ids_S = torch.tensor([0, *ids])
        order = ids_S.argsort()
        where_HW = torch.searchsorted(ids_S[order], pixels_HW.contiguous()).clamp(max=len(ids))
        if bool((ids_S[order][where_HW] != pixels_HW).any()):
            strange = sorted(set(pixels_HW.unique().tolist()) - set(ids) - {0})
            raise ValueError(
                f"Expected pixels of the segments that the JSON lists, got also the ids {strange[:5]}. The PNG and the "
                "JSON may be of different versions."
            )
        return cls(
            order[where_HW],
            torch.tensor(labels, dtype=torch.long),
            torch.ones(len(ids)),
            torch.tensor([False] * len(ids) if iscrowd is None else iscrowd, dtype=torch.bool),
        )

    @property
    def masks_SHW(self) -> Tensor:
        """Mask of each segment, ``(S, H, W)`` bool."""
        numbers = torch.arange(1, len(self.labels_S) + 1, device=self.ids_HW.device)
        return self.ids_HW[None] == numbers[:, None, None]
