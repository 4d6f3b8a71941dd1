"""A small image folder and the overrides that make a run of it take seconds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24, 12 and 8 pictures of 16 px, each class of a colour of its own with noise."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for (name, colour), count in zip(COLOURS.items(), (24, 12, 8), strict=True):
        (root / name).mkdir()
        for index in range(count):
            pixels = np.clip(random.normal(colour, 60, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="session")
def small(images: Path) -> Callable[..., list[str]]:
    """Overrides of a run that takes seconds."""

    def overrides(*more: str, epochs: int | None = 3) -> list[str]:
        """``epochs=None``: those of the stages among the other words."""
        return [
            f"--data.root={images}",
            "--data.image_size=16",
            "--data.batch_size=8",
            "--data.many_over=10",
            "--data.few_under=7",
            "--model.network.backbone=small_resnet",
            *([f"--trainer.max_epochs={epochs}"] if epochs is not None else []),
            "--trainer.check_val_every_n_epoch=1",
            *more,
        ]

    return overrides
