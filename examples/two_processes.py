"""BatchFormer over two processes: with gather="all" samples attend to those of every rank, with exact gradients.

torchrun --standalone --nproc-per-node=2 examples/two_processes.py
"""

import argparse
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import batchformer
from batchformer.data.fetch import get
from batchformer.data.formats import read_fashion_mnist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four files (default: fetched)")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    arrays = read_fashion_mnist(arguments.data or get("fashion-mnist"), train=True)
    padded = F.pad(arrays.images[: arguments.images].float() / 255, (2, 2, 2, 2))
    data = TensorDataset(padded, arrays.labels[: arguments.images])
    sampler: DistributedSampler[int] = DistributedSampler(data, shuffle=True, seed=0, drop_last=True)

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, in_chans=1).to(device)
    bf = batchformer.insert(model, before="auto", gather="all")  # line 1; before DDP, so that DDP sees its parameters
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(batchformer.param_groups(model, lr=0.05), momentum=0.9)

    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        for images, labels in DataLoader(data, 32, sampler=sampler, drop_last=True):
            loss = F.cross_entropy(wrapped(images.to(device)), bf.expand(labels.to(device)))  # line 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: {dist.get_world_size()} processes, last loss {loss.item():.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
