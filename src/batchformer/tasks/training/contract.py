"""What the engine needs of a task, so that it trains, compares, exports and predicts without knowing which one it is.

A task named ``x`` is a folder ``tasks/x`` and a line in ``engine/config.TASKS`` with two classes:

- the LightningModule, a :class:`TaskModule`. Its constructor takes ``seed: int`` and ``batchformer:
  BatchFormerSettings``; all arms of a comparison start from the same network and draw the same dropout where they have
  the same layers.
- the LightningDataModule. Its constructor takes ``seed: int``; its batches depend on the seed and the epoch alone. It
  shards over ranks by itself. It may test on several loaders: what the task logs as ``test_AP`` and
  ``test_unseen_AP`` stands as ``AP`` and ``unseen_AP`` in the result.

The run folder is ``trainer.default_root_dir``. A task may add files there: ``predictions.json``, and pictures as
``pictures/<name>.png``, of which a report shows those with the same name in several arms side by side, behind
``pictures/given/<name>.png``: what is the same in every arm. They belong to :meth:`on_test_epoch_end` and are written
by rank 0 alone.

``tasks/x/restore.py`` has ``exportable(run: Path) -> Exportable``; ``tasks/x/predict.py`` has
``predict(run: Path, images: Sequence[Path], out: Path, *, threshold: float = ...) -> list[Path]`` (the files written).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from .settings import BatchFormerSettings


@dataclass(frozen=True)
class ClassResult:
    """One class of the test result.

    Attributes:
        name: Of the class.
        count: How much the training data has of it; ``TaskModule.class_count`` says of what.
        value: ``TaskModule.class_metric`` as a fraction in 0..1, NaN where it is not defined.
    """

    name: str
    count: int
    value: float


@runtime_checkable
class TaskModule(Protocol):
    """A LightningModule that the engine can run.

    It logs ``train_loss``, ``val_<metric>`` (the primary one among them) and ``test_<metric>``: fractions in 0..1, NaN
    where there is nothing to measure.

    Attributes:
        primary: The test metric of a comparison's verdict, named before any run: ``"top1"``, ``"AP"``, ``"PQ"``.
        class_metric: What ``ClassResult.value`` is: ``"accuracy"``, ``"AP"``, ``"PQ"``.
        class_count: What ``ClassResult.count`` counts: ``"training images"``, ``"training boxes"``.
        seed: Of the run.
        plug_in: The module and the arm.
        network: With the module in it; ``None`` before ``setup()``.
        test_seconds: Spent on the forward passes of the test.
        test_images: That the test has seen.
    """

    primary: ClassVar[str]
    class_metric: ClassVar[str]
    class_count: ClassVar[str]
    seed: int
    plug_in: BatchFormerSettings
    network: nn.Module | None
    test_seconds: float
    test_images: int

    def class_results(self) -> list[ClassResult]:
        """Each class after the test."""
        ...

    def notes(self) -> list[str]:
        """Sentences for the run's record after the test: what trains and what is frozen, what was left out."""
        ...

    @staticmethod
    def not_comparable(setting: Callable[[str], Any]) -> str | None:
        """Why the arms of a comparison would all be alike with these settings; ``None`` where they differ.

        Args:
            setting: Gives the value of a key such as ``"model.stage.second"`` as recipe and overrides say it, ``None``
                where they are silent.
        """
        ...


@dataclass(frozen=True)
class Exportable:
    """The plain network of a run, for use elsewhere.

    Attributes:
        network: In ``eval()``; its state dict is what safetensors gets.
        forward: Takes and returns tensors by position; what ONNX gets.
        inputs: Examples for ``forward``, batch first, of at least two samples.
        input_names: One for each.
        output_names: Of what ``forward`` returns.
        facts: For ``model.json``: classes, input size and normalisation, settings.
        dynamic_batch: Whether the ONNX file takes any number of samples.
        onnx_refusal: Why there can be no ONNX file, as a message for the user; ``None`` where there can.
        more: Writes further files into the folder, such as transformers' ``config.json``, and returns their paths.
    """

    network: nn.Module
    forward: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    dynamic_batch: bool = True
    onnx_refusal: str | None = None
    more: Callable[[Path], Sequence[Path]] | None = None
