"""Every recipe is parsed: its header says what it should, and its commands set what they name."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe_runs import header_commands, settings_of
from tiny_recipes import RECIPES, STANDS_FOR, kinds

from batchformer.engine.config import parse
from batchformer.engine.recipes import Recipe, find_recipe, recipes
from batchformer.engine.stages import plan

MEASURED = ("fashion-mnist", "folder", "scenes")
OF_A_RUN = ("name", "out")
every_recipe = pytest.mark.parametrize("name", RECIPES)


def leaves(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in tree.items():
        inside = isinstance(value, dict) and value
        found += leaves(value, f"{prefix}{key}.") if inside else [(prefix + key, value)]
    return found


def setting(config: Any, key: str) -> Any:
    """Return a setting of a parsed recipe by its dotted key, also inside one that takes any keys."""
    for part in key.split("."):
        config = config[part]
    return config


def same(found: Any, expected: Any) -> bool:
    """Tell whether a setting that was read is what a file or a command says, where a path is text."""
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(same, found, expected))
    return str(found) == expected if isinstance(found, Path) else bool(found == expected)


def test_all_recipes_are_in_the_table() -> None:
    assert sorted(recipe.name for recipe in recipes()) == RECIPES


def test_every_kind_is_started() -> None:
    """A new kind of network, loss, source, augmentation or stage asks for a recipe in the table that stands for it."""
    started = set().union(*(kinds(find_recipe(name)) for name in STANDS_FOR))
    assert {name: missing for name in RECIPES if (missing := kinds(find_recipe(name)) - started)} == {}


@every_recipe
def test_header(name: str) -> None:
    recipe = find_recipe(name)
    header = recipe.header
    text = " ".join(header)
    assert header[0].endswith("."), "the first line says what it is, in one sentence"
    assert header[1] == ""
    assert header_commands(recipe)[0][:2] == ["compare", name]
    assert "Hardware and time: " in text
    assert "result: " in text.lower()
    if not name.partition("/")[2].startswith(MEASURED):
        assert "Published result: " in text
        assert "Differs from the published setting: " in text
        assert "not measured here" in text
    assert max(len(line) for line in recipe.path.read_text(encoding="utf-8").splitlines()) <= 120


def check_settings_of_stages(recipe: Recipe, overrides: list[str], whole: Any) -> None:
    """Check that the settings which a stage has for itself are settings, and that it runs with them."""
    listed = whole.config.get("stages") or ()
    for entry, one in zip(listed, plan(listed, whole.model.stages), strict=False):
        config = parse(recipe.path, overrides, one.overrides, logger=False).config if entry.settings else None
        for key, value in entry.settings.items():
            assert same(setting(config, key), value), key


@every_recipe
def test_parses_to_what_it_says(name: str) -> None:
    recipe = find_recipe(name)
    cli = parse(recipe.path, logger=False)
    settings = settings_of(recipe)
    stages = settings.pop("stages", None)
    for key, value in leaves(settings):
        assert same(setting(cli.config, key), value), key
    assert cli.model.batchformer.arm == "batchformer"
    planned = plan(cli.config.get("stages"), cli.model.stages)
    expected = [(stage["name"], stage["epochs"]) for stage in stages or ()]
    assert [(one.stage.name, one.stage.epochs) for one in planned] == (
        expected or [(next(iter(cli.model.stages)), None)]
    )


@every_recipe
def test_commands_of_its_header_set_what_they_name(name: str) -> None:
    for verb, other, *words in header_commands(find_recipe(name)):
        assert verb in ("fit", "compare")
        given = dict(word.removeprefix("--").split("=", 1) for word in words)
        overrides = [f"--{key}={value}" for key, value in given.items() if key not in OF_A_RUN]
        cli = parse(find_recipe(other).path, overrides, logger=False)
        stages = {one.name: one for one in cli.config.get("stages") or ()}
        for key, text in given.items():
            value = yaml.safe_load(text)
            if key.startswith("stages."):
                _, stage, *inside = key.split(".")
                entry = stages.get(stage)
                if not inside:
                    assert entry is None and value is None, f"{key} leaves a stage out"
                elif inside[0] == "settings":
                    assert same(entry.settings[".".join(inside[1:])], value), key
                else:
                    assert same(getattr(entry, inside[0]), value), key
            elif key not in OF_A_RUN:
                assert same(setting(cli.config, key), value), key
        if any(".settings." in key for key in given):
            check_settings_of_stages(find_recipe(other), overrides, cli)


# ------------------------------------------------------------------ published settings that differ are said


LONGTAIL = [name for name in RECIPES if name.startswith("longtail/")]
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
