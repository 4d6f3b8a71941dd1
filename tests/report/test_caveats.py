import re

import pytest

from batchformer.report import find_runs, read_comparison
from batchformer.report.caveats import caveats, flatten_config, hardware, run_caveats, versions


def test_a_clean_comparison_has_no_caveats(folders, tmp_path):
    assert caveats(read_comparison(folders.comparison(tmp_path / "cmp", folders.all_arms, range(5)))) == []


@pytest.mark.parametrize(("seeds", "start"), [((0,), "1 paired seed only"), ((0, 1, 2, 3), "4 paired seeds only")])
def test_few_seeds_are_a_caveat(folders, tmp_path, seeds, start):
    assert caveats(read_comparison(folders.comparison(tmp_path / "cmp", seeds=seeds)))[0].startswith(start)


def test_every_run_that_is_left_out_has_its_line(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    (folder / "plain" / "seed3" / "done").unlink()
    lines = caveats(read_comparison(folder))
    assert lines[0] == "1 of 10 planned runs are not in the tables:"
    assert lines[1].startswith("plain/seed3: unfinished")
    assert lines[2].startswith("4 paired seeds only")


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
    assert versions(run) == ({}, "not recorded")


def test_an_undefined_metric_is_named(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    folders.run(folder / "plain" / "seed4", "plain", 4, metrics={"few": None})
    assert caveats(read_comparison(folder)) == [
        "few is undefined (no class or image to measure) in plain/seed4; left out of its means."
    ]


def test_settings_that_seed_and_arm_do_not_explain_are_named(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    config = (folder / "plain" / "seed4" / "config.yaml").read_text()
    folders.run(folder / "plain" / "seed4", "plain", 4, config=config.replace("lr: 0.1", "lr: 0.2"))
    lines = caveats(read_comparison(folder))
    assert lines[0] == "Setting model.lr differs: 0.1 in plain/seed0, 0.2 in plain/seed4."
    assert lines[1].startswith("Expected the same settings but for seed and arm")
    assert len(lines) == 2


def test_the_runs_own_folder_and_the_plug_in_are_no_difference(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    for arm, drop in (("plain", "null"), ("batchformer", "0.5")):
        for seed in range(5):
            path = folder / arm / f"seed{seed}"
            text = f"arm: {arm}\nseed: {seed}\nout: {path}\nmodel:\n  batchformer:\n    drop: {drop}\n  lr: 0.1\n"
            folders.run(path, arm, seed, config=text)
    assert caveats(read_comparison(folder)) == []


def test_training_images_that_differ_between_runs_are_said(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5))
    counts = (2000, 1199, 718, 430, 258, 154, 92, 55, 20, 33)
    folders.run(folder / "plain" / "seed4", "plain", 4, counts=counts)
    assert caveats(read_comparison(folder))[0].startswith("The training images per class differ between runs")


def test_flattened_config_equals_a_real_yaml_reader():
    yaml = pytest.importorskip("yaml")
    tree = {"a": 1, "b": {"c": [1, 2, {"d": 3, "e": {"f": 4}}], "g": "x: y", "h": {}}, "i": [[5, 6], 7]}

    def flat(value, name=()):
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        if not pairs:
            return {".".join(name): value}
        return {k: v for key, entry in pairs for k, v in flat(entry, (*name, str(key))).items()}

    ours = flatten_config(yaml.safe_dump(tree, sort_keys=False))
    assert {key: yaml.safe_load(value) for key, value in ours.items()} == flat(tree)
