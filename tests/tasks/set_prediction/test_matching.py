"""The matcher: costs against a plain loop, assignments against every permutation, faults, and what it forms."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from batchformer.tasks.set_prediction import boxes, matching
from batchformer.tasks.set_prediction.matching import (
    Kind,
    MatchCosts,
    Matches,
    Stage,
    match,
    match_stages,
    pack,
    pair_costs,
)

L, Q, K = 3, 6, 4
KINDS: tuple[Kind, ...] = ("softmax", "focal")
Labels = list[dict[str, Tensor]]


def scene(kind: Kind, sizes: list[int], seed: int = 0, queries: int = Q) -> tuple[Tensor, Tensor, Labels]:
    """Logits, boxes and targets in fp64; row n has sizes[n] targets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    targets = [
        {"class_labels": torch.randint(K, (size,), generator=generator), "boxes": draw(size, 4) * 0.5 + 0.1}
        for size in sizes
    ]
    return 6 * draw(L, len(sizes), queries, K + (kind == "softmax")) - 3, draw(L, len(sizes), queries, 4), targets


def slow_cost(logits: list[float], box: Tensor, label: int, own: Tensor, costs: MatchCosts) -> float:
    if costs.kind == "softmax":
        exps = [math.exp(z) for z in logits]
        of_class = -exps[label] / sum(exps)
    else:
        p = 1 / (1 + math.exp(-logits[label]))
        hit = -costs.alpha * (1 - p) ** costs.gamma * math.log(p + 1e-8)
        of_class = hit + (1 - costs.alpha) * p**costs.gamma * math.log(1 - p + 1e-8)
    distance = sum(abs(a - b) for a, b in zip(box.tolist(), own.tolist(), strict=True))
    overlap = float(boxes.giou(boxes.to_corners(box), boxes.to_corners(own)))  # has a loop of its own in test_boxes
    return costs.class_ * of_class + costs.l1 * distance - costs.giou * overlap


