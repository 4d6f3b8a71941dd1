"""Predictions never take the place of the images that they are of."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from batchformer.engine import predict as engine


def test_results_beside_the_images_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def draw(run: Path, images: list[Path], out: Path) -> list[Path]:
        asked.append(out)
        return []

    monkeypatch.setattr(engine, "run_part", lambda run, part: SimpleNamespace(predict=draw))
    image = tmp_path / "a.png"
    image.touch()
    with pytest.raises(ValueError, match=r"Expected another folder for the results than that of .*a\.png"):
        engine.predict(tmp_path, [image], tmp_path / "x" / "..")
    engine.predict(tmp_path, [image], tmp_path / "out")
    assert asked == [tmp_path / "out"]
