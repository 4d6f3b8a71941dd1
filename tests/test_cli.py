"""The command line as a user meets it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchformer import cli

SLOW = ("torch", "lightning", "torchvision", "timm", "matplotlib", "scipy")


def outcome(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        status = cli.main(words)
    except SystemExit as leave:
        status = int(leave.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["ls"], ["data", "ls"], *([verb, "--help"] for verb in ("fit", "compare", "predict"))],
)
def test_help_and_lists_wait_for_nothing(words: list[str], tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from batchformer.cli import main\n"
        "try:\n    status = main(sys.argv[1:])\nexcept SystemExit as leave:\n    status = leave.code\n"
        f"assert not set(sys.modules) & set({SLOW}), set(sys.modules) & set({SLOW})\n"
        "assert time.process_time() < 1, time.process_time()\n"
        "sys.exit(status)\n"
    )
    environment = {**os.environ, "BATCHFORMER_DATA": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "batchformer" in done.stdout or "longtail/fashion-mnist-lt" in done.stdout or "fashion-mnist" in done.stdout


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    _, verbs = cli._parsers()
    assert set(verbs) == {
        *("ls", "data", "scenes", "fit", "test", "compare", "report", "export", "predict", "convert", "env")
    }
    for verb in verbs:
        status, out, _ = outcome([verb, "--help"], capsys)
        assert status == 0
        assert f"usage: batchformer {verb}" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compare", "--contorls", "frozen"], "Did you mean --controls?"),
        (["fit", "longtail/fashion-mnist-lt", "--resum"], "Did you mean --resume?"),
        (["comprae"], "Did you mean compare?"),
        (["data", "gte", "cifar10"], "Did you mean get?"),
        (["report", "runs", "--ouy=x"], "Did you mean --out?"),
        (["fit", "longtail/folder", "--seed", "1", "--name"], "argument --name: expected one argument\n"),
        (["export", "run", "surplus"], "batchformer export: unrecognized arguments: surplus"),
        (["fit", "longtail/fashion-mnist"], "Near to it: longtail/fashion-mnist-lt"),
        (["ls", "longtail/fashion"], "All of them: batchformer ls"),
        (["data", "get", "mnist"], "Expected the name of a known data set, one of fashion-mnist"),
        (["data", "get"], "Expected the name of a data set"),
        (["test", "no/such/run"], "Train one with batchformer fit"),
        (["report", "no/such/run"], "does not exist"),
        (["export", "no/such/run"], "Expected a run folder"),
        (["compare", "--seeds", "many"], "a number or a list such as 0,1,2, got 'many'"),
        (["compare", "--seeds", "0"], "at least one seed"),
    ],
)
def test_mistakes_get_one_clear_line(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = outcome(words, capsys)
    assert status == 2
    assert expected in err
    assert "Traceback" not in err


def test_the_reader_may_go_before_the_end() -> None:
    words = [sys.executable, "-m", "batchformer", "ls"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.parametrize(("words", "way"), [(["data", "get", "cifar10"], False), (["compare", "--seeds=1"], True)])
def test_ctrl_c_names_a_way_on_where_there_is_one(
    words: list[str], way: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, f"_{words[0]}", stop)
    status, _, err = outcome(words, capsys)
    assert status == 130
    assert ("--resume" in err) == way


def test_a_defect_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(cli, "_ls", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        cli.main(["ls"])


def test_a_linked_setting_and_a_wrong_group_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "longtail/folder", f"--out={tmp_path}", "--trainer.precision=32", "--data.seed=1"]
    words += ["--model.network=3", "--model.optimizer.milestones=[1,a]", "--data.root=123", "--data.n_max"]
    _, _, err = outcome(words, capsys)
    assert "5 problems in" in err  # a folder may be called 123
    for part in (
        "trainer.precision follows from precision. Set that.",
        "data.seed follows from seed. Set that.",
        "model.network: expected a mapping of settings, got 3.",
        "model.optimizer.milestones: expected a list (each: an integer), got [1, 'a'].",
        "Expected a value for --data.n_max.",
    ):
        assert part in err


def test_what_print_config_prints_is_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "longtail/folder", "--print-config", "--data.root=x", "--model.optimizer.lr=0.02"]
    _, first, _ = outcome(words, capsys)
    (tmp_path / "mine.yaml").write_text(first, encoding="utf-8")
    status, second, _ = outcome(["fit", str(tmp_path / "mine.yaml"), "--print-config"], capsys)
    assert (status, second) == (0, first)


def test_all_mistakes_in_the_settings_come_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("task: longtail\ndata:\n  dataset: imagenet\n  batchsize: 4\ntrainer:\n  max_epochs: many\n")
    words = [
        "fit",
        str(recipe),
        "--model.optimizer.lrr=1",
        "--lr",
        "3",
        "--model.batchformer.arm=x",
        f"--out={tmp_path}",
    ]
    status, _, err = outcome(words, capsys)
    assert status == 2
    assert "6 problems in" in err
    for part in (
        "data.dataset: expected one of fashion-mnist, cifar10",
        "Unknown setting data.batchsize. Did you mean data.batch_size",
        "trainer.max_epochs: expected an integer or null, got 'many'",
        "Unknown setting model.optimizer.lrr. Did you mean model.optimizer.lr",
        "Unknown setting lr. Did you mean model.optimizer.lr",
        "model.batchformer.arm: expected one of plain, batchformer",
    ):
        assert part in err
    recipe.write_text("data: [1, 2\n")
    assert "Expected YAML in" in outcome(["fit", str(recipe)], capsys)[2]


def test_ls_shows_a_recipes_header_and_print_config_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = outcome(["ls", "longtail/imagenet-lt-r50-ride"], capsys)
    assert status == 0
    assert "batchformer" in out and "ImageNet-LT" in out
    status, out, _ = outcome(
        ["fit", "longtail/fashion-mnist-lt", "--print-config", "--model.optimizer.lr=0.02"], capsys
    )
    assert status == 0
    assert "lr: 0.02" in out and "stream_weights" in out


def test_env_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    status, out, _ = outcome(["env"], capsys)
    assert status == 0
    assert json.loads(out)["versions"]["torch"]


# ---------------------------------------------------------------- a folder nobody has seen


@pytest.fixture
def strange_folder(tmp_path: Path) -> Path:
    """Grey, colour, alpha and palette pictures of odd sizes; names with spaces and umlauts; a class of two images."""
    root = tmp_path / "Meine Bilder"
    random = np.random.default_rng(0)
    modes = ("L", "RGB", "RGBA", "P")
    for name, count in (("größe 1", 12), ("kleine katze", 8), ("z", 2)):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.integers(0, 256, (20 + index, 31, 3), dtype=np.uint8)
            suffix = "png" if modes[index % 4] != "RGB" else "jpg"
            Image.fromarray(pixels).convert(modes[index % 4]).save(root / name / f"bild {index}.{suffix}")
        (root / name / "notes.txt").write_text("no image")
    return root


@pytest.mark.timeout(300)
def test_compare_works_with_nothing_but_the_folder(
    strange_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data"))
    # One epoch and one seed to be quick; nothing else is said about the data.
    words = ["compare", "--data.root", str(strange_folder), "--seeds=1", "--trainer.max_epochs=1"]
    status, out, err = outcome(words, capsys)
    assert status == 0, err
    report = tmp_path / "runs/compare-longtail-folder/report/report.md"
    assert f"Report: {report.relative_to(tmp_path)}" in out
    assert "too few seeds" in " ".join(out.split())
    assert "größe 1" in report.read_text(encoding="utf-8")
    status, _, err = outcome(words, capsys)
    assert status == 2
    assert "has a comparison already. Go on with --resume" in err


def test_hostile_folders_are_refused_before_the_first_step(
    strange_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data"))
    words = ["fit", "longtail/folder", "--name=run", f"--data.root={strange_folder}"]
    for index in (3, 5):
        (strange_folder / "kleine katze" / f"bild {index}.png").write_bytes(b"not a picture")
    (strange_folder / "kleine katze" / "bild 5.jpg").write_bytes(b"")
    status, _, err = outcome(words, capsys)
    assert status == 2
    assert all(f"bild {index}" in err for index in (3, 5))  # all in one message
    assert "Traceback" not in err
    assert not list((tmp_path / "runs").rglob("*.ckpt"))
    status, _, err = outcome([*words[:3], f"--data.root={tmp_path / 'nowhere'}"], capsys)
    assert status == 2
    assert "nowhere" in err


def test_other_hostile_folders(
    strange_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data"))
    single, flat, empty, file = (tmp_path / name for name in ("single", "flat", "empty", "file"))
    shutil.copytree(strange_folder / "z", single / "z")
    shutil.copytree(strange_folder / "z", flat)
    shutil.copytree(strange_folder, empty)
    for name in ("nothing 1", "nothing 2"):
        (empty / name).mkdir()
    file.write_text("no folder")
    for root, parts in (
        (single, ["at least two sub-folders, one per class", "found 1"]),
        (flat, ["at least two sub-folders", "2 image(s) directly in it"]),
        (empty, ["images in every class folder", "nothing 1", "nothing 2"]),
        (file, ["one sub-folder per class", str(file)]),
    ):
        status, _, err = outcome(
            ["fit", "longtail/folder", f"--out={tmp_path / 'runs'}", f"--data.root={root}"], capsys
        )
        assert status == 2
        assert all(part in err for part in parts), err
        assert "Traceback" not in err
        assert not list((tmp_path / "runs").rglob("*"))
