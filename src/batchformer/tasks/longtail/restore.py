"""From settings, or from a run folder, to a network."""

import inspect
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from batchformer.data.transforms import evaluation_rule
from batchformer.tasks.image_classification.network import ImageClassifier, train_only
from batchformer.tasks.training.contract import Exportable

from .decoupled import learn_weight_scale, retrain_classifier, tau_normalize
from .model import build_model
from .paco import PaCo
from .ride import RIDE, RoutedExperts, RoutedOutput
from .settings import NetworkSettings


@dataclass(frozen=True)
class DataFacts:
    """What a network needs to know of the data.

    Attributes:
        counts: Training images of each class.
        classes: Their names.
        groups: Class indices under "many", "medium", "few".
        in_channels: 1 or 3.
        image_size: Pixels.
        mean: Of each channel, in 0..1.
        std: Of each channel, in 0..1.
    """

    counts: list[int]
    classes: list[str]
    groups: dict[str, list[int]]
    in_channels: int
    image_size: int
    mean: list[float]
    std: list[float]

    @classmethod
    def of(cls, data: Any) -> "DataFacts":
        """Read them off a data module after its ``setup()``."""
        return cls(
            [int(n) for n in data.counts],
            list(data.classes),
            {name: [int(k) for k in members] for name, members in data.groups.items()},
            int(data.in_channels),
            int(data.image_size),
            [float(x) for x in data.mean],
            [float(x) for x in data.std],
        )


def build_network(settings: NetworkSettings, facts: DataFacts) -> ImageClassifier:
    """The plain network of a run.

    Raises:
        ValueError: For ``settings`` that this network does not take, and ``train_only`` of parts that it has not.
    """
    arguments = asdict(settings)
    more, parts, name = arguments.pop("settings"), arguments.pop("train_only"), arguments.pop("backbone")
    try:
        network = build_model(name, len(facts.counts), in_channels=facts.in_channels, **arguments, **more)
    except TypeError as error:
        if not more:
            raise
        taken = "none" if name in ("small_resnet", "resnet32") else f"arguments of timm's {name}"
        if settings.kind == "paco":
            taken = ", ".join(sorted(set(inspect.signature(PaCo).parameters) - {"backbone", "num_classes", "cosine"}))
        raise ValueError(
            f"Expected model.network.settings that this network takes ({taken}), got {', '.join(more)}: {error}."
        ) from error
    train_only(network, parts)
    return network


def second_stage(network: ImageClassifier, second: str, tau: float) -> nn.Module:
    """Prepare a trained network for its second stage.

    Raises:
        ValueError: For a stage that this kind of network has not.
    """
    if isinstance(network, PaCo):
        network = network.plain()
    if second == "crt":
        return retrain_classifier(network)
    if second == "lws":
        return learn_weight_scale(network)
    if second == "tau":
        return tau_normalize(network, tau)
    if not isinstance(network, RIDE):
        raise ValueError(f"Expected a RIDE run to start from for 'routing', got a {type(network).__name__}.")
    return RoutedExperts(network)


class Restored(NamedTuple):
    """What a run left behind: the plain network, in ``eval()``, and what it was built from."""

    network: ImageClassifier
    facts: DataFacts
    settings: NetworkSettings
    second: str | None = None


def load_network(run: str | Path) -> Restored:
    """The plain network of a run folder or checkpoint file; BatchFormer's weights are left out.

    Raises:
        FileNotFoundError: When there is no checkpoint.
        ValueError: When it is no checkpoint of a long-tailed run.
    """
    path = Path(run) / "checkpoints" / "last.ckpt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a run folder with checkpoints/last.ckpt, or a checkpoint file, got {run}.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "longtail" not in checkpoint:
        raise ValueError(f"Expected a checkpoint of a long-tailed run, got {path} without the entry 'longtail'.")
    stored = checkpoint["longtail"]
    facts = DataFacts(**stored["data"])
    settings = NetworkSettings(**{**stored["network"], "pretrained": False})
    network = _untrained(settings, facts, stored["second"])
    prefix = "network."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("batchformer.")})
    return Restored(network.eval(), facts, settings, stored["second"])


def _untrained(settings: NetworkSettings, facts: DataFacts, second: str | None) -> Any:
    network = build_network(settings, facts)
    return network if second is None else second_stage(network, second, 0.0)


def load_export(folder: str | Path) -> nn.Module:
    """The network that ``batchformer export`` wrote, with its weights.

    Args:
        folder: With ``model.safetensors`` and ``model.json``.

    Returns:
        In ``eval()``: images, (N, C, H, W) as ``model.json`` says, to logits.

    Raises:
        FileNotFoundError: When one of the files is not there.
        ImportError: When safetensors is missing.
    """
    files = [Path(folder) / name for name in ("model.json", "model.safetensors")]
    if absent := [str(path) for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"Expected {' and '.join(absent)}, but there is none. batchformer export RUN writes it."
        )
    try:
        from safetensors.torch import load_model
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'batchformer[export]'") from error
    written = json.loads(files[0].read_text(encoding="utf-8"))
    facts = DataFacts(**{one.name: written[one.name] for one in fields(DataFacts)})
    network = _untrained(NetworkSettings(**written["network"]), facts, written["second_stage"])
    network = network.plain() if isinstance(network, PaCo) else network
    load_model(network, files[1])
    return cast(nn.Module, network.eval())


class _Logits(nn.Module):
    """Logits of the plain network, (N, K), whatever the number of experts."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs = self.network(images)
        logits = outputs.logits if isinstance(outputs, RoutedOutput) else outputs
        return logits.mean(dim=1) if logits.dim() == 3 else logits


def _facts_of(settings: NetworkSettings) -> dict[str, Any]:
    """The settings that this network has a use for."""
    facts = asdict(settings)
    if settings.kind != "ride":
        del facts["experts"], facts["reduced"]
    return facts


def exportable(run: Path) -> Exportable:
    """The plain network of a run for safetensors and ONNX; of PaCo the encoder and the classifier that are tested."""
    restored, facts, settings, second = load_network(run)
    network = restored.plain() if isinstance(restored, PaCo) else restored
    refusal = None
    if isinstance(network, RoutedExperts):
        refusal = (
            "Expected a network that does the same for every image, got routed experts, which ONNX cannot say. Give "
            "--format=safetensors, or export the run of the first stage, which asks all experts."
        )
    return Exportable(
        network,
        _Logits(network).eval(),
        inputs=(torch.zeros(2, facts.in_channels, facts.image_size, facts.image_size),),
        input_names=("images",),
        output_names=("logits",),
        facts={
            "network": _facts_of(settings),
            "second_stage": second,
            **asdict(facts),
            **evaluation_rule(facts.image_size),
            "input": "(image / 255 - mean) / std",
        },
        onnx_refusal=refusal,
    )
