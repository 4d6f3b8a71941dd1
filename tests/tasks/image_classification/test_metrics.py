"""The metrics of image classification against torchmetrics, and at their edges.

tests/tasks/longtail/test_metrics.py compares all of them with loops in numpy, over batches and processes.
"""

import torch
from torchmetrics.classification import MulticlassCalibrationError, MulticlassF1Score

from batchformer.tasks.image_classification.metrics import ClassificationMetrics

K = 8


def test_calibration_and_f1_equal_torchmetrics_own() -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(K, (1000,), generator=generator)
    logits = torch.randn(1000, K, generator=generator)
    logits[torch.arange(1000), target] += 1.5
    metrics = ClassificationMetrics(K)
    metrics.update(logits, target)
    result = metrics.compute()
    torch.testing.assert_close(result["ece"], MulticlassCalibrationError(K, n_bins=15)(logits.softmax(1), target))
    torch.testing.assert_close(result["macro_f1"], MulticlassF1Score(K, average="macro")(logits, target))


def test_fewer_than_five_classes_make_top5_one() -> None:
    metrics = ClassificationMetrics(3)
    metrics.update(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert float(metrics.compute()["top5"]) == 1.0


def test_certain_and_right_is_perfectly_calibrated_and_certain_and_wrong_is_not() -> None:
    certain = 1000 * torch.eye(3)
    for target, expected in ((torch.arange(3), 0.0), (torch.tensor([1, 2, 0]), 1.0)):
        metrics = ClassificationMetrics(3)
        metrics.update(certain, target)
        assert float(metrics.compute()["ece"]) == expected


def test_equal_logits_go_to_the_first_class_in_top1_and_top5_alike() -> None:
    metrics = ClassificationMetrics(7)
    metrics.update(torch.zeros(7, 7), torch.arange(7))
    result = metrics.compute()
    torch.testing.assert_close(result["top1"], torch.tensor(1 / 7))
    torch.testing.assert_close(result["top5"], torch.tensor(5 / 7))
