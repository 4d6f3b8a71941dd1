"""Every loss against a plain loop over samples and classes in fp64 that shares no code with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchformer.tasks.longtail import loss

N, K = 9, 5
COUNTS = torch.tensor([1000, 211, 40, 3, 1])


def data(kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a trained network's size, and targets of one kind."""
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(N, K, generator=generator, dtype=torch.float64)
    if kind == "indices":
        return logits, torch.randint(K, (N,), generator=generator)
    return logits, torch.rand(N, K, generator=generator, dtype=torch.float64).softmax(dim=1)


def shares(target: Tensor) -> list[list[float]]:
    """Targets as rows of probabilities."""
    if target.ndim == 2:
        return [[float(p) for p in row] for row in target]
    return [[1.0 if k == int(y) else 0.0 for k in range(K)] for y in target]


def slow_cross_entropy(logits: list[list[float]], target: Tensor, weight: list[float] | None = None) -> float:
    total, norm = 0.0, 0.0
    for row, p in zip(logits, shares(target), strict=True):
        exps = [math.exp(z) for z in row]
        for k in range(K):
            w = 1.0 if weight is None else weight[k]
            total -= w * p[k] * math.log(exps[k] / sum(exps))
            norm += w * p[k]
    return total / norm


def slow_weights(counts: Tensor, beta: float) -> list[float]:
    raw = [1 / sum(beta**i for i in range(max(int(n), 1))) for n in counts]  # the geometric sum itself
    return [w * len(raw) / sum(raw) for w in raw]


def slow_margins(counts: Tensor, largest: float) -> list[float]:
    raw = [1 / math.sqrt(math.sqrt(max(float(n), 1.0))) for n in counts]
    return [largest * m / max(raw) for m in raw]