def of_layer_and_row(matches: Matches, layer: int, row: int, sizes: list[int]) -> dict[int, int]:
    """Target of that row (from 0) -> query."""
    start = sum(sizes[:row])
    here = matches.rows_P == row
    own, queries = matches.targets_LP[layer, here] - start, matches.queries_LP[layer, here]
    return dict(zip(own.tolist(), queries.tolist(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_costs_equal_the_loop(kind: Kind) -> None:
    sizes = [2, 0, 3]
    costs = MatchCosts(kind, class_=1.5, l1=3.0, giou=0.7, alpha=0.3, gamma=1.5)
    logits, predicted, targets = scene(kind, sizes)
    found = pair_costs(logits, predicted, pack(targets, predicted), costs)
    assert found.shape == (L, sum(sizes), Q)
    flat = [(row, t) for row, size in enumerate(sizes) for t in range(size)]
    for layer, (m, (row, t)), query in itertools.product(range(L), enumerate(flat), range(Q)):
        label, own = int(targets[row]["class_labels"][t]), targets[row]["boxes"][t]
        expected = slow_cost(logits[layer, row, query].tolist(), predicted[layer, row, query], label, own, costs)
        assert float(found[layer, m, query]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_no_other_assignment_costs_less(kind: Kind, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More targets than queries in the last row: every query gets one."""
    sizes, queries = [2, 0, 3, 6], 4
    costs = MatchCosts(kind)
    logits, predicted, targets = scene(kind, sizes, queries=queries)
    monkeypatch.setattr(matching, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    matches = match(logits, predicted, targets, costs)
    cost = pair_costs(logits, predicted, pack(targets, predicted), costs)
    for layer, (row, size) in itertools.product(range(L), enumerate(sizes)):
        pairs = of_layer_and_row(matches, layer, row, sizes)
        assert len(pairs) == len(set(pairs.values())) == min(size, queries)
        block = cost[layer, sum(sizes[:row]) : sum(sizes[: row + 1])]
        if size > queries:
            block, pairs = block.T, {query: target for target, query in pairs.items()}
        totals = [
            sum(float(block[i, j]) for i, j in enumerate(chosen))
            for chosen in itertools.permutations(range(block.shape[1]), len(block))
        ]
        assert sum(float(block[i, j]) for i, j in pairs.items()) == pytest.approx(min(totals), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_targets_and_queries_are_matched_alike(kind: Kind) -> None:
    sizes = [3, 5]
    logits, predicted, targets = scene(kind, sizes)
    matches = match(logits, predicted, targets, MatchCosts(kind))
    order, places = torch.randperm(5), torch.randperm(Q)
    other = [targets[0], {name: value[order] for name, value in targets[1].items()}]
    moved = match(logits[:, :, places], predicted[:, :, places], other, MatchCosts(kind))
    for layer in range(L):
        expected = of_layer_and_row(matches, layer, 1, sizes)
        found = of_layer_and_row(moved, layer, 1, sizes)
        assert {int(order[t]): int(places[q]) for t, q in found.items()} == expected


def test_rows_do_not_see_each_other() -> None:
    sizes = [3, 2, 4]
    logits, predicted, targets = scene("softmax", sizes)
    matches = match(logits, predicted, targets, MatchCosts())
    for row in range(3):
        alone = match(logits[:, row : row + 1], predicted[:, row : row + 1], targets[row : row + 1], MatchCosts())
        for layer in range(L):
            assert of_layer_and_row(alone, layer, 0, sizes[row:]) == of_layer_and_row(matches, layer, row, sizes)


@pytest.mark.parametrize("kind", KINDS)
def test_no_targets_at_all(kind: Kind) -> None:
    matches = match(*scene(kind, [0, 0]), MatchCosts(kind))
    assert matches.rows_P.shape == (0,) and matches.queries_LP.shape == matches.targets_LP.shape == (L, 0)


class Watch(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_only_an_images_own_costs_are_formed(kind: Kind) -> None:
    rows, size = 48, 5
    logits, predicted, targets = scene(kind, [size] * rows)
    with Watch() as watch:
        match(logits, predicted, targets, MatchCosts(kind))
    own = L * Q * rows * size
    # At most the centre and corner coordinates of own pairs; every query with every target would be 16 times own pairs
    # for one layer.
    assert own <= watch.largest <= 8 * own


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e13])
@pytest.mark.parametrize("where", ["logits", "boxes"])
def test_predictions_that_are_not_finite_say_where(kind: Kind, value: float, where: str) -> None:
    logits, predicted, targets = scene(kind, [2, 0, 1])
    (logits if where == "logits" else predicted)[1, 1, 4, 0] = value  # a row without targets
    with pytest.raises(
        FloatingPointError, match=r"finite predictions.* in layers \[1\], rows \[1\]. The run has diverged"
    ):
        match(logits, predicted, targets, MatchCosts(kind))


@pytest.mark.parametrize("label", [-1, K])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_out_of_range_say_which(kind: Kind, label: int) -> None:
    logits, predicted, targets = scene(kind, [2, 0, 1])
    targets[2]["class_labels"][0] = label
    with pytest.raises(
        ValueError, match=rf"labels from 0 to {K - 1}, got \[{label}\] in rows \[2\]. Number the categories"
    ):
        match(logits, predicted, targets, MatchCosts(kind))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_target_boxes_that_are_none_say_where(value: float) -> None:
    logits, predicted, targets = scene("softmax", [2, 1])
    targets[1]["boxes"][0, 2] = value
    with pytest.raises(ValueError, match=r"finite with w and h not negative, got others in rows \[1\]"):
        match(logits, predicted, targets, MatchCosts())


def test_targets_without_width_and_inverted_predictions_are_matched() -> None:
    logits, predicted, targets = scene("softmax", [2, 1])
    targets[1]["boxes"][0, 2:] = 0
    predicted[..., 2:] *= -1
    assert match(logits, predicted, targets, MatchCosts()).queries_LP.shape == (L, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(3, 4)}, r"got \(2,\) and \(3, 4\) in row 1"),
        ({"class_labels": torch.zeros(2, 1, dtype=torch.int64)}, r"got \(2, 1\) and \(2, 4\) in row 1"),
        ({"boxes": None}, r"got none of \{'boxes'\} in row 1"),
    ],
)
def test_targets_of_other_shapes_say_which(change: dict[str, Any], message: str) -> None:
    logits, predicted, targets = scene("softmax", [1, 2])
    targets[1] = {name: value for name, value in {**targets[1], **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        match(logits, predicted, targets, MatchCosts())


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="kind 'softmax' or 'focal', got 'sigmoid'"):
        MatchCosts("sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cost that is not 0"):
        MatchCosts(class_=0, l1=0, giou=0)


def test_two_stages_are_matched_as_by_themselves() -> None:
    first, second = scene("focal", [2, 1, 0]), scene("focal", [1, 3, 2], seed=1, queries=40)
    stages = [Stage(logits, predicted, pack(targets, predicted)) for logits, predicted, targets in (first, second)]
    for together, alone in zip(match_stages(stages, MatchCosts("focal")), (first, second), strict=True):
        for a, b in zip(together, match(*alone, MatchCosts("focal")), strict=True):
            assert torch.equal(a, b)
