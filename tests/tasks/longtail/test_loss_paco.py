"""PaCo's loss against a plain loop in fp64."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchformer.tasks.longtail.loss import balanced_softmax
from batchformer.tasks.longtail.loss_paco import paco

A, M, D, K = 6, 11, 8, 4
COUNTS = torch.tensor([300, 50, 7, 2])


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    queries, keys = F.normalize(draw(A, D), dim=1), F.normalize(draw(M, D), dim=1)
    target = torch.randint(K, (A,), generator=generator)
    key_target = torch.randint(-1, K, (M,), generator=generator)
    key_target[0] = -1  # at least one empty slot
    return 2 * draw(A, K), queries, target, keys, key_target


def slow_paco(
    logits: Tensor,
    queries: Tensor,
    target: Tensor,
    keys: Tensor,
    key_target: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    temperature: float,
) -> float:
    total = 0.0
    prior = [int(n) / int(COUNTS.sum()) for n in COUNTS]
    for i in range(len(target)):
        centers = [float(logits[i, k]) + math.log(prior[k]) for k in range(K)]
        contrast = []  # (similarity, class)
        for j in range(len(target)):
            if j != i:
                contrast.append((float(queries[i] @ queries[j]) / temperature, int(target[j])))
        for j in range(len(key_target)):
            if int(key_target[j]) >= 0:
                contrast.append((float(queries[i] @ keys[j]) / temperature, int(key_target[j])))
        denominator = sum(math.exp(c) for c in centers) + gamma * sum(math.exp(s) for s, _ in contrast)
        weight, value = beta, beta * (centers[int(target[i])] - math.log(denominator))
        for similarity, label in contrast:
            if label == int(target[i]):
                weight += alpha
                value += alpha * (similarity - math.log(denominator))
        total -= value / weight
    return total / len(target)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("beta", "temperature"), [(1.0, 0.2), (0.3, 0.05)])
def test_paco_equals_the_loop(alpha: float, beta: float, gamma: float, temperature: float) -> None:
    settings: dict[str, Any] = {"alpha": alpha, "beta": beta, "gamma": gamma, "temperature": temperature}
    value = paco(*case(), COUNTS, **settings)
    assert float(value) == pytest.approx(slow_paco(*case(), **settings), rel=1e-10)


def test_doubled_anchors_meet_the_same_keys() -> None:
    logits, queries, target, keys, key_target = case()
    other_logits, other_queries, *_ = case(seed=1)
    doubled = (torch.cat([logits, other_logits]), torch.cat([queries, other_queries]), torch.cat([target, target]))
    settings: dict[str, Any] = {"alpha": 0.05, "beta": 1.0, "gamma": 1.0, "temperature": 0.2}
    value = paco(*doubled, keys, key_target, COUNTS, **settings)
    assert float(value) == pytest.approx(slow_paco(*doubled, keys, key_target, **settings), rel=1e-10)


def test_without_contrast_it_is_balanced_softmax() -> None:
    logits, queries, target, keys, key_target = case()
    value = paco(logits, queries, target, keys, key_target, COUNTS, alpha=0.0, gamma=0.0)
    torch.testing.assert_close(value, balanced_softmax(logits, target, COUNTS))


def test_an_empty_slot_has_no_influence() -> None:
    logits, queries, target, keys, key_target = case()
    changed = keys.clone()
    changed[key_target < 0] = 100.0
    before, after = (paco(logits, queries, target, k, key_target, COUNTS) for k in (keys, changed))
    assert float(before) == float(after)


def test_keys_carry_no_gradient_and_queries_do() -> None:
    logits, queries, target, keys, key_target = case()
    for x in (logits, queries, keys):
        x.requires_grad_()
    paco(logits, queries, target, keys, key_target, COUNTS).backward()
    assert keys.grad is None
    assert logits.grad is not None
    assert queries.grad is not None
    assert queries.grad.abs().sum() > 0


def test_gradients_equal_finite_differences() -> None:
    logits, queries, target, keys, key_target = case()
    assert torch.autograd.gradcheck(
        lambda z, q: paco(z, q, target, keys, key_target, COUNTS), (logits.requires_grad_(), queries.requires_grad_())
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stable_in_half_precision(dtype: torch.dtype) -> None:
    logits, queries, target, keys, key_target = case()
    half = (40 * logits).to(dtype).requires_grad_()
    embedded = queries.to(dtype).requires_grad_()
    counts = torch.tensor([300, 50, 7, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = paco(half, embedded, target, keys.to(dtype), key_target, counts, temperature=0.01)
    exact = (half.detach().float(), embedded.detach().float(), target, keys.to(dtype).float(), key_target, counts)
    torch.testing.assert_close(value, paco(*exact, temperature=0.01))
    value.backward()
    for x in (half, embedded):
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_no_positive_at_all_is_zero_rather_than_nan() -> None:
    logits, queries, target, keys, key_target = case()
    value = paco(logits, queries, target, keys, torch.full_like(key_target, -1), COUNTS, alpha=0.0, beta=0.0)
    assert float(value) == 0.0


def test_errors() -> None:
    logits, queries, target, keys, key_target = case()
    with pytest.raises(ValueError, match=r"switch mixup and cutmix off"):
        paco(logits, queries, F.one_hot(target, K).double(), keys, key_target, COUNTS)
    with pytest.raises(ValueError, match=r"queries \(6, D\) and keys \(11, D\), got \(5, 8\)"):
        paco(logits, queries[:5], target, keys, key_target, COUNTS)
