"""Pictures and a table ``numbers.csv`` with the columns file and number; a third of them, by split, is the test."""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from batchformer.data.loader import TensorLoader
from batchformer.tasks.training.data import TaskData


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path).convert("L")))[None]


class CountingData(TaskData):
    def __init__(
        self, dataset: str = "folder", root: str = ".", split: int = 0, seed: int = 0, batch_size: int = 8
    ) -> None:
        super().__init__(seed=seed, batch_size=batch_size, eval_batch_size=16)
        self.root, self.split = Path(root), split
        self.classes, self.counts, self.side = [], [], 0  # type: ignore[var-annotated]

    def setup(self, stage: str | None = None) -> None:
        with (self.root / "numbers.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self.images = torch.stack([pixels(self.root / row["file"]) for row in rows])
        self.numbers = torch.tensor([float(row["number"]) for row in rows])
        self.side = self.images.shape[-1]
        self.held_out = torch.arange(len(rows)) % 3 == self.split

    def train_dataloader(self) -> TensorLoader:
        images, numbers = self.images[~self.held_out], self.numbers[~self.held_out]
        return TensorLoader(images, numbers, self.train_sampler(len(numbers)))

    def val_dataloader(self) -> TensorLoader:
        images, numbers = self.images[self.held_out], self.numbers[self.held_out]
        return TensorLoader(images, numbers, self.eval_sampler(len(numbers)))

    test_dataloader = val_dataloader
