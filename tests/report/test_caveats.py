import re
import sys

import pytest

from batchformer.report import find_runs, read_comparison
from batchformer.report.caveats import caveats, hardware, run_caveats, versions
from batchformer.report.settings import flatten, settings_of


def test_a_clean_comparison_has_no_caveats(folders, tmp_path):
    assert caveats(read_comparison(folders.comparison(tmp_path / "cmp", folders.all_arms, range(5)))) == []


@pytest.mark.parametrize(("seeds", "start"), [((0,), "Only 1 paired seed:"), ((0, 1, 2, 3), "Only 4 paired seeds:")])
def test_few_seeds_are_a_caveat(folders, tmp_path, seeds, start):
    assert caveats(read_comparison(folders.comparison(tmp_path / "cmp", seeds=seeds)))[0].startswith(start)


def test_every_run_that_is_left_out_has_its_line(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    (folder / "plain" / "seed3" / "done").unlink()
    lines = caveats(read_comparison(folder))
    assert lines[0] == "Missing from the tables: 1 of 10 planned runs."
    assert lines[1].startswith("plain/seed3: unfinished")
    assert lines[2].startswith("Only 4 paired seeds")


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        ({"hardware": {"cpu": "Other CPU", "cores": 64}}, "different hardware .*Other CPU, cores 64: plain/seed4"),
        ({"precision": "bf16-mixed"}, "different precision .*bf16-mixed: plain/seed4"),
        ({"versions": {"torch": "2.8.0"}}, r"different versions .*torch 2\.8\.0: plain/seed4"),
    ],
)
def test_runs_made_differently_are_named(folders, tmp_path, environment, match):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    folders.run(folder / "plain" / "seed4", "plain", 4, environment=environment)
    (line,) = caveats(read_comparison(folder))

    assert re.search(match, line)


def test_what_changes_from_minute_to_minute_is_not_hardware(folders, tmp_path):
    one = folders.run(tmp_path / "a", environment={"hardware": {"cpu": "x", "memory_free_gb": 1.5}})
    two = folders.run(tmp_path / "b", environment={"hardware": {"cpu": "x", "memory_free_gb": 3.5}})
    runs = find_runs([one, two]).runs
    assert run_caveats(runs) == []
    assert hardware(runs[0]) == "cpu x"


def test_a_folder_without_environment_falls_back_on_the_host(folders, tmp_path):
    folder = folders.run(tmp_path / "a")
    (folder / "environment.json").unlink()
    (run,) = find_runs([folder]).runs
    assert hardware(run) == "cpu Example CPU @ 2.00GHz, cores 2"
    assert versions(run) == "not recorded"


