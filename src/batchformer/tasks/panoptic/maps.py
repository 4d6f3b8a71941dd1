"""A panoptic map: every pixel belongs to one segment, or to none.

Axis letters: H, W pixels, S segments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PanopticMap"]


class PanopticMap(NamedTuple):
    """Segments of one image, predicted or true.

    Attributes:
        ids_HW: Which segment a pixel belongs to: 1..S, 0 for none (void). int64.
        labels_S: Class index of each segment; segment ``s`` of the map has ``labels_S[s - 1]``. int64.
        scores_S: Confidence of each segment in [0, 1]; of a true map ones.
        iscrowd_S: Whether a segment is a crowd, whose members nobody told apart; only in true maps. bool.

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
        """A true map from the ids of a PNG file (``R + 256 G + 65536 B``) and what its JSON says of them.

        Args:
            pixels_HW: Segment id of each pixel, 0 for void.
            ids: Of the segments, different, not 0.
            labels: Class index of each.
            iscrowd: Of each; none by default.

        Raises:
            ValueError: When a pixel's id is none of ``ids``.
        """
        ids_S = torch.tensor([0, *ids])
        order = ids_S.argsort()
        where_HW = torch.searchsorted(ids_S[order], pixels_HW.contiguous()).clamp(max=len(ids))
        if bool((ids_S[order][where_HW] != pixels_HW).any()):
            strange = sorted(set(pixels_HW.unique().tolist()) - set(ids) - {0})
            raise ValueError(f"Expected pixels of the segments that the JSON lists, got also the ids {strange[:5]}.")
        return cls(
            order[where_HW],
            torch.tensor(labels, dtype=torch.long),
            torch.ones(len(ids)),
            torch.tensor([False] * len(ids) if iscrowd is None else iscrowd, dtype=torch.bool),
        )

    @property
    def masks_SHW(self) -> Tensor:
        """One mask for each segment, ``(S, H, W)`` bool."""
        numbers = torch.arange(1, len(self.labels_S) + 1, device=self.ids_HW.device)
        return self.ids_HW[None] == numbers[:, None, None]
