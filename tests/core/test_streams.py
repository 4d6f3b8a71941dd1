"""Doubling and splitting of whatever models return and losses want."""

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batchformer import expand, split, stream_loss

Pair = namedtuple("Pair", ["logits", "boxes"])


class Output(OrderedDict[str, Any]):
    """Like transformers' ModelOutput."""


def test_class_indices_and_soft_targets() -> None:
    assert expand(torch.tensor([3, 1])).tolist() == [3, 1, 3, 1]
    soft = torch.rand(4, 5)
    assert torch.equal(expand(soft), torch.cat((soft, soft)))


def test_a_list_has_an_entry_for_each_sample() -> None:
    targets = [{"boxes": torch.rand(2, 4)}, {"boxes": torch.rand(0, 4)}]
    doubled = expand(targets)
    assert len(doubled) == 4
    assert doubled[2] is targets[0]
    assert len(targets) == 2


def test_tuples_and_dicts_hold_targets_of_the_whole_batch() -> None:
    first, second, weight = torch.tensor([0, 1]), torch.tensor([1, 0]), 0.3  # mixup
    a, b, c = expand((first, second, weight))
    assert (a.tolist(), b.tolist(), c) == ([0, 1, 0, 1], [1, 0, 1, 0], 0.3)
    doubled = expand({"labels": first, "nested": {"mask": None, "names": ["x", "y"]}, "scale": torch.tensor(2.0)})
    assert doubled["labels"].tolist() == [0, 1, 0, 1]
    assert doubled["nested"] == {"mask": None, "names": ["x", "y", "x", "y"]}
    assert doubled["scale"] == 2.0
    assert isinstance(expand(Pair(first, second)), Pair)


@pytest.mark.parametrize("weight", [0.3, 1, torch.tensor(0.3)])
def test_mixups_list_is_no_list_of_samples(weight: Any) -> None:
    first, second = torch.tensor([0, 1]), torch.tensor([1, 0])
    with pytest.raises(
        TypeError, match=r"one entry for each sample, got tensors beside numbers .*expand\(\(y_a, y_b, lam"
    ):
        expand([first, second, weight])
    with pytest.raises(TypeError, match="tensors beside numbers"):
        expand({"labels": [first, second, weight]})
    assert expand([0, 1]) == [0, 1, 0, 1]
    assert len(expand([torch.tensor(1), torch.tensor(2)])) == 4
    assert len(expand([first, second, None])) == 6


@pytest.mark.parametrize("targets", [np.zeros(3), {1, 2}, object()])
def test_other_types_are_refused(targets: object) -> None:
    with pytest.raises(TypeError, match=r"Expected targets as a tensor, .* got \w+. Convert it"):
        expand(targets)


def test_split_undoes_expand() -> None:
    stream = {"a": torch.rand(3, 2), "b": (torch.rand(3), [torch.rand(3, 1)]), "c": None, "d": torch.tensor(1.0)}
    plain, mixed = split(expand({**stream, "b": stream["a"]}))
    assert torch.equal(plain["a"], stream["a"])
    assert torch.equal(mixed["b"], stream["a"])
    assert plain["c"] is None
    assert mixed["d"] == 1.0


def test_split_keeps_types() -> None:
    rows = torch.arange(4)
    plain, mixed = split(Output(logits=rows, loss=torch.tensor(0.5)))
    assert isinstance(plain, Output)
    assert (plain["logits"].tolist(), mixed["logits"].tolist(), mixed["loss"].item()) == ([0, 1], [2, 3], 0.5)
    plain, mixed = split(Pair(rows, [rows, 2 * rows]))
    assert isinstance(mixed, Pair)
    assert [level.tolist() for level in mixed.boxes] == [[2, 3], [4, 6]]
    assert split([{"scores": 1}, {"scores": 2}]) == ([{"scores": 1}], [{"scores": 2}])
    from transformers.modeling_outputs import ImageClassifierOutput

    plain, mixed = split(ImageClassifierOutput(logits=rows))
    assert isinstance(mixed, ImageClassifierOutput)
    assert mixed.logits.tolist() == [2, 3]


def test_odd_rows_and_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match="even number of rows, .*, got 3"):
        split(torch.rand(3))
    with pytest.raises(TypeError, match="tensors, dicts, tuples or lists, got object"):
        split(object())


def test_loss_is_the_weighted_mean_of_both_streams() -> None:
    logits, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 3, 1])
    first, second = F.cross_entropy(logits[:3], labels), F.cross_entropy(logits[3:], labels)
    for weights, expected in (((1, 1), (first + second) / 2), ((1, 3), (first + 3 * second) / 4), ((0, 2), second)):
        found = stream_loss(F.cross_entropy, logits, labels, two_streams=True, weights=weights)
        torch.testing.assert_close(found, expected)
    both = stream_loss(F.cross_entropy, logits, labels, two_streams=True)
    torch.testing.assert_close(both, F.cross_entropy(logits, expand(labels)))
    torch.testing.assert_close(
        stream_loss(F.cross_entropy, logits[:3], labels, two_streams=False, weights=(0, 1)), first
    )
    for weights in ((0, 0), (-1, 2)):
        with pytest.raises(ValueError, match="stream weights that are not negative and not both zero"):
            stream_loss(F.cross_entropy, logits, labels, two_streams=True, weights=weights)


def test_equal_streams_give_a_plain_runs_loss() -> None:
    """The loss has one scale in plain and plugged-in runs."""
    logits, labels = torch.randn(5, 4), torch.arange(5) % 4
    doubled = stream_loss(F.cross_entropy, expand(logits), labels, two_streams=True)
    torch.testing.assert_close(doubled, F.cross_entropy(logits, labels))
