"""A tiny COCO folder, a small network, and a Trainer for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from batchformer.engine.run import quiet
from batchformer.tasks.detection.data import DetectionData
from batchformer.tasks.detection.settings import NetworkSettings
from batchformer.tasks.set_prediction.backbone import BackboneSettings

SMALL: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 32, "num_queries": 8, "num_heads": 4,
    "dropout": 0.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data-root"))


@pytest.fixture
def folder(write_coco: Callable[..., Path], tmp_path: Path) -> Path:
    """Nine training images, and four of each other split."""
    return write_coco(tmp_path / "coco", {"train": 9, "val": 4, "test": 4, "unseen": 3})


@pytest.fixture
def data(folder: Path) -> Callable[..., DetectionData]:
    """A data module of the folder; 64 pixels, batches of four."""

    def make(**settings: Any) -> DetectionData:
        given = {"size": 64, "batch_size": 4, "eval_batch_size": 3, "num_workers": 0, **settings}
        return DetectionData("folder", folder, **given)

    return make


@pytest.fixture
def small() -> Callable[..., NetworkSettings]:
    """Settings of a detector that takes milliseconds."""

    def make(detector: Any = "conditional_detr", *, trains: Any = "nothing", **settings: Any) -> NetworkSettings:
        backbone = BackboneSettings("resnet18", pretrained=False, trains=trains, strides=[16])
        return NetworkSettings(detector, backbone, **{**SMALL, "feature_levels": 1, **settings})

    return make


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet Trainer on the CPU."""
    quiet()

    def make(**settings: Any) -> Trainer:
        return Trainer(
            **{
                "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "max_epochs": 1,
                "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
                "use_distributed_sampler": False, "default_root_dir": tmp_path, **settings,
            }
        )  # fmt: skip

    return make
