"""Settings that recipes take from papers, worked out by hand from the published descriptions."""

import math

import pytest
from recipe_runs import settings_of

from batchformer.engine.config import parse
from batchformer.engine.recipes import find_recipe
from batchformer.tasks.training.schedule import learning_rate_factor
from batchformer.tasks.training.settings import OptimizerSettings


def test_an_override_of_one_loss_setting_keeps_the_others() -> None:
    recipe = find_recipe("longtail/cifar100-lt-ride")
    task = parse(recipe.path, ["--model.loss.settings.diversity=-0.2"], logger=False).model
    assert task.loss_settings.settings == {"reweight_epoch": 160, "diversity": -0.2, "reweight_factor": 0.05}


def rate(name: str, step: int, epochs: int, epoch_steps: int) -> float:
    settings = OptimizerSettings(**settings_of(find_recipe(name))["model"]["optimizer"])
    return settings.lr * learning_rate_factor(step, epochs * epoch_steps, epoch_steps, settings)


def test_schedules_are_the_published_ones() -> None:
    """A few points of each."""
    balanced = "longtail/cifar100-lt-balanced-softmax"  # 800 steps from .05 to .1, then a cosine
    assert rate(balanced, 0, 620, 21) == pytest.approx(0.05, abs=1e-4)
    assert rate(balanced, 399, 620, 21) == pytest.approx(0.075)
    assert rate(balanced, 799, 620, 21) == pytest.approx(0.1)
    assert rate(balanced, 800 + 6110, 620, 21) == pytest.approx(0.05, abs=1e-4)
    ride = "longtail/cifar100-lt-ride"  # by epoch: 1/5 .. 5/5, x.01 from 160, x.0001 from 180
    for epoch, expected in ((0, 0.02), (1, 0.04), (4, 0.1), (159, 0.1), (160, 1e-3), (179, 1e-3), (180, 1e-5)):
        for step in (0, 83):
            assert rate(ride, epoch * 84 + step, 200, 84) == pytest.approx(expected)
    paco = "longtail/imagenet-lt-r50-paco"  # by epoch: ten of warm-up, then a cosine
    assert rate(paco, 9 * 905 + 7, 400, 905) == pytest.approx(0.02)
    assert rate(paco, 205 * 905 + 7, 400, 905) == pytest.approx(0.01)
    steps = "longtail/imagenet-lt-r10-ride"
    assert [rate(steps, epoch * 226, 120, 226) for epoch in (59, 60, 80)] == pytest.approx([0.1, 0.01, 0.001])
    cosine = "longtail/imagenet-lt-r10-balanced-softmax"  # set at the start of each epoch, without warm-up
    assert [rate(cosine, s, 90, 905) for s in (0, 904, 905)] == pytest.approx(
        [0.05, 0.05, 0.025 * (1 + math.cos(math.pi / 90))]
    )


def test_the_panoptic_settings_are_the_published_ones() -> None:
    recipe = find_recipe("panoptic/coco-detr-r50")
    detector, masks = settings_of(recipe)["stages"]
    assert (detector["epochs"], masks["epochs"], masks["settings"]["model.optimizer.milestones"]) == (250, 25, [15])
    assert masks["settings"]["model.optimizer.lr"] == 1e-4
    task = parse(recipe.path, logger=False).model
    network, optimizer = task.network_settings, task.optimizer_settings
    assert (network.d_model, network.encoder_layers, network.decoder_layers, network.num_queries) == (256, 6, 6, 100)
    assert (optimizer.lr, optimizer.backbone_lr, optimizer.weight_decay) == (1e-4, 1e-5, 1e-4)
    module = task.batchformer
    assert (module.after, module.share, module.drop) == (["model.encoder.layers.*"], True, 0.5)
    assert task.postprocess.threshold == 0.85 and task.loss_settings.no_object_weight == 0.1
