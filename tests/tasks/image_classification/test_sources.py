"""The split of images that come without one."""

import pytest
import torch

from batchformer.data.errors import DataError
from batchformer.tasks.image_classification.sources import stratified_split


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 55, 100])
@pytest.mark.parametrize("fractions", [(0.1, 0.2), (0.0, 0.2), (0.3, 0.0), (0.45, 0.5)])
def test_split_policy(n: int, fractions: tuple[float, float]) -> None:
    labels = torch.cat([torch.zeros(n), torch.ones(40)]).long()[torch.randperm(n + 40)]
    parts = stratified_split(labels, *fractions, seed=3)
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(n + 40))
    sizes = {name: int((labels[indices] == 0).sum()) for name, indices in parts.items()}
    assert sizes["train"] >= 1
    assert (sizes["test"] >= 1) == (n >= 2 and fractions[1] > 0)
    assert (sizes["val"] >= 1) == (n >= (3 if fractions[1] else 2) and fractions[0] > 0)
    if n >= 10:
        assert abs(sizes["test"] - n * fractions[1]) <= 0.5
        assert abs(sizes["val"] - n * fractions[0]) <= 0.5
    again = stratified_split(labels, *fractions, seed=3)
    assert all(parts[name].equal(again[name]) for name in parts)


@pytest.mark.parametrize("fractions", [(-0.1, 0.2), (0.5, 0.5)])
def test_split_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="non-negative val_fraction and test_fraction with a sum below 1"):
        stratified_split(torch.zeros(5).long(), *fractions, seed=0)
