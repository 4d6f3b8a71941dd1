"""BatchFormer in an Accelerate loop: insert before prepare(), expand the labels.

python examples/accelerate_loop.py        (or: accelerate launch examples/accelerate_loop.py)
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import batchformer
from batchformer.data.fetch import get
from batchformer.data.formats import read_fashion_mnist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four files (default: fetched)")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    arrays = read_fashion_mnist(arguments.data or get("fashion-mnist"), train=True)
    padded = F.pad(arrays.images[: arguments.images].float() / 255, (2, 2, 2, 2))
    data = TensorDataset(padded, arrays.labels[: arguments.images])

    accelerator = Accelerator()
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, in_chans=1)
    bf = batchformer.insert(model, before="auto", gather="all")  # line 1; samples see those of every process
    optimizer = torch.optim.SGD(batchformer.param_groups(model, lr=0.05), momentum=0.9)
    loader = DataLoader(data, 64, shuffle=True, drop_last=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(arguments.epochs):
        wrapped.train()
        for images, labels in loader:
            loss = F.cross_entropy(wrapped(images), bf.expand(labels))  # line 2
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch}: last loss {loss.item():.3f}")
    plain = bf.remove()
    accelerator.print(f"plain network: {sum(p.numel() for p in plain.parameters()):,} parameters")


if __name__ == "__main__":
    main()
