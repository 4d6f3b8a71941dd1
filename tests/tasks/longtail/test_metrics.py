"""The metrics against loops in numpy, and their behaviour where there is nothing to measure."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command
from ranks import processes, run_on_ranks
from torch import Tensor

from batchformer.tasks.longtail.imbalance import shot_groups
from batchformer.tasks.longtail.metrics import GROUPS, LongTailMetrics

K = 8
GROUP_CLASSES = {"many": [5, 0], "medium": [1, 2, 3], "few": [4, 6, 7]}


def predictions(samples: int = 300, seed: int = 0, absent: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Logits that are right about half of the time, and targets in which some classes do not occur."""
    generator = torch.Generator().manual_seed(seed)
    present = torch.tensor([k for k in range(K) if k not in absent])
    target = present[torch.randint(len(present), (samples,), generator=generator)]
    logits = torch.randn(samples, K, generator=generator)
    logits[torch.arange(samples), target] += 1.5
    return 2 * logits, target


def slow_metrics(logits: Tensor, target: Tensor, bins: int = 15) -> dict[str, float | list[float]]:
    """One sample and one class at a time."""
    z, y = logits.double().numpy(), target.numpy()
    predicted = [int(np.argmax(row)) for row in z]
    per_class, f1 = [], []
    for k in range(K):
        mine = [n for n in range(len(y)) if y[n] == k]
        per_class.append(sum(predicted[n] == k for n in mine) / len(mine) if mine else float("nan"))
        if mine:
            right = sum(predicted[n] == k for n in mine)
            precision = right / max(1, predicted.count(k))
            recall = right / len(mine)
            f1.append(2 * precision * recall / (precision + recall) if right else 0.0)
    error = 0.0
    confidence = [float(np.max(np.exp(row - row.max()) / np.exp(row - row.max()).sum())) for row in z]
    for b in range(bins):
        inside = [n for n in range(len(y)) if b / bins < confidence[n] <= (b + 1) / bins]
        if inside:
            accuracy = np.mean([predicted[n] == y[n] for n in inside])
            error += len(inside) / len(y) * abs(accuracy - np.mean([confidence[n] for n in inside]))
    result: dict[str, float | list[float]] = {
        "top1": float(np.mean([predicted[n] == y[n] for n in range(len(y))])),
        "top5": float(np.mean([y[n] in np.argsort(-z[n], kind="stable")[:5] for n in range(len(y))])),
        "macro_f1": float(np.mean(f1)),
        "ece": float(error),
        "per_class": per_class,
    }
    for name, classes in GROUP_CLASSES.items():
        values = [per_class[k] for k in classes if not np.isnan(per_class[k])]
        result[name] = float(np.mean(values)) if values else float("nan")
    return result


def assert_equal(found: dict[str, Tensor], expected: dict[str, float | list[float]]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("absent", [(), (0,), (4, 6, 7)])
@pytest.mark.parametrize("batch", [300, 37])
def test_all_metrics_equal_the_loop_whatever_the_batch_size(absent: tuple[int, ...], batch: int) -> None:
    logits, target = predictions(absent=absent)
    metrics = LongTailMetrics(K, GROUP_CLASSES)
    for start in range(0, len(target), batch):
        metrics.update(logits[start : start + batch], target[start : start + batch])
    assert_equal(metrics.compute(), slow_metrics(logits, target))


def test_an_absent_class_is_nan_and_left_out_of_the_means() -> None:
    logits, target = predictions(absent=(0, 4, 6, 7))
    metrics = LongTailMetrics(K, GROUP_CLASSES)
    metrics.update(logits, target)
    result = metrics.compute()
    assert result["per_class"].isnan().nonzero().flatten().tolist() == [0, 4, 6, 7]
    assert float(result["many"]) == float(result["per_class"][5])
    assert result["few"].isnan()
    assert not result["macro_f1"].isnan()


def test_an_empty_group_is_nan() -> None:
    logits, target = predictions()
    metrics = LongTailMetrics(K, {"many": list(range(K))})
    metrics.update(logits, target)
    result = metrics.compute()
    assert result["medium"].isnan()
    assert result["few"].isnan()
    torch.testing.assert_close(result["many"], result["per_class"].mean())


def test_groups_are_means_over_classes_not_over_samples() -> None:
    target = torch.tensor([0] * 9 + [1])
    logits = torch.zeros(10, 2)
    logits[:, 0] = 1.0  # right for the nine, wrong for the one
    metrics = LongTailMetrics(2, {"many": [0, 1]})
    metrics.update(logits, target)
    assert float(metrics.compute()["many"]) == 0.5
    assert float(metrics.compute()["top1"]) == pytest.approx(0.9)


def test_reset_and_an_empty_batch() -> None:
    logits, target = predictions()
    metrics = LongTailMetrics(K, GROUP_CLASSES)
    metrics.update(logits.flip(0), target)
    metrics.reset()
    metrics.update(logits[:0], target[:0])
    metrics.update(logits, target)
    assert_equal(metrics.compute(), slow_metrics(logits, target))


def test_half_precision_logits() -> None:
    logits, target = predictions()
    metrics = LongTailMetrics(K, GROUP_CLASSES)
    metrics.update(logits.bfloat16(), target)
    assert_equal(metrics.compute(), slow_metrics(logits.bfloat16().float(), target))


def test_a_diverged_network_is_never_right() -> None:
    metrics = LongTailMetrics(3, {"many": [0, 1, 2]})
    metrics.update(torch.full((3, 3), torch.nan), torch.arange(3))
    result = metrics.compute()
    assert float(result["top1"]) == float(result["many"]) == 0.0
    assert result["ece"].isnan()


def one_rank(rank: int, world: int, folder: Path) -> None:
    logits, target = predictions(301)
    cut = 100  # uneven: 100 and 201 samples
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    metrics = LongTailMetrics(K, GROUP_CLASSES)
    metrics.update(logits[mine], target[mine])
    torch.save(metrics.compute(), folder / f"rank{rank}.pt")


@processes
def test_two_processes_with_uneven_parts_report_the_whole(command: Command, tmp_path: Path) -> None:
    run_on_ranks(command, 2, one_rank, tmp_path, tmp_path)
    for rank in range(2):
        assert_equal(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), slow_metrics(*predictions(301)))


def test_groups_are_named_as_those_of_the_data() -> None:
    assert tuple(shot_groups(torch.tensor([1280, 101, 100, 20, 19, 0]))) == GROUPS


def test_errors() -> None:
    metrics = LongTailMetrics(K, GROUP_CLASSES)
    with pytest.raises(ValueError, match=r"logits \(N, 8\).*got \(4, 3, 8\).*Average the logits"):
        metrics.update(torch.zeros(4, 3, 8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets in 0\.\.7, got -1\.\.8"):
        metrics.update(torch.zeros(2, 8), torch.tensor([-1, 8]))
    with pytest.raises(ValueError, match=r"Unknown class groups \['rare'\]"):
        LongTailMetrics(K, {"rare": [0]})
    with pytest.raises(ValueError, match=r"classes in 0\.\.7, got \[8\]"):
        LongTailMetrics(K, {"many": [8]})
    with pytest.raises(ValueError, match=r"in two: \[1\]"):
        LongTailMetrics(K, {"many": [0, 1], "few": [1]})
