"""Checkpoints that are whole or not there."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from batchformer.data.atomic import atomic_file


class WholeCheckpoints(TorchCheckpointIO):
    """Write checkpoints with :func:`batchformer.data.atomic.atomic_file`.

    Lightning writes its own to the system's temporary folder and moves them. From another file system a move is a copy,
    which leaves half a checkpoint when the process is killed.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint beside the old one, then put it in the old one's place."""
        with atomic_file(Path(path)) as new, new.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                # torch's archive cannot be closed when Ctrl-C came in the middle of it, and its error hides the Ctrl-C.
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise KeyboardInterrupt from None
                raise
