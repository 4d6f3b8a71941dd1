"""BatchFormer in a LightningModule: the two lines are marked.

python examples/lightning_module.py
"""

import argparse
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import batchformer
from batchformer.data.fetch import get
from batchformer.data.formats import read_fashion_mnist


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("resnet18", num_classes=10, in_chans=1)
        self.bf = batchformer.insert(self.model, before="auto")  # line 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images), self.bf.expand(labels))  # line 2
        self.log("loss", loss)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch  # Lightning has called eval(): the plain network answers
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(batchformer.param_groups(self.model, lr=0.05, batchformer_lr_mult=0.1), momentum=0.9)


def load(folder: Path, *, train: bool, images: int) -> DataLoader[Any]:
    arrays = read_fashion_mnist(folder, train=train)
    padded = F.pad(arrays.images[:images].float() / 255, (2, 2, 2, 2))
    return DataLoader(TensorDataset(padded, arrays.labels[:images]), 64, shuffle=train, drop_last=train)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four files (default: fetched)")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.data or get("fashion-mnist")
    seed_everything(0)
    trainer = Trainer(max_epochs=arguments.epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    task = Classifier()
    trainer.fit(task, load(folder, train=True, images=arguments.images))
    trainer.test(task, load(folder, train=False, images=arguments.images))


if __name__ == "__main__":
    main()
