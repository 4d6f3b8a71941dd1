"""Post-processing against pixel-by-pixel loops."""

import pytest
import torch
from torch import Tensor

from batchformer.tasks.panoptic.maps import PanopticMap
from batchformer.tasks.panoptic.postprocess import Frame, instances, masks_at, panoptic_map

IS_THING = torch.tensor([True, False, True, False])
SAME = Frame((12, 16), (12, 16), (12, 16))


def loops(
    logits: Tensor, masks: Tensor, threshold: float, smallest: int
) -> tuple[list[list[int]], list[tuple[int, float]]]:
    """For each pixel the index of its segment (or -1), and class and confidence of the segments; one at a time."""
    queries = []
    for q in range(len(logits)):
        scores = torch.softmax(logits[q], 0).tolist()
        best = max(range(len(scores)), key=lambda k: scores[k])
        if best < len(IS_THING) and scores[best] > threshold:
            queries.append((scores[best], q, best))
    queries.sort(key=lambda entry: -entry[0])
    height, width = masks.shape[1:]
    segments: list[tuple[int, float]] = []
    segment_of: dict[int, int] = {}
    for score, q, label in queries:
        same = [s for s, (other, _) in enumerate(segments) if other == label and not bool(IS_THING[label])]
        segment_of[q] = same[0] if same else len(segments)
        if not same:
            segments.append((label, score))
    alive = set(range(len(segments)))
    while True:
        pixels = [[-1] * width for _ in range(height)]
        area = [0] * len(segments)
        for y in range(height):
            for x in range(width):
                able = [q for _, q, _ in queries if segment_of[q] in alive]
                if able:
                    pixels[y][x] = segment_of[max(able, key=lambda q: float(masks[q, y, x]))]
                    area[pixels[y][x]] += 1
        small = {s for s in alive if area[s] <= smallest}
        if not small:
            return pixels, segments
        alive -= small


def as_map(pixels: list[list[int]], segments: list[tuple[int, float]]) -> PanopticMap:
    used = sorted({s for row in pixels for s in row} - {-1})
    numbers = {s: index + 1 for index, s in enumerate(used)} | {-1: 0}
    return PanopticMap(
        torch.tensor([[numbers[s] for s in row] for row in pixels]),
        torch.tensor([segments[s][0] for s in used], dtype=torch.long),
        torch.tensor([segments[s][1] for s in used]),
        torch.zeros(len(used), dtype=torch.bool),
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("threshold", "smallest"), [(0.3, 4), (0.6, 12), (0.0, 40), (0.3, 200)])
def test_equals_the_loops(seed: int, threshold: float, smallest: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 2.5 * torch.randn(9, 5, generator=generator)
    masks = 4 * torch.randn(9, 12, 16, generator=generator) + 4 * torch.randn(9, 1, 1, generator=generator)
    found = panoptic_map(logits, masks, SAME, IS_THING, threshold=threshold, smallest=smallest)
    wanted = as_map(*loops(logits, masks, threshold, smallest))
    assert torch.equal(found.ids_HW, wanted.ids_HW)
    assert torch.equal(found.labels_S, wanted.labels_S)
    torch.testing.assert_close(found.scores_S, wanted.scores_S)


def test_the_random_cases_drop_and_merge() -> None:
    merged = dropped = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        logits = 2.5 * torch.randn(9, 5, generator=generator)
        masks = 4 * torch.randn(9, 12, 16, generator=generator) + 4 * torch.randn(9, 1, 1, generator=generator)
        labels = [k for k in logits.argmax(1).tolist() if k in (1, 3)]
        merged += len(labels) - len(set(labels))
        few = panoptic_map(logits, masks, SAME, IS_THING, threshold=0.0, smallest=40)
        many = panoptic_map(logits, masks, SAME, IS_THING, threshold=0.0, smallest=0)
        dropped += len(many.labels_S) - len(few.labels_S)
    assert merged > 5 and dropped > 5


def test_every_segment_has_pixels_and_every_stuff_class_is_one() -> None:
    logits = torch.full((6, 5), -9.0)
    logits[[0, 1, 2], 1] = 9.0  # one stuff class three times
    logits[[3, 4], 0] = 9.0  # a thing twice
    logits[5, 4] = 9.0  # no-object, with the loudest mask
    masks = torch.zeros(6, 12, 16)
    for q in range(5):
        masks[q, :, 3 * q : 3 * q + 3] = 5.0
    masks[5] = 100.0
    found = panoptic_map(logits, masks, SAME, IS_THING)
    assert sorted(found.labels_S.tolist()) == [0, 0, 1]
    assert found.masks_SHW.sum((1, 2)).min() > 4
    stuff = int((found.labels_S == 1).nonzero()[0])
    assert bool(found.masks_SHW[stuff][:, :9].all())


def test_nobody_is_confident() -> None:
    found = panoptic_map(torch.zeros(4, 5), torch.zeros(4, 12, 16), SAME, IS_THING)
    assert found.ids_HW.shape == (12, 16) and not bool(found.ids_HW.any())
    assert len(found.labels_S) == len(found.scores_S) == len(found.iscrowd_S) == 0
    assert len(instances(torch.eye(5)[[1, 3]] * 9, torch.zeros(2, 3, 4), SAME, IS_THING).labels_S) == 0


def test_padding_does_not_reach_the_map() -> None:
    """The same image alone and in a larger batch: the mask head's stride divides both."""
    masks = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    padded = torch.full((3, 12, 16), 50.0)
    padded[:, :8, :8] = masks
    padded[:, 8, :8], padded[:, :8, 8] = masks[:, -1], masks[:, :, -1]  # interpolation looks one pixel over the edge
    padded[:, 8, 8] = masks[:, -1, -1]
    alone = masks_at(masks, Frame((32, 32), (32, 32), (64, 48)))
    torch.testing.assert_close(masks_at(padded, Frame((48, 64), (32, 32), (64, 48))), alone)


def test_instances_choose_among_objects_and_keep_things() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0, 0.0, 5.0], [0.0, 3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 4.0, 0.0, 0.0]])
    masks = torch.stack([torch.full((3, 4), value) for value in (1.0, 1.0, -1.0)])
    found = instances(logits, masks, SAME, IS_THING)
    assert found.labels_S.tolist() == [0, 2], "no-object never wins, stuff is left out"
    torch.testing.assert_close(found.scores_S, logits.softmax(-1)[[0, 2], [0, 2]])
    assert [bool(mask.all()) for mask in found.masks_SHW] == [True, False]
    assert not bool(found.masks_SHW[1].any())


def test_focal_scores_are_sigmoids_without_a_class_for_nothing() -> None:
    logits = torch.tensor([[3.0, -3.0, -3.0, -3.0], [-3.0, 2.0, -3.0, 1.0], [-4.0, -4.0, -4.0, -4.0]])
    masks = torch.zeros(3, 12, 16)
    masks[0, :, :8], masks[1, :, 8:], masks[2] = 2.0, 2.0, 9.0
    found = panoptic_map(logits, masks, SAME, IS_THING, kind="focal", threshold=0.5)
    assert found.labels_S.tolist() == [0, 1]
    torch.testing.assert_close(found.scores_S, torch.tensor([3.0, 2.0]).sigmoid())
    things = instances(logits, masks, SAME, IS_THING, kind="focal")
    assert things.labels_S.tolist() == [0, 0], "every query whose best class is a thing, however unlikely"
