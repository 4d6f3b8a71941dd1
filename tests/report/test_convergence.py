"""Early and late leads, and the pictures of several arms side by side."""

import math

import pytest

from batchformer.report import read_comparison
from batchformer.report.convergence import convergence_sentence, convergence_table
from batchformer.report.curves import seed_curves
from batchformer.report.pictures import picture_table
from batchformer.report.plots import plot_groups

EPOCHS = 20


def with_curves(folders, tmp_path, curves, primary="AP", seeds=(0, 1, 2), noise=0.002, older=True, **result):
    """A comparison whose validation metric is a function of the epochs done, by arm."""
    result = {"metrics": {primary: 0.5}, **result}
    folder = folders.comparison(
        tmp_path / "cmp", tuple(curves), seeds, plan={"primary": primary}, result=result, older=older
    )
    for arm, curve in curves.items():
        for seed in seeds:
            shift = noise * (seed - 1) * (-1 if arm == "plain" else 1)
            lines = [f"{epoch},{curve(epoch + 1) + shift}" for epoch in range(EPOCHS)]
            text = "\n".join([f"epoch,val_{primary}", *lines]) + "\n"
            (folder / arm / f"seed{seed}" / "metrics.csv").write_text(text)
    return read_comparison(folder)


def falling(time, end=4.0, start=20.0):
    return lambda epoch: end + (start - end) * math.exp(-epoch / time)


def rising(time, end=0.4):
    return lambda epoch: end * (1 - math.exp(-epoch / time))


def test_faster_and_not_better_is_called_so(folders, tmp_path):
    comparison = with_curves(folders, tmp_path, {"plain": rising(4.0), "batchformer": rising(1.5)})
    sentence = convergence_sentence(comparison)
    assert "is ahead early, but no lead is shown at the end: faster, not better" in sentence
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
        (rising(1.5, 0.6), "is ahead early and at the end"),
        (rising(4.0), "shows no lead, neither early nor at the end"),
        (rising(6.0, 0.6), "is behind early and ahead at the end: slower, but better"),
        (rising(4.0, 0.2), "is behind at the end"),
        (rising(1.0, 0.36), "is ahead early and behind at the end"),
    ],
)
def test_the_other_ways_to_go(folders, tmp_path, batchformer, words):
    end = 0.4 if words != "is behind early and ahead at the end: slower, but better" else 0.5
    comparison = with_curves(
        folders, tmp_path, {"plain": rising(4.0 if end == 0.4 else 2.0, end), "batchformer": batchformer}
    )
    assert f"On the validation data, BatchFormer {words} (" in convergence_sentence(comparison)


def test_an_arm_that_never_comes_near(folders, tmp_path):
    comparison = with_curves(folders, tmp_path, {"plain": rising(4.0), "batchformer": rising(4.0, 0.1)})
    assert convergence_table(comparison).rows[1][1] == "never"


def test_an_error_falls_to_its_goal_and_a_lower_one_leads(folders, tmp_path):
    curves = {"plain": falling(4.0), "batchformer": falling(1.5)}
    comparison = with_curves(folders, tmp_path, curves, "mae", older=False, measures=[folders.error])
    table = convergence_table(comparison)
    assert table.columns[1] == "epochs to 110 % of plain's final error"
    # By hand: the first epoch with 4 + 16 exp(-e / t) <= 1.1 * (4 + 16 exp(-20 / 4)).
    goal = (1.1 * (4 + 16 * math.exp(-20 / 4.0)) - 4) / 16
    assert [row[1] for row in table.rows] == [f"{math.ceil(-time * math.log(goal))}" for time in (4.0, 1.5)]
    lead = falling(1.5)(5) - falling(4.0)(5)
    assert float(table.rows[1][2].split()[0]) == pytest.approx(lead, abs=0.006)
    assert "lower is better" in table.notes[0]
    assert "Differences are in years with 95 % intervals" in table.notes[1]
    sentence = convergence_sentence(comparison)
    assert "is ahead early and at the end (" in sentence
    assert "epoch 5: -" in sentence and " years, 95 % interval -" in sentence


def test_a_final_value_of_zero_has_no_share(folders, tmp_path):
    nothing = dict.fromkeys(("plain", "batchformer"), lambda epoch: 0.0)
    assert [row[1] for row in convergence_table(with_curves(folders, tmp_path, nothing, noise=0.0)).rows] == ["n/a"] * 2


def test_units_of_a_seed_are_averaged_epoch_by_epoch(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", units=("photo", "sketch"))
    for arm, time in (("plain", 4.0), ("batchformer", 1.5)):
        for seed in range(3):
            for unit, shift in (("photo", 0.1), ("sketch", -0.1)):
                rows = [f"{epoch},{rising(time)(epoch + 1) + shift + 0.001 * seed}" for epoch in range(EPOCHS)]
                path = folder / arm / f"seed{seed}-{unit}" / "metrics.csv"
                path.write_text("\n".join(["epoch,val_top1", *rows]))
    (folder / "plain" / "seed2-photo" / "done").unlink()
    curves = seed_curves(read_comparison(folder), "val_top1")
    assert curves["plain"].keys() == {0, 1}  # both units of a seed, or none
    assert curves["plain"][1][5] == pytest.approx(rising(4.0)(5) + 0.001)
    assert (
        convergence_table(read_comparison(folder)).rows[0][1]
        == f"{math.ceil(-4.0 * math.log(1 - 0.9 * (1 - math.exp(-5))))}"
    )


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
    shown = picture_table(read_comparison(folder), tmp_path / "out")
    assert shown.columns == ["plain, seed 1", "batchformer, seed 1"]
    assert [(name, [picture and picture.path for picture in row]) for name, row in shown.rows] == [
        ("a", ["../cmp/plain/seed1/pictures/a.png", "../cmp/batchformer/seed1/pictures/a.png"]),
        ("b", ["../cmp/plain/seed1/pictures/b.png", None]),
    ]
    given = folder / "batchformer" / "seed1" / "pictures" / "given"
    given.mkdir()
    (given / "a.png").touch()
    shown = picture_table(read_comparison(folder), tmp_path / "out")
    assert shown.columns[0] == "given"
    assert shown.rows[0][1][0].path == "../cmp/batchformer/seed1/pictures/given/a.png"
    assert shown.more == 0


def test_groups_of_other_metrics(folders, tmp_path):
    pytest.importorskip("matplotlib")
    metrics = {"AP": 0.3, "APS": 0.1, "APM": None, "APL": 0.5}
    folder = folders.comparison(
        tmp_path / "cmp", seeds=(0,), plan={"primary": "AP"}, result={"metrics": metrics}, older=True
    )
    comparison = read_comparison(folder)
    assert comparison.metric_names == ("AP", "APS", "APM", "APL")
    _, ax = plot_groups(comparison)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["small objects", "large objects"]
    assert ax.get_ylabel() == "test AP (%)"
