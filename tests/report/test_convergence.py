"""Who is ahead early, who in the end; and the pictures of several arms side by side."""

import math

import pytest

from batchformer.report import read_comparison
from batchformer.report.convergence import convergence_sentence, convergence_table
from batchformer.report.pictures import picture_table
from batchformer.report.plots import plot_groups

EPOCHS = 20


def with_curves(folders, tmp_path, curves, primary="AP", seeds=(0, 1, 2), noise=0.002):
    """A comparison whose validation metric is a function of the epochs done, by arm."""
    folder = folders.comparison(
        tmp_path / "cmp", tuple(curves), seeds, plan={"primary": primary}, result={"metrics": {primary: 0.5}}
    )
    for arm, curve in curves.items():
        for seed in seeds:
            shift = noise * (seed - 1) * (-1 if arm == "plain" else 1)
            lines = [f"{epoch},{curve(epoch + 1) + shift}" for epoch in range(EPOCHS)]
            text = "\n".join([f"epoch,val_{primary}", *lines]) + "\n"
            (folder / arm / f"seed{seed}" / "metrics.csv").write_text(text)
    return read_comparison(folder)


def rising(time, end=0.4):
    return lambda epoch: end * (1 - math.exp(-epoch / time))


def test_faster_and_not_better_is_called_so(folders, tmp_path):
    comparison = with_curves(folders, tmp_path, {"plain": rising(4.0), "batchformer": rising(1.5)})
    sentence = convergence_sentence(comparison)
    assert "ahead early, and not shown to be in the end: faster, not better" in sentence
    assert "epoch 5: +" in sentence and "epoch 20: +" in sentence
    table = convergence_table(comparison)
    assert table.columns[2:] == ("vs plain, epoch 5 of 20", "vs plain, epoch 10 of 20", "vs plain, epoch 20 of 20")
    plain, batchformer = table.rows
    # By hand: the first epoch with 1 - exp(-e / t) >= 0.9 * (1 - exp(-20 / 4)).
    goal = 0.9 * (1 - math.exp(-20 / 4.0))
    assert plain[1] == f"{math.ceil(-4.0 * math.log(1 - goal))}"
    assert batchformer[1] == f"{math.ceil(-1.5 * math.log(1 - goal))}"
    lead = 100 * (rising(1.5)(5) - rising(4.0)(5))
    assert float(batchformer[2].split()[0]) == pytest.approx(lead, abs=0.006)
    assert plain[2:] == ("", "", "")


@pytest.mark.parametrize(
    ("batchformer", "words"),
    [
        (rising(1.5, 0.6), "ahead early and in the end"),
        (rising(4.0), "not shown to be ahead early, nor in the end"),
        (rising(6.0, 0.6), "behind early and ahead in the end: slower, and better"),
        (rising(4.0, 0.2), "behind in the end"),
        (rising(1.0, 0.36), "ahead early and behind in the end"),
    ],
)
def test_the_other_ways_to_go(folders, tmp_path, batchformer, words):
    end = 0.4 if words != "behind early and ahead in the end: slower, and better" else 0.5
    comparison = with_curves(
        folders, tmp_path, {"plain": rising(4.0 if end == 0.4 else 2.0, end), "batchformer": batchformer}
    )
    assert f"validation data: {words} (" in convergence_sentence(comparison)


def test_an_arm_that_never_comes_near(folders, tmp_path):
    comparison = with_curves(folders, tmp_path, {"plain": rising(4.0), "batchformer": rising(4.0, 0.1)})
    assert convergence_table(comparison).rows[1][1] == "never"


def test_two_seeds_are_too_few_to_say(folders, tmp_path):
    comparison = with_curves(folders, tmp_path, {"plain": rising(4.0), "batchformer": rising(1.5)}, seeds=(0, 1))
    assert "too few seeds" in convergence_sentence(comparison)


def test_without_a_way_there_is_nothing_to_say(folders, tmp_path):
    comparison = with_curves(folders, tmp_path, {"plain": rising(4.0), "batchformer": rising(4.0)})
    for path in tmp_path.rglob("metrics.csv"):
        path.write_text("epoch,val_AP\n0,0.1\n9,0.2\n19,0.3\n")
    assert convergence_table(comparison) is None
    assert convergence_sentence(comparison) is None


def test_pictures_of_one_seed_side_by_side(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0, 1))
    assert picture_table(read_comparison(folder), tmp_path) is None
    for arm, names in (("plain", ("a", "b")), ("batchformer", ("a",))):
        (folder / arm / "seed1" / "pictures").mkdir()
        for name in names:
            (folder / arm / "seed1" / "pictures" / f"{name}.png").touch()
    (tmp_path / "out").mkdir()
    assert picture_table(read_comparison(folder), tmp_path / "out").splitlines() == [
        "|  | plain, seed 1 | batchformer, seed 1 |",
        "| --- | --- | --- |",
        "| a | ![a.png](<../cmp/plain/seed1/pictures/a.png>) | ![a.png](<../cmp/batchformer/seed1/pictures/a.png>) |",
        "| b | ![b.png](<../cmp/plain/seed1/pictures/b.png>) |  |",
    ]
    given = folder / "batchformer" / "seed1" / "pictures" / "given"
    given.mkdir()
    (given / "a.png").touch()
    lines = picture_table(read_comparison(folder), tmp_path / "out").splitlines()
    assert lines[0] == "|  | given | plain, seed 1 | batchformer, seed 1 |"
    shown = "| a | ![a.png](<../cmp/batchformer/seed1/pictures/given/a.png>) | ![a.png](<../cmp/plain/seed1/"
    assert lines[2].startswith(shown)


def test_groups_of_other_metrics(folders, tmp_path):
    pytest.importorskip("matplotlib")
    metrics = {"AP": 0.3, "APS": 0.1, "APM": None, "APL": 0.5}
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,), plan={"primary": "AP"}, result={"metrics": metrics})
    comparison = read_comparison(folder)
    assert comparison.metric_names == ("AP", "APS", "APM", "APL")
    _, ax = plot_groups(comparison)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["small objects", "large objects"]
    assert ax.get_ylabel() == "test AP (%)"
