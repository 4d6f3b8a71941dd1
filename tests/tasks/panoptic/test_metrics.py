"""Panoptic quality against plain loops over segments and pixels, and what must hold of any metric of this kind."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from batchformer.tasks.panoptic.maps import PanopticMap
from batchformer.tasks.panoptic.metrics import PanopticMetrics, PanopticQuality, segment_matches
from batchformer.tasks.panoptic.postprocess import Instances

IS_THING = [True, True, False, False, True]


@dataclass
class Picture:
    """One image as files say it: an id for each pixel, and ``id -> (class, iscrowd)``."""

    pixels: Any
    segments: dict[int, tuple[int, bool]] = field(default_factory=dict)

    def map(self) -> PanopticMap:
        ids, facts = list(self.segments), list(self.segments.values())
        return PanopticMap.of(
            torch.from_numpy(self.pixels), ids, [label for label, _ in facts], [crowd for _, crowd in facts]
        )


def loops(pairs: list[tuple[Picture, Picture]], classes: list[int]) -> dict[str, float]:
    """The published definition, one segment after the other: (predicted, true) pictures to means over ``classes``."""
    iou = dict.fromkeys(range(len(IS_THING)), 0.0)
    tp, fp, fn = (dict.fromkeys(range(len(IS_THING)), 0) for _ in range(3))
    for predicted, truth in pairs:
        matched_true, matched_predicted = set(), set()
        void = truth.pixels == 0
        for t, (label, crowd) in truth.segments.items():
            for p, (guess, _) in predicted.segments.items():
                if crowd or label != guess:
                    continue
                mine, theirs = predicted.pixels == p, truth.pixels == t
                overlap = np.sum(mine & theirs) / np.sum((mine & ~void) | theirs)
                if overlap > 0.5:
                    iou[label] += overlap
                    tp[label] += 1
                    matched_true.add(t)
                    matched_predicted.add(p)
        crowd_of: dict[int, int] = {}
        for t, (label, crowd) in truth.segments.items():
            if crowd:
                crowd_of[label] = t
            elif t not in matched_true:
                fn[label] += 1
        for p, (label, _) in predicted.segments.items():
            if p not in matched_predicted:
                mine = predicted.pixels == p
                ignored = void | (truth.pixels == crowd_of[label]) if label in crowd_of else void
                if np.sum(mine & ignored) / np.sum(mine) <= 0.5:
                    fp[label] += 1
    met = [k for k in classes if tp[k] + fp[k] + fn[k]]
    if not met:
        return dict.fromkeys(("PQ", "SQ", "RQ"), float("nan"))
    errors = {k: tp[k] + fp[k] / 2 + fn[k] / 2 for k in met}
    return {
        "PQ": sum(iou[k] / errors[k] for k in met) / len(met),
        "SQ": sum(iou[k] / tp[k] if tp[k] else 0.0 for k in met) / len(met),
        "RQ": sum(tp[k] / errors[k] for k in met) / len(met),
    }


def expected(pairs: list[tuple[Picture, Picture]]) -> dict[str, float]:
    groups = {"": range(5), "_things": [0, 1, 4], "_stuff": [2, 3]}
    return {name + end: value for end, classes in groups.items() for name, value in loops(pairs, list(classes)).items()}


def draw_truth(random: np.random.Generator, void: bool = True) -> Picture:
    """Rectangles over each other, some of them crowds, with void between them."""
    pixels = np.zeros((24, 32), dtype=np.int64)
    segments = {}
    for _ in range(int(random.integers(1, 9))):
        y, x = random.integers(0, 20), random.integers(0, 28)
        number = int(random.integers(1, 2**24))
        pixels[y : y + random.integers(2, 16), x : x + random.integers(2, 20)] = number
        segments[number] = (int(random.integers(0, 5)), bool(random.random() < 0.25))
    if not void:
        pixels[pixels == 0] = 5
        segments[5] = (2, False)
    there = set(np.unique(pixels).tolist())
    return Picture(pixels, {number: facts for number, facts in segments.items() if number in there})


def perturb(truth: Picture, random: np.random.Generator) -> Picture:
    """Shift, cut in two, give other classes and new ids: some segments still match, some do not."""
    pixels = np.roll(truth.pixels, random.integers(-3, 4, 2), (0, 1))
    segments: dict[int, tuple[int, bool]] = {}
    fresh = np.zeros_like(pixels)
    for number, (label, _) in truth.segments.items():
        halves = [pixels == number]
        if random.random() < 0.3:
            cut = int(random.integers(0, 32))
            halves = [halves[0] & (np.arange(32) < cut), halves[0] & (np.arange(32) >= cut)]
        for half in halves:
            if half.any() and random.random() < 0.9:
                name = len(segments) + 1
                fresh[half] = name
                segments[name] = (label if random.random() < 0.8 else int(random.integers(0, 5)), False)
    if random.random() < 0.5:  # something where nothing is
        fresh[:6, :6] = 100
        segments[100] = (int(random.integers(0, 5)), False)
    there = set(np.unique(fresh).tolist())
    return Picture(fresh, {number: facts for number, facts in segments.items() if number in there})


def figures(pairs: list[tuple[Picture, Picture]]) -> dict[str, float]:
    metric = PanopticQuality(IS_THING)
    for predicted, truth in pairs:
        metric.update([predicted.map()], [truth.map()])
    return {name: float(value) for name, value in metric.compute().items() if name != "per_class"}


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_loops_on_perturbed_pictures(seed: int) -> None:
    random = np.random.default_rng(seed)
    pairs = []
    for _ in range(6):
        truth = draw_truth(random, void=bool(random.random() < 0.7))
        pairs.append((perturb(truth, random), truth))
    assert figures(pairs) == pytest.approx(expected(pairs), abs=1e-12, nan_ok=True)


def test_the_perturbed_pictures_have_everything_that_the_definition_speaks_of() -> None:
    random = np.random.default_rng(0)
    pairs = [(perturb(truth, random), truth) for truth in (draw_truth(random) for _ in range(60))]
    metric = PanopticQuality(IS_THING)
    for predicted, truth in pairs:
        metric.update([predicted.map()], [truth.map()])
    assert bool((metric.tp > 0).all() and (metric.fp > 0).all() and (metric.fn > 0).all())
    blind = [(p, Picture(t.pixels, {n: (label, False) for n, (label, _) in t.segments.items()})) for p, t in pairs]
    assert figures(blind) != figures(pairs), "crowds make a difference"
    assert 0.1 < figures(pairs)["PQ"] < 0.9, "some segments match, some do not"


def test_by_hand() -> None:
    """Thing 0: 8 of 10 pixels found. Stuff 2: found as thing 1. A guess on void and one on a crowd are no errors."""
    truth = Picture(np.zeros((4, 10), dtype=np.int64), {11: (0, False), 12: (2, False), 13: (4, True)})
    truth.pixels[0], truth.pixels[1], truth.pixels[2] = 11, 12, 13
    guess = Picture(np.zeros((4, 10), dtype=np.int64), {1: (0, False), 2: (1, False), 3: (4, False), 4: (3, False)})
    guess.pixels[0, :8], guess.pixels[1], guess.pixels[2, :5], guess.pixels[3, :5] = 1, 2, 3, 4
    values = figures([(guess, truth)])
    assert values["PQ"] == pytest.approx(0.8 / 3)  # classes 0, 1 and 2 were met
    assert values["SQ"] == pytest.approx(0.8 / 3)
    assert values["RQ"] == pytest.approx(1 / 3)
    assert values["PQ_things"] == pytest.approx(0.4)
    assert values["PQ_stuff"] == 0.0


def test_exactly_one_half_is_no_match() -> None:
    truth = Picture(np.array([[1, 1, 2, 2]]), {1: (0, False), 2: (2, False)})
    guess = Picture(np.array([[1, 1, 1, 1]]), {1: (0, False)})
    found = segment_matches(guess.map(), truth.map(), 5)
    assert (int(found["tp"].sum()), int(found["fp"].sum()), int(found["fn"].sum())) == (0, 1, 2)


def test_perfect_empty_and_void() -> None:
    truth = draw_truth(np.random.default_rng(3), void=False)
    plain = Picture(truth.pixels, {n: (label, False) for n, (label, _) in truth.segments.items()})
    assert figures([(plain, plain)])["PQ"] == 1.0
    nothing = Picture(np.zeros((24, 32), dtype=np.int64))
    assert figures([(nothing, plain)])["PQ"] == 0.0
    # Where the truth is void there is nothing to be wrong about, and nothing to measure.
    assert all(np.isnan(value) for value in figures([(plain, nothing)]).values())


def test_adds_up_over_batches_and_does_not_depend_on_numbering() -> None:
    random = np.random.default_rng(1)
    pairs = [(perturb(truth, random), truth) for truth in (draw_truth(random) for _ in range(4))]
    together = PanopticQuality(IS_THING)
    together.update([p.map() for p, _ in pairs], [t.map() for _, t in pairs])
    assert float(together.compute()["PQ"]) == pytest.approx(figures(pairs)["PQ"], abs=1e-12)
    turned = [
        (Picture(-p.pixels % 1000, {-n % 1000: facts for n, facts in reversed(p.segments.items())}), t)
        for p, t in pairs
    ]
    assert figures(turned) == pytest.approx(figures(pairs), abs=1e-12)


def test_errors_explain_themselves() -> None:
    truth = Picture(np.array([[1, 1]]), {1: (0, False)})
    with pytest.raises(ValueError, match=r"truth's size \(1, 2\), got \(1, 1\)"):
        segment_matches(Picture(np.array([[1]]), {1: (0, False)}).map(), truth.map(), 5)
    with pytest.raises(ValueError, match="a segment without any"):
        segment_matches(Picture(np.array([[1, 1]]), {1: (0, False), 2: (0, False)}).map(), truth.map(), 5)
    with pytest.raises(ValueError, match=r"also the ids \[9\]"):
        Picture(np.array([[1, 9]]), {1: (0, False)}).map()


def test_mask_ap_counts_things_and_leaves_crowds_out() -> None:
    pixels = np.zeros((20, 20), dtype=np.int64)
    pixels[:10, :10], pixels[:10, 10:], pixels[10:] = 1, 2, 3
    truth = Picture(pixels, {1: (0, False), 2: (0, True), 3: (2, False)}).map()
    metrics = PanopticMetrics(IS_THING)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}

    def mask_ap(found: Instances) -> float:
        metrics.reset()
        metrics.update([{**none, "scores": torch.zeros(0)}], [{**none, "image_id": 1}], [(truth, found, truth)])
        return float(metrics.compute()["mask_AP"])

    # The best guess is right; one on the crowd, which is no error; nobody asks for stuff.
    found = Instances(truth.masks_SHW[:2], torch.tensor([0.9, 0.95]), torch.tensor([0, 0]))
    assert mask_ap(found) == pytest.approx(1.0)
    wrong = Instances(truth.masks_SHW[2:], torch.tensor([0.9]), torch.tensor([0]))
    assert mask_ap(wrong) == 0.0
    assert mask_ap(Instances(*(part[:0] for part in wrong))) == 0.0, "nothing found is no better than wrong"
