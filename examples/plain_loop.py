"""BatchFormer in a plain PyTorch loop: the two lines are marked.

python examples/plain_loop.py
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import batchformer
from batchformer.data.fetch import get
from batchformer.data.formats import read_fashion_mnist


def load(folder: Path, *, train: bool, images: int) -> TensorDataset:
    arrays = read_fashion_mnist(folder, train=train)
    return TensorDataset(F.pad(arrays.images[:images].float() / 255, (2, 2, 2, 2)), arrays.labels[:images])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four files (default: fetched)")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    folder = arguments.data or get("fashion-mnist")
    torch.manual_seed(0)

    model = timm.create_model("resnet18", num_classes=10, in_chans=1)
    bf = batchformer.insert(model, before="auto")  # line 1
    print(batchformer.describe(model))
    optimizer = torch.optim.SGD(batchformer.param_groups(model, lr=0.05), momentum=0.9)

    train = DataLoader(load(folder, train=True, images=arguments.images), 64, shuffle=True, drop_last=True)
    for epoch in range(arguments.epochs):
        model.train()
        for images, labels in train:
            logits = model(images)
            loss = F.cross_entropy(logits, bf.expand(labels))  # line 2: labels for [plain; mixed]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: last loss {loss.item():.3f}")

    batchformer.remove(model)  # the plain network again, at no cost
    model.eval()
    with torch.no_grad():
        test = DataLoader(load(folder, train=False, images=arguments.images), 256)
        correct = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in test)
    print(f"test accuracy {100 * correct / len(test.dataset):.1f} %")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
