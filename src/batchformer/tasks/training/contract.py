"""Values that pass between tasks and the engine, so that the engine knows no task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Measure:
    """A metric as tables and plots show it.

    Attributes:
        name: Name under which the task's metric computes it: ``"top1"``.
        label: Name that people read: ``"top-1"``.
        unit: ``"%"`` for a fraction in 0..1, which is shown times 100 and whose differences are percentage points; any
            other unit, such as ``"years"``, is written behind the number as it is.
        higher_is_better: Whether more is better; False for errors.
        part: Group of classes or objects that it is the primary metric of ("few-shot classes", "small objects"), for
            the picture of groups; empty for none.
    """

    name: str
    label: str
    unit: str = "%"
    higher_is_better: bool = True
    part: str = ""


@dataclass(frozen=True)
class Unit:
    """One of the things that every seed of a comparison is run on, such as a target domain or a split.

    Runs of one seed on several units are not independent: statistics average over units within a seed.

    Attributes:
        name: Name in folders and tables: letters, digits, ``_`` and ``.``; empty where the seed is all there is.
        settings: Settings of runs on this unit: ``{"data.split": 1}``.
    """

    name: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """The part of a run that a task is in.

    Attributes:
        name: One of ``Task.stages``.
        epochs: Epochs of this stage; ``None`` means all of the trainer's.
        first_epoch: Epochs of the stages before.
        start: Checkpoint that the stage starts from: the stage before, or another run; ``None`` for a first stage.
    """

    name: str
    epochs: int | None = None
    first_epoch: int = 0
    start: Path | None = None


@dataclass(frozen=True)
class ClassResult:
    """One class of the test result.

    Attributes:
        name: Name of the class.
        count: Amount of its training data; ``Task.class_count`` says of what.
        value: Value of ``Task.class_metric``, NaN where it is not defined.
    """

    name: str
    count: int
    value: float


@dataclass(frozen=True)
class Exportable:
    """The plain network of a run, for use elsewhere.

    Attributes:
        network: The network in ``eval()``, whose state dict safetensors gets.
        forward: Module that takes and returns tensors by position, which ONNX gets.
        inputs: Example inputs of ``forward``, batch first, of at least two samples.
        input_names: Name of each input.
        output_names: Name of each output of ``forward``.
        facts: Content of ``model.json``: classes, input size and normalisation, settings.
        dynamic_batch: Whether the ONNX file takes any number of samples.
        onnx_refusal: Message for the user that says why there can be no ONNX file; ``None`` where there can.
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
