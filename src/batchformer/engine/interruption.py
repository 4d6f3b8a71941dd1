"""Ctrl-C while a run trains."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

__all__ = ["Interruption"]


class Interruption(Callback):
    """Lets no Ctrl-C get lost.

    Python drops a KeyboardInterrupt that is raised inside a destructor or a callback of C code, with a line on stderr
    at most, and the run would go on. So it is noted too, and raised again at the next batch.
    """

    def __init__(self) -> None:
        self.pressed = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note Ctrl-C inside; where it does not do what Python makes it do by itself, it is left alone."""
        # Only a main thread may ask for signals.
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _press(self, *_: Any) -> None:
        self.pressed = True
        raise KeyboardInterrupt

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Raise what was lost."""
        self._raise()

    def on_validation_batch_start(self, *_: Any) -> None:
        """Raise what was lost."""
        self._raise()

    def _raise(self) -> None:
        if self.pressed:
            raise KeyboardInterrupt
