"""The smallest task: points of three classes, tested on two sets; all that the engine asks of a task, and no more."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from batchformer.insertion import Handle, param_groups
from batchformer.tasks.training.contract import ClassResult, Exportable
from batchformer.tasks.training.schedule import optimization
from batchformer.tasks.training.settings import BatchFormerSettings, OptimizerSettings, insert_plug_in

CLASSES = ("cat", "dog", "owl")


class ToyData(LightningDataModule):
    """Noisy points around one corner for each class; ``unseen``: with more noise."""

    def __init__(self, root: str | None = None, seed: int = 0) -> None:
        super().__init__()
        self.root, self.seed = root, seed

    def _loader(self, noise: float, seed: int) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(24) % 3
        points = torch.eye(4)[labels] + noise * torch.randn(24, 4, generator=generator)
        return DataLoader(TensorDataset(points, labels), batch_size=8)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0.2, 100 + self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(0.2, 1)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(0.2, 2), self._loader(0.6, 3)]


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class ToyTask(LightningModule):
    primary: ClassVar[str] = "AP"
    class_metric: ClassVar[str] = "AP"
    class_count: ClassVar[str] = "training boxes"

    def __init__(
        self,
        batchformer: BatchFormerSettings = BatchFormerSettings(),  # noqa: B008
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        second: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.plug_in, self.optimizer_settings, self.seed = batchformer, optimizer, seed
        self.network: nn.Module | None = None
        self.handle: Handle | None = None
        self.test_seconds, self.test_images = 0.0, 0
        self.right: dict[str, list[Tensor]] = {}

    def setup(self, stage: str) -> None:
        if self.network is None:
            torch.manual_seed(self.seed)
            self.network = build()
            self.handle = insert_plug_in(self.network, self.plug_in)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(1000 * self.seed + 10 * self.current_epoch + batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        points, labels = batch
        logits = self.network(points)  # type: ignore[misc]
        labels = labels if self.handle is None else self.handle.expand(labels)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def _evaluate(self, batch: Any, name: str) -> None:
        points, labels = batch
        self.right.setdefault(name, []).append((self.network(points).argmax(1) == labels).float())  # type: ignore[misc]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val_AP")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._evaluate(batch, ("test_AP", "test_unseen_AP")[dataloader_idx])
        self.test_seconds += 0.001
        self.test_images += len(batch[1])

    def on_validation_epoch_end(self) -> None:
        self._log()

    def on_test_epoch_end(self) -> None:
        self.classes = torch.cat(self.right["test_AP"]).view(-1, 3).mean(0).tolist()
        self.log("test_APS", torch.tensor(torch.nan))
        self._log()
        folder = Path(self.trainer.default_root_dir)
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / "first.png").write_bytes(b"picture")
        (folder / "predictions.json").write_text("[]")

    def _log(self) -> None:
        for name, values in self.right.items():
            self.log(name, torch.cat(values).mean())
        self.right.clear()

    def configure_optimizers(self) -> Any:
        groups = param_groups(self.network, self.optimizer_settings.lr)  # type: ignore[arg-type]
        return optimization(groups, self.optimizer_settings, self.trainer)

    def class_results(self) -> list[ClassResult]:
        return [ClassResult(*entry) for entry in zip(CLASSES, (8, 8, 8), self.classes, strict=True)]

    def notes(self) -> list[str]:
        return ["everything trains"]

    @staticmethod
    def not_comparable(setting: Callable[[str], Any]) -> str | None:
        return "the second stage has no module" if setting("model.second") else None


def exportable(run: Path) -> Exportable:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    network = build()
    names = network.state_dict().keys()
    network.load_state_dict({k.removeprefix("network."): v for k, v in state.items() if k[8:] in names})
    return Exportable(
        network.eval(),
        network,
        (torch.zeros(2, 4),),
        ("points",),
        ("logits",),
        {"classes": list(CLASSES)},
        onnx_refusal="Expected safetensors, got ONNX.",
        more=lambda out: [Path(out / "README.txt")],
    )


def predict(run: Path, images: Sequence[Path], out: Path, *, threshold: float = 0.5) -> list[Path]:
    (out / "predictions.json").write_text(json.dumps([len(images), threshold]))
    return [out / "predictions.json"]
