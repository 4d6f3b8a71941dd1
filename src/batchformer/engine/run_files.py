"""What a run writes into its folder, and when. Every file is whole or not there."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}")
    with scratch.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there.

    Lightning's own are written to the system's temporary folder and moved: from another file system a move is a copy,
    which a kill cuts in two.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write beside the old checkpoint, then take its place."""
        scratch = Path(path).with_name(f".{Path(path).name}")
        scratch.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)


def write_json(path: Path, content: Any) -> None:
    """The same for JSON."""
    write_text(path, json.dumps(content, indent=2) + "\n")