@pytest.mark.parametrize("kind", ["indices", "soft"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_the_loop(kind: str, smoothing: float) -> None:
    logits, target = data(kind)
    smooth = torch.tensor(shares(target), dtype=torch.float64) * (1 - smoothing) + smoothing / K
    expected = slow_cross_entropy(logits.tolist(), smooth)
    assert float(loss.cross_entropy(logits, target, label_smoothing=smoothing)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_weighted_cross_entropy_equals_the_loop(kind: str) -> None:
    logits, target = data(kind)
    weight = torch.tensor([0.1, 0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = slow_cross_entropy(logits.tolist(), target, weight.tolist())
    assert float(loss.cross_entropy(logits, target, weight=weight)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_is_torchs_for_indices_and_the_same_for_one_hot(smoothing: float) -> None:
    logits, target = data("indices")
    weight = torch.rand(K, dtype=torch.float64)
    ours = loss.cross_entropy(logits, target, weight=weight, label_smoothing=smoothing)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target, weight=weight, label_smoothing=smoothing))
    hot = F.one_hot(target, K).double()
    torch.testing.assert_close(ours, loss.cross_entropy(logits, hot, weight=weight, label_smoothing=smoothing))


@pytest.mark.parametrize("kind", ["indices", "soft"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjustment_equals_the_loop(kind: str, tau: float) -> None:
    logits, target = data(kind)
    share = [int(n) / int(COUNTS.sum()) for n in COUNTS]
    adjusted = [[z + tau * math.log(q) for z, q in zip(row, share, strict=True)] for row in logits.tolist()]
    expected = slow_cross_entropy(adjusted, target)
    assert float(loss.logit_adjusted(logits, target, COUNTS, tau=tau)) == pytest.approx(expected, rel=1e-12)


def test_balanced_softmax_multiplies_the_exponentials_by_the_counts() -> None:
    logits, target = data("indices")
    total = 0.0
    for row, y in zip(logits.tolist(), target.tolist(), strict=True):
        weighted = [int(n) * math.exp(z) for n, z in zip(COUNTS, row, strict=True)]
        total -= math.log(weighted[y] / sum(weighted))
    assert float(loss.balanced_softmax(logits, target, COUNTS)) == pytest.approx(total / N, rel=1e-12)


def test_balanced_softmax_of_equal_counts_is_cross_entropy() -> None:
    logits, target = data("soft")
    torch.testing.assert_close(
        loss.balanced_softmax(logits, target, torch.full((K,), 7)), loss.cross_entropy(logits, target)
    )


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999])
def test_class_balanced_weights_equal_the_geometric_sum(beta: float) -> None:
    expected = torch.tensor(slow_weights(COUNTS, beta), dtype=torch.float64)
    torch.testing.assert_close(loss.class_balanced_weights(COUNTS, beta).double(), expected, rtol=1e-6, atol=0)


def test_class_balanced_weights_keep_their_digits_for_beta_near_one() -> None:
    weights = loss.class_balanced_weights(torch.tensor([2, 1]), beta=1 - 1e-9)
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 4 / 3]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["indices", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
def test_ldam_equals_the_loop(kind: str, weighted: bool) -> None:
    logits, target = data(kind)
    margins = slow_margins(COUNTS, 0.5)
    shifted = [
        [z - 30 * margins[k] * p[k] for k, z in enumerate(row)]
        for row, p in zip(logits.tolist(), shares(target), strict=True)
    ]
    weight = slow_weights(COUNTS, 0.9999) if weighted else None
    given = torch.tensor(weight, dtype=torch.float64) if weight else None
    expected = slow_cross_entropy(shifted, target, weight)
    assert float(loss.ldam(logits, target, COUNTS, weight=given)) == pytest.approx(expected, rel=1e-6)


ALL = {
    "cross_entropy": lambda z, y, n: loss.cross_entropy(
        z, y, weight=loss.class_balanced_weights(n), label_smoothing=0.1
    ),
    "balanced_softmax": loss.balanced_softmax,
    "logit_adjusted": lambda z, y, n: loss.logit_adjusted(z, y, n, tau=1.5),
    "ldam": loss.ldam,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_a_class_without_images_counts_as_one_image(name: str, kind: str) -> None:
    logits, target = data(kind)
    logits.requires_grad_()
    without = ALL[name](logits, target, torch.tensor([1000, 211, 40, 3, 0]))
    torch.testing.assert_close(without, ALL[name](logits, target, COUNTS))
    without.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["indices", "soft"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_fp32(name: str, kind: str, dtype: torch.dtype) -> None:
    logits, target = data(kind)
    half = (20 * logits).to(dtype).requires_grad_()  # exp() of these overflows fp16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = ALL[name](half, target if kind == "indices" else target.to(dtype), COUNTS)
    assert value.dtype == torch.float32
    exact = target if kind == "indices" else target.to(dtype).float()
    torch.testing.assert_close(value, ALL[name](half.detach().float(), exact, COUNTS))
    value.backward()
    assert half.grad is not None
    assert half.grad.isfinite().all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_gradients_equal_finite_differences(name: str, kind: str) -> None:
    logits, target = data(kind)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ALL[name](z, target, COUNTS), (logits,), rtol=1e-4)


def test_errors_name_what_came_and_the_way_out() -> None:
    logits, target = data("indices")
    with pytest.raises(ValueError, match=r"got \(9, 3, 5\).*average them over dim 1"):
        loss.cross_entropy(logits[:, None].expand(N, 3, K), target)
    with pytest.raises(ValueError, match=r"target of shape \(18,\).*got \(9,\).*handle.expand"):
        loss.balanced_softmax(torch.cat([logits, logits]), target, COUNTS)
    with pytest.raises(ValueError, match=r"counts of shape \(5,\).*got \(4,\)"):
        loss.ldam(logits, target, COUNTS[:4])
    with pytest.raises(ValueError, match=r"weight of shape \(5,\).*got \(6,\)"):
        loss.cross_entropy(logits, target, weight=torch.ones(6))
    with pytest.raises(ValueError, match=r"0 <= beta < 1, got 1.0"):
        loss.class_balanced_weights(COUNTS, beta=1.0)
    with pytest.raises(ValueError, match=r"counts of shape \(K,\)"):
        loss.ldam_margins(COUNTS[None])
