"""The criteria: when they reweight, what they pass on, what they refuse."""

import pytest
import torch

from batchformer.tasks.longtail import loss, loss_paco, loss_ride
from batchformer.tasks.longtail.criterion import LOSSES, build_loss
from batchformer.tasks.longtail.paco import PaCoOutput

COUNTS = torch.tensor([100, 30, 4])
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([0, 0, 1, 1, 2, 2])
WEIGHT = loss.class_balanced_weights(COUNTS)


def test_plain_losses_do_not_depend_on_the_epoch() -> None:
    expected = {
        "cross_entropy": loss.cross_entropy(LOGITS, TARGET),
        "balanced_softmax": loss.balanced_softmax(LOGITS, TARGET, COUNTS),
        "class_balanced": loss.cross_entropy(LOGITS, TARGET, weight=WEIGHT),
        "logit_adjusted": loss.logit_adjusted(LOGITS, TARGET, COUNTS),
        "ldam": loss.ldam(LOGITS, TARGET, COUNTS),
    }
    for name, value in expected.items():
        for epoch in (0, 199):
            torch.testing.assert_close(build_loss(name, COUNTS)(LOGITS, TARGET, epoch), value)
    assert set(expected) | {"ride", "paco"} == set(LOSSES)


def test_settings_arrive() -> None:
    torch.testing.assert_close(
        build_loss("cross_entropy", COUNTS, label_smoothing=0.1)(LOGITS, TARGET, 0),
        loss.cross_entropy(LOGITS, TARGET, label_smoothing=0.1),
    )
    torch.testing.assert_close(
        build_loss("logit_adjusted", COUNTS, tau=2.0)(LOGITS, TARGET, 0),
        loss.logit_adjusted(LOGITS, TARGET, COUNTS, tau=2.0),
    )
    torch.testing.assert_close(
        build_loss("class_balanced", COUNTS, beta=0.9)(LOGITS, TARGET, 0),
        loss.cross_entropy(LOGITS, TARGET, weight=loss.class_balanced_weights(COUNTS, 0.9)),
    )


def test_ldam_reweights_from_its_epoch_on() -> None:
    criterion = build_loss("ldam", COUNTS, reweight_epoch=160)
    plain, weighted = loss.ldam(LOGITS, TARGET, COUNTS), loss.ldam(LOGITS, TARGET, COUNTS, weight=WEIGHT)
    assert not torch.allclose(plain, weighted)
    torch.testing.assert_close(criterion(LOGITS, TARGET, 159), plain)
    torch.testing.assert_close(criterion(LOGITS, TARGET, 160), weighted)


def test_ride_reweights_weights_and_temperatures_from_its_epoch_on() -> None:
    logits = torch.randn(6, 2, 3)
    criterion = build_loss("ride", COUNTS, reweight_epoch=80, diversity=-0.45, reweight_factor=0.3)
    torch.testing.assert_close(criterion(logits, TARGET, 79), loss_ride.ride(logits, TARGET, COUNTS, diversity=-0.45))
    late = loss_ride.ride(
        logits,
        TARGET,
        COUNTS,
        diversity=-0.45,
        weight=WEIGHT,
        temperature=loss_ride.diversity_temperature(COUNTS, 0.3),
    )
    torch.testing.assert_close(criterion(logits, TARGET, 80), late)


def test_ride_adds_the_teacher() -> None:
    logits, teacher = torch.randn(6, 2, 3), torch.randn(6, 6, 3)
    criterion = build_loss("ride", COUNTS, distill_factor=0.5)
    with_teacher = criterion(logits, TARGET, 0, teacher_logits=teacher)
    term = loss_ride.distillation(logits, teacher, temperature=1.5)
    torch.testing.assert_close(with_teacher, criterion(logits, TARGET, 0) + 0.5 * term)


def test_paco_takes_the_networks_output() -> None:
    unit = torch.nn.functional.normalize(torch.randn(9, 4), dim=1)
    output = PaCoOutput(LOGITS, unit[:6], unit[6:], torch.tensor([0, 1, -1]))
    torch.testing.assert_close(
        build_loss("paco", COUNTS, alpha=0.1)(output, TARGET, 0),
        loss_paco.paco(LOGITS, unit[:6], TARGET, unit[6:], output.key_targets, COUNTS, alpha=0.1),
    )


def test_a_simple_loss_sums_over_experts() -> None:
    logits = torch.randn(6, 2, 3)
    criterion = build_loss("balanced_softmax", COUNTS)
    expected = criterion(logits[:, 0], TARGET, 0) + criterion(logits[:, 1], TARGET, 0)
    torch.testing.assert_close(criterion(logits, TARGET, 0), expected)


def test_a_criterion_leaves_nothing_in_a_checkpoint() -> None:
    for name in LOSSES:
        criterion = build_loss(name, COUNTS)
        assert not criterion.state_dict()
        assert not list(criterion.parameters())


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"Unknown loss 'focal'.*balanced_softmax"):
        build_loss("focal", COUNTS)
    with pytest.raises(ValueError, match=r"'ldam' has no setting tau. It has: reweight_epoch"):
        build_loss("ldam", COUNTS, tau=1.0)
    with pytest.raises(ValueError, match=r"'balanced_softmax' has no setting beta. It has: none"):
        build_loss("balanced_softmax", COUNTS, beta=1.0)
    for counts in (torch.tensor([]), torch.tensor([0, 0]), torch.tensor([3, -1]), torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"training images of each class"):
            build_loss("cross_entropy", counts)
