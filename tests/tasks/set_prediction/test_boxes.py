"""Boxes against plain arithmetic in fp64, torchvision, and the cases that have no area."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou

from batchformer.tasks.set_prediction import boxes


def slow_giou(a: Sequence[float], b: Sequence[float]) -> float:
    def area(box: Sequence[float]) -> float:
        return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)

    inner = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    outer = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = area(a) + area(b) - inner
    iou = inner / union if union > 0 else 0.0
    return iou - ((outer - union) / outer if outer > 0 else 0.0)


def corners(n: int, seed: int) -> Tensor:
    low = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    side = torch.rand(n, 2, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return torch.cat((low, low + side), 1)


def test_giou_equals_the_loop_and_torchvision() -> None:
    a, b = corners(30, 0), corners(20, 5)
    found = boxes.giou(a[:, None], b)
    assert found.shape == (30, 20)
    for i in range(30):
        for j in range(20):
            assert float(found[i, j]) == pytest.approx(slow_giou(a[i].tolist(), b[j].tolist()), abs=1e-12)
    torch.testing.assert_close(found, generalized_box_iou(a, b))
    torch.testing.assert_close(boxes.giou(a[:20], b), found[:20].diagonal())


POINT, LINE, UNIT = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5], [0.0, 0.0, 1.0, 1.0]
INVERTED = [0.8, 0.8, 0.2, 0.2]


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        (POINT, POINT, 0.0),  # 0/0 in the definition
        (LINE, LINE, 0.0),
        (POINT, [0.7, 0.7, 0.7, 0.7], -1.0),  # nothing of what encloses them is theirs
        (POINT, UNIT, 0.0),  # IoU 0, and the box encloses the point
        (LINE, [0.2, 0.5, 0.8, 1.0], 0.0),
        (INVERTED, UNIT, 0.0),  # no area, whatever the product of its sides
        (INVERTED, INVERTED, 0.0),
        (UNIT, UNIT, 1.0),
    ],
)
def test_boxes_without_area_have_a_value_and_a_finite_gradient(a: list[float], b: list[float], value: float) -> None:
    first, second = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    found = boxes.giou(first, second)
    found.backward()
    assert float(found.detach()) == pytest.approx(value, abs=1e-6)
    assert first.grad is not None and first.grad.isfinite().all()
    assert second.grad is not None and second.grad.isfinite().all()


@pytest.mark.parametrize("side", [1e-3, 1e-12, 1e-18, 1e-25, 0.0])
def test_gradients_of_ever_smaller_boxes_stay_finite(side: float) -> None:
    """A box of a sigmoid never has a negative side, but any small one."""
    box = torch.tensor([0.5, 0.5, side, side], requires_grad=True)
    value = boxes.giou(boxes.to_corners(box), boxes.to_corners(torch.tensor([0.5, 0.5, side, 0.5 * side])))
    value.backward()
    assert -1 <= float(value.detach()) <= 1 and box.grad is not None and box.grad.isfinite().all()


def test_formats_are_inverse_to_each_other() -> None:
    box = corners(9, 3).view(3, 3, 4)
    torch.testing.assert_close(boxes.to_corners(boxes.to_centers(box)), box)
    assert math.isclose(float(boxes.to_centers(box)[0, 0, 2]), float(box[0, 0, 2] - box[0, 0, 0]))
