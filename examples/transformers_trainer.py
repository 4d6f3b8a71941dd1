"""BatchFormer under transformers' Trainer: one line, since the model's own loss gets its labels doubled by itself.

python examples/transformers_trainer.py
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import batchformer
from batchformer.data.fetch import get
from batchformer.data.formats import read_fashion_mnist


class Clothes(Dataset[dict[str, Any]]):
    def __init__(self, folder: Path, *, train: bool, images: int) -> None:
        arrays = read_fashion_mnist(folder, train=train)
        self.images = F.pad(arrays.images[:images].float() / 255, (2, 2, 2, 2))
        self.labels = arrays.labels[:images]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four files (default: fetched)")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.data or get("fashion-mnist")
    torch.manual_seed(0)

    config = ViTConfig(
        image_size=32, patch_size=4, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)  # or .from_pretrained("google/vit-base-patch16-224", num_labels=10)
    bf = batchformer.insert(model, before="auto")  # the line; labels= of the model are doubled in training
    print(batchformer.describe(model))

    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch, num_train_epochs=arguments.epochs, per_device_train_batch_size=64, per_device_eval_batch_size=256,
            learning_rate=1e-3, save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(), logging_strategy="no", dataloader_pin_memory=False,
        )  # fmt: skip
        train = Clothes(folder, train=True, images=arguments.images)
        trainer = Trainer(model, settings, train_dataset=train)
        print(f"training loss {trainer.train().training_loss:.3f}")
        bf.remove()
        answers = trainer.predict(Clothes(folder, train=False, images=arguments.images))
    correct = answers.predictions.argmax(1) == answers.label_ids
    print(f"test accuracy {100 * correct.mean():.1f} %")


if __name__ == "__main__":
    main()
