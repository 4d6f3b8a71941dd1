"""Warnings about a module that cannot learn; warnings are errors here, so silence is tested by every other line."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.optim import SGD

from batchformer import BatchFormer, BatchFormerWarning
from batchformer.core import training_checks

C = 4
ABSENT = "gets gradients but no optimizer holds its parameters"


class Net(nn.Module):
    """A module in the middle that may be left out of an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.batchformer, self.head = nn.Linear(C, C), BatchFormer(C), nn.Linear(C, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.batchformer(self.backbone(x)))
        return out


def steps(net: nn.Module, *optimizers: torch.optim.Optimizer, times: int = 3) -> None:
    for _ in range(times):
        for optimizer in optimizers:
            net(torch.randn(3, C)).sum().backward()
            optimizer.step()


def without_module(net: Net) -> SGD:
    return SGD([*net.backbone.parameters(), *net.head.parameters()], lr=0.1)


def test_absent_from_the_optimizer_warns_once() -> None:
    net = Net()
    optimizer = without_module(net)
    steps(net, optimizer, times=1)  # once is no sign yet
    with pytest.warns(BatchFormerWarning, match=ABSENT) as caught:
        steps(net, optimizer)
    assert len(caught) == 1
    steps(net, optimizer)


def test_held_by_an_optimizer_is_silent() -> None:
    net = Net()
    steps(net, SGD(net.parameters(), lr=0.1))


def test_optimizers_that_take_turns_are_silent() -> None:
    net = Net()
    steps(net, without_module(net), SGD(net.batchformer.parameters(), lr=0.1))


def test_an_optimizer_of_another_model_is_silent() -> None:
    """Before the module's first backward pass, and where it gets no gradients at all."""
    net, other = Net(), nn.Linear(C, 1)
    optimizer = SGD(other.parameters(), lr=0.1)
    with torch.no_grad():
        net(torch.randn(3, C))
    steps(other, optimizer)


def test_a_copy_warns_for_itself() -> None:
    net = Net()
    steps(net, SGD(net.parameters(), lr=0.1), times=1)
    twin = copy.deepcopy(net)
    with pytest.warns(BatchFormerWarning, match=ABSENT):
        steps(twin, without_module(twin))


def test_frozen_warns_once_and_only_in_training() -> None:
    module = BatchFormer(C).requires_grad_(False)
    module.eval()(torch.randn(3, C))
    with pytest.warns(BatchFormerWarning, match=r"all of its parameters are frozen \(requires_grad=False\)") as caught:
        module.train()(torch.randn(3, C))
    assert len(caught) == 1
    module(torch.randn(3, C))


def test_frozen_on_purpose_or_in_part_is_silent() -> None:
    BatchFormer(C).freeze()(torch.randn(3, C))
    partly = BatchFormer(C)
    partly.layers[0].norm1.requires_grad_(False)
    partly(torch.randn(3, C))


def test_watching_keeps_no_module_alive() -> None:
    gc.collect()
    before = len(training_checks._unclaimed)
    module = BatchFormer(C)
    module(torch.randn(3, C))
    assert len(training_checks._unclaimed) == before + 1
    del module
    gc.collect()
    assert len(training_checks._unclaimed) == before
