"""Momentum encoders and queues, against a plain average and a plain ring."""

import pytest
import torch
from torch import nn

from batchformer.tasks.training.momentum import MomentumEncoder, RowQueue


def online() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)


def test_copies_start_equal_and_move_by_the_momentum_of_each_step() -> None:
    first, second = online()
    encoder = MomentumEncoder(first, second)
    originals, copies = [*first.parameters(), *second.parameters()], list(encoder.parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in zip(originals, copies, strict=True))
    expected = [copy.detach().double() for copy in copies]
    for momentum in (0.9, 0.99, 1.0, 0.0):
        with torch.no_grad():
            for original in originals:
                original.add_(torch.randn_like(original))
        encoder.follow(first, second, momentum=momentum)
        expected = [
            momentum * copy + (1 - momentum) * original.detach().double()
            for copy, original in zip(expected, originals, strict=True)
        ]
        for copy, value in zip(copies, expected, strict=True):
            torch.testing.assert_close(copy.detach().double(), value, rtol=1e-5, atol=1e-6)
    assert not any(copy.requires_grad for copy in copies)


def test_copies_run_one_after_another_without_gradient_and_keep_their_own_statistics() -> None:
    first, second = online()
    encoder, images = MomentumEncoder(first, second), torch.randn(8, 3, requires_grad=True)
    out = encoder(images)
    torch.testing.assert_close(out, second(first(images)))
    assert not out.requires_grad
    mean = encoder.get_buffer("0.1.running_mean").clone()
    first(images + 1)
    encoder.follow(first, second, momentum=0.0)
    assert torch.equal(encoder.get_buffer("0.1.running_mean"), mean)


def test_a_wrong_momentum_or_another_network_is_refused() -> None:
    first, second = online()
    encoder = MomentumEncoder(first, second)
    with pytest.raises(ValueError, match="0 <= momentum <= 1, got 1.5"):
        encoder.follow(first, second, momentum=1.5)
    with pytest.raises(ValueError, match="longer"):
        encoder.follow(first, momentum=0.5)


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [3, 7, 1, 10, 2], [5, 5, 5], [13, 4]])
def test_the_queue_equals_a_plain_ring(sizes: list[int]) -> None:
    queue = RowQueue(keys=torch.zeros(10, 6), targets=torch.full((10,), -1))
    ring: list[tuple[list[float], int]] = [([0.0] * 6, -1)] * 10
    at = 0
    for step, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(step)
        keys, labels = torch.randn(size, 6, generator=generator), torch.randint(5, (size,), generator=generator)
        queue.push(keys=keys, targets=labels)
        for row, label in zip(keys.tolist(), labels.tolist(), strict=True):
            ring[at] = (row, label)
            at = (at + 1) % 10
    assert queue.column("keys").tolist() == [row for row, _ in ring]
    assert queue.column("targets").tolist() == [label for _, label in ring]
    assert int(queue.position) == at


def test_columns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"columns of one length of at least 1, got lengths \[3, 4\]"):
        RowQueue(keys=torch.zeros(3, 2), targets=torch.zeros(4))
    with pytest.raises(ValueError, match="got lengths of none"):
        RowQueue()
    queue = RowQueue(keys=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="Expected rows of keys, got keys, targets"):
        queue.push(keys=torch.zeros(1, 2), targets=torch.zeros(1))
