"""The number of targets is the ranks' mean: real processes on gloo, uneven targets, gradients against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command
from ranks import processes, run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchformer.tasks.set_prediction.criterion import SetCriterion, SetOutputs

Q, K = 6, 3
SIZES = ([3, 1], [0, 0])  # of two rows on each rank; the second has none: its share of the focal loss still counts


class Net(nn.Module):
    """Predictions of two layers from one vector for each query."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.boxes = nn.Linear(8, 2 * K), nn.Linear(8, 2 * 4)
        self.double()

    def forward(self, x_NQC: Tensor) -> SetOutputs:
        logits, boxes = (head(x_NQC).unflatten(-1, (2, -1)).movedim(2, 0) for head in (self.classes, self.boxes))
        return SetOutputs(logits, boxes.sigmoid())


class Loss(nn.Module):
    """What DDP wraps: a network and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = Net(), SetCriterion(K, "focal")

    def forward(self, x_NQC: Tensor, targets: Any) -> Tensor:
        return self.criterion(self.net(x_NQC), targets)["loss"]


def batch(rank: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
    stream = torch.Generator().manual_seed(100 + rank)
    targets = [
        {
            "class_labels": torch.randint(K, (size,), generator=stream),
            "boxes": torch.rand(size, 4, generator=stream, dtype=torch.float64) * 0.5 + 0.1,
        }
        for size in SIZES[rank]
    ]
    return torch.randn(2, Q, 8, generator=stream, dtype=torch.float64), targets


def gradients_are(rank: int, world: int, expected: dict[str, Tensor]) -> None:
    wrapped = DistributedDataParallel(Loss())
    wrapped(*batch(rank)).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(wrapped.module.get_parameter(name).grad, gradient, msg=name)


@processes
@pytest.mark.timeout(120)
def test_two_ranks_have_the_gradients_of_one_process(command: Command, tmp_path: Path) -> None:
    """Divided by its own targets each rank would weigh its objects by how few it has."""
    (x, targets), (y, others) = batch(0), batch(1)
    loss = Loss()
    loss(torch.cat((x, y)), targets + others).backward()
    expected = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}
    assert len(expected) == 4
    run_on_ranks(command, 2, gradients_are, tmp_path, expected)
