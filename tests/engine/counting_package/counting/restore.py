"""From a run folder back to the network."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from batchformer.tasks.training.checkpoint import CheckpointFormat, DataFacts, Restored, Stored
from batchformer.tasks.training.contract import Exportable


@dataclass(frozen=True)
class CountingFacts(DataFacts):
    side: int


CHECKPOINT = CheckpointFormat("counting", CountingFacts)


def build(side: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(side**2, 32), nn.ReLU(), nn.Linear(32, 1))


def rebuild(stored: Stored) -> Restored:
    network = build(stored.facts.side)
    network.load_state_dict(stored.plain)
    return Restored(network.eval(), stored.facts, stored.settings, stored.stage)


def exportable(run: Path) -> Exportable:
    network, facts, _, _ = rebuild(CHECKPOINT.read(run))
    pictures = (torch.zeros(2, 1, facts.side, facts.side),)
    return Exportable(network, network, pictures, ("pictures",), ("numbers",), {"side": facts.side})
