"""The verb ``predict`` tells warnings of a task as sentences."""

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from batchformer import cli
from batchformer.engine import predict as engine


def test_a_warning_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(run: Path, images: list[Path], out: Path) -> list[Path]:
        warnings.warn("No box in 1 image: lower --threshold.", stacklevel=2)
        return []

    monkeypatch.setattr(engine, "run_part", lambda run, part: SimpleNamespace(predict=nothing))
    monkeypatch.setattr(warnings, "formatwarning", lambda *_, **__: "file and line of it")
    (tmp_path / "a.png").touch()
    with pytest.warns(UserWarning, match="lower --threshold") as told:
        assert cli.main(["predict", str(tmp_path), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]) == 0
    (one,) = told
    words = warnings.formatwarning(str(one.message), one.category, one.filename, one.lineno)
    assert words == "Warning: No box in 1 image: lower --threshold.\n"
