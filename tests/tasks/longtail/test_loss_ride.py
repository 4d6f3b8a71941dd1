"""RIDE's losses against plain loops in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchformer.tasks.longtail import loss_ride
from batchformer.tasks.longtail.loss import class_balanced_weights

N, E, K = 7, 3, 4
COUNTS = torch.tensor([500, 60, 8, 2])


def softmax(row: list[float]) -> list[float]:
    exps = [math.exp(z) for z in row]
    return [e / sum(exps) for e in exps]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def logits_and_targets(kind: str = "indices", seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(N, E, K, generator=generator, dtype=torch.float64)
    if kind == "soft":
        return logits, torch.rand(N, K, generator=generator, dtype=torch.float64).softmax(dim=1)
    return logits, torch.randint(K, (N,), generator=generator)


def slow_ride(logits: Tensor, target: Tensor, diversity: float, temperature: list[float], weight: list[float]) -> float:
    """One expert, one sample, one class at a time."""
    margins = [n**-0.25 for n in COUNTS.tolist()]
    margins = [0.5 * m / max(margins) for m in margins]
    soft = target.tolist() if target.ndim == 2 else F.one_hot(target, K).double().tolist()
    mean_temperature = sum(temperature) / K
    total = 0.0
    for e in range(E):
        loss, norm, divergence = 0.0, 0.0, 0.0
        for n in range(N):
            z = logits[n, e].tolist()
            q = softmax([z[k] - 30 * margins[k] * soft[n][k] for k in range(K)])
            loss -= sum(weight[k] * soft[n][k] * math.log(q[k]) for k in range(K))
            norm += sum(weight[k] * soft[n][k] for k in range(K))
            mean = [sum(float(logits[n, i, k]) for i in range(E)) / E for k in range(K)]
            tempered = (softmax([x[k] / temperature[k] for k in range(K)]) for x in (mean, z))
            divergence += kl(*tempered)
        total += loss / norm + diversity * mean_temperature**2 * divergence / N
    return total


@pytest.mark.parametrize("kind", ["indices", "soft"])
@pytest.mark.parametrize("diversity", [-0.2, -0.45, 0.0])
def test_ride_before_reweighting_equals_the_loop(kind: str, diversity: float) -> None:
    logits, target = logits_and_targets(kind)
    value = loss_ride.ride(logits, target, COUNTS, diversity=diversity, temperature=1.3)
    assert float(value) == pytest.approx(slow_ride(logits, target, diversity, [1.3] * K, [1.0] * K), rel=1e-6)


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_ride_with_weights_and_temperatures_equals_the_loop(kind: str) -> None:
    logits, target = logits_and_targets(kind)
    weight, temperature = class_balanced_weights(COUNTS), loss_ride.diversity_temperature(COUNTS, 0.3)
    value = loss_ride.ride(logits, target, COUNTS, diversity=-0.2, temperature=temperature, weight=weight)
    expected = slow_ride(logits, target, -0.2, temperature.tolist(), weight.tolist())
    assert float(value) == pytest.approx(expected, rel=1e-6)


def test_diversity_temperature_equals_its_formula() -> None:
    raw = [K * n / 570 * 0.05 + 0.95 for n in COUNTS.tolist()]
    expected = torch.tensor([t / max(raw) for t in raw])
    torch.testing.assert_close(loss_ride.diversity_temperature(COUNTS, 0.05), expected)
    torch.testing.assert_close(loss_ride.diversity_temperature(COUNTS, 0.0), torch.ones(K))


def test_the_mean_of_the_experts_is_a_constant_in_the_diversity_term() -> None:
    logits, target = logits_and_targets()
    logits.requires_grad_()
    base = loss_ride.ride(logits, target, COUNTS, diversity=0.0)
    term = loss_ride.ride(logits, target, COUNTS, diversity=-1.0) - base
    (gradient,) = torch.autograd.grad(term, logits)
    # d KL(p || softmax(z)) / dz = softmax(z) - p where p is a constant.
    p, q = logits.detach().mean(dim=1, keepdim=True).softmax(-1), logits.detach().softmax(-1)
    torch.testing.assert_close(gradient, -(q - p) / N)


def test_negative_diversity_drives_experts_apart() -> None:
    logits, target = logits_and_targets()
    logits = logits.mean(dim=1, keepdim=True) + 0.01 * logits
    optimized = logits.clone().requires_grad_()
    for _ in range(50):
        base = loss_ride.ride(optimized, target, COUNTS, diversity=0.0)
        term = loss_ride.ride(optimized, target, COUNTS, diversity=-0.5) - base
        (gradient,) = torch.autograd.grad(term, optimized)
        optimized = (optimized - gradient).detach().requires_grad_()
    assert optimized.std(dim=1).mean() > 1.2 * logits.std(dim=1).mean()


def test_distillation_equals_the_loop_and_trains_only_the_student() -> None:
    student, _ = logits_and_targets()
    teacher, _ = logits_and_targets(seed=1)
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss_ride.distillation(student, teacher, temperature=1.5)
    expected = 0.0
    for n in range(N):
        pair = (x.detach()[n].mean(dim=0) / 1.5 for x in (teacher, student))
        p, q = (softmax(x.tolist()) for x in pair)
        expected += 1.5**2 * kl(p, q) / N
    assert float(value.detach()) == pytest.approx(expected, rel=1e-9)
    value.backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_distillation_refuses_doubled_rows() -> None:
    with pytest.raises(ValueError, match=r"\(8, 4\) and \(4, 4\).*once for each stream"):
        loss_ride.distillation(torch.zeros(8, K), torch.zeros(4, K))


def test_routing_equals_the_loop() -> None:
    logits, target = logits_and_targets(seed=3)
    for n in range(0, N, 2):  # the last expert rescues every second sample
        logits[n, -1, target[n]] += 20
    help_logits = torch.randn(N, E - 1, dtype=torch.float64)
    total, positives = 0.0, 0
    for n in range(N):
        right = []
        for e in range(E):
            running = [sum(float(logits[n, i, k]) for i in range(e + 1)) / (e + 1) for k in range(K)]
            right.append(max(range(K), key=running.__getitem__) == int(target[n]))
        for e in range(E - 1):
            sigmoid = 1 / (1 + math.exp(-float(help_logits[n, e])))
            wanted = not right[e] and any(right[e + 1 :])
            positives += wanted
            total -= 100 * math.log(sigmoid) if wanted else math.log(1 - sigmoid)
    assert 0 < positives < N * (E - 1)  # else the oracle would not see the weight
    expected = total / (N * (E - 1))
    assert float(loss_ride.routing(help_logits, logits, target)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32_with_finite_gradients(dtype: torch.dtype) -> None:
    logits, target = logits_and_targets()
    half = (10 * logits).to(dtype).requires_grad_()
    counts = torch.tensor([500, 60, 8, 0])
    weight, temperature = class_balanced_weights(counts), loss_ride.diversity_temperature(counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss_ride.ride(half, target, counts, weight=weight, temperature=temperature)
        value = value + loss_ride.distillation(half, half.detach().flip(0))
    exact = half.detach().float()
    expected = loss_ride.ride(exact, target, counts, weight=weight, temperature=temperature)
    expected = expected + loss_ride.distillation(exact, exact.flip(0))
    torch.testing.assert_close(value, expected)
    value.backward()
    assert half.grad is not None
    assert half.grad.isfinite().all()


def test_errors() -> None:
    logits, target = logits_and_targets()
    with pytest.raises(ValueError, match=r"\(N, experts, K\), got \(7, 4\).*experts=3"):
        loss_ride.ride(logits[:, 0], target, COUNTS)
    with pytest.raises(ValueError, match=r"0 <= factor < 1, got 1.0"):
        loss_ride.diversity_temperature(COUNTS, 1.0)
    with pytest.raises(ValueError, match=r"help_logits of shape \(7, 2\), got \(7, 3\)"):
        loss_ride.routing(torch.zeros(7, 3), logits, target)
