"""Runs, tests and comparisons know their data by its content: moved data is the same, changed data is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jobs_here import in_this_process
from PIL import Image

from batchformer import cli
from batchformer.engine import run as engine
from batchformer.engine.compare import compare
from batchformer.engine.errors import ConfigError
from batchformer.engine.recipes import find_recipe

Small = Callable[..., list[str]]
RECIPE = find_recipe("longtail/folder").path


@pytest.fixture
def data(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "pictures"))


@pytest.fixture
def fit(small: Small, data: Path) -> Callable[..., dict[str, Any]]:
    def train(folder: Path, *more: str, root: Path = data, resume: bool = False) -> dict[str, Any]:
        words = small(f"--data.root={root}", *more, epochs=1)
        return engine.fit(RECIPE, words, folder, name="longtail/folder", resume=resume, say=lambda line: None)

    return train


def unfinished(folder: Path) -> Path:
    (folder / "done").unlink()
    return folder


def relabel(data: Path) -> None:
    """Two images change places, so that all counts stay."""
    one, other = data / "red/0.png", data / "green/0.png"
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_result_and_checkpoint_name_the_data(fit: Any, data: Path, tmp_path: Path) -> None:
    result = fit(tmp_path / "run")
    assert list(result["data"]) == ["train", "val", "test"]
    assert json.loads((tmp_path / "run/result.json").read_text())["data"] == result["data"]
    checkpoint = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["longtail"]["data"] == result["data"]
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["root"] == str(data)


def test_moved_data_is_the_same_data(
    fit: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "moved"
    monkeypatch.chdir(tmp_path)
    result = fit(run, root=Path(data.name))  # named from the working folder, recorded for every one
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["root"] == str(data)
    moved.parent.mkdir()
    shutil.move(data, moved)
    monkeypatch.chdir(moved.parent)
    assert cli.main(["test", str(run), "--data.root=moved", "--data.num_workers", "1", "--data.memory_gib=0"]) == 0
    said = capsys.readouterr()
    assert "not the data" not in said.err
    assert f"{100 * result['metrics']['top1']:.2f}" in said.out
    before = json.loads((run / "result.json").read_text())
    again = fit(unfinished(run), "--data.num_workers=1", root=moved, resume=True)
    assert again["metrics"] == before["metrics"]
    assert again["data"] == before["data"]
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["root"] == str(moved)


def test_other_data_of_the_same_counts_is_refused_wherever_it_lies(fit: Any, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit(run)
    unfinished(run)
    config = (run / "config.yaml").read_text()
    other = Path(shutil.copytree(data, tmp_path / "other"))
    relabel(other)
    with pytest.raises(ConfigError, match=r"its splits? .*have? changed|has changed") as refused:
        fit(run, root=other, resume=True)
    assert "Point data.root to that data, or start another run with --name." in str(refused.value)
    assert (run / "config.yaml").read_text() == config
    relabel(data)
    with pytest.raises(ValueError, match=r"Expected the data that this run was trained on, but its splits? \w+"):
        fit(run, resume=True)


def test_a_test_on_other_data_says_so(fit: Any, data: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run")
    relabel(data)
    with pytest.warns(UserWarning, match="This is not the data that the run was trained on: its split") as said:
        values = engine.test(tmp_path / "run")
    assert "top1" in values
    assert "The results belong to the data that is there now" in str(said[0].message)


def test_a_test_takes_the_place_of_the_data_alone(fit: Any, data: Path, tmp_path: Path) -> None:
    fit(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"where the data lies .*, got --data.image_size=20, --seed=2"):
        engine.test(tmp_path / "run", ["--data.image_size=20", "--data.num_workers=1", "--seed=2"])
    with pytest.raises(FileNotFoundError, match=r"Expected the folder of the data in .*/typo, found none"):
        engine.test(tmp_path / "run", [f"--data.root={tmp_path}/typo"])
    assert not (tmp_path / "typo").exists()


def without_fingerprints(run: Path) -> Path:
    """Make a run one of an earlier version."""
    path = run / "checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["longtail"]["data"]
    torch.save(checkpoint, path)
    result = json.loads((run / "result.json").read_text())
    del result["data"]
    (run / "result.json").write_text(json.dumps(result))
    return run


def test_a_run_of_an_earlier_version_goes_on_where_its_data_was(fit: Any, data: Path, tmp_path: Path) -> None:
    before = fit(tmp_path / "run")
    run = unfinished(without_fingerprints(tmp_path / "run"))
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    with pytest.raises(
        ConfigError, match=r"made by an older version, which kept no fingerprint .* Leave data.root out"
    ):
        fit(run, root=moved, resume=True)
    assert fit(run, resume=True)["metrics"] == before["metrics"]


# ---------------------------------------------------------------- comparisons


@pytest.fixture
def compared(small: Small, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Compare in this process; returns the lines."""
    from batchformer.engine import compare as module

    monkeypatch.setattr(module, "run_jobs", in_this_process)

    def go(folder: Path, *more: str, seeds: list[int], resume: bool = False, root: Path = data) -> list[str]:
        said: list[str] = []
        words = small(f"--data.root={root}", *more, epochs=1)
        compare(RECIPE, words, folder, name="longtail/folder", seeds=seeds, resume=resume, say=said.append)
        return said

    return go


def plan(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "compare.json").read_text()))


def test_a_comparison_goes_on_with_its_data_alone(compared: Any, data: Path, tmp_path: Path) -> None:
    folder, moved = tmp_path / "both", tmp_path / "moved"
    compared(folder, seeds=[0])
    first = plan(folder)
    assert first["data"][""] == json.loads((folder / "plain/seed0/result.json").read_text())["data"]
    shutil.move(data, moved)
    said = compared(folder, "--data.num_workers=1", seeds=[0, 1], resume=True, root=moved)
    assert ["kept" in line for line in said] == [True, True, False, False]
    assert plan(folder)["data"] == first["data"]

    more = moved / "red" / "0.png"
    Image.open(more).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(more)
    before = (folder / "compare.json").read_text()
    with pytest.raises(
        ConfigError, match=r"the data that the comparison in .*both was started on, but its split \w+ has"
    ):
        compared(folder, seeds=[0, 1, 2], resume=True, root=moved)
    assert not list(folder.glob("*/seed2"))
    assert (folder / "compare.json").read_text() == before


def test_settings_that_change_the_data_are_refused_as_settings(compared: Any, tmp_path: Path) -> None:
    compared(tmp_path / "both", seeds=[0])
    with pytest.raises(ConfigError, match=r"data.n_max: 5 \(was: None\)"):
        compared(tmp_path / "both", "--data.n_max=5", seeds=[0], resume=True)


def test_a_finished_run_on_other_data_is_never_kept(compared: Any, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    compared(folder, seeds=[0])
    path = folder / "batchformer/seed0/result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "data": {**result["data"], "test": "0"}}))
    with pytest.raises(
        ConfigError, match=r"batchformer/seed0 was made on other data \(split test\). Delete that folder"
    ):
        compared(folder, seeds=[0, 1], resume=True)
    assert not (folder / "plain/seed1").exists()


def test_a_comparison_of_an_earlier_version_gets_its_fingerprints(compared: Any, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    compared(folder, seeds=[0])
    data = plan(folder)["data"]
    for run in folder.glob("*/seed0"):
        without_fingerprints(run)
    (folder / "compare.json").write_text(json.dumps({k: v for k, v in plan(folder).items() if k != "data"}))
    assert len(compared(folder, seeds=[0], resume=True)) == 2
    assert plan(folder)["data"] == data
