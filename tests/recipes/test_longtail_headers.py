"""Headers of long-tailed recipes: commands that do what they are for, and each published setting that differs."""

import pytest

from batchformer.engine.recipes import find_recipe, recipes

LONGTAIL = [recipe.name for recipe in recipes() if recipe.name.startswith("longtail/")]
BEST_AS_PUBLISHED = [
    "cifar10-lt-balanced-softmax",
    "cifar100-lt-balanced-softmax",
    "cifar100-lt-ride",
    "imagenet-lt-r10-balanced-softmax",
    "imagenet-lt-r10-ride",
    "imagenet-lt-r50-balanced-softmax",
    "imagenet-lt-r50-ride",
    "imagenet-lt-x50-ride",
    "inat18-r50-ride",
]


def text_of(name: str) -> str:
    return " ".join(find_recipe(name).header)


@pytest.mark.parametrize("name", LONGTAIL)
def test_a_teacher_is_a_plain_network(name: str) -> None:
    for command in text_of(name).split("batchformer ")[1:]:
        if "--name=teacher" in command:
            assert "--model.batchformer.arm=plain" in command


def test_there_are_teachers() -> None:
    assert sum("--name=teacher" in text_of(name) for name in LONGTAIL) >= 6


@pytest.mark.parametrize("name", BEST_AS_PUBLISHED)
def test_the_last_network_in_the_place_of_the_best_is_said(name: str) -> None:
    assert "last network is tested, not the best" in text_of(f"longtail/{name}").replace("  ", " ")


@pytest.mark.parametrize("network", ["r10", "r50"])
def test_the_shift_of_the_published_schedule_is_said(network: str) -> None:
    assert "steps the schedule before the first epoch" in text_of(f"longtail/imagenet-lt-{network}-balanced-softmax")
