"""The learning rate at each step."""

import math

import pytest

from batchformer.tasks.training.schedule import learning_rate_factor
from batchformer.tasks.training.settings import OptimizerSettings


def test_schedules() -> None:
    steps = OptimizerSettings(schedule="step", milestones=[2, 4], gamma=0.1)
    assert [learning_rate_factor(s, 25, 5, steps) for s in (0, 9, 10, 19, 20)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = OptimizerSettings(schedule="cosine", per_epoch=True)
    (within,) = {learning_rate_factor(s, 20, 5, cosine) for s in range(5, 10)}
    assert within == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))
    assert learning_rate_factor(7, 20, 5, OptimizerSettings(schedule="constant")) == 1.0