def test_an_undefined_metric_is_named(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    folders.run(folder / "plain" / "seed4", "plain", 4, metrics={"few": None})
    assert caveats(read_comparison(folder)) == [
        "few is undefined in plain/seed4, where there is no class or image to measure; its means leave this seed out."
    ]


def with_settings(folders, path, lines, **comparison):
    """A comparison of five seeds whose config.yaml has further lines, by a function of arm, seed and unit."""
    folder = folders.comparison(path, seeds=range(5), **comparison)
    for file in folder.glob("*/*/config.yaml"):
        arm, (seed, _, unit) = file.parents[1].name, file.parent.name.removeprefix("seed").partition("-")
        file.write_text(folders.config(arm, int(seed), *lines(arm, int(seed), unit)))
    return caveats(read_comparison(folder))


def test_settings_that_seed_and_arm_do_not_explain_are_named(folders, tmp_path):
    lines = with_settings(
        folders, tmp_path / "cmp", lambda arm, seed, _: [f"lr: {0.2 if (arm, seed) == ('plain', 4) else 0.1}"]
    )
    assert lines == [
        "Runs differ in settings other than seed and arm, which may be what the tables show.",
        "Setting lr differs: 0.1 in plain/seed0, 0.2 in plain/seed4.",
    ]


# The seeds that say which images there are, are no seeds of the run.
@pytest.mark.parametrize(
    ("key", "free_of_seed", "free_of_arm"),
    [
        ("seed", True, True),
        ("data.seed", True, True),
        ("model.seed", True, True),
        ("model.batchformer.drop", False, True),
        ("model.batchformer.arm", False, True),
        ("model.batchformers.drop", False, False),
        ("other.model.batchformer.drop", False, False),
        ("data.subset_seed", False, False),
        ("data.class_order_seed", False, False),
        ("data.seeds", False, False),
        ("model.network.arm", False, False),
        ("arm", False, False),
        ("trainer.plugins", False, False),
    ],
)
def test_only_the_seed_and_the_module_are_free(folders, tmp_path, key, free_of_seed, free_of_arm):
    def config(value):
        return f"{{{key.replace('.', ': {')}: {value}{'}' * (key.count('.') + 1)}"

    for name, value, free in (
        ("seeds", lambda arm, seed: seed, free_of_seed),
        ("arms", lambda arm, seed: len(arm), free_of_arm),
    ):
        folder = folders.comparison(tmp_path / name, seeds=range(5))
        for arm in ("plain", "batchformer"):
            for seed in range(5):
                (folder / arm / f"seed{seed}" / "config.yaml").write_text(config(value(arm, seed)))
        lines = caveats(read_comparison(folder))
        assert any(line.startswith(f"Setting {key} differs:") for line in lines) == (not free), (name, lines)


def test_settings_of_a_unit_are_free_when_all_arms_have_them(folders, tmp_path):
    units = ("photo", "sketch")
    alike = with_settings(folders, tmp_path / "alike", lambda arm, seed, unit: [f"target: {unit}"], units=units)
    assert alike == []
    lines = with_settings(
        folders, tmp_path / "unlike", lambda arm, seed, unit: [f"target: {arm if unit == 'photo' else 0}"], units=units
    )
    assert lines[1:] == ["Setting target differs: plain in plain/seed0-photo, batchformer in batchformer/seed0-photo."]


def test_the_runs_own_folder_is_no_difference(folders, tmp_path):
    path = tmp_path / "cmp"

    def lines(arm, seed, unit):
        return [f"out: {path}/{arm}/seed{seed}", f"start: runs/before/{arm}/seed{seed}/last.ckpt"]

    assert with_settings(folders, path, lines) == []


@pytest.mark.parametrize("text", ["model: [", "- 1", ""])
def test_settings_that_cannot_be_compared_are_said(folders, tmp_path, text):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    (folder / "plain" / "seed4" / "config.yaml").write_text(text)
    assert caveats(read_comparison(folder)) == [
        "The settings of plain/seed4 were not compared: config.yaml is missing or not valid YAML."
    ]


def test_training_images_that_differ_between_runs_are_said(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    counts = (2000, 1199, 718, 430, 258, 154, 92, 55, 20, 33)
    folders.run(folder / "plain" / "seed4", "plain", 4, counts=counts)
    assert caveats(read_comparison(folder))[0].startswith("The training images of each class differ between runs")


def test_settings_are_flattened_to_dotted_keys():
    tree = {"a": 1, "b": {"c": [1, {"d": None, "e": {"f": 4}}], "g": "x: y", "h": {}}, "i": [[5], []]}
    flat = {"a": 1, "b.c.0": 1, "b.c.1.d": None, "b.c.1.e.f": 4, "b.g": "x: y", "b.h": {}, "i.0.0": 5, "i.1": []}
    assert dict(flatten(tree)) == flat
    assert settings_of("a: 1\nb: {c: [2, x]}\n") == {"a": 1, "b.c.0": 2, "b.c.1": "x"}


def test_without_pyyaml_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"pip install 'batchformer\[train\]'"):
        settings_of("a: 2 # not read before")
